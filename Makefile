# `make demo` and `make test` need nothing but Python >= 3.11: both set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
S3_SERVER := .cache/s3-server/made-of.txt

RUN ?= runs/digits
TASK ?= examples/digits.py:task
FORGET ?= rand10=random:10:0 rand50=random:50:0 rand140=random:140:0 coherent60=cluster:60:0
METHODS ?= do_nothing,dmm,dmm_linear,dmm_datamodel,om,pgu,dmm_pgu,gradient_ascent,fine_tune
N_MODELS ?= 100
TEST_PROCESSES ?= 2

.PHONY: help demo test lint format clean

help:
	@echo "make demo    precompute, evaluate and report on the digits, in $(RUN)"
	@echo "make test    lint, then all tests and doctests"
	@echo "make lint    ruff, mypy and the import contracts"
	@echo "make format  let ruff format and repair the code"
	@echo "make clean   remove what make and the tools wrote, but no run"

demo: $(READY)
	$(BIN)/dmm precompute $(TASK) --run $(RUN)
	$(BIN)/dmm evaluate --run $(RUN) --forget $(FORGET) --methods $(METHODS) --n-models $(N_MODELS) --out $(RUN)/evaluation.json
	$(BIN)/dmm report --run $(RUN)

test: lint $(S3_SERVER)
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python >= 3.11 is needed, and '$(PYTHON)' is not: name one, as in 'make PYTHON=python3.12 test'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[examples,test]'
	touch $@

# Without a network the tests that need the server are left out, and say so.
$(S3_SERVER): tests/s3_server.txt | $(READY)
	-$(BIN)/python tests/s3_server.py

clean:
	rm -rf $(VENV) .cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find stores attribution unlearning tests examples -name __pycache__ -prune -exec rm -rf {} +
