# make demo    trains a small Glow on handwritten digits and writes runs/demo
# make serve   a web page on this machine: the small model that comes with the package, and runs/demo if it is there
# make test    the style checks, then the tests, side by side on all cores
# make test-full       the tests that `make test` leaves out: slow ones, and those that pin the inside of what is to be replaced
# make test-machines   tests/contract, kernels, layers, models, runs and latents as other processors compute: once for each of $(MACHINES)
# make test-machines SHARES=6   each of these runs another sixth of the tests, without kernels, the command line, processes and counts of bytes
# make test-live       tests/live against anomalib, antsnormflows, coqui-tts, glasflow, jet-pytorch and ONNX's runtimes, put into build/live (360 MB)
# make mutants         mutmut changes the core's Python, and shows what no test notices; goes on where it stopped (MUTANTS_MINUTES)
# make faults          seeds the numeric faults of tests/faults.toml into a copy of csrc, and shows which the tests catch
# make docs    the pages of docs/ and the API reference as a site in build/site
# make wheel   a wheel and a source distribution in dist/; the wheel's name says which torch its kernels are compiled for
# make gpu-module   build/gpu-module/pyglow_fast/_C*.so, compiled here for a machine with a GPU and without a compiler
# make lint | format | venv | clean | help
# All of it happens in a virtual environment, $(VENV), which is made when it is missing and needs no root rights.

PYTHON ?= python3
VENV ?= .venv
# What to install as torch: TORCH='torch==2.13.0', or TORCH='torch --index-url URL' for the wheels of another index.
TORCH ?= torch>=2.11
PYTEST_ARGS ?=
MUTANTS_MINUTES ?= 60
# What gpu-module compiles for: its Python, its torch (one without CUDA will do), its GPU.
GPU_PYTHON ?= python3.12
GPU_TORCH ?= torch==2.11.*
GPU_ARCH ?= 9.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# To translate all of torch and its kin to bytecode would take the demo a minute; what it imports is translated then.
INSTALL := $(PIP) install --quiet --no-compile
NATIVE := $(shell find csrc cmake -type f)
# Tests share the cores: a worker has one thread and takes up to 1.2 GB.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
FORMATTED := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# How other processors compute, a setting at a time: MKL's, torch's and oneDNN's code, and the kernels here. The last two are
# left out where the processor has no AVX-512, since nothing changes there.
MACHINES := MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default PYGLOW_CPU=portable
ifneq ($(shell grep -sm1 -ow avx512f /proc/cpuinfo),)
MACHINES += ONEDNN_MAX_CPU_ISA=AVX2 PYGLOW_CPU=avx2
endif
SHARES ?=
# Where each setting runs a share: `make test-full` has the kernels of every instruction set; these start processes, or count bytes.
THINNED := $(addprefix --ignore=tests/,runs/test_distributed.py runs/test_plans.py \
  $(addprefix contract/test_,command_line.py launches.py memory.py page.py resume.py shown.py))

# Packages that tests/live imports single modules of, without their dependencies.
LIVE := build/live

GPU := build/gpu-module

.PHONY: venv demo serve test test-full test-machines test-live mutants faults lint format docs wheel gpu-module clean help
.DELETE_ON_ERROR:

venv: $(VENV)/.tools

# Three steps, because the package is compiled without isolation against the torch that is already there, by a setuptools
# newer than the one a fresh environment starts with. The file keeps that torch in place in the last step.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is not one. Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "1 of 3: torch into $(VENV), unless it is in pip's cache some 200 MB, or 3 GB with CUDA's libraries"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) 'setuptools>=77' wheel 'cmake>=3.24' ninja
	$(INSTALL) $(foreach word,$(TORCH),'$(word)')
	$(PIP) freeze | grep '^torch==' > $@

$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	@echo "2 of 3: the kernels are compiled (half a minute on two cores, three with CUDA), and the page's packages installed"
	$(INSTALL) --no-build-isolation --constraint $(VENV)/.torch --editable '.[web]'
	@$(BIN)/python -c 'from pyglow_fast._core import backend; print("compiled kernels:", backend.reason() or "ready")'
	@touch $@

# What checks, tests and the documentation need on top. Ninja finds nothing to compile.
$(VENV)/.tools: $(VENV)/.built
	$(INSTALL) --no-build-isolation --constraint $(VENV)/.torch --editable '.[dev,docs]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # tests start processes that write none
	@touch $@

demo: $(VENV)/.built
	@echo "3 of 3: a Glow trains on handwritten digits, for two minutes at most"
	$(BIN)/python -m pyglow_fast demo --overwrite --out runs/demo

serve: $(VENV)/.built
	$(BIN)/python -m pyglow_fast serve shown $(wildcard runs/demo)

# The checks come first, so that the suite's own summary is the last line.
test: lint
	$(PYTEST) $(PYTEST_ARGS)

test-full: venv
	$(PYTEST) --full $(PYTEST_ARGS)

# All settings run, whichever fails.
test-machines: venv
	@share=0; failed=; for machine in $(MACHINES); do \
	  share=$$((share + 1)); echo "$$machine$(if $(SHARES), share $$share of $(SHARES))"; \
	  env $$machine $(PYTEST) $(if $(SHARES),--share $$share/$(SHARES) $(THINNED)) \
	    $(addprefix tests/,contract layers models runs latents $(if $(SHARES),,kernels)) $(PYTEST_ARGS) || failed="$$failed $$machine"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

$(LIVE)/.installed: tests/live/requirements.txt | venv
	rm -rf $(LIVE)
	$(INSTALL) --no-deps --target $(LIVE) -r $<
	@touch $@

test-live: $(LIVE)/.installed
	PYTHONPATH=$(LIVE) $(PYTEST) $(PYTEST_ARGS) tests/live

mutants: venv
	timeout --signal=INT --kill-after=60 $(MUTANTS_MINUTES)m $(BIN)/mutmut run || [ $$? = 124 ]
	$(BIN)/mutmut results | grep survived || true

faults: venv
	$(BIN)/python tests/faults.py --minutes $(MUTANTS_MINUTES)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/pre-commit validate-config

format: venv
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

docs: venv
	$(BIN)/python -m mkdocs build --quiet
	@echo build/site/index.html

wheel: venv
	PYGLOW_WHEEL_LABEL=1 $(BIN)/python -m build --no-isolation --outdir dist .

gpu-module:
	$(MAKE) VENV=$(GPU)/venv PYTHON=$(GPU_PYTHON) TORCH='$(GPU_TORCH)' $(GPU)/venv/.torch
	PYGLOW_NO_EXTENSION=0 PYGLOW_CUDA=1 TORCH_CUDA_ARCH_LIST=$(GPU_ARCH) $(GPU)/venv/bin/python setup.py build_ext --build-lib $(GPU)
	PYTHONPATH=$(GPU)/pyglow_fast $(GPU)/venv/bin/python -c 'import torch, _C; print(_C.__file__, _C.build_info())'

clean:
	rm -rf build dist *.egg-info pyglow_fast/_C*.so $(VENV)/.built $(VENV)/.tools

help:
	@sed -n 's/^# make/make/p' Makefile
