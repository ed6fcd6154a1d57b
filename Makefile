# The two commands of the README, and what CI runs. PYTHON chooses the Python that .venv is made of:
#   make demo PYTHON=/path/to/python
PYTHON ?= python3
SHELL := bash
RUN := .venv/bin

.PHONY: demo test test-gpu sanitize-gpu lint docs bench-cpu bench-gpu env clean

demo: env
	$(RUN)/moegate route deepseek-v3 --tokens 256

test: env
	$(RUN)/python -m pytest -n auto

# On a GPU host, with what PYTHON has there (torch, pytest, hypothesis and pytest-xdist): the contract's tests on
# the GPU, then the tests that are about a GPU. What they say is kept in RESULTS.
RESULTS ?= benchmarks/results/h100
GPU_TESTS := PYTHONPATH=$(CURDIR)/src:$(PYTHONPATH) $(PYTHON) -m pytest -q -n auto -p no:cacheprovider -p no:benchmark

test-gpu:
	mkdir -p $(RESULTS)
	set -o pipefail; { \
	  PYTHONPATH=$(CURDIR)/src:$(PYTHONPATH):$(CURDIR) $(PYTHON) -m moegate.measure.record make test-gpu && \
	  $(GPU_TESTS) --device cuda tests/test_contract_*.py tests/test_gate.py tests/test_properties.py \
	    tests/test_arguments.py tests/test_ops.py tests/test_noticing.py tests/test_noticing_states.py tests/test_noticing_options.py && \
	  $(GPU_TESTS) -m gpu tests/test_cuda_bits.py tests/test_cuda_gpu.py tests/test_cuda_streams.py \
	    tests/test_cuda_many.py tests/test_cuda_input_norm.py tests/test_choice_gpu.py tests/test_gate.py \
	    tests/test_cli_gpu.py tests/test_noticing_gpu.py && \
	  $(GPU_TESTS) -m gpu -rP tests/test_cuda_catalog.py; } 2>&1 | tee $(RESULTS)/tests.txt

# Where compute-sanitizer may look (some hosts refuse it). racecheck sees shared memory only; what goes through global
# memory has tests of its own in test_cuda_streams.py.
sanitize-gpu:
	mkdir -p $(RESULTS)
	set -o pipefail; { PYTHONPATH=$(CURDIR)/src:$(PYTHONPATH) $(PYTHON) -m moegate.measure.record make sanitize-gpu && \
	for tool in memcheck racecheck initcheck synccheck; do \
	  echo "== $$tool"; PYTHONPATH=$(CURDIR)/src:$(PYTHONPATH) PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	    compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 9 $(PYTHON) tests/sanitized.py || exit 1; \
	done; } 2>&1 | tee $(RESULTS)/sanitizer.txt

# Also on a GPU host: goes on from where it was when it is called again.
bench-gpu:
	PYTHONPATH=$(CURDIR)/src:$(PYTHONPATH) $(PYTHON) benchmarks/gpu/run.py --out $(RESULTS)
	PYTHONPATH=$(CURDIR)/src:$(PYTHONPATH) $(PYTHON) benchmarks/gpu/report.py $(RESULTS) > docs/performance.md

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
