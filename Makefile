# make            the environment in .venv (the first time takes minutes, then it is a no-op)
# make demo       optimize a real sentence transformer, end to end; RESUME=1 goes on with an interrupted run
# make test       lint, format, types and the whole test suite, without network
# make clean      remove what these targets made

PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/installed
OUT    ?= runs/demo

.PHONY: install demo test clean
.DEFAULT_GOAL := install

install: $(STAMP)

# torch first and pinned: pip then settles for the build it is offered instead of fetching the largest one.
$(STAMP): pyproject.toml constraints.txt .ci/venv
	@PYTHON="$(PYTHON)" .ci/venv .venv
	@touch $@

demo: $(STAMP)
	@$(if $(RESUME),,rm -rf $(OUT))
	$(BIN)/perjoule optimize examples/minilm.py --keep 99% --out $(OUT) $(if $(RESUME),--resume)

# Lint, format and types are tests too (tests/test_house.py), so the last line always counts everything.
test: export HF_HUB_OFFLINE = 1
test: export TOKENIZERS_PARALLELISM = false
test: $(STAMP)
	@$(BIN)/python -m pytest -n 2 --dist worksteal -q tests

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis $(OUT)
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
