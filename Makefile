# Everything that a fresh machine with Python 3 needs: `make demo`, `make check`, `make test`, `make perf`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
PYTEST = $(RUN) -m pytest -n auto --dist worksteal
NUMBA_OPT_MXNET ?= $(abspath $(VENV)-mxnet)/bin/python

.PHONY: test check demo perf lint types dist clean

test: $(VENV)/test.stamp lint types
	$(PYTEST)

# For use while working: the heart of the suite, within two minutes on two processors.
check: $(VENV)/test.stamp lint types
	$(PYTEST) -m "not large and not elsewhere and not gpu" tests/conformance/test_dense.py \
		$(addprefix tests/test_,$(addsuffix .py,table golden bad_input kernels machine_code))

lint: $(VENV)/test.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/test.stamp
	$(RUN) -m mypy

demo: $(VENV)/demo.stamp
	$(RUN) -m numba_opt demo

# Some 20 minutes on a machine with nothing else to do; `make perf PERF=--missing` goes on where it was ended.
perf: $(VENV)/perf.stamp $(NUMBA_OPT_MXNET)
	NUMBA_OPT_MXNET=$(NUMBA_OPT_MXNET) $(RUN) -m perf --readme $(PERF)

# MXNet wants an old NumPy, and Python 3.11 or older. Where it can't be had, it is left out of the comparison.
$(abspath $(VENV)-mxnet)/bin/python:
	$(PYTHON) -m venv $(VENV)-mxnet
	-$@ -m pip install --quiet --disable-pip-version-check --only-binary numpy numpy==1.23.5 mxnet==2.0.0b1

dist: $(VENV)/test.stamp
	$(RUN) -m build

# An environment that holds the package, in place, and the extras that a target needs.
$(VENV)/%.stamp: setup.cfg pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-mxnet build dist *.egg-info
