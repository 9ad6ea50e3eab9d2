# Each target sets up what it needs on a fresh machine: see scripts/install.
#   make demo                          the bundled model inside a quarter of its experts' memory
#   make test ARGS='-m "not slow"'     the tests; ARGS go to pytest
#   make check                         ruff, mypy --strict
#   make bench                         the measurements of the README's tables (long)
#   make ... PYTHON=/path/to/python3   with another interpreter
VENV ?= .venv
export VENV PYTHON
ARGS ?=

.PHONY: demo test check bench install clean

install:
	@scripts/install "$(VENV)"

demo: install
	"$(VENV)/bin/moe-runtime" demo $(ARGS)

test: install
	scripts/test $(ARGS)

check: install
	scripts/check $(ARGS)

bench: install
	scripts/bench $(ARGS)

clean:
	rm -rf "$(VENV)" .venv-oldest .typecheck build
