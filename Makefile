# Every target works from a clean checkout: it creates .venv, installs the pinned dependencies and
# builds the kernels if that has not been done.

PYTHON ?= python3
TORCH ?= 2.13.0
# What `make headers` compiles against: the oldest torch we serve, the next, and the newest there is.
HEADERS ?= 2.10.0 2.11.0 newest
# The second compiler: the newest clang that is installed.
CLANG ?= $(lastword $(shell ls /usr/bin /usr/local/bin | grep -xE 'clang\+\+(-[0-9]+)?' | sort -V))
# For its interpreter and its compiler, beside a torch that does not bring one.
TRITON ?= 3.9.0
# That of torch 2.10 and 2.11, the oldest that our kernels have to compile with.
OLD_TRITON ?= 3.6.0

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --quiet
CPP := $(shell find csrc tests/emulation tests/kernels -name "*.h" -o -name "*.cpp" -o -name "*.cu")
# The tests that enter every branch of the kernels, and those that also ask for trouble.
SANITIZE_TESTS := tests/test_cross_entropy.py tests/test_sgd.py \
	$(foreach part,errors ops memory threads cuda, \
	$(wildcard tests/test_cross_entropy_$(part).py tests/test_sgd_$(part).py))
SANITIZED := FASTOPT_LIBRARY=$(CURDIR)/build/sanitize/_C.so FASTOPT_SANITIZE=1 \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	$(PYTEST) -n auto --maxprocesses 8 --dist loadgroup -m "not slow"

# On a machine with a GPU, with that machine's own Python: torch for CUDA or ROCm, Triton, pytest,
# pytest-benchmark, pytest-xdist, hypothesis and matplotlib have to be there; nothing is downloaded.
GPU_PYTHON ?= python3
FAMILIES ?= cuda triton
OPS ?= cross_entropy sgd
# Never from the environment, where OUT may mean another place.
OUT = bench/results
GPU_PYTEST := $(GPU_PYTHON) -m pytest --quiet
# Triton compiles thousands of kernels for the tests of values, one after the other without
# pytest-xdist.
GPU_PARALLEL = $(shell $(GPU_PYTHON) -c "import xdist" 2>/dev/null && echo "-n 8")
# make gpu INSTALLED=1: what pip has installed is tested and timed, not this checkout. (Python 3.11
# and later know how to leave the current folder out of their path.)
ifdef INSTALLED
export PYTHONSAFEPATH := 1
GPU_PYTEST += --override-ini=pythonpath=
endif

# Where nvcc is, for the wheel of the CUDA kernels.
CUDA_HOME ?= /usr/local/cuda
AARCH64 := aarch64-linux-gnu-g++

.PHONY: demo check test test-values modes bench build lint format headers clang aarch64 sanitize
.PHONY: wheel wheels clean docs gpu gpu-build gpu-test gpu-sanitize gpu-bench gpu-carry gpu-lease

demo: build
	$(BIN)/python bench/train_digits.py

# Threads that spin while they wait make tests twenty times slower where others use the cores too.
check test test-values modes clang aarch64 sanitize wheel wheels: export OMP_WAIT_POLICY = passive

# Format, lint, types and one fast case of every kind: before every commit.
check: lint build
	$(BIN)/python tools/suite.py check

test: lint build build/triton-$(OLD_TRITON)
	OLD_TRITON=$(OLD_TRITON) $(BIN)/python tools/suite.py

test-values: build
	$(BIN)/python tools/suite.py values

# The losses in every mode of PyTorch, against torch's own: also those that compile with Inductor.
modes: build
	$(PYTEST) -n auto --maxprocesses 8 tests/test_cross_entropy_modes.py \
	  tests/test_linear_cross_entropy_modes.py

# make bench BENCH=--quick: a few cases, for a first look
bench: build
	$(PYTEST) bench/bench_*.py --benchmark-json=build/bench.json $(BENCH)
	$(BIN)/python bench/report.py build/bench.json

build: .venv/.installed
	@FASTOPT_BUILD=cpu $(BIN)/python setup.py --quiet build_ext --inplace

lint: .venv/.installed
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy --no-error-summary
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(if $(wildcard .github),$(BIN)/zizmor --quiet --offline .github)

format: .venv/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

# make headers HEADERS="2.12.1 2.13.0": against the headers of any torch, downloaded once.
headers: .venv/.installed
	$(BIN)/python -m tools.headers $(HEADERS)

# The tests of values with the library that clang makes, at every SIMD level that this CPU has.
clang: build
	$(if $(CLANG),,$(error no clang++ was found; on Debian and Ubuntu: apt install clang))
	@CXX=$(CLANG) FASTOPT_BUILD=cpu $(BIN)/python setup.py --quiet build_ext --build-lib build/clang
	FASTOPT_LIBRARY=$(CURDIR)/build/clang/fastopt/_C.so $(BIN)/python tools/suite.py values

# The pages, in build/docs/index.html. Nothing is fetched while they are built; warnings are errors.
docs: build .venv/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -n -E docs build/docs

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer. Python itself is not
# instrumented, so the runtime is preloaded, and libstdc++ with it: without that the runtime
# cannot find the functions behind C++ exceptions. Python's own leaks are not our matter. The CUDA
# kernels' emulation is built with the sanitizers too: one unit that takes as long as all of _C.so,
# so both are built at once.
sanitize: build
	@FASTOPT_SANITIZE=1 PYTHONPATH=tests $(BIN)/python -c "import emulated; emulated.build()" & \
	CXX=g++ FASTOPT_SANITIZE=1 \
	FASTOPT_SIMD=$$($(BIN)/python -c "from fastopt import backends; print(backends.simd_level())") \
	$(BIN)/python setup.py --quiet build_ext && wait $$!
	$(SANITIZED) $(SANITIZE_TESTS)
	FASTOPT_TEST_KERNELS=emulated $(SANITIZED) tests/test_cross_entropy.py \
	  -k "(numbers_of or shapes or labels or 32_bits or scaling or layouts) and (float32 or bfloat16) \
	  or (shapes and float64) or 32_bits"

# build/lib* is setuptools' own copy of the package, which keeps modules that were deleted since.
wheel: build
	rm -rf dist build/lib*
	FASTOPT_BUILD=cpu $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	$(PYTEST) -n auto --maxprocesses 8 tests/test_packaging.py tests/test_install.py

# The kernels for another machine: every source compiled, warnings being errors, and the library
# linked; then their values, where qemu-user is installed.
aarch64: .venv/.installed
	CXX=$(AARCH64) FASTOPT_BUILD=cpu $(BIN)/python setup.py --quiet build_ext --build-lib build/aarch64
	CXX=$(AARCH64) $(PYTEST) -rPs tests/test_kernels_alone.py

# What is published, in dist/: the source, wheels with CPU kernels for two machines and, where there
# is a CUDA toolkit, the wheel with CUDA kernels.
WHEEL := FASTOPT_BUILD=cpu $(BIN)/python setup.py --quiet bdist_wheel --plat-name
wheels: .venv/.installed
	rm -rf dist build/lib* packaging/cuda13/build
	$(BIN)/python setup.py --quiet sdist
	$(WHEEL) manylinux_2_28_x86_64
	rm -rf build/lib*
	CXX=$(AARCH64) $(WHEEL) manylinux_2_28_aarch64
	if [ -x $(CUDA_HOME)/bin/nvcc ]; then cd packaging/cuda13 && \
	  $(CURDIR)/$(BIN)/python setup.py --quiet bdist_wheel --dist-dir $(CURDIR)/dist \
	    --plat-name manylinux_2_28_x86_64; \
	else echo "no CUDA toolkit in $(CUDA_HOME): no wheel of fastopt-cuda13"; fi
	$(PYTEST) tests/test_wheels.py

# Everything that only hardware can show. The parts can be run alone.
gpu: gpu-test gpu-sanitize gpu-bench

gpu-build:
ifndef INSTALLED
	FASTOPT_BUILD=cuda $(GPU_PYTHON) setup.py --quiet build_ext --inplace
endif
	$(GPU_PYTHON) -m fastopt

# Whatever fails, the rest of a target runs too; a GPU may be gone before the next try.
gpu-test: gpu-build
	failed=0; \
	for family in $(FAMILIES); do \
	  echo "== $$family"; export FASTOPT_ALWAYS=1 FASTOPT_BACKEND=$$family; \
	  $(GPU_PYTEST) tests/test_gpu.py || failed=1; \
	  FASTOPT_TEST_DEVICE=cuda $(GPU_PYTEST) $(GPU_PARALLEL) tests/test_cross_entropy.py \
	    -m "not slow" || failed=1; \
	done; \
	exit $$failed

# Every allocation by itself, so that a step out of bounds leaves it. memcheck looks for that,
# racecheck for shared memory that is read before it was written; in our kernels, not torch's.
gpu-sanitize: gpu-build
	failed=0; \
	for tool in memcheck racecheck; do \
	  FASTOPT_ALWAYS=1 FASTOPT_BACKEND=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	  compute-sanitizer --tool $$tool --kernel-name kns=fastopt --error-exitcode 1 $(GPU_PYTEST) \
	    tests/test_gpu.py -k "same_bits or out_of_range_give_nan or sgd_trains" || failed=1; \
	done; \
	exit $$failed

gpu-bench: gpu-build
	mkdir -p build
	rm -f build/bench-cuda-*.json build/bench-triton-*.json
	failed=0; \
	for family in $(FAMILIES); do \
	  for op in $(OPS); do \
	    FASTOPT_BACKEND=$$family $(GPU_PYTEST) bench/bench_$$op.py --device=cuda \
	      --benchmark-json=build/bench-$$family-$$op.json \
	      --benchmark-storage=.benchmarks/$$family-$$op $(BENCH) || failed=1; \
	  done; \
	  PYTHONSAFEPATH= $(GPU_PYTHON) bench/report.py build/bench-$$family-*.json --results $(OUT) \
	    || failed=1; \
	done; \
	exit $$failed

# A GPU that is lent for minutes: tools/lease.py says what the five steps are. The library can be
# built before, where the compilers are, and carried along in build/carry.
gpu-lease:
	@$(GPU_PYTHON) tools/lease.py $(STEP) \
	  --out $(if $(filter command,$(origin OUT)),$(OUT),build/lease)

gpu-carry: .venv/.installed
	$(BIN)/python tools/lease.py carry

.venv/.docs: docs/requirements.txt .venv/.installed
	$(BIN)/python -m pip install --quiet -r docs/requirements.txt
	@touch $@

build/triton-$(OLD_TRITON): | .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==$(OLD_TRITON)

clean:
	rm -rf build dist *.egg-info packaging/*/build packaging/*/*.egg-info
	rm -rf fastopt/*.so fastopt/_build.json .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find fastopt tests bench -name __pycache__ -prune -exec rm -rf {} +

.venv/.installed: requirements-dev.txt pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==$(TORCH) -r requirements-dev.txt
	$(BIN)/python -c "import triton" 2>/dev/null || \
	$(BIN)/python -m pip install --quiet --no-deps triton==$(TRITON)
	FASTOPT_BUILD=cpu $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@
