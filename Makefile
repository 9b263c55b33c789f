# Every command runs in the project's own environment, which `uv run` makes on first use.
RUN ?= uv run

.PHONY: check test test-gpu bench format

check:
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) pyright
	$(RUN) lint-imports

format:
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

test:
	$(RUN) pytest

test-gpu:
	$(RUN) --extra gpu pytest -m "gpu and not alone" -n 8 --dist load
	$(RUN) --extra gpu pytest -m "gpu and alone" -n 0

bench:
	$(RUN) --extra gpu python -m benchmarks.first_numbers
