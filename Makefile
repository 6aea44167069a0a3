# Everything here needs only Python and make: the virtual environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help demo test check eval clean

help:
	@echo "make demo   answer a question about a clip, with the shipped checkpoint"
	@echo "make test   lint, type check, tests"
	@echo "make eval   an environment with lmms-eval in $(EVAL)"
	@echo "make clean  remove the environment"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,plot,ray,heif]'
	touch $@

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

# CHECKPOINT=folder-or-hub-id asks another model than the shipped one about the shipped clip, QUESTION=... something else.
QUESTION ?= What happens here?

demo: $(VENV)/installed
ifdef CHECKPOINT
	$(BIN)/python -m omni.generate --model $(CHECKPOINT) --max-new-tokens 32 omni/demo/clip.mp4 "$(QUESTION)"
else
	$(BIN)/python -m omni.generate
endif

# lmms-eval wants torchvision, which it runs without and whose wheels bring another torch; and PyAV 15, where 18 does.
EVAL ?= .venv-eval
eval: $(EVAL)/installed

$(EVAL)/installed: pyproject.toml constraints.txt scripts/tasks/requirements.txt
	$(PYTHON) -m venv $(EVAL)
	$(EVAL)/bin/python -m pip install --quiet --constraint constraints.txt --editable .
	$(EVAL)/bin/python -m pip install --quiet --no-deps lmms-eval==0.7.3
	$(EVAL)/bin/python -m pip install --quiet --constraint constraints.txt --requirement scripts/tasks/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(EVAL)
