# The verbs of CONTRIBUTING.md. Each sets up what it needs in .venv first: `make test` is all a fresh machine needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install -c constraints.txt -e
# mypy and pyright read the packages that the tests use.
EXTRAS_lint := test,lint

.PHONY: help demo test quick lint slow kinds site ci
.DEFAULT_GOAL := help

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.examples  ## set up, and train the main example with ddp on two CPU processes
	$(BIN)/plugframe run examples/image_classifier/train_lite.py --strategy=ddp --devices=2 --accelerator=cpu

test: $(VENV)/.test  ## set up, and run the tests
	$(BIN)/pytest

quick: $(VENV)/.test  ## set up, and run the tests that start no process and compile nothing
	$(BIN)/pytest -m 'not ranks and not compile and not slow and not kinds'

lint: $(VENV)/.lint  ## set up, and check types, style and layers
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

slow: $(VENV)/.test  ## run the tests that take long too, as CI does
	$(BIN)/pytest -n 0 -m slow

kinds: $(VENV)/.test  ## hold every script of tests/kinds to docs/same-numbers.md
	$(BIN)/pytest -n 0 -m kinds

site: $(VENV)/.site  ## build the site of the documentation in site/; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

ci:  ## do all that CI does, in a clean checkout
	bash .ci/run

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# Entry points are read from the installed metadata: a change of pyproject.toml installs again.
$(VENV)/.examples $(VENV)/.test $(VENV)/.lint $(VENV)/.site: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) '.[$(or $(EXTRAS_$*),$*)]'
	@touch $@
