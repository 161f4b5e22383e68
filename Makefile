# make demo | test | check | nightly. Everything runs in .venv, made on first use; PYTHON is the interpreter that makes it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Seen through a link of the package's name, so that the folder of the checkout may have any name.
TYPED := $(addprefix shardwright/,errors.py planner profiles cli)
INSTALLED := $(VENV)/.installed

.PHONY: demo test check nightly install clean

demo: $(INSTALLED)
	$(BIN)/shardwright demo

# Two processes share the tests (tests/conftest.py).
test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	mkdir -p build/types && ln -sfn ../.. build/types/shardwright
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --explicit-package-bases --follow-imports=silent $(TYPED)

nightly: $(INSTALLED)
	$(BIN)/python -m pytest -m nightly

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("shardwright needs Python 3.11 or newer; call make with PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[hf,dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
