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

.DEFAULT_GOAL := help
.PHONY: help install install-all demo test test-fast test-hosts benchmarks bench-check bench-keep experiments experiments-small fuzz lint clean test-lowest docs

help:
	@echo "make demo        install what it needs, train a small early-exit model, draw its budget curve (DATA=folder for your images)"
	@echo "make test        install everything, run the tests and the linters"
	@echo "make test-fast   the tests that take no compiling, no other process and no long time"
	@echo "make test-hosts  run the hosts' own test files over every model of this package"
	@echo "make benchmarks  measure what docs/benchmarks.md lacks, on a quiet machine, and write it (ONLY=names FORCE=1)"
	@echo "make bench-check  measure the benchmarks' ratios again and say which got worse than kept (bench-keep keeps them)"
	@echo "make experiments run what is missing of docs/results.md, going on where it stopped (EXPERIMENTS_DATA=folder ONLY=name)"
	@echo "make fuzz        damage thousands of files of every kind, kill every writer at thirty points (long)"
	@echo "make test-lowest  the tests on the lowest versions declared (an environment of its own: .venv-lowest)"
	@echo "make docs    the documentation as a site, in site/"
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

# MMDetection's operators are compiled against the torch that is installed, before pip resolves the extras.
# They belong to this torch: after another one is installed, remove .venv/.mmcv.
$(VENV)/.mmcv: | $(VENV)/.installed
	$(BIN)/python -m exit_plugins.install_mmdet --jobs $(JOBS)
	touch $@

$(VENV)/.installed-all: pyproject.toml $(VENV)/.installed $(VENV)/.mmcv
	$(PIP) install -e ".[all]"
	$(BIN)/python -c "import exit_plugins.mmdet, mmcv.ops, mmdet, peft, transformers, onnxruntime, openvino"
	touch $@

$(VENV)/.installed-fast: pyproject.toml $(VENV)/.installed
	$(PIP) install -e ".[peft,plots,test]"
	touch $@

demo: install
	$(BIN)/python examples/demo.py --data $(DATA) --output runs/demo

# timm's and PEFT's own test files come with their source distributions, in the versions installed.
.hosts/.fetched: $(VENV)/.installed-all
	$(BIN)/python tests/hosts/fetch.py .hosts
	touch $@

# The crash tests fork, which must not happen beside the threads that other tests have left running.
test: install-all .hosts/.fetched lint
	$(BIN)/python -m pytest tests --durations=15 --ignore=tests/exits/test_crash.py --ignore=tests/exits/test_crash_training.py --ignore=tests/exits/test_files.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/exits/test_crash.py tests/exits/test_crash_training.py tests/exits/test_files.py

# Without MMDetection's compiled operators, without other processes, without what is marked slow (tests/conftest.py).
test-fast: $(VENV)/.installed-fast
	$(BIN)/python -m pytest tests -m "not slow" --durations=15

test-hosts: install-all .hosts/.fetched
	$(BIN)/python tests/hosts/run.py --all

# Half an hour on a quiet machine with two cores. FORCE=1 measures again what has a result.
FORCE ?=
benchmarks: install-all
	$(BIN)/python examples/benchmarks/measure_all.py --data $(EXPERIMENTS_DATA) --only $(ONLY) $(if $(FORCE),--force)

# Ratios measured on one thread of a quiet machine, in RATIOS; those of another machine are not compared.
RATIOS := docs/results/ratios
BENCHMARKS := forward adaptive
bench-check bench-keep: install-all
	mkdir -p runs/benchmarks $(RATIOS)
	for name in $(BENCHMARKS); do \
		$(BIN)/python examples/benchmarks/$$name.py --threads 1 --mode fused onnx --batch 1 8 \
			--json runs/benchmarks/$$name.json || exit 1; \
	done
	$(if $(findstring keep,$@),cp $(BENCHMARKS:%=runs/benchmarks/%.json) $(RATIOS),$(BIN)/python \
		examples/benchmarks/bench_check.py $(foreach name,$(BENCHMARKS),$(RATIOS)/$(name).json runs/benchmarks/$(name).json))

# JOBS runs side by side, one thread each; the small form trains on a hundredth of the data, to see that all of it runs.
experiments experiments-small: install-all
	$(BIN)/python examples/experiments/run.py --data $(EXPERIMENTS_DATA) --jobs $(JOBS) --only $(ONLY) \
		$(if $(findstring small,$@),--small)

# Two thousand damaged files of every kind, and thirty kills of every writer and of training: half an hour of processor
# time or less. TIMM_SCRIPTS=folder adds timm's train.py to what is killed.
fuzz: install-all
	$(BIN)/python tests/fuzz/fuzz.py --count 2000 --output docs/fuzz.json
	CRASH_POINTS=30 $(BIN)/python -m pytest tests/exits/test_crash.py tests/exits/test_crash_training.py

# The lowest versions pyproject.toml declares, in an environment of their own; LOWEST_PYTHON=python3.10 where it is there.
LOWEST_PYTHON ?= python3.10
test-lowest:
	$(LOWEST_PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q --upgrade pip "setuptools>=77" tomli
	.venv-lowest/bin/python tests/lowest.py plots > .venv-lowest/requirements.txt
	.venv-lowest/bin/python -m pip install -r .venv-lowest/requirements.txt "numpy<2.3" pytest hypothesis parameterized expecttest
	.venv-lowest/bin/python -m pip install --no-deps --no-build-isolation -e .
	.venv-lowest/bin/python -m pytest tests/exits tests/timm tests/cli tests/test_package.py

# Every page of docs/ as a site in site/; a link that leads nowhere is an error.
docs: install-all
	$(BIN)/python -m mkdocs build --strict

lint: install-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .hosts runs build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .mypy_cache
