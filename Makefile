# make demo    set everything up and distil a one-step text-to-image generator
# make setup   the set-up alone: a virtual environment in .venv with locked versions
# make test    ruff, mypy and pytest      make lint    ruff and mypy      make clean    remove .venv and caches
# make test-nerfstudio, make test-blender    what needs nerfstudio or Blender, each in an environment below .venv
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

.PHONY: demo setup test test-nerfstudio test-blender lint clean
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

# nerfstudio sees what is in .venv already; Blender's module (370 MB, for Python 3.11) has a numpy of its own.
$(VENV)/nerfstudio/.ready: $(CHOSEN) requirements/nerfstudio.txt
	@$(BIN)/python -m venv $(@D)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/limbeck.pth"
	@$(@D)/bin/python -m pip -qq install --no-deps -r requirements/nerfstudio.txt
	@touch $@

$(VENV)/blender/.ready: $(CHOSEN)
	@$(BIN)/python -m venv $(@D)
	@$(@D)/bin/python -m pip -qq install 'bpy==5.0.1'
	@touch $@

test-nerfstudio: $(VENV)/nerfstudio/.ready
	@$(<D)/bin/python -m pytest -W ignore tests/threed/test_nerfstudio.py $(ARGS)

test-blender: $(VENV)/blender/.ready
	@BLENDER=$(<D)/bin/python $(BIN)/python -m pytest tests/threed/test_blender.py $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
