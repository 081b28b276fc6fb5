# Everything a newcomer needs: `make demo` and `make test`. Needs Python 3.11 or newer with venv, and nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --prefer-binary --constraint constraints.txt
TORCH := torch==2.13.0
STAMP := $(VENV)/.installed
DEMO := runs/demo

.PHONY: install demo test nightly aarch64 optimum executorch quant table clean

install: $(STAMP)

# The CPU build of torch is a tenth of the size of the default one on Linux, so look for it first: where pip looks anyway, then at
# its publisher's. Elsewhere than on Linux the default build is the CPU build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --quiet "$(TORCH)+cpu" 2>/dev/null || \
		PIP_EXTRA_INDEX_URL="$$PIP_EXTRA_INDEX_URL https://download.pytorch.org/whl/cpu" $(PIP) "$(TORCH)"
	$(PIP) --editable ".[dev]"
	touch $@

demo: install
	rm -rf $(DEMO)-toy $(DEMO)-cat
	$(BIN)/pocketune personalize demo/photos/toy --recipe demo/toy.toml --out $(DEMO)-toy
	$(BIN)/pocketune personalize demo/photos/cat --recipe demo/cat.toml --out $(DEMO)-cat
	@echo "Open $(DEMO)-toy/report.html and $(DEMO)-cat/report.html"

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

nightly: install
	$(BIN)/pytest -m slow

# An emulated board, and optimum, which needs older libraries than ours: the nightly tests use them where they are there.
aarch64: install
	PIP="$(BIN)/python -m pip" tests/aarch64/prepare.sh build/aarch64

# Apart from `dev`, because they bring torchao, of which diffusers, transformers and peft make remarks at import. Tests of the
# quantizer "hqq" and of ExecuTorch run where they are there.
executorch quant: install
	$(PIP) --editable ".[$@]"

optimum:
	$(PYTHON) -m venv build/optimum
	PIP_EXTRA_INDEX_URL="$$PIP_EXTRA_INDEX_URL https://download.pytorch.org/whl/cpu" \
		build/optimum/bin/python -m pip install --prefer-binary $(TORCH) onnx onnxruntime "optimum>=2.1,<2.2" \
		"optimum-onnx==0.1.0" "transformers<4.58" "diffusers>=0.35,<0.37" "huggingface-hub<1"

table: install
	$(BIN)/python -m benchmarks.quality --table-only
	$(BIN)/python -m benchmarks.edge_memory --table-only
	$(BIN)/python -m benchmarks.edge_speed --table-only
	$(BIN)/python -m benchmarks.memory --table-only
	$(BIN)/python -m benchmarks.streaming_cost --table-only
	$(BIN)/python -m benchmarks.insert_tables

clean:
	rm -rf $(VENV) $(DEMO)-toy $(DEMO)-cat .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
