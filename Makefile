# Everything from a fresh clone: `make demo` shows the main job, `make test` checks it.
# PYTHON picks the interpreter the environment is built with, OUT the folder `make demo` writes to.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
BIN := $(VENV)/bin

.PHONY: install demo test test-oldest lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar on -e '.[dev,triton]'
	touch $@

demo: install
	$(BIN)/ovq demo --out $(OUT)

test: install lint
	$(BIN)/python -m pytest -n 2 -m 'not slow' tests src/ovq

# The oldest dependencies that pyproject.toml allows; 6 GB, as old versions of torch come for GPUs alone.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --progress-bar on -e '.[dev]' -c tests/oldest.txt
	$(VENV)-oldest/bin/python -m pytest -n 2 -m 'not slow' tests src/ovq

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-oldest $(OUT) .pytest_cache .ruff_cache .hypothesis
