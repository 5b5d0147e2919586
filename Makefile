# Everything runs in .venv, made on the first call; no activation needed. Another interpreter: make PYTHON=python3.13
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint typecheck format clean

demo: .venv/ready
	$(BIN)/offloop demo

test: .venv/ready-dev
	$(BIN)/python -m pytest

lint: .venv/ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

typecheck: .venv/ready-dev
	$(BIN)/mypy

format: .venv/ready-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# What builds and tools leave behind; not .venv and not runs/.
clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
