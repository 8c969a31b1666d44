# Everything goes into .venv (and .venv-new, for tests with the newest transformers); each step leaves a stamp and runs
# again only when its requirements file changed.
#   make demo   fine-tune LLaVA through the packing tower on real photographs, reload it, ask about each, score it
#   make test   the test suite          make lint   ruff, mypy          make docs   the site, in build/site, without a warning
#   make test-long  the tests that take minutes each (marked "long"), in both environments
#   make clean  remove .venv and outputs
# PYTHON=...          interpreter to build .venv with (3.10 to 3.12)
# LLAVA_NEXT_DIR=...  a clone of LLaVA-NeXT: used as the host in place of the LLaVA from PyPI
# DEMO_ARGS=..., TEST_ARGS=...  passed on
# WORKERS=...         tests at a time; 0: one after the other, as where there is a GPU, on which some tests measure

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
SHELL := /bin/bash

VENV := .venv
STAMPS := $(VENV)/.stamps
BIN := $(VENV)/bin
NEW := .venv-new
# The requirements files name everything, dependencies included: nothing is left for pip to choose.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
WORKERS ?= $(if $(wildcard /dev/nvidia0),0,2)
# tests/conftest.py makes the groups, what shares a training in one, and puts the long ones first.
SPREAD := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
HOST := $(if $(LLAVA_NEXT_DIR),$(STAMPS)/next) $(STAMPS)/host
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-long lint docs clean env
help:
	@sed -n '3,10s/^# \{0,1\}//p' Makefile

demo: $(STAMPS)/project $(STAMPS)/demo $(STAMPS)/eval $(HOST)
	$(BIN)/llava-packing demo $(DEMO_ARGS)

# Both environments, also if the first fails; of the second, 5 says that TEST_ARGS selected none of its tests.
test test-long: $(STAMPS)/project $(STAMPS)/demo $(STAMPS)/dev $(STAMPS)/eval $(HOST) $(NEW)/.stamps/ready
	@trap 'exit 130' INT; first=0; second=0; \
	echo "[$(VENV)] all tests, $(WORKERS) at a time"; \
	$(BIN)/python -m pytest tests -m "$(LENGTH)" $(SPREAD) $(TEST_ARGS) || first=$$?; \
	echo "[$(NEW)] the tests marked newest"; \
	$(NEW)/bin/python -m pytest tests -m "newest and $(LENGTH)" $(SPREAD) $(TEST_ARGS) || second=$$?; \
	if [ $$second = 5 ] && [ -n "$(TEST_ARGS)$(filter test-long,$@)" ]; then second=0; fi; \
	echo "[$(VENV)] exit status $$first   [$(NEW)] exit status $$second"; \
	exit $$((first ? first : second))
test: LENGTH := not long
test-long: LENGTH := long

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMPS)/docs
	$(BIN)/mkdocs build --strict

env: $(STAMPS)/project $(STAMPS)/demo $(STAMPS)/dev $(STAMPS)/eval $(HOST)

clean:
	rm -rf $(VENV) $(NEW) demo_output build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(STAMPS)/venv:
	@for p in $(PYTHON) python3.11 python3.10 python3.12 python3; do \
	  if "$$p" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
	    echo "[.venv] $$("$$p" --version) ($$(command -v "$$p"))"; rm -rf $(VENV); \
	    "$$p" -m venv $(VENV) && mkdir -p $(STAMPS) && touch $@ && exit 0; exit 1; \
	  fi; \
	done; \
	echo "No Python 3.10, 3.11 or 3.12 with the venv module was found. Name one: make PYTHON=/path/to/python3.11" >&2; exit 1

LISTS := torch base deepspeed host next demo eval dev docs
$(addprefix $(STAMPS)/,$(LISTS)): $(STAMPS)/%: requirements/%.txt
	@echo "[$(VENV)] requirements/$*.txt"
	@$(PIP) $(PIP_$*) -r requirements/$*.txt
	@touch $@

# What has to be there before.
PIP_deepspeed := --no-build-isolation
PIP_eval := -r requirements/next.txt
$(STAMPS)/torch: $(STAMPS)/venv
$(STAMPS)/base: $(STAMPS)/torch
$(addprefix $(STAMPS)/,deepspeed next demo eval dev docs): $(STAMPS)/base
$(STAMPS)/host: $(STAMPS)/deepspeed
$(STAMPS)/eval: requirements/next.txt

$(STAMPS)/project: setup.cfg pyproject.toml $(STAMPS)/base
	@echo "[.venv] llava_packing_tower"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

# The second environment: the newest supported transformers, for the tests marked "newest".
$(NEW)/.stamps/ready: $(addprefix requirements/,torch.txt newest.txt demo.txt dev.txt newest_host.txt) setup.cfg pyproject.toml $(STAMPS)/venv
	@echo "[$(NEW)] torch, the newest transformers, photographs, pytest, DeepSpeed, LLaVA"
	@test -x $(NEW)/bin/python || $(BIN)/python -m venv $(NEW)
	@for list in torch newest demo dev newest_host; do \
	  $(NEW)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	    -r requirements/$$list.txt || exit 1; done
	@$(NEW)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@mkdir -p $(NEW)/.stamps && touch $@
