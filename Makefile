# `make demo` and `make test` are all that a newcomer needs: each sets everything up by itself, in .venv.
#
#   make test PY=python3.12    with another Python
#   make test VENV=            in the environment that is active, whose torch (a CUDA build, say) is kept
#   make demo DEMO_ARGS="--epochs 2"

PY ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
BENCH_ARGS ?= --json
RUN ?= runs/demo

ENV := $(or $(VENV),$(shell $(PY) -c "import sys; print(sys.prefix)"))
BIN := $(if $(VENV),$(VENV)/bin,$(shell $(PY) -c "import sysconfig; print(sysconfig.get_path('scripts'))"))
PYTHON := $(if $(VENV),$(VENV)/bin/python,$(PY))
# The install is editable: lipfast/ is live; what CMake compiles or copies makes it old.
READY := $(subst $() ,\ ,$(ENV))/.lipfast
COMPILED := CMakeLists.txt pyproject.toml $(wildcard cmake/* csrc/* csrc/*/* kernels/*)

.PHONY: help demo test lint bench bench-check gpu wheels wheels-test clean
help:
	@grep -E '^#( |$$)' Makefile | head -n 5 | cut -c 3-
	@echo "targets: demo test lint bench bench-check gpu wheels wheels-test clean"

demo: $(READY)
	rm -rf "$(RUN)"
	"$(BIN)/lipfast" train interval --data digits --out "$(RUN)" $(DEMO_ARGS)
	"$(BIN)/lipfast" certify "$(RUN)" --eps 0.02 0.05 0.1
	"$(BIN)/lipfast" report "$(RUN)"

test: $(READY)
	"$(BIN)/pytest" -q $(TEST_ARGS)

lint: $(READY)-dev
	"$(BIN)/ruff" check
	"$(BIN)/ruff" format --check
	"$(BIN)/mypy"
	git ls-files -z -co --exclude-standard 'csrc/*' 'kernels/*.cu' 'kernels/*.cuh' | xargs -0r "$(BIN)/clang-format" --dry-run -Werror

# A whole run goes into bench/results/<machine>/bench.json; what BENCH_ARGS ask for, only where they say.
bench: $(READY)
	"$(PYTHON)" -m bench $(BENCH_ARGS)

# Fails when an op has lost more than 15 % against the committed results of this machine, twice in a row.
bench-check: $(READY)
	"$(PYTHON)" -m bench --check

# On a machine with a GPU, and without a network: builds, tests, sanitizes, measures.
gpu:
	bash tools/gpu.sh

# One wheel for each, into dist/: make wheels CUDA="cpu 13.0 13.x". 13.0 runs under every driver for CUDA 13.
CUDA = cpu 13.0
wheels: $(READY)
	"$(PYTHON)" tools/wheels.py $(CUDA)

# Each in a fresh environment: make wheels-test SMOKE_ARGS="--torch 2.10.0 newest"
wheels-test: $(READY)
	"$(PYTHON)" tools/smoke.py dist/*.whl $(SMOKE_ARGS)

clean:
	rm -rf build dist .venv

# torch first: the build reads its headers, and an existing one is kept.
$(READY): $(COMPILED)
	$(if $(VENV),[ -x "$(PYTHON)" ] || "$(PY)" -m venv "$(VENV)")
	"$(PYTHON)" -c "import torch" 2>/dev/null || "$(PYTHON)" -m pip install -q "$(TORCH)"
	"$(PYTHON)" -m pip install -q -e '.[test]'
	touch "$(ENV)/.lipfast"

$(READY)-dev: $(READY)
	"$(PYTHON)" -m pip install -q -e '.[dev]'
	touch "$(ENV)/.lipfast-dev"
