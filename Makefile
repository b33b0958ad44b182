# Everything that people and CI call. Needs python3 (3.11 or newer) with pip; the rest is set up in .venv.
PYTHON ?= python3
DATA ?= data
# Test files that run at the same time. Each has servers of its own.
TESTS_AT_ONCE ?= 2
PYTEST := -m pytest -n $(TESTS_AT_ONCE) --dist loadfile
UV_VERSION := 0.13.8
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BACKENDS := .venv-backends
BACKENDS_READY := $(BACKENDS)/.ready
DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready
MKDOCS := NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs
BACKEND_TESTS := $(addprefix tests/client/test_,backends.py keras_internals.py looks.py stalls.py)
LOOP_TESTS := $(wildcard tests/client/test_torch*.py tests/client/test_tf.py)
export KERAS_BACKEND ?= jax

.PHONY: help setup demo test test-all test-backends bench lint format docs docs-serve serve requirements wheels clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: $(READY) ## make .venv with everything in it

$(READY): requirements/dev.txt pyproject.toml client/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e client -e .
	@touch $@

demo: setup ## pack real digits into DATA, serve them, train a Keras model over HTTP
	@$(BIN)/h5feed-server demo --keep $(DATA)

test: setup ## run the tests
	$(BIN)/python $(PYTEST)

test-all: test test-backends ## run all tests, those that take minutes too
	$(BIN)/python $(PYTEST) -m slow

test-backends: $(BACKENDS_READY) ## run the tests of the training loops on torch and TensorFlow too, in .venv-backends
	for backend in torch tensorflow; do \
	  echo "backend $$backend"; KERAS_BACKEND=$$backend TF_CPP_MIN_LOG_LEVEL=3 \
	  $(BACKENDS)/bin/python $(PYTEST) $(BACKEND_TESTS) || exit 1; done
	$(BACKENDS)/bin/python $(PYTEST) $(LOOP_TESTS)
	$(BACKENDS)/bin/python -m pytest tests/docs -k "torch or tensorflow"

$(BACKENDS_READY): $(READY) requirements/backends.txt
	test -x $(BACKENDS)/bin/python || $(PYTHON) -m venv $(BACKENDS)
	$(BIN)/uv pip install --quiet --python $(BACKENDS)/bin/python -r requirements/dev.txt
	$(BACKENDS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/backends.txt
	$(BIN)/uv pip install --quiet --python $(BACKENDS)/bin/python --no-deps -e client -e .
	@touch $@

bench: setup ## measure; prints a table and RATIO lines (5 minutes)
	$(BIN)/python -m benchmarks

lint: setup ## check format, style, types, and who imports whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DOCS_READY) ## build the documentation into site/; broken links and files of other hosts are errors
	$(MKDOCS) build --strict --quiet
	@! grep -rnoE '<(script|link|img|iframe)[^>]+(src|href)="?(https?:)?//[^">]+' site --include='*.html'

docs-serve: $(DOCS_READY) ## show the documentation at http://127.0.0.1:8001, rebuilt when a page changes
	$(MKDOCS) serve --dev-addr 127.0.0.1:8001

$(DOCS_READY): $(READY) requirements/docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(BIN)/uv pip install --quiet --python $(DOCS)/bin/python -r requirements/docs.txt
	@touch $@

serve: setup ## serve the HDF5 files below DATA (default: data)
	$(BIN)/h5feed-server serve $(DATA)

requirements: ## pin all dependencies anew
	test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv==$(UV_VERSION); }
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --no-emit-package h5feed pyproject.toml -o requirements/server.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --no-emit-package h5feed -c requirements/server.txt --extra demo --group dev pyproject.toml -o requirements/dev.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --group docs -o requirements/docs.txt

wheels: setup ## build both wheels into dist/
	$(BIN)/uv build --quiet --wheel --out-dir dist client
	$(BIN)/uv build --quiet --wheel --out-dir dist .

clean: ## remove the virtual environments and all caches
	rm -rf $(VENV) $(BACKENDS) $(DOCS) dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
