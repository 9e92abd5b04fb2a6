# The front door. Every target creates .venv and installs what it needs.
#   make demo          distil a one-step generator of handwritten digits, and show it
#   make demo-boss     the same teacher straightened to 2, 4 and 6 steps, against reflow
#   make demo-scflow   the same teacher as one student for 1, 2, 4 and 8 steps
#   make test          every test that this machine can run
#   make bench         the operators against PyTorch eager and torch.compile
#   make lint          ruff, mypy, clang-format, import directions
#   make aot           every Triton kernel in every benchmarked shape, compiled ahead of time
#   make gpu           on a machine with an NVIDIA GPU: build, test, benchmark (DRY=1: the same on CPU)
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# Kernels for this machine's CPU alone build in a third of the time; CPU=portable is what pip builds.
CPU ?= host
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOP := $(VENV)/.develop
NATIVE_SOURCES := $(wildcard csrc/*/*) CMakeLists.txt setup.py
# A torch that is installed already is kept; else the pinned one, by name: a plain `torch` would
# fetch gigabytes of CUDA packages on a machine that has no GPU.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo demo-boss demo-scflow test bench lint aot gpu clean
help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/.torch: constraints.txt
	@echo "Creating $(VENV) and installing PyTorch"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $$(grep '^torch==' constraints.txt) 2> >(grep -v '^WARNING: Location' >&2 || true)
	@touch $@

$(INSTALLED): $(VENV)/.torch pyproject.toml $(NATIVE_SOURCES)
	@echo "Installing flowkernels and building its native library"
	@$(PIP) pybind11 cmake ninja setuptools wheel 2> >(grep -v '^WARNING: Location' >&2 || true)
	@FLOWKERNELS_CPU=$(CPU) PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e '.[train]' 2> >(grep -v '^WARNING: Location' >&2 || true)
	@touch $@

# What tests, benchmarks and linters need beyond that. By name: installing `.[dev]` would build the
# native library again.
$(DEVELOP): $(INSTALLED)
	@echo "Installing the tools of development"
	@$(PIP) $$($(BIN)/python -c "$$LIST_TOOLS") 2> >(grep -v '^WARNING: Location' >&2 || true)
	@touch $@

define LIST_TOOLS
import tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*(name for extra in ("dev", "diffusers") for name in extras.get(extra, ()) if not name.startswith("flowkernels")))
endef
export LIST_TOOLS

# Each begins with the teacher; one that is finished is not trained again.
demo: $(INSTALLED)
	@$(BIN)/flowkernels train --recipe recipes/digits-teacher.yaml
	@$(BIN)/flowkernels distill fgm --recipe recipes/digits-fgm.yaml
	@$(BIN)/flowkernels evaluate --recipe recipes/digits-evaluate.yaml

demo-boss: $(INSTALLED)
	@$(BIN)/flowkernels train --recipe recipes/digits-teacher.yaml
	@$(BIN)/flowkernels distill boss --recipe recipes/digits-boss.yaml
	@$(BIN)/flowkernels distill boss --recipe recipes/digits-reflow.yaml
	@$(BIN)/flowkernels evaluate --recipe recipes/digits-boss-evaluate.yaml

demo-scflow: $(INSTALLED)
	@$(BIN)/flowkernels train --recipe recipes/digits-teacher.yaml
	@$(BIN)/flowkernels distill scflow --recipe recipes/digits-scflow.yaml
	@$(BIN)/flowkernels evaluate --recipe recipes/digits-scflow-evaluate.yaml

# A process for each core, of one thread: threads of two that share a core wait for each other.
test: $(DEVELOP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $$(nproc) --dist loadfile
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory gpu DRY=1

bench: $(DEVELOP)
	@$(BIN)/python -m bench.run

lint: $(DEVELOP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/clang-format --dry-run --Werror csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh

aot: $(DEVELOP)
	@$(BIN)/python -m tests.checks.aot

# On a GPU machine nothing is installed: its own torch, Triton and Python are used.
gpu:
ifdef DRY
	@$(BIN)/python -m bench.gpu --dry
else
	@$(PYTHON) -m bench.gpu
endif

clean:
	rm -rf build dist flowkernels/_lib flowkernels/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache
