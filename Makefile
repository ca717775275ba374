# relay: `make` prints this help.
#
# The only things a machine needs are Python >= 3.11, git and make; RabbitMQ is installed by `make servers` when it is
# missing (with apt-get, as root or through sudo), PostgreSQL comes with the environment.

.DEFAULT_GOAL := help
.PHONY: help venv servers test demo faults check bench manifest clean

BIN := .venv/bin
PYTHON := $(BIN)/python
# Written when the environment is complete, so that an interrupted `make venv` is done again.
STAMP := .venv/.installed

help:  ## print this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## make .venv and install relay and its tools into it

# A candidate is run, not only looked up: pyenv leaves shims on the PATH that fail when called.
$(STAMP): pyproject.toml
	@set -e; \
	if ! $(PYTHON) -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  for candidate in python3.13 python3.12 python3.11 python3; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then echo 'No Python >= 3.11 found: install one, e.g. apt-get install python3 python3-venv' >&2; exit 1; fi; \
	  echo "making .venv with $$found"; \
	  if ! $$found -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$found cannot make a venv: install its venv package, e.g. apt-get install python3-venv" >&2; exit 1; fi; \
	  $$found -m venv --clear .venv; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

servers: venv  ## install RabbitMQ if it is missing
	@$(PYTHON) -m relay.sandbox install

test: venv servers  ## run the tests against real, throwaway servers
	@$(PYTHON) -m pytest

demo: venv servers  ## show the whole system at work, with faults
	@$(BIN)/relay demo

PROFILE ?= smoke
faults: venv servers  ## break everything on purpose and check: PROFILE=smoke|standard|soak SEED=n POSTGRES=15|18 REPAIR=no
	@$(PYTHON) -m tests.faults $(PROFILE) $(if $(SEED),--seed $(SEED)) $(if $(POSTGRES),--postgres $(POSTGRES)) $(if $(filter no,$(REPAIR)),--no-repair) $(if $(OUT),--out $(OUT))

check: venv  ## lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: venv servers  ## measure outbox, relay and inbox on this machine
	@$(BIN)/relay bench

manifest: venv  ## write sql/manifest.txt again, after a change in sql/migrations
	@$(PYTHON) -c 'from relay.sandbox import SandboxPostgres; from relay.postgres.manifest import main; server = SandboxPostgres().start(); code = main([server.dsn()]); server.stop(); raise SystemExit(code)' > sql/manifest.txt.new
	@mv sql/manifest.txt.new sql/manifest.txt

clean:  ## remove everything that make made
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
