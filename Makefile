# Everything here needs only Python and make: the virtual environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO = .demo

.PHONY: help demo test check eval clean

help:
	@echo "make demo   answer a question about a clip, with a small random checkpoint"
	@echo "make test   lint, type check, tests"
	@echo "make eval   an environment with lmms-eval in $(EVAL)"
	@echo "make clean  remove the environment and the demo's files"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,plot,ray]'
	touch $@

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

# CHECKPOINT=folder-or-hub-id takes another model than the random one.
CHECKPOINT ?= $(DEMO)/random
QUESTION ?= What happens here?

demo: $(VENV)/installed $(DEMO)/random/config.json $(DEMO)/clip.mp4
	$(BIN)/python -m omni.generate --model $(CHECKPOINT) --max-new-tokens 32 $(DEMO)/clip.mp4 "$(QUESTION)"
	@echo "(The random checkpoint knows nothing: its answer is noise. CHECKPOINT=... takes a real one."
	@echo " It ran without compiling, the fastest way for a single question: to compile takes longer than to answer it.)"

$(DEMO)/random/config.json: scripts/make_checkpoint.py $(VENV)/installed
	$(BIN)/python scripts/make_checkpoint.py $(DEMO)/random

$(DEMO)/clip.mp4: scripts/make_clip.py $(VENV)/installed
	mkdir -p $(DEMO)
	$(BIN)/python scripts/make_clip.py $@

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
	rm -rf $(VENV) $(DEMO) $(EVAL)
