# One virtual environment, two sizes. `make install` is enough for the demo (minutes);
# `make install-all` adds PEFT, MMDetection with compiled ops, the exporters and the test tools (10 to 15 minutes).
# Each target does whatever set-up is missing and is quick when nothing is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
DATA ?= digits
# For the experiments: the folder with cifar100/, caltech101/, bccd/; which of them; how many side by side.
EXPERIMENTS_DATA ?= datasets
ONLY ?=
JOBS ?= 2
MMCV := onedl-mmcv==2.3.6

.DEFAULT_GOAL := help
.PHONY: help install install-all demo test test-hosts experiments experiments-small lint clean

help:
	@echo "make demo        install what it needs, train a small early-exit model, draw its budget curve (DATA=folder for your images)"
	@echo "make test        install everything, run the tests and the linters"
	@echo "make test-hosts  run the hosts' own test files over every model of this package"
	@echo "make experiments run what is missing of docs/results.md, going on where it stopped (EXPERIMENTS_DATA=folder ONLY=name)"
	@echo "make install | install-all | lint | clean"

install: $(VENV)/.installed
install-all: $(VENV)/.installed-all

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) install torch torchvision
	$(PIP) install -e ".[plots]"
	touch $@

# MMDetection's ops must be compiled against the torch that is installed, and so before pip resolves the extra:
# left to itself, pip builds mmcv in isolation, without torch, and silently without its ops.
# torch >= 2.14 needs C++20 while mmcv's build appends -std=c++17; the wrapper has the last word.
# With a GPU they are compiled for it, which takes nvcc; without nvcc the GPU is hidden, or the build would stop.
# They belong to this torch: after another one is installed, remove .venv/.mmcv.
$(VENV)/.mmcv: | $(VENV)/.installed
	$(PIP) install "setuptools>=80" wheel ninja packaging "numpy<2.3"
	printf '#!/bin/sh\nexec g++ "$$@" -std=c++20\n' > $(BIN)/g++-c++20
	chmod +x $(BIN)/g++-c++20
	command -v nvcc >/dev/null || export CUDA_VISIBLE_DEVICES=; \
	PATH="$(CURDIR)/$(BIN):$$PATH" CPPFLAGS=-g0 MAX_JOBS=$(JOBS) CXX="$(CURDIR)/$(BIN)/g++-c++20" \
		$(PIP) install --no-build-isolation --no-deps --no-cache-dir --force-reinstall $(MMCV)
	touch $@

# Two OpenCV wheels arrive and the one with a GUI, which needs libGL, would win: the headless one is laid over it last.
$(VENV)/.installed-all: pyproject.toml $(VENV)/.installed $(VENV)/.mmcv
	$(PIP) install -e ".[all]"
	$(PIP) install --force-reinstall --no-deps opencv-python-headless==4.12.0.88
	$(BIN)/python -c "import exit_plugins.mmdet, mmcv.ops, mmdet, peft, transformers, onnxruntime, openvino"
	touch $@

demo: install
	$(BIN)/python examples/demo.py --data $(DATA) --output runs/demo

# timm's and PEFT's own test files come with their source distributions, in the versions installed.
.hosts/.fetched: $(VENV)/.installed-all
	$(BIN)/python tests/hosts/fetch.py .hosts
	touch $@

test: install-all .hosts/.fetched lint
	$(BIN)/python -m pytest tests

test-hosts: install-all .hosts/.fetched
	$(BIN)/python tests/hosts/run.py --all

# JOBS runs side by side, one thread each; the small form trains on a hundredth of the data, to see that all of it runs.
experiments experiments-small: install-all
	$(BIN)/python examples/experiments/run.py --data $(EXPERIMENTS_DATA) --jobs $(JOBS) --only $(ONLY) \
		$(if $(findstring small,$@),--small)

lint: install-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .hosts runs build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
