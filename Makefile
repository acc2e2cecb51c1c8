# Everything here sets itself up: a virtual environment in .venv, the package, and what the command needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test soak learn check lint types imports format clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[quickstart,dev]'
	touch $(INSTALLED)

quickstart: $(INSTALLED)  ## tune a small language model from human ratings
	$(BIN)/solotune quickstart $(ARGS)

test: $(INSTALLED)  ## the whole test suite, in two processes of a thread each
	$(PYTEST) $(ARGS)

soak: $(INSTALLED)  ## fifty kills, all of the hostile files, five hundred rounds
	SOLOTUNE_SOAK=1 SOLOTUNE_KILLS=50 $(PYTEST) tests/reliability $(ARGS)

learn: $(INSTALLED)  ## every method on random walks, three seeds each; results and curves go into docs/
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/learning.py --out docs $(ARGS)

check: lint types imports

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyright

imports: $(INSTALLED)  ## who may import whom
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist
