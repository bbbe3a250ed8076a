# `make demo` and `make test` set up a virtual environment by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test mutants lint bench sass sass-diff clean

demo: $(READY)
	@$(BIN)/python -m bench.demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# make mutants [ARGS="--part today"]
mutants: $(READY)
	@$(BIN)/python -m tests.mutants $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(READY)
	@$(BIN)/python -m bench $(ARGS)

sass: $(READY)
	@$(BIN)/python -m bench.sass

# make sass-diff BASE=commit [ALL=1]
sass-diff: $(READY)
	@$(BIN)/python -m bench.sass_diff $(BASE) $(if $(ALL),--all) $(ARGS)

clean:
	rm -rf $(VENV)

$(READY): tests/requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "cute_quant needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement tests/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@
