# Every target makes its own environment in .venv; nothing else needs to be installed than Python 3.11+ with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-slow check lint types layers audit sbom release matrix bench docs studies studies-check measure clean

demo: $(READY)  ## tune a real 135M language model over three clients, about five minutes on two cores
	$(BIN)/fedmezo run configs/demo.toml

# Two processes of one thread each: the suite takes half as long on two cores.
test: $(READY)  ## the test suite (no network, no GPU)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: $(READY)  ## the tests that need minutes or the real 135M model
	$(BIN)/python -m pytest -m slow

check: lint types layers audit test  ## everything a change must pass

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

audit: $(READY)  ## known vulnerabilities of the tested set; says SKIPPED where no database of them is reachable
	$(BIN)/python scripts/audit.py

sbom: $(READY)  ## the bill of materials of a release, dist/sbom.json
	$(BIN)/python scripts/sbom.py --out dist/sbom.json

release: $(READY)  ## build wheel and source archive, check them in an environment of their own; needs PyPI and 2 GB
	$(BIN)/python scripts/release.py --out docs/results/release.json

matrix: $(READY)  ## the fast tests on every Python from 3.11 that is found
	$(BIN)/python scripts/matrix.py --out docs/results/matrix.json

docs: $(READY)  ## the documentation as a site, in site/ (warnings are errors)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)  ## speed and memory as ratios, measured in one run (about half an hour; `fedmezo bench WHAT` for less)
	$(BIN)/fedmezo bench
	$(BIN)/python -m pytest benchmarks/test_kernels.py --benchmark-enable --benchmark-only

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

studies: $(READY)  ## run the tiny set of the studies (about two hours on two cores) and write studies/site
	$(BIN)/fedmezo study run --scale tiny --workers 2
	$(BIN)/fedmezo study report

studies-check: $(READY)  ## one cell of each study again, beside its record
	$(BIN)/fedmezo study check

measure: $(READY)  ## the figures behind the thresholds of tests/test_convergence.py
	PYTHONPATH=tests $(BIN)/python -m scripts.measure_tiny

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
