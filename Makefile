.PHONY: format check test test-all docs package

PYTHON_FILES = src tests benchmarks examples tools docs/tutorials

format:
	python -m ruff format $(PYTHON_FILES)
	python -m ruff check --fix $(PYTHON_FILES)

check:
	python -m ruff format --check $(PYTHON_FILES)
	python -m ruff check $(PYTHON_FILES)
	python -m mypy

test:
	python -m pytest

test-all:
	python -m pytest -m "not full and not gpu and not torture"

docs:  # RUN_TUTORIALS=false leaves their outputs out; `python -m mkdocs serve` shows changes at once
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

package:
	.ci/package
