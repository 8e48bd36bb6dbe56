# Everything that a fresh machine with Python 3 needs: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: test demo lint types dist clean

test: $(VENV)/test.stamp lint types
	$(RUN) -m pytest

lint: $(VENV)/test.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/test.stamp
	$(RUN) -m mypy

demo: $(VENV)/demo.stamp
	$(RUN) -m numba_opt demo

dist: $(VENV)/test.stamp
	$(RUN) -m build

# An environment that holds the package, in place, and the extras that a target needs.
$(VENV)/%.stamp: setup.cfg pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
