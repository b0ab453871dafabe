# `make demo` and `make test` are the only two commands needed on a machine with Python >= 3.11.
VENV ?= .venv
# The first interpreter that runs and is new enough; override with `make PYTHON=... demo`.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := $(VENV)/bin
RUN ?= runs/demo

# A training step on a CPU maps its whole workspace anew; in huge pages (Linux, glibc) that costs
# far fewer page faults. Elsewhere the variable means nothing.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test lint evidence clean

demo: $(VENV)/.installed
	$(BIN)/python train/demo.py configs/images/demo.py --workdir $(RUN)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Re-makes docs/evidence/NAME.{json,md,png}; hours, not minutes, for some names.
evidence: $(VENV)/.installed
	$(BIN)/python train/evidence.py $(NAME) $(EVIDENCE_ARGS)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "jaxllm needs Python 3.11 or newer on PATH" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info
