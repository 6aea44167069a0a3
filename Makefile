# Everything here needs only Python and make: the virtual environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO = .demo

.PHONY: help demo test check clean

help:
	@echo "make demo   answer a question about a clip, with a small random checkpoint"
	@echo "make test   lint, type check, tests"
	@echo "make clean  remove the environment and the demo's files"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,plot]'
	touch $@

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) $(DEMO)
