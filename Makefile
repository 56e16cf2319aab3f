# make demo           decode a batch with the bundled model, then score the model
# make test           run all tests; on another Python: make test PYTHON=python3.13
# make quick          run the quick tests: pure Python, and one placement of each mechanism (tests/quick.txt)
# make lint           check formatting and lint
# make check          check formatting, lint and types
# make bench          run the benchmarks with tiny sizes, to see that they run
# make clean          remove the virtual environments
PYTHON ?= python3

ifeq ($(PYTHON),python3)
VENV := .venv
else
VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
BIN := $(VENV)/bin

.PHONY: demo test quick lint check bench clean

demo: $(VENV)/installed
	$(BIN)/moe-jax generate --temperature 0
	$(BIN)/moe-jax selftest

test: $(VENV)/installed-test $(VENV)/gpu-compiler
	$(BIN)/python -m pytest -n auto --maxprocesses 8

quick: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --quick

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

check: lint
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/installed-bench
	for script in combine grouped_matmul moe decode schedule serve host quantization compile_time memory; do $(BIN)/python -m bench.$$script --quick || exit; done

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, as in: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-%: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

# XLA's GPU compiler needs neither a GPU nor CUDA. It has a directory of its own: inside the environment, JAX would use
# it to look for a GPU.
$(VENV)/gpu-compiler: | $(VENV)/installed
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && $(BIN)/python -m pip install --quiet \
		--no-deps --target $@ jax-cuda12-pjrt==$$version jax-cuda12-plugin==$$version

clean:
	rm -rf .venv .venv-*
