# Everything runs in .venv, made on first use. Needs Python 3.11 or newer, make and, for the fast CPU path, a
# C++ compiler. Another interpreter: make PYTHON=/path/to/python. More for pytest: make test ARGS="-k native -x"

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed
PIP := $(PY) -m pip --disable-pip-version-check
TORCH := torch==2.13.0
# With what the tests run on a processor without AMX.
BUILD := FASTBERT_AMX_EMULATION=ON $(PIP) install -q -e

# What to run the virtual environment's making with: the first that is new enough and can make one.
usable = command -v $(1) >/dev/null 2>&1 && $(1) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do $(call usable,$$p) && { echo $$p; break; }; done)

.PHONY: help install demo test test-slow arm sanitize bench targets lint docs clean

help:
	@echo 'make demo | test | test-slow | arm | sanitize | bench | targets | lint | docs | install | clean'

install: $(STAMP)

# torch on its own first: its version is the one the figures were measured with, and the build needs none.
$(STAMP): pyproject.toml tests/amx_emulation.cpp $(shell find csrc -type f ! -name '*.md')
	@if [ -z "$(PYTHON)" ]; then \
	  echo 'make: no Python 3.11 or newer with the modules venv and ensurepip was found (on Debian: apt install' >&2; \
	  echo 'make: python3-venv); name one with make PYTHON=/path/to/python' >&2; exit 1; fi
	@$(call usable,"$(PYTHON)") || { \
	  echo 'make: $(PYTHON) is no Python 3.11 or newer with the modules venv and ensurepip' >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo 'making $(VENV)'; "$(PYTHON)" -m venv --clear $(VENV); }
	@echo 'installing $(TORCH)'
	@$(PIP) install -q $(TORCH)
	@echo 'building and installing fastbert'
	@$(BUILD) '.[test]'
	@cd $(VENV) && bin/python -c "from fastbert import native; print(native.available() or 'native: built, ' + native.isa())"
	@touch $@

demo: $(STAMP)
	@$(PY) benchmarks/demo.py $(ARGS)

# A process for each core, each with one thread but for tests of real models (tests/conftest.py).
test: $(STAMP)
	@$(PY) -m pytest -q -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-slow: $(STAMP)
	@$(PY) -m pytest -q -m slow $(ARGS)

# The C++ row kernels for ARM, cross-compiled and run in an emulator.
arm: $(STAMP)
	@$(PY) -m pytest -q -m slow $(ARGS) tests/arm

# The C++ under sanitizers, in a build of its own; some minutes. Needs Linux, GCC and cmake.
sanitize: $(STAMP)
	@$(PY) tests/sanitize.py $(ARGS)

bench: $(STAMP)
	@$(PY) benchmarks/bench_encoder.py --quick $(ARGS)

# What must hold, against the public runtimes: half an hour on two cores. Each script says itself what it missed.
TARGETS := benchmarks/results/targets-cpu.csv
targets: $(STAMP)
	@$(BUILD) '.[peers]'
	-@$(PY) benchmarks/bench_gemm.py --output $(TARGETS)
	-@$(PY) benchmarks/bench_start.py --output $(TARGETS)
	-@$(PY) benchmarks/bench_memory.py --output $(TARGETS)
	-@$(PY) benchmarks/bench_encoder.py --targets --output $(TARGETS) $(ARGS)
	@$(PY) benchmarks/acceptance/targets.py $(TARGETS)

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

# The pages of docs/ as a site in site/; a broken link or anchor ends it (with -q mkdocs would not count them).
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --clean -f docs/mkdocs/mkdocs.yml $(ARGS)
	@echo 'site/index.html'

# Back to a fresh clone.
clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
