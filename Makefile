# The few commands to remember:
#   make demo   set up, start two ranks, talk to them, show what they share
#   make test   set up, lint and run the tests
DEVICE ?= cpu
PY := .venv/bin/python

.PHONY: setup native demo test test-unit test-native test-e2e lint format clean

setup:
	@scripts/setup.sh $(DEVICE)

native:
	@$(PY) setup.py -q build_ext --inplace

demo: setup
	@$(PY) examples/demo.py

test: setup lint test-native test-unit test-e2e

test-unit:
	$(PY) -m pytest -q -m "not e2e and not gpu" tests

# The copy engine under the address, undefined-behaviour and thread sanitizers.
test-native:
	@scripts/test_native.sh

test-e2e:
	$(PY) -m pytest -q -m "e2e" tests/e2e

lint:
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format:
	@$(PY) -m ruff check -q --fix . ; $(PY) -m ruff format .

clean:
	rm -rf build *.egg-info vllm_dwdp/libdwdp.so
