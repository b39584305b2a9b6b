# The main jobs. Each creates .venv and installs what it needs on first use; a changed pyproject.toml installs again.
#   make demo    the whole system at tiny size on this machine, ending in a report
#   make test    the test suite
#   make test-oldest  the model's tests on the oldest transformers that pyproject.toml allows
#   make test-lmms    the plug-in of lmms-eval inside lmms-eval, in an environment of its own (.venv-lmms, 0.8 GB)
#   make lint    format, types, spelling and floors
#   make bench   every benchmark
#   make help    this list

BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-lmms lint bench

help:
	@sed -n 's/^#   //p' Makefile

demo: .venv/.installed
	$(BIN)/qlip demo

test: .venv/.installed-dev
	$(BIN)/pytest

OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)

test-oldest: .venv/.installed-dev
	@$(INSTALL) --no-deps --upgrade --target .venv/oldest "transformers==$(OLDEST).0"
	PYTHONPATH=.venv/oldest $(BIN)/pytest tests/models

# lmms-eval pins wandb, av and others, so it never shares an environment; torch and the rest come from .venv, unchanged.
# It uses filelock._api, which filelock 4 has not.
LMMS := .venv-lmms
LMMS_VERSION := 0.7.3

$(LMMS)/.installed: pyproject.toml | .venv/.installed-dev
	@echo "installing lmms-eval $(LMMS_VERSION) into $(LMMS) (once, a minute)"
	@rm -rf $(LMMS)
	@$(BIN)/python -m venv $(LMMS)
	@where='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  echo "import site; site.addsitedir('$$($(BIN)/python -c "$$where")')" \
	  > "$$($(LMMS)/bin/python -c "$$where")/qlip-environment.pth"
	@$(LMMS)/bin/pip install --quiet --disable-pip-version-check "lmms_eval==$(LMMS_VERSION)" "filelock<4"
	@touch $@

test-lmms: $(LMMS)/.installed
	$(LMMS)/bin/python -m pytest tests/apps/test_lmms_eval.py -n 0

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/lint-imports

bench: .venv/.installed-dev
	@status=0; for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python "$$script" || status=1; done; exit $$status

$(BIN)/pip:
	@for python in python3.11 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    exec $$python -m venv .venv; \
	  fi; \
	done; \
	echo "qlip needs Python 3.11 or newer as python3.11 or python3: install it and run make again" >&2; exit 1

.venv/.installed: pyproject.toml | $(BIN)/pip
	@echo "installing qlip into .venv (once, some minutes)"
	@$(INSTALL) --editable .
	@touch $@

.venv/.installed-dev: pyproject.toml | $(BIN)/pip
	@echo "installing qlip with the developers' tools into .venv (once, some minutes)"
	@$(INSTALL) --editable '.[dev]'
	@touch $@ .venv/.installed
