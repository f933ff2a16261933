# Two commands matter: `make demo` fits a mixture to Old Faithful, `make test` runs the suite.
# Both create a virtual environment in .venv first. `make test-slow` runs the tests that the suite
# leaves out: those that start or stop processes, run tutorials, train guides or networks, or fit the
# examples of others. `make docs` builds the site, `make tutorials` runs the notebooks and keeps their
# outputs, `make bench` measures an EM iteration beside its peers.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

.PHONY: demo test test-slow check wheel docs tutorials bench clean

demo: $(VENV)/.installed
	$(BIN)/python -m models.gmm

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -q --dist worksteal -m "not slow"

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -q --dist worksteal -m slow tests

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: $(VENV)/.installed-test
	$(BIN)/python .ci/wheel.py

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -q -W --keep-going -j auto -b html docs build/html
	@echo "open build/html/index.html"

tutorials: $(VENV)/.installed-test
	$(BIN)/python tutorials/execute.py

bench: $(VENV)/.installed-bench
	$(BIN)/python -m tests.benchmarks --write

# torch is installed first, and only where there is none: the user's own build is kept.
$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(VENV)/bin/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e ".[plot,data]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e ".[plot,data,graph,test,check]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e ".[plot,data,graph,docs]"
	touch $@

$(VENV)/.installed-bench: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e ".[fast,plot,data,bench]"
	touch $@

clean:
	rm -rf $(VENV) figures build dist *.egg-info
