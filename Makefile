# Each target makes its own environment: nothing is needed but Python 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test sweep check format clean

demo: $(READY)  ## optimise two trained models that ship in golden/ and print what changed
	$(BIN)/graphopt optimize golden/detector/model.onnx -o $(VENV)/detector.onnx
	$(BIN)/graphopt optimize golden/encoder/model.onnx -o $(VENV)/encoder.onnx

test: $(READY)  ## the whole test suite
	$(BIN)/pytest -n 2 -q

sweep: $(READY)  ## every ONNX backend test model and every zoo model through the default pipeline
	$(BIN)/python benchmarks/sweep.py

check: $(READY)  ## lint, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
