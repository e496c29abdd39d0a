# make help lists what there is.  Everything sets itself up: a virtual environment in .venv with the versions of
# constraints.txt, and, when root, the few Debian packages that are missing.
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup configured module native test test-cpp test-python test-exhaustive test-isa sanitize lint format demo demo-all bench bench-compare architectures peers tpu-check gpu-check gpu-wheels clean

PYTHON ?= python3
JOBS ?= $(shell nproc)
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONPATH := $(CURDIR)/python
# Tests run two by two; each with one thread, or they would fight for the cores.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) -q

READY := $(VENV)/ready-$(shell cat constraints.txt tools/setup.sh | sha256sum | cut -c1-12)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## virtual environment, pinned packages, Debian packages when missing

$(READY):
	tools/setup.sh $(PYTHON) $(VENV)
	touch $@

# What `make native` builds has the CUDA kernels wherever nvcc is; else CMake looks for a driver too.
native: CUDA := $(if $(shell command -v nvcc),-DUNSWAG_CUDA=ON)

configured: setup
	cmake --preset release -G Ninja $(CUDA) -DUNSWAG_PYTHON=ON -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python --log-level=WARNING

module: configured ## build the Python module alone
	cmake --build --preset release -j $(JOBS) --target _core

native: configured ## build the C++ library, its tests and the Python module
	cmake --build --preset release -j $(JOBS)

test: native test-cpp test-python ## all tests but the long ones

test-cpp: native ## C++ tests
	ctest --preset release -j $(JOBS)

test-python: native ## Python tests
	$(PYTEST)

test-exhaustive: native ## every value of every format: hours
	UNSWAG_EXHAUSTIVE=1 ctest --preset release
	UNSWAG_EXHAUSTIVE=1 $(PYTEST) -m 'slow or exhaustive'

test-isa: native ## the numeric Python tests with older instruction sets, 1 to 3 threads and other seeds
	JOBS=$(JOBS) tools/isa_matrix.sh

sanitize: setup ## C++ and native Python tests under the address, undefined-behaviour and thread sanitizers
	tools/sanitize.sh $(JOBS)

lint: native ## formatting, lint and types
	tools/lint.sh $(JOBS)

format: setup ## rewrite the sources in our format
	git ls-files '*.cpp' '*.hpp' '*.cu' | xargs clang-format -i
	ruff check --fix-only -q .
	ruff format .

demo: module ## memory and losses of SmolLM2 with LoRA, stock against UnSwag: table and picture in demo-out/
	python -m examples.demo

demo-all: module ## the demo with full training as well
	python -m examples.demo --all

bench: native ## the benchmarks whose results are committed
	python -m bench

bench-compare: setup ## what got faster or slower between two result files of one benchmark: A=old.json B=new.json
	python -m bench.compare $(or $(A),$(error bench-compare needs A=old.json B=new.json)) $(or $(B),$(error bench-compare needs A=old.json B=new.json))

architectures: module ## surgery on every model type of transformers, small, against stock and float64: results and docs/supported.md
	python -m bench.architectures
	python tools/supported.py > docs/supported.md

peers: module ## the tests that come with the sdist of transformers, on operated models: fetches it into build/ (half an hour)
	python -m bench.peers

tpu-check: setup ## what the TPU compiler says, without a TPU: fetches the proprietary libtpu into build/ (optional; an hour)
	python -m bench.tpu_aot --fetch

# On a machine with a GPU, with its own Python (torch, transformers, peft, nanobind), nvcc, CMake and ninja: no .venv, no network.
gpu-check: ## every kernel on this machine's GPU, in stages that can be taken up again (docs/gpu.md); STAGE=1, PYTHON=python3
	$(PYTHON) -m bench.gpu $(if $(STAGE),--stage $(STAGE))

# For Python 3.12: what such a machine may lack. All are optional there.
gpu-wheels: ## wheels for gpu-check into wheels/, to be carried to a machine without network
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d wheels \
	  $(shell grep -E '^(nanobind-backend|orjson)==' constraints.txt) liger-kernel==0.8.5

clean: ## remove what was built (not .venv)
	rm -rf build python/unswag/_core*.so python/unswag/_core.pyi
