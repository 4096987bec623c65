# make demo: install into .venv and run the demo. make test, make lint: what CI runs.
# make validate, parity, test-vllm: with a real vLLM on the CPU, in .venv-vllm.
# Environments are made again only when pyproject.toml or the constraints change.
PYTHON ?= python3
VENV   ?= .venv
CASES  ?= 10000
CORES  ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
BIN    := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN  := $(VLLM_VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint fuzz bench wheel clean validate parity ranking overhead test-vllm

help:
	@echo "make demo    four policies on the bundled trace: a table and two figures"
	@echo "make test    all tests"
	@echo "make lint    ruff, mypy, pyright"
	@echo "make fuzz    fast engine against step-by-step engine, CASES=$(CASES) random cases"
	@echo "make bench   how fast the simulator is"
	@echo "make wheel   dist/*.whl"
	@echo "make clean   removes environments, caches and build leftovers, not outputs/"
	@echo ""
	@echo "with a real vLLM on the CPU (installed into $(VLLM_VENV), 3.3 GB):"
	@echo "make validate    one trace simulated and live, side by side: a table and a figure"
	@echo "make parity      $(CASES) random workloads through vLLM's scheduler and ours"
	@echo "make ranking     do policies rank live as they do simulated? (about 10 minutes)"
	@echo "make overhead    what plugged-in policies cost per step"
	@echo "make test-vllm   the tests that need vLLM"

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

$(VLLM_VENV)/.installed: pyproject.toml validate/install.py validate/constraints.txt
	$(PYTHON) -m validate.install $(VLLM_VENV)
	@touch $@

validate: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/servelab validate

parity: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/servelab parity --seeds 0:$(CASES) --jobs $(CORES)
	$(VLLM_BIN)/servelab parity --seeds 0:$(CASES) --jobs $(CORES) --asynchronous
	$(VLLM_BIN)/servelab parity --seeds 0:$(CASES) --jobs $(CORES) --policies
	$(VLLM_BIN)/servelab parity --seeds 0:$(CASES) --jobs $(CORES) --fast

ranking: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python -m validate.ranking

overhead: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python -m validate.overhead

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python -m pytest -q -m vllm -n 2 --dist loadfile

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
