# make demo | make test [PYTHON=python3.13] | make check | make goldens
PYTHON ?= python3
VENV := .venv-$(notdir $(PYTHON))
BIN := $(VENV)/bin

.PHONY: demo test check goldens clean

demo: $(VENV)/installed
	$(BIN)/moe-jax generate
	$(BIN)/moe-jax eval

test: $(VENV)/tests-installed
	$(BIN)/python -m pytest -n 2

check: $(VENV)/dev-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/tests-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/dev-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-*
