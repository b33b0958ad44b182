# Everything that people and CI call. Needs python3 (3.11 or newer) with pip; the rest is set up in .venv.
PYTHON ?= python3
DATA ?= data
# Tests that run at the same time: one more than a machine with two cores has, because they often wait. Each worker has
# servers of its own.
TESTS_AT_ONCE ?= 3
PYTEST := -m pytest -n $(TESTS_AT_ONCE) --dist worksteal
WHOLE := -m "" --hypothesis-profile=thorough
UV_VERSION := 0.13.8
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BACKENDS := .venv-backends
BACKENDS_READY := $(BACKENDS)/.ready
DOCS := .venv-docs
DOCS_READY := $(DOCS)/.ready
ASSETS := $(CURDIR)/app/h5feed_server/api/static
MKDOCS := NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs
BACKEND_TESTS := $(addprefix tests/client/test_,\
  backends.py keras_follow.py keras_internals.py looks.py loops_of_samples.py stalls.py)
LOOP_TESTS := $(wildcard tests/client/test_torch*.py) $(addprefix tests/client/test_,encoded_files.py tf.py)
FLOORS := .venv-floors
FLOORS_READY := $(FLOORS)/.ready
# Tests of what leans on other packages: files, images, HTTP, settings, Keras, splits.
VERSION_TESTS := $(addprefix tests/server/test_,api.py by_h5py.py doors.py encoded.py filters.py openapi.py plots.py \
  read.py serving.py splits.py stats.py stream.py tracing.py) $(addprefix tests/client/test_,cli.py decode.py keras.py \
  keras_internals.py loader.py looks.py readahead.py wire.py) $(addprefix tests/builder/test_,building.py tables.py)
NEWEST_PYTHON ?= $(or $(lastword $(sort $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python3))),python3)
NEWEST := .venv-newest
NEWEST_READY := $(NEWEST)/.ready
SYSTEM := tests/system
SYSTEM_READY := $(SYSTEM)/build/.ready
PROGRAMS := $(SYSTEM)/build/programs
export KERAS_BACKEND ?= jax
# Tests and benchmarks start hundreds of processes: without bytecode, each would compile a thousand modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-all test-whole test-backends test-backends-whole test-floors test-newest setup-system \
  test-system screens bench bench-peers lint format docs docs-serve serve requirements assets wheels clean

help: ## list all targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 21

setup: $(READY) ## create .venv with both packages and all development tools

$(READY): requirements/dev.txt pyproject.toml client/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e client -e .
	@touch $@

demo: setup ## pack real digits into DATA, serve them, train a Keras model over HTTP
	@$(BIN)/h5feed-server demo --keep $(DATA)

test: setup ## run the tests that every change must pass
	$(BIN)/python $(PYTEST)

test-all: test-whole test-backends-whole test-floors test-newest ## run all tests, on both backends and on the oldest and newest versions

test-whole: setup ## run all tests, with all cases of which `test` runs a sample
	$(BIN)/python $(PYTEST) $(WHOLE)

test-backends: $(BACKENDS_READY) ## test the training loops on torch and TensorFlow, in .venv-backends
	$(call test_backends,)

test-backends-whole: $(BACKENDS_READY)
	$(call test_backends,$(WHOLE))

define test_backends
	for backend in torch tensorflow; do \
	  echo "backend $$backend"; KERAS_BACKEND=$$backend TF_CPP_MIN_LOG_LEVEL=3 \
	  $(BACKENDS)/bin/python $(PYTEST) $(1) $(BACKEND_TESTS) || exit 1; done
	$(BACKENDS)/bin/python $(PYTEST) $(1) $(LOOP_TESTS)
	$(BACKENDS)/bin/python $(PYTEST) $(1) tests/docs -k "torch or tensorflow"
endef

$(BACKENDS_READY): $(READY) requirements/backends.txt
	test -x $(BACKENDS)/bin/python || $(PYTHON) -m venv $(BACKENDS)
	$(BIN)/uv pip install --quiet --python $(BACKENDS)/bin/python -r requirements/dev.txt
	$(BACKENDS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/backends.txt
	$(BIN)/uv pip install --quiet --python $(BACKENDS)/bin/python --no-deps -e client -e .
	@touch $@

test-floors: $(FLOORS_READY) ## run tests with the oldest supported versions, in .venv-floors
	$(FLOORS)/bin/python $(PYTEST) $(VERSION_TESTS)

$(FLOORS_READY): $(READY) requirements/floors.txt
	test -x $(FLOORS)/bin/python || $(PYTHON) -m venv $(FLOORS)
	$(BIN)/uv pip install --quiet --python $(FLOORS)/bin/python -r requirements/floors.txt
	$(BIN)/uv pip install --quiet --python $(FLOORS)/bin/python --no-deps -e client -e .
	@touch $@

test-newest: $(NEWEST_READY) ## run tests with the newest Python, the newest versions and httpx2, in .venv-newest
	$(NEWEST)/bin/python $(PYTEST) $(VERSION_TESTS)

$(NEWEST_READY): $(READY) pyproject.toml client/pyproject.toml
	$(NEWEST_PYTHON) -m venv --clear $(NEWEST)
	$(BIN)/uv pip install --quiet --python $(NEWEST)/bin/python -e client -e ".[demo,parquet]" --group dev httpx2
	@touch $@

setup-system: $(SYSTEM_READY) ## install what `test-system` needs: Chromium, Prometheus, nginx, gcc, Jupyter, object stores, npm packages

$(SYSTEM_READY): $(READY) $(addprefix $(SYSTEM)/,package.json package-lock.json h5web.jsx) requirements/system.txt
	missing=; for program in chromium npm prometheus nginx gcc; do command -v $$program > /dev/null || missing="$$missing $$program"; done; \
	  command -v systemd-analyze > /dev/null || missing="$$missing systemd"; \
	  test -z "$$missing" || { apt-get update -qq && apt-get install -qqy --no-install-recommends $$missing libc6-dev; }
	npm ci --prefix $(SYSTEM) --ignore-scripts --no-audit --no-fund --silent
	npm run --prefix $(SYSTEM) --silent build
	test -x $(PROGRAMS)/bin/python || $(PYTHON) -m venv $(PROGRAMS)
	$(BIN)/uv pip install --quiet --python $(PROGRAMS)/bin/python -r requirements/system.txt
	@touch $@

test-system: setup-system ## run the tests that need them: pages in Chromium, metrics in Prometheus, reverse proxies, disks that hang
	$(BIN)/python -m pytest -m "" $(SYSTEM)

screens: setup-system ## keep screenshots of every page in screens/, and take those of the README anew
	$(BIN)/python -m tests.system.screens screens

bench: setup ## run the benchmarks; prints a table and RATIO lines (15 minutes)
	$(BIN)/python -m benchmarks

bench-peers: setup ## measure what users would pick instead of h5feed, each in an environment in .venv-peers (5 GB)
	$(BIN)/python -m benchmarks --peers

lint: setup ## check format, style, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DOCS_READY) ## build the documentation into site/; fails on broken links and on files from other hosts
	$(MKDOCS) build --strict --quiet
	@! grep -rnoE '<(script|link|img|iframe)[^>]+(src|href)="?(https?:)?//[^">]+' site --include='*.html'

docs-serve: $(DOCS_READY) ## serve the documentation at http://127.0.0.1:8001, and rebuild it when a page changes
	$(MKDOCS) serve --dev-addr 127.0.0.1:8001

$(DOCS_READY): $(READY) requirements/docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(BIN)/uv pip install --quiet --python $(DOCS)/bin/python -r requirements/docs.txt
	@touch $@

serve: setup ## serve the HDF5 files below DATA (default: data)
	$(BIN)/h5feed-server serve $(DATA)

requirements: ## pin the newest versions of all dependencies
	test -x $(BIN)/uv || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv==$(UV_VERSION); }
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --no-emit-package h5feed --extra object-store pyproject.toml -o requirements/server.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --no-emit-package h5feed -c requirements/server.txt --extra demo --extra ray --group dev --group stores --group lineage pyproject.toml \
	  -o requirements/dev.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --resolution lowest-direct --python-version 3.11 --no-header \
	  --no-annotate --no-emit-index-url --no-emit-package h5feed --extra demo --extra otel --extra parquet --extra decode \
	  --extra object-store --extra ray --extra cli --extra keras pyproject.toml client/pyproject.toml -o requirements/floors.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --no-emit-package h5feed -c requirements/floors.txt --extra demo --extra otel --extra parquet --group dev \
	  --extra object-store --extra ray pyproject.toml -o requirements/floors.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --no-emit-package h5feed -c requirements/dev.txt --extra decode --extra cli --extra keras client/pyproject.toml \
	  requirements/trainer.in -o requirements/trainer.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --group docs -o requirements/docs.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --group system -o requirements/system.txt

assets: ## unpack Swagger UI and Redoc anew, as pinned in requirements/assets.sha256
	$(eval TMP := $(shell mktemp -d))
	sed -E 's/.*  (.*)-([0-9.]+)\.tgz/\1@\2/' requirements/assets.sha256 | xargs npm pack --silent --pack-destination $(TMP)
	cd $(TMP) && sha256sum --check --quiet $(CURDIR)/requirements/assets.sha256
	for archive in $(TMP)/*.tgz; do tar -xzf $$archive -C $(TMP) --one-top-level; done
	rm -rf $(ASSETS)/swagger-ui $(ASSETS)/redoc
	mkdir $(ASSETS)/swagger-ui $(ASSETS)/redoc
	cd $(TMP)/swagger-ui-dist-*/package && cp LICENSE NOTICE favicon-32x32.png swagger-ui.css swagger-ui-bundle.js \
	  swagger-ui-bundle.js.LICENSE.txt $(ASSETS)/swagger-ui
	cd $(TMP)/redoc-*/package && cp LICENSE bundles/redoc.standalone.js $(ASSETS)/redoc
	# Its logo comes from another host.
	sed -i 's#https://cdn.redoc.ly/redoc/logo-mini[a-z-]*.svg#static/redoc-name.svg#g' $(ASSETS)/redoc/redoc.standalone.js
	! grep -o 'src:[^,]*https://[^`]*' $(ASSETS)/redoc/redoc.standalone.js
	rm -r $(TMP)

wheels: setup ## build both wheels into dist/
	$(BIN)/uv build --quiet --wheel --out-dir dist client
	$(BIN)/uv build --quiet --wheel --out-dir dist .

clean: ## remove the virtual environments and all caches
	rm -rf $(VENV) $(BACKENDS) $(FLOORS) $(NEWEST) $(DOCS) .venv-peers dist site screens $(SYSTEM)/build \
	  $(SYSTEM)/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis
