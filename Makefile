# Everything goes into .venv (and .venv-new, for tests with the newest transformers); each step leaves a stamp and runs
# again only when its requirements file changed.
#   make demo   fine-tune LLaVA through the packing tower on real photographs, reload it, ask about each, score it
#   make test   the test suite          make lint   ruff          make clean   remove .venv and outputs
# PYTHON=...          interpreter to build .venv with (3.10 to 3.12)
# LLAVA_NEXT_DIR=...  a clone of LLaVA-NeXT: used as the host in place of the LLaVA from PyPI
# DEMO_ARGS=..., TEST_ARGS=...  passed on

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
HOST := $(if $(LLAVA_NEXT_DIR),$(STAMPS)/next) $(STAMPS)/host
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test lint clean env
help:
	@sed -n '3,7s/^# \{0,1\}//p' Makefile

demo: $(STAMPS)/project $(STAMPS)/demo $(STAMPS)/eval $(HOST)
	$(BIN)/llava-packing demo $(DEMO_ARGS)

test: $(STAMPS)/project $(STAMPS)/demo $(STAMPS)/dev $(STAMPS)/eval $(HOST) $(NEW)/.stamps/ready
	$(BIN)/python -m pytest tests $(TEST_ARGS)
	$(NEW)/bin/python -m pytest tests -m newest $(TEST_ARGS) $(if $(TEST_ARGS),|| test $$? = 5) # 5: none selected

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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

$(STAMPS)/torch: requirements/torch.txt $(STAMPS)/venv
	@echo "[.venv] torch"
	@$(PIP) -r requirements/torch.txt
	@touch $@

$(STAMPS)/base: requirements/base.txt $(STAMPS)/torch
	@echo "[.venv] transformers and friends"
	@$(PIP) -r requirements/base.txt
	@touch $@

$(STAMPS)/deepspeed: requirements/deepspeed.txt $(STAMPS)/base
	@echo "[.venv] DeepSpeed"
	@$(PIP) --no-build-isolation -r requirements/deepspeed.txt
	@touch $@

$(STAMPS)/host: requirements/host.txt $(STAMPS)/deepspeed
	@echo "[.venv] LLaVA"
	@$(PIP) -r requirements/host.txt
	@touch $@

$(STAMPS)/next: requirements/next.txt $(STAMPS)/base
	@echo "[.venv] what LLaVA-NeXT imports"
	@$(PIP) -r requirements/next.txt
	@touch $@

$(STAMPS)/demo: requirements/demo.txt $(STAMPS)/base
	@echo "[.venv] photographs, matplotlib"
	@$(PIP) -r requirements/demo.txt
	@touch $@

$(STAMPS)/eval: requirements/eval.txt requirements/next.txt $(STAMPS)/base
	@echo "[.venv] lmms-eval"
	@$(PIP) -r requirements/eval.txt
	@touch $@

$(STAMPS)/dev: requirements/dev.txt $(STAMPS)/base
	@echo "[.venv] pytest, hypothesis, ruff"
	@$(PIP) -r requirements/dev.txt
	@touch $@

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
