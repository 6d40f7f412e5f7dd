# The few commands to remember:
#   make demo   set up, start two ranks, talk to them, show what they share
#   make test   set up, lint and run the tests of every push
#   make test-all   the same with the tests that take longer
DEVICE ?= cpu
PY := .venv/bin/python

.PHONY: setup native demo test test-all test-versions tables test-unit test-cuda test-native test-e2e fuzz lint format clean
.PHONY: gpu-minutes two-gpu-minutes test-gpu bench-gpu native-gpu

setup:
	@scripts/setup.sh $(DEVICE)

native:
	@$(PY) setup.py -q build_ext --inplace

demo: setup
	@$(PY) examples/demo.py

test test-all: setup lint test-native test-unit test-cuda test-e2e
test-all: test-versions

# Tests marked `slow` are left out, except by test-all.
CHOSEN := and not slow
test-all: CHOSEN :=

# Two files at a time; a file's tests run one after the other, in order.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

test-unit:
	$(PY) -m pytest -q $(SIDE_BY_SIDE) -m "not e2e $(CHOSEN)" tests

# The CUDA device over the fake driver: no evidence about hardware.
test-cuda:
	env $$($(PY) -m gpu_checks.fake) $(PY) -m pytest -q tests/cuda

# The copy engine under the address, undefined-behaviour and thread sanitizers.
test-native:
	@scripts/test_native.sh

test-e2e:
	$(PY) -m pytest -q $(SIDE_BY_SIDE) -m "e2e $(CHOSEN)" --durations=20 tests/e2e

# The newest vLLM that is tested, over the compiled parts of this environment's.
OTHER_PY := .venv-0.33/bin/python
test-versions:
	@$(PY) -m tests.helpers.other_vllm >/dev/null
	$(OTHER_PY) -m pytest -q $(SIDE_BY_SIDE) -m "(compat or every_version) $(CHOSEN)" tests

# docs/features.md, docs/models.md and docs/versions.md, from the last results on this machine.
tables:
	$(PY) -m tests.tables

# Coverage-guided fuzzing of the messages between ranks; needs `pip install -e .[fuzz]`.
FUZZ_SECONDS ?= 60
fuzz:
	$(PY) -m tests.fuzz.fuzz_wire -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -rss_limit_mb=2048

# On a GPU machine, which may have neither .venv nor pytest nor vLLM (docs/gpu.md).
GPU_PY ?= python3
ON_GPU = PYTHONUNBUFFERED=1 PYTHONPATH=$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PY)

gpu-minutes: native-gpu
	$(ON_GPU) -m gpu_checks --first-minutes

two-gpu-minutes: native-gpu
	$(ON_GPU) -m gpu_checks --two-gpus

test-gpu: native-gpu
	$(ON_GPU) -m gpu_checks --skip bench

bench-gpu: native-gpu
	$(ON_GPU) -m gpu_checks --only bench

native-gpu:
	@test -e vllm_dwdp/device/libdwdp.so || $(GPU_PY) setup.py -q build_ext --inplace

lint:
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format:
	@$(PY) -m ruff check -q --fix . ; $(PY) -m ruff format .

clean:
	rm -rf build *.egg-info vllm_dwdp/device/libdwdp.so
