# Everything here needs only Python and make: the virtual environment is made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test check eval clean

help:
	@echo "make demo   answer a question about a clip, with the shipped checkpoint"
	@echo "make test   lint, type check, tests"
	@echo "make eval   an environment with lmms-eval in $(EVAL)"
	@echo "make clean  remove the environments"

# The model alone.
$(VENV)/core: pyproject.toml constraints.txt
	@echo "Installing PyTorch and what reads clips into $(VENV): 260 MB to fetch, 1.2 GB on disk, some 2 minutes."
	@echo "On Linux PyPI's PyTorch brings CUDA, several GB more; without a GPU leave it out by"
	@echo "    export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

# And what checks it: transformers, Ray, matplotlib, linters.
$(VENV)/installed: $(VENV)/core
	@echo "Adding what the tests need: 0.5 GB more to fetch, 1.7 GB more on disk, some minutes."
	$(PIP) --editable '.[test,plot,ray,heif]'
	touch $@

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	@echo "Tests take about 10 minutes on 2 cores."
	$(BIN)/python -m pytest

# CHECKPOINT=folder-or-hub-id asks another model than the shipped one about the shipped clip, QUESTION=... something else.
QUESTION ?= What happens here?

demo: $(VENV)/core
ifdef CHECKPOINT
	$(BIN)/python -m omni.generate --model $(CHECKPOINT) --max-new-tokens 32 omni/demo/clip.mp4 "$(QUESTION)"
else
	$(BIN)/python -m omni.generate
endif

# lmms-eval wants torchvision, which it runs without and whose wheels bring another torch; and PyAV 15, where 18 does.
EVAL ?= .venv-eval
EVAL_PIP = $(EVAL)/bin/python -m pip install --disable-pip-version-check
eval: $(EVAL)/installed

$(EVAL)/installed: pyproject.toml constraints.txt scripts/tasks/requirements.txt
	@echo "Installing the model (260 MB to fetch) and what lmms-eval imports into $(EVAL)."
	$(PYTHON) -m venv $(EVAL)
	$(EVAL_PIP) --constraint constraints.txt --editable .
	$(EVAL_PIP) --no-deps lmms-eval==0.7.3
	$(EVAL_PIP) --constraint constraints.txt --requirement scripts/tasks/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(EVAL)
