# The commands of this project. `make demo` and `make test` need nothing but Python >= 3.11 and make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin
STAMP := .venv/.setup-done
# One BLAS thread per process: two are slower wherever two processes share two cores.
export OMP_NUM_THREADS ?= 1
FAST := not slow and not gpu and not compat

.PHONY: help setup demo smoke lint test test-all compat constraints wheel

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/make \1\t\2/' | expand -t 18

setup: $(STAMP)  ## virtual environment, pinned dependencies, system libraries

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	./scripts/setup.sh .venv
	@touch $@

demo: setup  ## the main job: three treatments trained, evaluated and compared in runs/demo/report.html (20 min)
	$(BIN)/vlm4vla demo --out runs/demo

smoke: setup  ## the same with a few steps and episodes; proves the machinery, not the result (3 min)
	$(BIN)/vlm4vla demo --smoke --out runs/smoke

lint: setup  ## style, types and import direction
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

test: lint  ## lint and the fast tests
	$(BIN)/pytest -n auto -m "$(FAST)"

test-all: lint  ## lint and every test that this machine can run
	$(BIN)/pytest

compat: setup  ## other projects' packages, for the tests marked compat
	$(BIN)/pip install -q -c constraints.txt -e .[compat]
	@# openpi-client pins numpy below 2; what is used of it works with 2 as well
	$(BIN)/pip install -q --no-deps openpi-client==0.1.2

constraints:  ## pin what is installed now
	@{ echo "# Every version this project was measured with. Regenerate: make constraints"; \
	   $(BIN)/pip freeze --exclude-editable | grep -v '^#' | sed -E 's/\+[A-Za-z0-9.]+$$//'; } > constraints.tmp
	@mv constraints.tmp constraints.txt

wheel: setup  ## dist/*.whl
	$(BIN)/python -m build --wheel
