# make demo    set everything up and distil a one-step text-to-image generator
# make setup   the set-up alone: a virtual environment in .venv with locked versions
# make test    ruff, mypy and pytest      make lint    ruff and mypy      make clean    remove .venv and caches
# PYTHON=/path/to/python3.11 chooses the interpreter, TORCH_INDEX=URL the package index that torch comes from
# (a CPU or a CUDA build), ARGS="--set steps=50" is handed to the demo or to pytest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip -qq
TORCH := $(shell grep '^torch==' requirements/lock.txt)

# The stamp's name holds what the set-up depends on, so that a finished one is recognised at once.
sum = $(firstword $(shell $(1) | cksum))
STAMPS := $(VENV)/.ready
STAMP := $(STAMPS)-$(call sum,cat pyproject.toml setup.py requirements/lock.txt)
CHOSEN := $(STAMP)$(if $(TORCH_INDEX),-$(call sum,printf '%s' '$(TORCH_INDEX)'))

.PHONY: demo setup test lint clean
.DEFAULT_GOAL := demo

demo: setup
	@$(BIN)/limbeck run image/demo $(ARGS)

setup: $(CHOSEN)

$(CHOSEN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'limbeck needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo 'setting up $(VENV) (about a minute) ...'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -f $(STAMPS)-*
ifdef TORCH_INDEX
	@PIP_INDEX_URL='$(TORCH_INDEX)' $(PIP) install --force-reinstall --no-deps '$(TORCH)'
	@PIP_INDEX_URL='$(TORCH_INDEX)' $(PIP) install '$(TORCH)'
endif
	@$(PIP) install -c requirements/lock.txt -e '.[embedded,image,sequence,threed,video,dev]'
	@touch $(STAMP) $(CHOSEN)

lint: setup
	@$(BIN)/ruff check
	@$(BIN)/mypy

test: lint
	@$(BIN)/python -m pytest $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
