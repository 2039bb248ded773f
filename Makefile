# Two commands: `make quickstart` and `make test`. Both install what they need and cost
# nothing the second time. Tests run in two lanes: `test` covers every promise of the README's
# table of claims in minutes, `test-long` what cannot be made small. Compiled programs are kept in
# .cache, which the next run reads.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
BENCH = runs/bench$(if $(FULL),-full)
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: quickstart test test-long ablation bench bench-gpu plan-all lint format clean

quickstart: $(VENV)/.installed
	$(BIN)/layerskip quickstart --workdir=$(RUN)

test: $(VENV)/.installed-test lint
	$(PYTEST) -m "not slow" tests

test-long: $(VENV)/.installed-test
	$(PYTEST) -m slow tests

# Five runs of one small model; QUICK=1 trains hardly at all; SIZE=100m for a GPU, with
# SOURCE=FOLDER of text.
ablation: $(VENV)/.installed
	$(BIN)/python benchmarks/ablation.py $(if $(QUICK),--quick) --size=$(or $(SIZE),small) \
	    --workdir=$(or $(WORKDIR),runs/ablation$(if $(QUICK),-quick)) \
	    --source=$(or $(SOURCE),stdlib)

# Every benchmark, one after the other, at most three minutes each; FULL=1 as docs/benchmarks.md
# has them. The tests' environment has torch to compare with.
bench: $(VENV)/.installed-test
	mkdir -p $(BENCH)
	set -e; for name in train_step train_mfu attention decode guards feed; do \
	    $(BIN)/python benchmarks/$$name.py $(if $(FULL),,--quick) --json=$(BENCH)/$$name.json; done

# Every target of every recipe, compiled for its TPUs without one, LayerSkip and plain.
plan-all: $(VENV)/.installed-test
	$(BIN)/python -m layerskip_jax plan --all --json=plans.json

# The same in full on the device that jax finds.
bench-gpu: bench
bench-gpu: FULL := 1

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	sys.exit(0 if v in ((3, 11), (3, 12)) else \
	"layerskip_jax needs Python 3.11 or 3.12, and %s is %d.%d; set PYTHON=python3.12" \
	% (sys.executable, *v))'
	$(PYTHON) -m venv $(VENV)

# A stamp is newer than what it was made from only when the whole installation succeeded.
# The package itself is installed as it lies here, so that $(BIN)/layerskip works from any folder;
# with the setuptools that pyproject.toml asks for at hand, which saves pip an environment of its own.
$(VENV)/.installed: requirements.txt pyproject.toml setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt 'setuptools>=77'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

clean:
	rm -rf $(VENV) .cache runs
