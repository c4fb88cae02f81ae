# make up ARGS="--port 9000 --no-tour" hands its words on to `ondol up`; test and bench do alike.
.PHONY: install up test check bench clean

install:
	@scripts/install

up: install
	@.venv/bin/ondol up $(ARGS)

test:
	@scripts/install --dev
	@scripts/test $(ARGS)

check:
	@scripts/install --dev
	@scripts/check

bench:
	@scripts/install --dev
	@scripts/bench $(ARGS)

clean:
	rm -rf .venv .ondol .cache build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
