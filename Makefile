# `make demo` and `make test` need python3 and make; everything else they bring themselves, into $(VENV).
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python

help:
	@echo "make demo    train digits as bs=32, as 4x8 with AccumulateStep, and otherwise; a table and out/digits.png"
	@echo "make test    notebooks and package in step, notebooks run, tests pass"
	@echo "make bench   time and communication against fastai's own callback and a hand-written loop"
	@echo "make sync    export the package, clean the notebooks, write README.md from nbs/index.ipynb"

env: $(VENV)/.done
$(VENV)/.done: settings.ini setup.py pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: env
	$(PY) examples/digits.py

bench: env
	$(PY) -W ignore benchmarks/overhead.py
	$(PY) -W ignore benchmarks/communication.py

sync: env
	PATH="$(abspath $(VENV))/bin:$$PATH" bash tools/sync.sh

test: env
	PATH="$(abspath $(VENV))/bin:$$PATH" bash tools/sync.sh --check
	$(VENV)/bin/nbdev-test --n-workers 2
	$(PY) -m pytest

.PHONY: help env demo bench sync test
