# `make` lists the targets. Needs python3 (3.11 or newer) and, for Triton, a C compiler.
PYTHON ?= python3
VENV ?= .venv
VENV_MIN ?= .venv-min
# Further arguments: PYTEST_ARGS="-k fork -x", BENCH_ARGS="--only W2", PIP_ARGS="--index-url ..."
PYTEST_ARGS ?=
BENCH_ARGS ?=
WORKERS ?= 2
PIP_ARGS ?=

TORCH := $(shell grep '^torch==' constraints.txt)
BIN := $(VENV)/bin
comma := ,
BENCHMARKS := $(wildcard benchmarks/memory.py benchmarks/cpu_generate.py)

.DEFAULT_GOAL := help
.PHONY: help venv weights test test-min test-gpu demo check bench bench-gpu models clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv: $(VENV)/.installed  ## virtual environment with pinned dependencies

weights: $(VENV)/.installed  ## SmolLM2-135M-Instruct in the user's cache folder, prepared once
	@$(BIN)/python examples/weights.py

test: weights  ## tests on CPU with the newest transformers
	$(BIN)/python -m pytest -n $(WORKERS) -m "not gpu and not slow" $(PYTEST_ARGS)

test-min: weights $(VENV_MIN)/.installed  ## core tests with the oldest supported transformers
	$(VENV_MIN)/bin/python -m pytest -n $(WORKERS) -m "core and not gpu and not slow" $(PYTEST_ARGS)

test-gpu:  ## GPU tests in the current environment, which needs torch with CUDA and pytest
	$(PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

demo: weights  ## one question, many branches, on real weights
	@$(BIN)/python examples/self_consistency.py

check: $(VENV)/.installed  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: weights  ## benchmarks that run on a CPU
	@for script in $(BENCHMARKS); do echo "==> $$script"; $(BIN)/python $$script || exit 1; done

bench-gpu:  ## benchmark of the kernel on a GPU, in an environment as for test-gpu; 6 minutes
	$(PYTHON) benchmarks/kernel.py $(BENCH_ARGS)

models: $(VENV)/.installed  ## docs/models.md: which models of transformers run, and how; 3 minutes
	$(BIN)/python benchmarks/model_coverage.py
	TRITON_INTERPRET=1 $(BIN)/python benchmarks/kernel_coverage.py --save

clean:  ## everything that make and the tools left here; the weights stay
	rm -rf $(VENV) $(VENV_MIN) .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: constraints.txt pyproject.toml
	$(call install,$(VENV),constraints.txt,dev$(comma)demo)

$(VENV_MIN)/.installed: constraints-min.txt pyproject.toml
	$(call install,$(VENV_MIN),constraints-min.txt,test$(comma)quantised)

# $(call install,folder,constraints,extras)
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hf_tree_cache needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; } >&2
	@echo "==> $(1): new virtual environment"
	@$(PYTHON) -m venv $(1)
	@echo "==> $(1): installing $(TORCH) (a large download the first time)"
	@$(1)/bin/python -m pip install -qq $(PIP_ARGS) "$(TORCH)" || { \
	  echo "pip could not install $(TORCH) here (see above). It is only what we test with: in an"; \
	  echo "environment with any torch>=2.11, run pip install -e '.[dev,demo]' and use"; \
	  echo "python -m pytest -m 'not gpu and not slow' or python examples/self_consistency.py."; \
	  exit 1; } >&2
	@echo "==> $(1): installing hf_tree_cache[$(3)] with $(2)"
	@$(1)/bin/python -m pip install -qq $(PIP_ARGS) -c $(2) -e ".[$(3)]"
	@touch $@
	@echo "==> $(1): ready"
endef
