# Two commands: `make demo` runs the main job, `make test` the tests. Both make .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*) $(wildcard kernels/cuda/*)
# torch first, because the build looks it up in the environment. PyPI's own comes with gigabytes of CUDA libraries: where there is no GPU,
# a CPU build from an index of yours serves as well (`make demo TORCH='torch==2.13.0+cpu'` with that index in pip's configuration).
TORCH ?= torch>=2.11,<2.14
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# CrypTen's own requirement list names a package that no longer installs, so its real needs stand in our `crypten` extra
CRYPTEN := crypten==0.4.1

.PHONY: demo test test-slow lint format check-kernels sanitize bench bench-peers bench-secure clean

demo: $(VENV)/.run
	$(BIN)/deepshare demo --out runs/demo

# A process a core, whole files each; a test's own threads would only wait for the other process.
WORKERS ?= 2
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(PYTEST)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -m slow $(PYTEST)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h')

check-kernels: $(VENV)/.test
	$(BIN)/python scripts/check-kernels

sanitize: $(VENV)/.test
	$(BIN)/python scripts/sanitize $(SANITIZE)

# The record goes to .benchmarks/, for `deepshare bench-report` and `--benchmark-compare`. BENCH=quick takes 2 minutes.
# With glibc's own settings every large tensor is mapped anew, and page faults take longer than the pass (docs/benchmarks.md).
BENCH ?= full
SELECTED_full :=
SELECTED_quick := -m quick --benchmark-max-time=0.3
bench: export MALLOC_MMAP_MAX_ := 0
bench: export MALLOC_TRIM_THRESHOLD_ := 100000000000
bench: export MALLOC_TOP_PAD_ := 2000000000
bench: $(VENV)/.test
	$(BIN)/python -m pytest bench -q --benchmark-only --benchmark-autosave --benchmark-max-time=0.5 --benchmark-min-rounds=9 $(SELECTED_$(BENCH)) $(PYTEST)

# Private ReLU of other libraries beside ours (docs/secure_costs.md); each is installed by name into .venv-peers/.
bench-peers: $(VENV)/.test
	$(BIN)/python bench/peers/run.py $(PEERS)

# DeepShare's Table 6 (docs/secure_costs.md); a killed run goes on. Between namespaces it needs root: TABLE6='--link loopback' does not.
bench-secure: $(VENV)/.test
	$(BIN)/python bench/secure_table6 $(TABLE6)

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit("deepshare needs Python 3.11 or newer, this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)' numpy
	touch $@

$(VENV)/.run: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable '.[demo,secure,crypten]'
	$(PIP) --no-deps $(CRYPTEN)
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP) --editable '.[test,dev]'
	$(PIP) --no-deps $(CRYPTEN)
	touch $@

clean:
	rm -rf build dist *.egg-info deepshare/_C*.so $(VENV)/.run $(VENV)/.test
