# Set-up and the jobs of this repository. `make demo` is the main one and installs what it needs.

PYTHON ?= python3
DATA ?=
BACKENDS ?= tensorflow jax torch
PYTEST_ARGS ?= -q -n auto --maxprocesses 4

# Small CPU builds. For PyTorch, point pip at an index or a folder with "+cpu" wheels
# (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS); without one, pip takes the default build.
TENSORFLOW ?= $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),tensorflow-cpu,tensorflow)
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUICK := not slow and not bench and not network and not arm

export TF_CPP_MIN_LOG_LEVEL := 3
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-arm test-no-tensorflow test-old-runtime bench bench-peers reference lint format clean

help:
	@echo "make install             the virtual environment $(VENV) with the three backends"
	@echo "make demo [DATA=x.npz]   the main job: train, quantize, export, verify"
	@echo "make test                the tests, on: $(BACKENDS)"
	@echo "make test-slow           whole models, and exactness on many random ones"
	@echo "make test-arm            exported files in the aarch64 runtime, under qemu-user"
	@echo "make test-no-tensorflow  quantize, train, export, verify where TensorFlow is not installed"
	@echo "make test-old-runtime    exported files in tflite-runtime 2.14"
	@echo "make bench               time of a training step against the float model, and of methods"
	@echo "make bench-peers         the same for other libraries, each in its environment (gigabytes)"
	@echo "make reference           docs/reference.md and docs/recipes.md, from the docstrings"
	@echo "make lint | make format  ruff"

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing keras-lowbit and three backends into $(VENV); this takes some minutes."
	@$(BIN)/python -m pip install --quiet --editable ".[dev,jax]" "$(TENSORFLOW)" "$(TORCH)"
	@touch $@

demo: install
	@KERAS_BACKEND=$${KERAS_BACKEND:-tensorflow} $(BIN)/python -m keras_lowbit.demo $(DATA)

# The first backend runs everything; the others leave out what no backend can change.
test: install
	@status=0; filter="$(QUICK)"; \
	for backend in $(BACKENDS); do \
	  echo "== backend: $$backend"; \
	  KERAS_BACKEND=$$backend $(BIN)/python -m pytest $(PYTEST_ARGS) -m "$$filter" \
	    || { status=1; failed="$$failed $$backend"; }; \
	  filter="$(QUICK) and not once"; \
	done; \
	if [ $$status -ne 0 ]; then echo "== failed on:$$failed"; fi; exit $$status

test-slow: install
	@KERAS_BACKEND=$${KERAS_BACKEND:-tensorflow} $(BIN)/python -m pytest $(PYTEST_ARGS) \
	  -m "slow and not bench and not network and not arm"

# Debian's qemu and aarch64 Python, unpacked to .arm/ (0.5 GB); nothing is installed.
test-arm: install
	@$(BIN)/python -m tests.exactness.arm
	@KERAS_BACKEND=$${KERAS_BACKEND:-tensorflow} $(BIN)/python -m pytest -q -s -m arm

# The last tflite-runtime; its wheels end at Python 3.11.
OLD := .venv-old
OLD_PYTHON ?= python3.11

$(OLD)/.installed:
	@test -x $(OLD)/bin/python || $(OLD_PYTHON) -m venv $(OLD)
	@$(OLD)/bin/python -m pip install --quiet "tflite-runtime==2.14.0" "numpy<2"
	@touch $@

test-old-runtime: install $(OLD)/.installed
	@KERAS_BACKEND=$${KERAS_BACKEND:-tensorflow} $(BIN)/python -m pytest -q -s \
	  tests/exactness/test_old_runtime.py

# JAX and PyTorch users need no TensorFlow: an environment that has none.
BARE := .venv-no-tensorflow

$(BARE)/.installed: pyproject.toml
	@test -x $(BARE)/bin/python || $(PYTHON) -m venv $(BARE)
	@$(BARE)/bin/python -m pip install --quiet --editable ".[jax,tflite]" "$(TORCH)"
	@touch $@

test-no-tensorflow: $(BARE)/.installed
	@! $(BARE)/bin/python -c "import tensorflow" 2>/dev/null \
	  || { echo "TensorFlow is installed in $(BARE)"; exit 1; }
	@for backend in jax torch; do \
	  out=$$(mktemp -d) && echo "== backend: $$backend" \
	    && KERAS_BACKEND=$$backend $(BARE)/bin/python tests/no_tensorflow_job.py $$out || exit 1; \
	  rm -r $$out; \
	done

bench: install
	@for backend in $(BACKENDS); do \
	  PYTHONPATH=. KERAS_BACKEND=$$backend $(BIN)/python tests/benchmarks/training_step.py $(BENCH_ARGS) \
	    || exit 1; \
	done
	@PYTHONPATH=. KERAS_BACKEND=$${KERAS_BACKEND:-torch} $(BIN)/python \
	  tests/benchmarks/method_step.py $(METHOD_ARGS)
	@PYTHONPATH=. KERAS_BACKEND=$${KERAS_BACKEND:-tensorflow} $(BIN)/python \
	  tests/benchmarks/import_time.py
	@PYTHONPATH=. KERAS_BACKEND=$${KERAS_BACKEND:-tensorflow} $(BIN)/python \
	  tests/benchmarks/convert_cost.py

# Other libraries, with pinned versions, in .venv-peers/<name>.
bench-peers: install
	@PYTHONPATH=. KERAS_BACKEND=$${KERAS_BACKEND:-tensorflow} $(BIN)/python \
	  -m tests.benchmarks.peers.run $(PEERS_ARGS)

reference: install
	@PYTHONPATH=. KERAS_BACKEND=$${KERAS_BACKEND:-tensorflow} $(BIN)/python \
	  tests/benchmarks/write_reference.py

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLD) $(BARE) .venv-peers .arm build dist .pytest_cache .ruff_cache .jax_cache
