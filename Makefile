.PHONY: format check test test-all

format:
	python -m ruff format src tests benchmarks examples
	python -m ruff check --fix src tests benchmarks examples

check:
	python -m ruff format --check src tests benchmarks examples
	python -m ruff check src tests benchmarks examples
	python -m mypy

test:
	python -m pytest

test-all:
	python -m pytest -m "not full and not gpu and not torture"
