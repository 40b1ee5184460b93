# make setup && make demo && make test.  `make` alone lists the targets.

PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
RUN = PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

ifndef ACCELERATOR
ACCELERATOR := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
endif
ifeq ($(filter $(ACCELERATOR),cpu cuda),)
$(error ACCELERATOR=$(ACCELERATOR) is not known; use ACCELERATOR=cpu or ACCELERATOR=cuda)
endif

# Each rank has a GPU of its own. Two ranks on two cores: without OMP_NUM_THREADS every rank starts a thread per core.
NUM_RANKS ?= $(if $(filter cuda,$(ACCELERATOR)),$(shell $(VENV)/bin/python -c 'import torch; print(min(2, torch.cuda.device_count()) or 1)'),2)
TORCHRUN = $(RUN) OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node $(NUM_RANKS) -m

CONSTRAINTS = requirements/constraints-$(ACCELERATOR).txt
# The set-up is done when the stamp of exactly these pins exists; then it costs one look at the file system.
STAMP := $(VENV)/.setup-$(ACCELERATOR)-$(shell cat pyproject.toml requirements/*.txt | cksum | cut -d' ' -f1)

# torch's CPU build carries "+cpu" in its version on Linux and is the only build on macOS.
TORCH_PIN := $(shell grep '^torch==' requirements/constraints-cpu.txt)
TORCH_CPU := $(TORCH_PIN)$(if $(filter Linux,$(shell uname -s)),+cpu)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help setup doctor demo compare test test-slow test-gpu test-slurm test-spark test-chaos check format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'
	@echo "  builds: $(ACCELERATOR) (override with ACCELERATOR=cpu or ACCELERATOR=cuda), environment: $(VENV)"

setup: $(STAMP)  ## create .venv with the tested versions; does nothing the second time
	@echo "$(VENV) is ready ($(ACCELERATOR) builds)"

$(STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
		"the pinned set needs Python 3.11 or later, %s is %d.%d; run make setup PYTHON=python3.11" \
		% (sys.executable, v[0], v[1]))'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(MAKE) --no-print-directory install-$(ACCELERATOR) ACCELERATOR=$(ACCELERATOR)
# --no-build-isolation: the setuptools that torch brought builds muonrec, nothing more is downloaded.
	$(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e '.[data,report,compare,torchx,dev]'
	rm -f $(VENV)/.setup-*
	touch $@

# torch first and pinned: a resolver left alone picks the newest torch, which no fbgemm has been built for.
.PHONY: install-cpu install-cuda
install-cpu:
	$(PIP) install -c $(CONSTRAINTS) '$(TORCH_CPU)' 2>/dev/null \
		|| $(PIP) install -c $(CONSTRAINTS) --extra-index-url $(TORCH_CPU_INDEX) '$(TORCH_CPU)'
	$(PIP) install -c $(CONSTRAINTS) fbgemm-gpu-cpu tensordict torchmetrics tqdm pyre-extensions iopath
	$(PIP) install -c $(CONSTRAINTS) --no-deps torchrec

install-cuda:
	$(PIP) install -c $(CONSTRAINTS) torch
	$(PIP) install -c $(CONSTRAINTS) fbgemm-gpu torchrec iopath

doctor: $(STAMP)  ## say what is installed, what this machine can train, and what to mend
	$(VENV)/bin/python -m muonrec doctor

demo: $(STAMP)  ## data -> train with Muon and with AdamW on two ranks (one GPU: one) -> eval -> report, a few minutes on a CPU
	$(RUN) python -m pipeline.data configs/demo/sasrec.yaml
	$(TORCHRUN) pipeline.train configs/demo/sasrec.yaml output=out/demo/muon
	$(TORCHRUN) pipeline.train configs/demo/sasrec.yaml output=out/demo/adamw \
		dense_optimizer=adamw dense_optimizer.lr=0.003
	$(TORCHRUN) pipeline.eval out/demo/adamw
	$(TORCHRUN) pipeline.eval out/demo/muon 'compare=[out/demo/adamw]'
	@echo "report: $(CURDIR)/out/demo/muon/report.html"

compare: $(STAMP)  ## does Muon pay, in small: three arms tuned alike, two seeds, a verdict; minutes on a CPU
	$(RUN) python -m pipeline.data configs/demo/sasrec.yaml
	$(RUN) python -m pipeline.compare configs/compare/demo.yaml

# Two workers, each with ranks of its own. In one process, in the order of the files: make test WORKERS=0
WORKERS ?= 2
test: $(STAMP)  ## the tests that need no GPU and little time
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not gpu and not slurm and not spark and not chaos"

test-slow: $(STAMP)  ## the long ones
	$(RUN) python -m pytest -m "slow and not gpu and not slurm and not spark and not chaos" --timeout 900

test-gpu: $(STAMP)  ## the ones that need CUDA
	$(RUN) python -m pytest -m gpu --timeout 600

test-slurm: $(STAMP)  ## launch for real: a two-node SLURM cluster on this machine (Debian, root), and its faults
	$(RUN) OMP_NUM_THREADS=1 python -m pytest tests/slurm -m slurm --timeout 1200 --durations 0

test-spark: $(STAMP)  ## the data stage on Spark, alone and on two nodes; installs PySpark, needs Java 17
	@java -version 2>/dev/null || { echo "Spark needs Java 17: apt install openjdk-17-jre-headless"; exit 1; }
	$(PIP) install -q -c $(CONSTRAINTS) 'pyspark>=4.0'
	$(RUN) python -m pytest -m spark --timeout 900

test-chaos: $(STAMP)  ## kill ranks at random moments, damage checkpoints, count what happened (CHAOS_SEED=0)
	$(RUN) OMP_NUM_THREADS=1 python -m pytest tests/chaos -m chaos --timeout 1800

check: $(STAMP)  ## ruff, mypy and the import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(RUN) PYTHONPATH=. lint-imports

format: $(STAMP)  ## rewrite in the house style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove what the tools made; .venv and out/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
