# make demo      the whole line on the bundled language model, into ./workspace
# make app       the app on ./workspace
# make test      lint and tests; test-all adds the heavy ones
# make lint      ruff, mypy, import contracts
# make clean     forget the environment and the caches (./workspace stays)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

# No test may depend on a hub that happens to be reachable.
PYTEST := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=disabled $(BIN)/python -m pytest

.PHONY: demo app test test-all lint clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/dictlearn demo

app: $(INSTALLED)
	$(BIN)/dictlearn app

test: lint
	$(PYTEST) -m "not heavy" --numprocesses logical --maxprocesses 4 --dist loadfile

# One at a time: some measure speed, or fill the memory.
test-all: test
	$(PYTEST) -m heavy

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The stamp is younger than what it was made from, so a second run installs nothing and a changed pin reinstalls.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "dictlearn needs Python 3.11 or newer, and $(PYTHON) is `$(PYTHON) -V 2>&1`: name another with make PYTHON=python3.12 $(MAKECMDGOALS)." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[app,dev,hub,s3]' --constraint constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find activation_store dictlearn app scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
