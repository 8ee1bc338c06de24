# Each target builds what it needs: .venv with the library the first time, and again when pyproject.toml or the pins change.
SHELL := /bin/bash
# The first Python that suits; one that can make environments by itself (ensurepip) is preferred.
PYTHON ?= $(shell for extra in ensurepip sys; do for p in python3.12 python3.11 python3 python3.13; do \
  $$p -c "import sys, $$extra; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))" 2>/dev/null && { echo $$p; exit; }; done; done)
BIN := .venv/bin
ARGS ?=
# What Python has compiled is kept; otherwise each process begins with ten seconds of compiling libraries (images often switch it off).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart app test test-slow docs bench notebooks readme constraints clean
.DELETE_ON_ERROR:

help: ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: .venv/.app ## the whole story on a real model: SFT, reward model, PPO and DPO, table and plot
	$(BIN)/rlhf-lab quickstart $(ARGS)

app: .venv/.app ## compare the models side by side and vote
	$(BIN)/python app.py $(ARGS)

test: .venv/.dev ## everything but the slow tests
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: .venv/.dev ## the tests that take minutes
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=0 $(ARGS)

docs: .venv/.dev ## the notebooks as a site in _docs
	$(BIN)/python .ci/docs.py

bench: .venv/.dev ## how fast it is here; ARGS="…" goes to each script
	set -e; for name in layers generate train; do echo "== $$name"; $(BIN)/python bench/$$name.py $(ARGS); done

notebooks: .venv/.dev ## run the notebooks and keep what they show; ARGS="33 34" only these
	$(BIN)/python .ci/notebooks.py $(ARGS)

readme: .venv/.dev ## README.md from nbs/index.ipynb; ARGS=runs/quickstart shows that run
	$(BIN)/python .ci/readme.py $(ARGS)

constraints: .venv/.dev ## pin every dependency anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --upgrade --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links pyproject.toml -o constraints.txt

clean: ## remove what was built (not runs, not downloads)
	rm -rf .venv _proc _docs build dist *.egg-info .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# uv is quick; where its way of finding packages fails (a mirror that only pip knows of), pip does the same.
.venv/.%: pyproject.toml constraints.txt $(BIN)/uv
	$(BIN)/uv pip install --python $(BIN)/python --constraints constraints.txt --editable '.[$*]' \
	  || $(BIN)/python -m pip install --constraint constraints.txt --editable '.[$*]'
	@touch $@

$(BIN)/uv: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv

# Debian splits ensurepip off: then a pip from outside fills the environment.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'error: no Python 3.11, 3.12 or 3.13 on PATH; install one, or name it: make PYTHON=/path/to/python3.12' >&2; exit 2; }
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; } \
	  || { rm -rf .venv; echo 'error: $(PYTHON) cannot make an environment; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 2; }
