# Two commands set everything up on a fresh machine: `make test` and `make demo`.
# They need Python 3.10 or later, make and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
BIN := $(VENV)/bin

SOURCES := pyproject.toml setup.py $(shell find csrc fused_convlstm -type f -not -name '*.so' -not -path '*/__pycache__/*')

.PHONY: test-interop test lint check demo benchmark gpu-report gpu-tune clean

test: lint check

# The package as a user gets it: built in an isolated environment, installed, not imported from the source tree.
$(VENV)/installed: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet ".[dev,train]"
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

check: $(VENV)/installed
	$(BIN)/pytest tests --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

# Renders clips, trains on them a network with memory and one of the same size that sees single frames, evaluates both
# and looks at which scales the first one uses. Interrupted, it goes on where it was.
DEMO ?= runs/demo
TRAIN_DEMO := $(BIN)/fused-convlstm train --resume demo $(DEMO)/cache

demo: $(VENV)/installed
	$(BIN)/fused-convlstm generate $(DEMO)/clips
	$(BIN)/fused-convlstm prepare lrw $(DEMO)/clips $(DEMO)/cache
	$(TRAIN_DEMO) $(DEMO)/convlstm
	$(TRAIN_DEMO) $(DEMO)/frames --set model.name=resnet_frames_small --set training.readout=mean
	$(BIN)/fused-convlstm sensitivity $(DEMO)/convlstm
	@echo "--- single frames:"
	$(BIN)/fused-convlstm evaluate $(DEMO)/frames
	@echo "--- ConvLSTM:"
	$(BIN)/fused-convlstm evaluate $(DEMO)/convlstm

benchmark: $(VENV)/installed
	$(BIN)/pytest benchmarks/ --benchmark

# Converters and swap against the real libraries, in an environment of its own; the result goes to docs/interop.md.
# PyTorch comes first, so that nothing else decides which build of it; torchgeo and snnTorch come alone, as what they
# depend on besides is not needed for their ConvLSTMs.
INTEROP ?= .venv-interop
test-interop:
	test -d $(INTEROP) || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet "$(TORCH)"
	$(INTEROP)/bin/pip install --quiet numpy pytest h5py keras jax flax
	$(INTEROP)/bin/pip install --quiet --no-deps torchgeo snntorch
	$(INTEROP)/bin/pip install --quiet tensorflow-cpu dm-tree tabulate
	$(INTEROP)/bin/pip install --quiet --no-deps tf_keras dm-sonnet
	$(INTEROP)/bin/pip install --quiet .
	$(INTEROP)/bin/pytest interop -p no:cacheprovider --report docs/interop.md

# The GPU suite and the benchmark on the GPU at hand, 8 minutes; without one it says so. Run again, it goes on.
gpu-report: $(VENV)/installed
	$(BIN)/python benchmarks/gpu_report.py

# On the same GPU: the kernels' shares of the time, every tile of both backends, and whole networks.
gpu-tune: $(VENV)/installed
	$(BIN)/python benchmarks/gpu_profile.py
	$(BIN)/python benchmarks/gpu_tune.py
	$(BIN)/python benchmarks/models.py --device cuda

clean:
	rm -rf $(VENV) $(INTEROP) build dist *.egg-info
