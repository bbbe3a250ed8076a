# `make demo` and `make test` set up a virtual environment by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := .venv-docs
ENGINES := .venv-engines

.PHONY: demo test test-all test-engines fuzz mutants test-arm64 lint docs bench figures sass sass-diff clean

demo: $(READY)
	@$(BIN)/python -m bench.demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# The plug-ins, in the engines that tests/engines/requirements.txt names. About 3 GB, no GPU.
test-engines: $(ENGINES)/.ready
	PRETENDED_GPU=10.0 $(ENGINES)/bin/python -m pytest tests/engines/test_vllm.py $(ARGS)
	PRETENDED_GPU=9.0 $(ENGINES)/bin/python -m pytest tests/engines/test_vllm.py $(ARGS)
	$(ENGINES)/bin/python -m pytest tests/engines/test_sglang.py $(ARGS)

$(ENGINES)/.ready: tests/engines/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet $$(grep ^torch== tests/engines/requirements.txt)
	$(ENGINES)/bin/python -m pip install --quiet --no-deps --requirement tests/engines/requirements.txt
	$(ENGINES)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

# Random calls in the emulator until one fails: make fuzz ARGS="--seed 7"
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz $(ARGS)

# make mutants [ARGS="--part today"]
mutants: $(READY)
	@$(BIN)/python -m tests.mutants $(ARGS)

# On Debian on x86-64; see CONTRIBUTING.md.
test-arm64: $(READY)
	@$(BIN)/python -m tests.arm64

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Needs neither torch nor CuTe DSL: the reference is read from the source.
docs: $(DOCS)/.ready
	$(DOCS)/bin/mkdocs build --strict --quiet --config-file .mkdocs.yml
	@echo site/index.html

$(DOCS)/.ready: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --requirement docs/requirements.txt
	@touch $@

bench: $(READY)
	@$(BIN)/python -m bench $(ARGS)

# Pictures and marked tables of the documents, from bench/results and docs/layouts. No GPU needed.
figures: $(READY)
	@$(BIN)/python -m bench.figures

sass: $(READY)
	@$(BIN)/python -m bench.sass

# make sass-diff BASE=commit [ALL=1]
sass-diff: $(READY)
	@$(BIN)/python -m bench.sass_diff $(BASE) $(if $(ALL),--all) $(ARGS)

clean:
	rm -rf $(VENV) $(DOCS) $(ENGINES) .arm64 site

$(READY): tests/requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "cute_quant needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement tests/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@
