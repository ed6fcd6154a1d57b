# The two commands of the README, and what CI runs. PYTHON chooses the Python that .venv is made of:
#   make demo PYTHON=/path/to/python
PYTHON ?= python3
RUN := .venv/bin

.PHONY: demo test test-gpu lint bench-cpu bench-gpu env clean

demo: env
	$(RUN)/moegate route deepseek-v3 --tokens 256

test: env
	$(RUN)/python -m pytest -n auto

# On a GPU host, with what PYTHON has there (torch, pytest, hypothesis and pytest-xdist): the contract's tests on
# the GPU, then the tests that are about a GPU.
test-gpu:
	PYTHONPATH=$(CURDIR)/src $(PYTHON) -m pytest -n 8 -p no:cacheprovider --device cuda tests/test_contract_*.py \
	  tests/test_gate.py tests/test_properties.py tests/test_arguments.py tests/test_ops.py
	PYTHONPATH=$(CURDIR)/src $(PYTHON) -m pytest -n 8 -p no:cacheprovider -m gpu

# Also on a GPU host: into benchmarks/results/h200, from where it goes on when it is called again.
bench-gpu:
	PYTHONPATH=$(CURDIR)/src:$(PYTHONPATH) $(PYTHON) benchmarks/gpu/run.py --out benchmarks/results/h200
	PYTHONPATH=$(CURDIR)/src $(PYTHON) benchmarks/gpu/report.py benchmarks/results/h200 > docs/performance.md

lint: env
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench-cpu: env
	$(RUN)/python benchmarks/cpu.py

env:
	@$(PYTHON) tools/environment.py

clean:
	rm -rf .venv
