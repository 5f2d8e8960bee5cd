# Everything runs through $(VENV)/bin/python; nothing has to be activated. `make help` lists the targets.

VENV ?= .venv
PYTHON ?=
PIP_ARGS ?=
ARGS ?=
PROCESSES ?= 2

RUN := $(VENV)/bin/python
# A stamp says that the environment is as new as the two files that describe it. It goes before an install begins, so a
# broken install is tried again. The second one adds what tests and checks need.
INSTALLED := $(VENV)/.installed
DEVELOPMENT := $(VENV)/.installed-development
INTEGRATIONS := $(VENV)/.installed-integrations
INSTALL = $(RUN) -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup train-normal train-stable train-safe train-stable-multi train-semantic-recommendation \
	train-semantic-recommendation-safe test test-mutants test-integrations checks clean

help: ## list the targets
	@echo "usage: make TARGET [ARGS=\"key=value ...\"] [PYTHON=python3.11] [VENV=.venv] [PIP_ARGS=...]"
	@grep -hE '^[a-z-]+:.*## ' Makefile | while IFS= read -r line; do \
	  printf '  %-34s %s\n' "$${line%%:*}" "$${line##*## }"; done
	@echo 'ARGS go to the program or to pytest: make train-safe ARGS="precision=bf16 seed=3"'

setup: $(INSTALLED) ## create the environment and install stabletrain into it
	@echo "ready: $(RUN) -m stabletrain"

train-normal: $(INSTALLED) ## train the digits network with the preset normal
	@$(RUN) -m stabletrain +preset=normal $(ARGS)

train-stable: $(INSTALLED) ## train it with the preset stable
	@$(RUN) -m stabletrain +preset=stable $(ARGS)

train-safe: $(INSTALLED) ## train it with the preset safe
	@$(RUN) -m stabletrain +preset=safe $(ARGS)

train-stable-multi: $(INSTALLED) ## train it with the preset stable on PROCESSES=2 processes
	@$(RUN) -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES) -m stabletrain +preset=stable parallel=ddp $(ARGS)

train-semantic-recommendation: $(INSTALLED) ## train the recommender of the next item with the preset stable
	@$(RUN) -m stabletrain +experiment=semantic_recommendation +preset=stable $(ARGS)

train-semantic-recommendation-safe: $(INSTALLED) ## train it with the preset safe
	@$(RUN) -m stabletrain +experiment=semantic_recommendation +preset=safe $(ARGS)

test: $(DEVELOPMENT) ## run the tests and the examples in docstrings
	@$(RUN) -m pytest -q -n 3 --dist worksteal $(ARGS)

test-mutants: $(DEVELOPMENT) ## leave out each statement of the guard in turn: some test has to fail (half an hour)
	@MUTANTS=all $(RUN) -m pytest -q -n 2 --dist worksteal tests/guard/test_mutation.py $(ARGS)

test-integrations: $(INTEGRATIONS) ## test the adapters for Lightning, Hugging Face and Accelerate
	@$(RUN) -m pytest -q -n 3 --dist worksteal -o addopts="--doctest-modules --import-mode=importlib --strict-markers -ra" \
	  tests/integrations src/stabletrain/integrations $(ARGS)

checks: $(DEVELOPMENT) ## lint, formatting, types, layers
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(RUN) -m pytest -q tests/test_layers.py

clean: ## remove the environment, caches and built files (never runs/)
	rm -rf "$(VENV)" build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests conf -name __pycache__ -type d -prune -exec rm -rf {} +

# The interpreter is chosen by running it, since one that is found needn't work. Without PYTHON=, an environment that is
# there and works keeps its own.
WORKS := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
ENOUGH := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))

$(INSTALLED): pyproject.toml constraints.txt
	@rm -f "$@"
	@if [ -n "$(PYTHON)" ] || ! $(RUN) -c "$(ENOUGH)" 2>/dev/null || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
	  chosen=; bare=; \
	  for candidate in $(or $(PYTHON),python3.11 python3 python3.13 python3.12 python3.10); do \
	    if "$$candidate" -c "$(WORKS)" >/dev/null 2>&1; then chosen=$$candidate; break; fi; \
	    if "$$candidate" -c "$(ENOUGH)" >/dev/null 2>&1; then bare=$${bare:-$$candidate}; fi; \
	  done; \
	  if [ -z "$$chosen" ] && [ -n "$$bare" ]; then \
	    echo "missing: $$bare has no venv or ensurepip; install its package (Debian: python3-venv), or give PYTHON=" >&2; exit 1; \
	  elif [ -z "$$chosen" ]; then \
	    echo "missing: a working Python 3.10 to 3.13 (tried: $(or $(PYTHON),python3.11 python3 python3.13 python3.12 python3.10)); install one, or give PYTHON=/path/to/python3" >&2; exit 1; \
	  fi; \
	  "$$chosen" -m venv --clear "$(VENV)" || exit 1; \
	fi
	@echo "installing into $(VENV) (once; a few minutes, torch is large)"
	@$(INSTALL) -e .
	@touch "$@"

$(DEVELOPMENT): $(INSTALLED)
	@rm -f "$@"
	@echo "installing what tests and checks need"
	@$(INSTALL) -e '.[dev]'
	@touch "$@"

$(INTEGRATIONS): $(DEVELOPMENT)
	@rm -f "$@"
	@echo "installing Lightning, Transformers and Accelerate"
	@$(INSTALL) -e '.[integrations]'
	@touch "$@"
