.DEFAULT_GOAL := help
.PHONY: help demo test docs lint setup clean

# horovodrun and mpirun find each other, and python, through PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# What follows ## is the help text.
help: ## show this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  ARGS=... goes to the demo or to pytest: make test ARGS='-k qsgd'"

demo: setup ## train a small model with and without compression
	@.venv/bin/python examples/demo.py $(ARGS)

test: lint ## lint, then run the tests
	.venv/bin/python -m pytest $(ARGS)

docs: setup ## build the documentation into site/, warnings are errors
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict
	@echo "Open $(CURDIR)/site/index.html"

lint: setup ## check style, formatting and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy hvd_qsgd

setup: ## make or update .venv; all others do this themselves
	@tools/setup_environment.sh

clean: ## remove what was built or cached here, except .venv
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
