# Everything runs in .venv, made on the first call; no activation needed. Another interpreter: make PYTHON=python3.13
PYTHON ?= python3
BIN := .venv/bin

BUILD_PAGE := dashboard/web/build_page.py
NODE_MODULES := dashboard/web/node_modules/.package-lock.json

.PHONY: demo test lint typecheck format docs page page-dev page-test clean

# The installation has built the live page; this builds it again if a source has changed since (0.2 s if not).
demo: .venv/ready
	$(BIN)/python $(BUILD_PAGE)
	$(BIN)/offloop demo

# In as many processes as the machine has cores; one that has no more work takes some from another.
test: .venv/ready-dev
	$(BIN)/python $(BUILD_PAGE)
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: .venv/ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

typecheck: .venv/ready-dev
	$(BIN)/mypy

format: .venv/ready-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Rewrites the parts of the pages in docs/ that are made from docstrings; a test fails where they are out of date.
docs: .venv/ready-dev
	$(BIN)/python docs/make_reference.py

# The live page alone; needs Python and Node.js, no .venv.
page:
	$(PYTHON) $(BUILD_PAGE)

# Builds the live page each time a source changes, until Ctrl-C.
page-dev:
	$(PYTHON) $(BUILD_PAGE) --watch

page-test: $(NODE_MODULES)
	cd dashboard/web && npm run --silent check && npm run --silent test

# What builds and tools leave behind, the built page too (make page); not .venv and not runs/.
clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf dashboard/static dashboard/.static-* dashboard/web/node_modules
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

$(NODE_MODULES): dashboard/web/package.json dashboard/web/package-lock.json
	cd dashboard/web && npm ci --ignore-scripts --prefer-offline --no-audit --no-fund
	touch $@
