# make demo: install into .venv and run the demo. make test, make lint: what CI runs.
# .venv is made again only when pyproject.toml or constraints.txt changes.
PYTHON ?= python3
VENV   ?= .venv
CASES  ?= 10000
CORES  ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint fuzz bench wheel clean

help:
	@echo "make demo    four policies on the bundled trace: a table and two figures"
	@echo "make test    all tests"
	@echo "make lint    ruff, mypy, pyright"
	@echo "make fuzz    fast engine against step-by-step engine, CASES=$(CASES) random cases"
	@echo "make bench   how fast the simulator is"
	@echo "make wheel   dist/*.whl"
	@echo "make clean   removes .venv, caches and build leftovers, not outputs/"

$(VENV)/.created: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("error: ServeLab needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d; say make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/servelab demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n auto

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

# Each core gets its own range of cases (first, count); one failing share fails the target.
fuzz: $(VENV)/.installed-test
	@$(BIN)/python -c 'n, k = $(CASES), $(CORES); [print(n * i // k, n * (i + 1) // k - n * i // k) for i in range(k)]' \
	  | xargs -n 2 -P $(CORES) $(BIN)/python sim/tests/twins.py

bench: $(VENV)/.installed
	$(BIN)/python -m experiments.bench

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
