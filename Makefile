# The two commands of the README, and what CI runs. PYTHON chooses the Python that .venv is made of:
#   make demo PYTHON=/path/to/python
PYTHON ?= python3
RUN := .venv/bin

.PHONY: demo test test-gpu lint bench-cpu env clean

demo: env
	$(RUN)/moegate route deepseek-v3 --tokens 256

test: env
	$(RUN)/python -m pytest -n auto

# On a GPU host, with its own torch: everything that a GPU changes.
test-gpu: env
	$(RUN)/python -m pytest -m gpu

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
