# make train   install, and train a small CAFormer on handwritten digits
# make test    install what most tests need, and run them; tests of the extras onnx, demo, prepare,
#              tpu and gpu are skipped where these are not installed
# make lint    linter, formatter and type checker
# make docs    the pages as a site, in site/index.html
# make lock    write constraints.txt anew from the newest releases
#
# PYTHON picks the interpreter for .venv, WORKDIR the run's folder, and ARGS adds to the command:
#   make train WORKDIR=runs/mine ARGS="--config.seed=1 --config.epochs=5"

PYTHON ?= python3
WORKDIR ?= runs/digits
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
DECLARED := setup.cfg pyproject.toml constraints.txt Makefile

.PHONY: train test lint docs lock clean

train: .venv/installed
	$(BIN)/python -m metaformer_jax.main --config=configs/digits.py --workdir=$(WORKDIR) $(ARGS)

test: .venv/installed-for-tests
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-for-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(\
	"error: Python 3.11 or newer is needed, got " + sys.version.split()[0] + \
	". Name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/created $(DECLARED)
	@echo "installing into .venv (a few minutes the first time) ..."
	$(PIP) --constraint constraints.txt --editable .
	@touch $@

.venv/installed-for-tests: .venv/installed
	@echo "installing what the tests need ..."
	$(PIP) --constraint constraints.txt --editable ".[torch,test,lint]"
	@touch $@

.venv/installed-for-docs: .venv/installed
	@echo "installing what the site is built with ..."
	$(PIP) --constraint constraints.txt --editable ".[docs]"
	@touch $@

# torch keeps its pin: newer releases bring gigabytes for GPUs along.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet "torch==2.13.0" --editable ".[torch,test,lint,docs]"
	.venv-lock/bin/pip freeze --exclude-editable | sed 's/^torch==.*/torch==2.13.0/' > constraints.txt
	rm -rf .venv-lock

clean:
	rm -rf .venv build dist site *.egg-info
