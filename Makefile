# `make quickstart` and `make test` need nothing but Python 3.11 and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# On a machine without a GPU a bare `torch` may bring several GB of CUDA: TORCH names what pip is to install,
# options included, e.g. make TORCH="torch==2.13.0 --index-url URL-OF-CPU-BUILDS"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-grids test-faults lint clean

quickstart: $(VENV)/installed
	$(BIN)/python pretrain/quickstart.py

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# all grids up to 8 processes, where `make test` takes a selection
test-grids: $(VENV)/installed
	$(BIN)/python -m pytest -m "" tests/distributed

# a hundred killed runs, where `make test` kills a few; and every other fault
test-faults: $(VENV)/installed
	$(BIN)/python -m pytest -m "" tests/faults tests/slurm/test_training_survives.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and alone: with it in place nothing else asks for another build
$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[hf,eval,prepare,report,logging,mpi,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
