# Everything a person does in a checkout. `make` alone lists it.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Where to get PyTorch from, if not from the package index. On Linux x86-64 the index has the CUDA build (several GB);
# whoever wants the CPU build names its index here.
TORCH_INDEX_URL ?=
OURS := src jobs
CODE := src tests jobs serve benchmarks docs
TEST_PROCESSES ?= 2
QUICK := not slow and not cluster and not browser and not gpu and not long

.PHONY: help setup setup-dev demo test check types house imports mistakes style audit docs reference bench peers vllm test-vllm clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## install apprentice and all it needs into .venv

setup-dev: $(VENV)/.installed-dev ## the same, with what the tests and checks need

demo: setup ## the whole pipeline on a real 135M model: data, training, evaluation, serving
	@$(BIN)/apprentice quickstart

test: setup-dev ## the quick tests, TEST_PROCESSES=2 files of them at a time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder -m "$(QUICK)"

check: setup-dev ## style, types, import rules, known mistakes, lengths
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target --keep-going types house imports mistakes style

# The parts of `check`, the longest first; two run at a time.
types:
	@$(BIN)/mypy

house:
	@$(BIN)/python -m pytest -q tests/test_architecture.py

imports:
	@$(BIN)/lint-imports --no-logo

mistakes:
	@$(BIN)/bandit -q -c pyproject.toml -r $(OURS)

style:
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check $(CODE)

audit: setup-dev ## known weaknesses of what is installed (asks the advisory database, so it needs the network) and of our code
	@$(BIN)/bandit -q -c pyproject.toml -r $(OURS)
	@$(BIN)/pip-audit --strict --no-deps --disable-pip -r constraints.txt || \
	  { echo "pip-audit found weaknesses (listed above), or could not reach the advisory database: it needs the network." >&2; exit 1; }

reference: setup-dev ## docs/reference, made anew from the code
	@$(BIN)/python docs/build/reference.py

docs: setup-dev ## the documentation, strictly built into site/
	@$(BIN)/mkdocs build --quiet --strict

bench: setup-dev ## all benchmarks of speed, one JSON object a line; give them the machine alone (learning/ and checks/ are run by hand)
	@for script in $$(grep -l __main__ benchmarks/*/*.py | grep -Ev '/(learning|checks)/'); do \
	  $(BIN)/python -m $$(echo $${script%.py} | tr / .) || exit 1; done

peers: ## the other projects that the benchmarks compare with, in .venv-peers
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip --quiet --disable-pip-version-check install -r benchmarks/peers.txt

vllm: ## vLLM's CPU build beside apprentice in .venv-vllm; on Linux x86-64, PyTorch's CPU build comes as in setup
	@$(PYTHON) -m venv .venv-vllm
	@if [ -n "$(TORCH_INDEX_URL)" ]; then .venv-vllm/bin/python -m pip -q install --no-deps --index-url "$(TORCH_INDEX_URL)" torch==2.13.0; fi
	@.venv-vllm/bin/python -m pip --quiet --disable-pip-version-check install --no-deps -r benchmarks/vllm.txt -e .

test-vllm: ## the tests of the vllm engine, in that environment
	@OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -W default tests/serve/engines/test_vllm.py tests/model_pool/test_vllm_split.py

clean: ## remove the virtual environments and the tools' caches; runs stay
	@rm -rf .venv .venv-peers .venv-vllm .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis dist

# An interrupted install leaves no stamp and is taken up again; a new pin or dependency makes the stamp old.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing apprentice into $(VENV) (a few minutes the first time) …"
	@if [ -n "$(TORCH_INDEX_URL)" ]; then $(PIP) install --no-deps -c constraints.txt --index-url "$(TORCH_INDEX_URL)" torch; fi
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@$(PIP) install --upgrade --no-deps -c constraints.txt --target $(VENV)/qlora bitsandbytes # peft would import it in each process
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "apprentice needs Python 3.11 or newer, and '$(PYTHON)' is not: install one and say make PYTHON=python3.11." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "'$(PYTHON)' cannot make virtual environments: install its venv package (Debian: apt-get install python3-venv)." >&2; exit 1; }
	@command -v g++ >/dev/null || \
	  { echo "DeepSpeed compiles a small part on first use and there is no g++: install a compiler (Debian: apt-get install g++)." >&2; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
	  { echo "Python.h is missing, which DeepSpeed compiles against: install the Python headers (Debian: apt-get install python3-dev)." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
