# The two commands of the README, and what CI runs. PYTHON chooses the Python that .venv is made of:
#   make demo PYTHON=/path/to/python
PYTHON ?= python3
SHELL := bash
RUN := .venv/bin

.PHONY: demo test test-engines test-engines-newest test-gpu sanitize-gpu release-check lint docs bench-cpu bench-gpu env clean

demo: env
	$(RUN)/moegate route deepseek-v3 --tokens 256

test: env
	$(RUN)/python -m pytest -n auto

# moegate inside each engine, in an environment of its own under .engines: about 10 minutes and 6 GB the first time.
test-engines:
	$(PYTHON) tools/engines.py

# The same with the newest releases, for information: tells how each went, and fails never.
test-engines-newest:
	$(PYTHON) tools/engines.py --newest

# On a GPU host, with what PYTHON has there (torch, pytest, hypothesis and pytest-xdist): the contract's tests on the
# GPU, then tests/gpu. What came out is a row of benchmarks/results/gpu_runs.csv.
GPU_PYTHON := PYTHONPATH=$(CURDIR)/src:$(PYTHONPATH) $(PYTHON)

test-gpu:
	$(GPU_PYTHON) tools/gpu_runs.py test-gpu

# Where compute-sanitizer may look (some hosts refuse it). racecheck sees shared memory only; what goes through global
# memory has tests of its own in tests/gpu/test_cuda_streams.py.
sanitize-gpu:
	$(GPU_PYTHON) tools/gpu_runs.py sanitize-gpu

# On any machine: fails unless the last run of both passed, with the kernels as they are.
release-check:
	$(PYTHON) tools/gpu_runs.py check

# Also on a GPU host: goes on from where it was when it is called again. Git keeps the medians, in RESULTS.csv, and
# leaves the folder out.
RESULTS ?= benchmarks/results/h100

bench-gpu:
	$(GPU_PYTHON) benchmarks/gpu/run.py --out $(RESULTS)
	$(GPU_PYTHON) benchmarks/gpu/report.py $(RESULTS) > docs/performance.md
	$(GPU_PYTHON) benchmarks/gpu/table.py $(RESULTS) $(RESULTS).csv

lint: env
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

# The API reference, as HTML.
docs: env
	$(RUN)/python -W error tools/api_reference.py build/docs

bench-cpu: env
	$(RUN)/python benchmarks/cpu.py

env:
	@$(PYTHON) tools/environment.py

clean:
	rm -rf .venv
