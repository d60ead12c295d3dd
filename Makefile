# Two commands do all: `make demo` and `make test`. Both make their own virtual environment first.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-peers lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m tools.demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-peers: $(VENV)/.peers
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m peers

lint: $(VENV)/.test
	$(PIP) ruff
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# open_clip_torch is installed for the vocabulary file inside it; its own requirements are not needed.
$(VENV)/.demo: requirements.txt | $(VENV)/bin/python
	$(PIP) -r requirements.txt
	$(PIP) --no-deps open_clip_torch
	touch $@

$(VENV)/.test: $(VENV)/.demo tests/requirements.txt
	$(PIP) -r tests/requirements.txt
	touch $@

$(VENV)/.peers: $(VENV)/.test tests/peers/requirements.txt
	$(PIP) -r tests/peers/requirements.txt
	touch $@
