# Everything from a fresh clone: `make demo` shows the main job, `make test` checks it.
# `make fuzz` runs many more random programs than the tests do: CALLS of the op on each backend, and of other
# kinds a share; Triton's interpreter takes most of the time. BACKEND=... runs one backend alone.
# PYTHON picks the interpreter the environment is built with, OUT the folder `make demo` writes to.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
CALLS ?= 10000
SEED ?= 0
BIN := $(VENV)/bin

.PHONY: install demo test fuzz lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar on -e '.[dev,triton]'
	touch $@

demo: install
	$(BIN)/ovq demo --out $(OUT)

test: install lint
	$(BIN)/python -m pytest -n 2 -m 'not slow' tests src/ovq

fuzz: install
	$(BIN)/python -m tests.fuzz --calls $(CALLS) --seed $(SEED) $(if $(BACKEND),--backend $(BACKEND))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OUT) .pytest_cache .ruff_cache .hypothesis
