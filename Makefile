# Targets set up a virtual environment by themselves. `make VENV=/path` uses another one; PYTHON picks the interpreter.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
TESTS := tests $(wildcard plugins/*/tests)
RUN := runs/quickstart
# One thread a process: small multiplications only get slower with more, and tests run side by side.
ONE := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
JOBS ?= 2

.PHONY: help install quickstart test test-slow test-gpu test-clients benchmarks check lint format clean

help:
	@echo "make quickstart   search, fit and compare on the embedded model: minutes, nothing downloaded"
	@echo "make test         the tests; make test-slow: those that take minutes too; make test-gpu: those for CUDA"
	@echo "make test-clients installs vLLM, llama.cpp, MLX, transformers (~/.cache/qratk-clients) and tests what they serve"
	@echo "make benchmarks   speed and memory against public libraries; DATA=DIR for real models"
	@echo "make check        format, lint, types and tests, as in .ci/run"
	@echo "make format       reformat the code"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' $(addprefix -e ./,$(PLUGINS))
	@touch $@

quickstart: $(STAMP)
	$(ONE) $(BIN)/qratk search --config quickstart --run_dir $(RUN)
	$(ONE) $(BIN)/qratk fit --config $(RUN)/best.yaml --trainer.default_root_dir=$(RUN)/fit
	@$(BIN)/qratk gain $(RUN)

test: $(STAMP)
	$(ONE) $(BIN)/python -m pytest -n $(JOBS) -m "not slow and not gpu and not clients" -q $(TESTS)

test-slow: $(STAMP)
	$(ONE) $(BIN)/python -m pytest -n $(JOBS) -m "not gpu and not clients" -q $(TESTS)

test-gpu: $(STAMP)
	$(ONE) $(BIN)/python -m pytest -m gpu -q $(TESTS)

test-clients: $(STAMP)
	$(BIN)/python tests/helpers/clients/environments.py
	$(ONE) $(BIN)/python -m pytest -m clients -rs -q tests/clients

benchmarks: $(STAMP)
	$(BIN)/python benchmarks/run.py $(if $(DATA),--data $(DATA))

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy qratk

check: lint test

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
