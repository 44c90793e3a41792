# Two commands: `make book` and `make test`. Everything is installed into .venv
# from requirements.lock; nothing has to be installed by hand.

SHELL := /bin/sh
.DEFAULT_GOAL := help

# The first interpreter that is Python 3.11; override with `make PYTHON=... book`.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null \
    && echo $$p && break; done)
BIN := .venv/bin
CORES ?= 1
PORT ?= 8000

# Chapters and tests use two threads everywhere: results are compared, and the
# number of threads changes the last digits.
export OMP_NUM_THREADS ?= 2
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)
export NUMBA_NUM_THREADS ?= $(OMP_NUM_THREADS)
export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONHASHSEED := 0
# Kernels choose the inline backend themselves.
unexport MPLBACKEND
# Another environment's packages must not leak into this one.
unexport PYTHONPATH

.PHONY: help book refresh strict results test chapter classroom wheelhouse matrix bench serve lint lock clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' Makefile | \
	    awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "  e.g. make chapter CHAPTER=garage DATASET=pollen"

.venv/.installed: requirements.lock pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 was not found. Install it," \
	    "or name it: make PYTHON=/path/to/python3.11 book" >&2; exit 1; fi
	@echo "== Installing into .venv (about 2 GB, a few minutes the first time)"
	@rm -f $@
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check \
	    --no-deps --no-build-isolation -e .
	@touch $@

.venv/.installed-results: .venv/.installed requirements-results.lock
	@echo "== Installing the workflow tools into .venv"
	$(BIN)/python -m pip install --disable-pip-version-check \
	    -r requirements.lock -r requirements-results.lock
	@touch $@

book: .venv/.installed ## execute what changed, then render the book into _build/html
	@$(BIN)/python tools/book.py execute
	@$(BIN)/python tools/book.py render

refresh: .venv/.installed ## execute, then rewrite the outputs stored in book/ (ONLY=)
	@$(BIN)/python tools/book.py refresh $(ONLY)

strict: .venv/.installed ## clean build of the stored outputs; any warning fails
	@$(BIN)/python tools/book.py strict

results: .venv/.installed-results ## the recorded runs (CHAPTER=, DATASET=, PROFILE=, SEEDS=, LABEL_KEY=, BATCH_KEY=, CORES=), into book/results
	@$(BIN)/snakemake --snakefile experiments/Snakefile --cores $(CORES) \
	    --rerun-triggers mtime $(if $(CHAPTER)$(DATASET)$(PROFILE)$(SEEDS)$(LABEL_KEY)$(BATCH_KEY),--config) \
	    $(if $(CHAPTER),chapter=$(CHAPTER)) $(if $(DATASET),dataset=$(DATASET)) \
	    $(if $(PROFILE),profile=$(PROFILE)) $(if $(SEEDS),seeds=$(SEEDS)) \
	    $(if $(LABEL_KEY),'label_key=$(LABEL_KEY)') \
	    $(if $(BATCH_KEY),'batch_key=$(BATCH_KEY)')

# Both halves always run; either one failing fails the target.
test: .venv/.installed ## unit tests, then every notebook against its stored outputs
	@status=0; \
	echo "== Unit tests"; \
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -n 2 --dist loadfile tests || status=1; \
	echo "== Notebooks"; \
	$(BIN)/python -m pytest -p no:cacheprovider --nbval --nbval-current-env \
	    --nbval-cell-timeout 300 -o timeout=600 book || status=1; \
	exit $$status

chapter: .venv/.installed ## one chapter on one data set (CHAPTER=, DATASET=), into runs/
	@$(BIN)/scgenlib run $(or $(CHAPTER),garage) \
	    -p dataset $(or $(DATASET),pbmc68k_reduced)

classroom: .venv/.installed ## student and instructor notebooks, slides (ONLY=), into _build/classroom
	@$(BIN)/python tools/classroom.py notebooks $(ONLY)
	@$(BIN)/python tools/classroom.py slides $(ONLY)

wheelhouse: .venv/.installed ## a folder to install and teach from without a network (OUT=, SYSTEMS=)
	@$(BIN)/python tools/classroom.py wheelhouse \
	    --out $(or $(OUT),_build/wheelhouse) \
	    $(foreach system,$(SYSTEMS),--platform $(system))

matrix: .venv/.installed ## every chapter on every data set at hand, for the status page
	@$(BIN)/python tools/matrix.py

bench: .venv/.installed ## speed and memory against the floor
	@set -e; for script in benchmarks/[a-z]*.py; do \
	    echo "== $$script"; $(BIN)/python $$script; done

serve: ## look at the rendered book on http://localhost:8000 (PORT=)
	@test -f _build/html/index.html || { echo "run 'make book' first" >&2; exit 1; }
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

lint: .venv/.installed ## ruff over package and notebooks, mypy over the package
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

lock: ## rewrite the lock files from the packages in .venv
	@$(BIN)/python tools/lock.py

clean: ## remove what was built (not .venv, runs or results)
	rm -rf _build vendor .pytest_cache .mypy_cache .ruff_cache
