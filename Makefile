# Everything runs in .venv; a target installs its dependencies, and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet install -c constraints.txt
CONFIG ?= configs/quickstart.yaml
SITE := PYTHONPATH=.:tests $(BIN)/python -m support.site build/docs && $(BIN)/zensical build --strict --clean

.PHONY: setup train server worker test test-slow check bench gpu docs gallery clean

train: $(VENV)/run ## grow the quickstart rack: three stacks, about three minutes
	@$(BIN)/stackwise train $(CONFIG)

server: $(VENV)/run ## run Prefect's server with its pages, on http://127.0.0.1:4200
	@$(BIN)/stackwise server

worker: $(VENV)/run ## register the deployments and execute their runs
	@$(BIN)/stackwise worker

# Two processes with one thread each: each starts a Prefect server, and more would overload a small machine.
test: $(VENV)/test ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

test-slow: $(VENV)/test ## run the tests that take minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PYTEST)

check: $(VENV)/check ## check style, types, import layers, spelling and the documentation's links
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright --level error
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/codespell
	@$(SITE)

bench: $(VENV)/bench ## run the benchmarks: JSON and a table in benchmarks/results/
	@$(BIN)/python -m benchmarks

gpu: $(VENV)/run ## download the wheels to carry to a machine with a GPU, and print the command that measures it
	@$(BIN)/python -m benchmarks.gpu.wheels

docs: $(VENV)/check ## build the documentation into site/, and run its snippets
	@$(SITE)
	@$(BIN)/python -m pytest tests/project/test_docs.py

gallery: $(VENV)/test ## train three small runs, and write their reports into docs/gallery, for the site
	@PYTHONPATH=.:tests $(BIN)/python -m support.gallery docs/gallery

setup: $(VENV)/run $(VENV)/test $(VENV)/check ## install the dependencies of these targets at once

# One stamp file per set of dependencies, so that `make train` does not install those of the tests.
$(VENV)/run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"StackWise needs Python 3.11 or newer; $(PYTHON) is {v.major}.{v.minor}. Try: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing stackwise into $(VENV) (takes some minutes, once)"
	@$(INSTALL) --upgrade pip # an old version takes twice as long
	@$(INSTALL) -e .
	@touch $@

$(VENV)/test: $(VENV)/run
	@echo "installing the dependencies of the tests"
	@$(INSTALL) -e '.[test]'
	@touch $@

$(VENV)/bench: $(VENV)/test
	@echo "installing the dependencies of the benchmarks"
	@$(INSTALL) -e '.[test,bench]'
	@touch $@ $(VENV)/test

$(VENV)/check: $(VENV)/run
	@echo "installing the dependencies of the checks"
	@$(INSTALL) -e '.[test,check]'
	@touch $@ $(VENV)/test

clean: ## remove the virtual environment; artifacts stay
	rm -rf $(VENV)
