# syntax=docker/dockerfile:1
# The image of every stage: docker build --build-arg ACCELERATOR=cuda -t REGISTRY/muonrec:0.1.0 .
# It installs what `make setup` installs, by the same targets and constraints, without the tools for development.
# Linted in the tests; it has not been built, since there was no Docker engine where it was written.
ARG PYTHON=3.11.13-slim-bookworm

FROM python:${PYTHON} AS build
ARG ACCELERATOR=cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends make=4.3-4.1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
# The big wheels in a layer of their own, which a change of the code leaves as it is.
COPY Makefile pyproject.toml ./
COPY requirements requirements
RUN python -m venv /opt/venv \
    && make install-${ACCELERATOR} ACCELERATOR=${ACCELERATOR} VENV=/opt/venv
COPY LICENSE README.md ./
COPY muonrec muonrec
COPY pipeline pipeline
COPY components components
COPY configs configs
# --no-build-isolation: by the setuptools that torch brought, as in `make setup`.
RUN /opt/venv/bin/python -m pip install -c requirements/constraints-${ACCELERATOR}.txt --no-build-isolation \
    -e '.[data,report,compare]'

FROM python:${PYTHON}
# Volumes are made writable for this group by the components (fsGroup) and by docs/launch/train.yaml.
RUN groupadd --gid 1000 muonrec && useradd --uid 1000 --gid 1000 --create-home muonrec \
    && mkdir /data /out && chown muonrec:muonrec /data /out
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
# The second line is for NVIDIA's container runtime: the wheels bring CUDA, the node brings the driver.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
USER 1000:1000
CMD ["python", "-m", "muonrec", "doctor"]
