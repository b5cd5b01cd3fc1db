# What a person types. The venv is made once and refreshed when a lock file changes; scripts/ holds the longer steps.

PYTHON ?= python3
PYTEST_ARGS ?=
# The tests mostly wait: two processes side by side take half the time.
PYTEST_PROCESSES ?= 2
BENCH_ARGS ?=
RELEASE_ARGS ?=
V ?=
LOCK_ARGS ?=
N8N_HOME ?= .n8n

VENV := .venv
BIN := $(VENV)/bin
MAKEFLAGS += --no-print-directory

.DEFAULT_GOAL := help
.NOTPARALLEL:  # `make -j test` must not run the tests beside the installation they need
.PHONY: help run test test-n8n bench env token openapi docs client screenshots version release lint format lock audit setup clean runtime dev

help:  ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /\1\t/p' Makefile | while IFS='	' read -r target text; do \
		printf '  make %-11s %s\n' "$$target" "$$text"; done

run: runtime  ## start the service for development, on http://127.0.0.1:8000 (PORT is respected)
	@DEV_MODE=true DRAIN_SECONDS=$${DRAIN_SECONDS:-2} exec $(BIN)/gunicorn wsgi:app

test: dev  ## run all checks and tests, installing what they need (PYTEST_ARGS="-k name")
	@scripts/ensure-test-tools $(VENV)
	@$(MAKE) lint
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests -n $(PYTEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-n8n: dev  ## run the tests against a real n8n, installed into .n8n (3 GB, 8 minutes; N8N_HOME=folder for another)
	@scripts/ensure-n8n "$(N8N_HOME)"
	@PATH="$(abspath $(N8N_HOME))/node24/bin:$$PATH" scripts/check-n8n-node
	@N8N_HOME="$(N8N_HOME)" PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/n8n $(PYTEST_ARGS)

bench: dev  ## measure cost, memory and latency; writes docs/performance.md (15 minutes; BENCH_ARGS="stages" for a part)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m bench $(BENCH_ARGS)

env: runtime  ## write a .env with random secrets; only the provider keys are missing
	@$(BIN)/python -m aistream.environment

token: runtime  ## print the call of /init-stream to paste, with a fresh token
	@DEV_MODE=true $(BIN)/python generate_token.py --curl

# With the defaults: nothing of this machine's .env stands in it.
openapi: runtime  ## write docs/openapi.json anew from the code's own models
	@PYTHON_DOTENV_DISABLED=true DEV_MODE=true PORT= $(BIN)/python -m aistream openapi > docs/openapi.json.new
	@mv docs/openapi.json.new docs/openapi.json

docs: openapi  ## write the pages and pictures of docs/ that are made from code
	@$(BIN)/python scripts/write-docs
	@$(BIN)/python scripts/draw-pictures

client: dev  ## build the browser's client, into clients/js/dist and for the service to serve
	@scripts/ensure-test-tools $(VENV)
	@ln -sfn ../../$(VENV)/npm/node_modules clients/js/node_modules
	@cd clients/js && PATH="$(CURDIR)/$(BIN):$$PATH" npm run --silent build -- ../../aistream/static/client

screenshots: dev  ## take the demo page's pictures for README.md anew, into docs/screenshots
	@scripts/ensure-test-tools $(VENV)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/screenshots

version:  ## list every place that says the version; V=0.2.0 sets it in all of them, and heads what CHANGELOG.md has as unreleased
	@$(PYTHON) -m scripts.release.version $(V)

release: dev  ## build wheel, npm packages and image context into dist/, install each cleanly, see it work (3 minutes; docs/releasing.md)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m scripts.release $(RELEASE_ARGS)

# What measures the service starts processes (B404, B603, B607), rolls dice for its load (B311) and asserts (B101), all on purpose.
BENCH_MAY := B101,B311,B404,B603,B607
lint: dev  ## ruff, mypy, and bandit over what runs
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/bandit --quiet --configfile pyproject.toml --recursive aistream wsgi.py gunicorn.conf.py generate_token.py
	@$(BIN)/bandit --quiet --configfile pyproject.toml --recursive bench --skip $(BENCH_MAY)

format: dev  ## let ruff format the code and fix what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# The lock files serve Python 3.11 and newer on every platform: uv resolves for all of them at once.
UV_COMPILE := $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
lock: runtime  ## write requirements*.txt anew from pyproject.toml (LOCK_ARGS=--upgrade moves the indirect ones too)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@$(UV_COMPILE) $(LOCK_ARGS) --output-file requirements.txt
	@$(UV_COMPILE) $(LOCK_ARGS) --constraint requirements.txt --group dev --output-file requirements-dev.txt

# Asks PyPI's advisories about every pinned version, and fails where it gets no answer: it needs the network, so CI does not run it.
audit: runtime  ## look for known vulnerabilities in everything that requirements*.txt pins
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	@$(BIN)/uv tool run --quiet pip-audit==2.10.1 --requirement requirements-dev.txt --disable-pip --strict

setup: dev  ## only make the venv, with everything for development

clean:  ## remove the venv and all caches; .env and .dev-secret stay
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info clients/js/dist clients/js/node_modules
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

runtime:
	@scripts/ensure-venv "$(PYTHON)" $(VENV) requirements.txt

dev:
	@scripts/ensure-venv "$(PYTHON)" $(VENV) requirements-dev.txt
