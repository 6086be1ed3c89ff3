# make bench   verify every kernel, then time it: build/bench/report.html and its pictures; eight minutes
#              (with BENCH="--op mann_sequence", "sweep --variable N", ...: python -m bench with these)
# make test    run the tests: ten minutes                (TEST="-k name" is passed on)
# make test-long   what is too long for that: every schedule, dtype, target and planted fault, two versions of Triton
# make test-gpu    on a machine with a GPU: the tests marked gpu, then compute-sanitizer over every kernel
# make reproduce DATA=FILE   train on Omniglot and print a paper's table beside ours (hours; goes on where it was); TABLE=mann-onehot,
#              mann-strings, metanet, regression, cost
# make test-wheel TORCH=2.13.0   build the sdist and from it the wheel, and try that beside this torch (minutes; for others downloads)
# make sanitize, compilers, verify-gpu, verify-sharded, docs, lint, format, wheel, clean
# Everything is set up first, in .venv; a second call finds it done.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
BENCH ?=
DATA ?=
TEST ?=
TORCH ?= 2.13.0
SANITIZED := build/sanitize
# A second version of Triton, beside the pinned one: alone in a folder that comes first on the path.
OTHER_TRITON := 3.9.0
OTHER_PATH := build/triton-$(OTHER_TRITON)
CXX_FILES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/cuda/*.cu $(addprefix tests/gpu_on_cpu/*.,h cpp cu))
# The tests that drive the C++ kernels; those that start compilers or other processes would only slow the sanitizers down.
SANITIZED_TESTS := tests --ignore=tests/gpu_on_cpu -m "not compiles and not gpu"

.DEFAULT_GOAL := help
.PHONY: help setup bench test test-long test-gpu reproduce verify-gpu verify-sharded docs sanitize compilers lint format wheel test-wheel clean

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

# pip runs when the pins change, and leaves byte-compiling to the first import (most is never imported); ninja decides at every call
# what there is to compile.
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
BUILD := $(RUN) setup.py --quiet build_ext --inplace
setup: $(VENV)/.requirements-dev
	@$(BUILD)

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements-bench
	$(PIP) --no-compile -r $<
	@touch $@

$(VENV)/.requirements-bench: requirements-bench.txt pyproject.toml
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile -r $<
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

# Both suites in their quick form, the growth with every size, and the report of all.
REPORT := build/bench
# What this machine does not run, minutes of compiling, and what only tests and tools need is left to `make test`.
bench: export MANN_NATIVE := 1
bench: $(VENV)/.requirements-bench
	@$(BUILD)
ifeq ($(strip $(BENCH)),)
	$(RUN) -m bench --suite mann --quick --json $(REPORT)/mann.json
	$(RUN) -m bench --suite metanet --quick --json $(REPORT)/metanet.json
	$(RUN) -m bench sweep --seconds 1 --json $(REPORT)/sweep.json
	$(RUN) -m bench report $(REPORT)/mann.json $(REPORT)/metanet.json $(REPORT)/sweep.json --out $(REPORT)
else
	$(RUN) -m bench $(BENCH)
endif

# Everything over all cores; what runs under Triton's interpreter has processes of its own.
PYTEST := $(RUN) -m pytest -n auto --durations 10
test: setup
	$(PYTEST) tests $(TEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/gpu_on_cpu $(TEST)

test-long: setup verify-gpu
	$(PYTEST) --long tests --ignore=tests/gpu_on_cpu $(TEST)

# compute-sanitizer comes with CUDA; each kernel runs once, small.
test-gpu: setup
	$(RUN) -m pytest --durations 10 -m gpu tests $(TEST)
	for tool in memcheck racecheck synccheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(RUN) tests/every_kernel.py || exit 1; done

# A second call goes on from the last checkpoint. The tables are:
#   mann-onehot   Santoro et al. 2016, table 1: 5 classes, one-hot labels, the paper's sizes; MANN and LSTM
#   mann-strings  table 2: labels of five characters, 5 classes, and 15 by a curriculum
#   metanet       Munkhdalai & Yu 2017, Omniglot, one example of a class, by the protocol of its code: table 4 trained on 20 classes
#   regression    Gaussian processes in one dimension, beside the exact process; needs no data
#   cost          what black-box adaptation costs in tasks of training: every learner of few-shot tasks, and a picture of all
# MANN is tested on the paper's 423 classes, upright and then with the training's augmentation as in the paper.
TABLE ?= mann-onehot
TRAIN := $(RUN) -m mann_kernels.train
EVALUATE := $(RUN) -m mann_kernels.evaluate
OFTEN := --resume --schedule cosine --log-every 100 --test-every 1000 --interim-tasks 200 --test-tasks 2000
WRITES := --write add --key-strength
ON := build/reproduce
.PHONY: reproduce-mann-onehot reproduce-mann-strings reproduce-metanet reproduce-regression reproduce-cost
reproduce: setup
	@test -n "$(DATA)" -o "$(TABLE)" = regression || { \
	    echo "make reproduce DATA=FILE: want Omniglot, see mann_kernels.tasks.load_omniglot"; exit 1; }
	@$(MAKE) --no-print-directory reproduce-$(TABLE)
reproduce-mann-onehot: ONEHOT := omniglot --data $(DATA) $(OFTEN) --warps --schedule-updates 100000
reproduce-mann-onehot:
	$(TRAIN) $(ONEHOT) --updates 200000 --out $(ON)/mann $(WRITES)
	$(TRAIN) $(ONEHOT) --updates 100000 --out $(ON)/lstm --learner lstm
	@for run in mann lstm; do \
	    $(EVALUATE) $(ON)/$$run --data $(DATA) --plots $(ON)/$$run; $(EVALUATE) $(ON)/$$run --data $(DATA) --augment; done
reproduce-mann-strings: STRINGS := omniglot --data $(DATA) $(OFTEN) --labels string
reproduce-mann-strings:
	$(TRAIN) $(STRINGS) --updates 60000 --out $(ON)/strings $(WRITES)
	$(TRAIN) $(STRINGS) --updates 60000 --out $(ON)/strings-lstm --learner lstm
	$(TRAIN) $(STRINGS) --updates 15000 --out $(ON)/strings-feedforward --learner mann-feedforward $(WRITES)
	$(TRAIN) $(STRINGS) --updates 20000 --out $(ON)/strings-15 --most-ways 15 $(WRITES)
	@for run in strings strings-lstm strings-feedforward; do \
	    $(EVALUATE) $(ON)/$$run --data $(DATA) --plots $(ON)/$$run; $(EVALUATE) $(ON)/$$run --data $(DATA) --augment --nearest; done
	@for ways in 5 15 25; do $(EVALUATE) $(ON)/strings-15 --data $(DATA) --augment --nearest --ways $$ways; done
reproduce-metanet:
	$(TRAIN) few-shot --data $(DATA) $(OFTEN) --protocol original --ways 20 --queries 3 --updates 10000 --out $(ON)/metanet
	@for ways in 5 10 15 20; do $(EVALUATE) $(ON)/metanet --data $(DATA) --ways $$ways --nearest --plots $(ON)/metanet; done
reproduce-regression:
	$(TRAIN) gp-regression $(OFTEN) --hidden-size 128 --num-slots 64 --slot-size 32 --num-heads 2 --updates 30000 \
	    --out $(ON)/regression $(WRITES)
	$(EVALUATE) $(ON)/regression --plots $(ON)/regression
reproduce-cost: FEW := few-shot --data $(DATA) --resume --log-every 20 --test-every 200 --interim-tasks 100 --out $(ON)/cost
reproduce-cost:
	@for run in context-mean:8000 context-recurrent:8000 lstm:6000 mann:6000; do learner=$${run%:*}; \
	    $(TRAIN) $(FEW)/$$learner --learner $$learner --tasks-per-update 16 --updates $${run#*:} || exit 1; done
	$(TRAIN) $(FEW)/metanet --learner metanet --updates 7000
	$(RUN) -m mann_kernels.compare $(ON)/cost/* --out $(ON)/cost.png

# What can be known of the GPU kernels without a GPU: that they compile and fit every target, their numbers as source, that every
# access is sound; with both versions of Triton, and for the CUDA kernels under sanitizers.
verify-gpu: setup $(OTHER_PATH)
	TRITON_INTERPRET=1 $(PYTEST) --long tests/gpu_on_cpu
	$(PYTEST) --long tests/gpu_on_cpu
	TRITON_INTERPRET=1 PYTHONPATH=$(OTHER_PATH) $(PYTEST) tests/gpu_on_cpu
	PYTHONPATH=$(OTHER_PATH) $(PYTEST) tests/gpu_on_cpu/test_triton_compile.py

# The documentation as a site, in build/site.
docs: setup
	$(PIP) -r docs/requirements.txt
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict -f docs/mkdocs.yml

# A memory of a million slots over two processes, against the whole one (about 10 GB).
verify-sharded: setup
	$(RUN) -m torch.distributed.run --standalone --nproc-per-node 2 tests/sharded.py large

$(OTHER_PATH):
	$(PIP) --no-deps --target $@ triton==$(OTHER_TRITON)

# A second copy of the package with an instrumented library; the first test there checks that it is the one loaded.
sanitize: setup
	@mkdir -p $(SANITIZED)
	@rm -rf $(SANITIZED)/mann_kernels && cp -r mann_kernels tests bench csrc setup.py pyproject.toml $(SANITIZED)/
	@rm -f $(SANITIZED)/mann_kernels/_C*.so
	cd $(SANITIZED) && MANN_CUDA=0 MANN_SANITIZE=address,undefined ../../$(RUN) setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONPATH=$(CURDIR)/$(SANITIZED) \
	    ../../$(RUN) -m pytest --capture=sys $(SANITIZED_TESTS) $(TEST)

# Clang for this machine and for aarch64, without a warning. It comes as one package, with the headers of both (400 MB).
CLANG := build/clang
compilers: setup
	test -d $(CLANG)/ziglang || $(PIP) --target $(CLANG) ziglang==0.17.1
	PYTHONPATH=$(CURDIR)/$(CLANG) $(RUN) -m tests.compilers

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

wheel: setup
	$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# One wheel for every torch: built once, from the source archive, then installed in an environment of its own for each.
BUILT := build/wheel/.built
TRIED := build/wheel/torch-$(TORCH)
$(BUILT): setup.py pyproject.toml MANIFEST.in $(shell find mann_kernels csrc -name '*.py' -o -name '*.h' -o -name '*.c*' -type f)
	rm -rf $(@D)
	$(RUN) setup.py --quiet sdist --dist-dir $(@D)
	$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir $(@D) $(@D)/*.tar.gz
	@touch $@

test-wheel: setup $(BUILT)
	$(PYTHON) -m venv --clear $(TRIED)
	$(TRIED)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(TRIED)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-index build/wheel/*.whl
	cd $(TRIED) && bin/python -I $(CURDIR)/tests/wheel.py

clean:
	rm -rf build dist *.egg-info .venv mann_kernels/_C*.so
