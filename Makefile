# Two commands: `make quickstart` and `make test`. Both install what they need and cost
# nothing the second time. Tests run in two lanes: `test` covers every promise of the README's
# table of claims in minutes, `test-long` what cannot be made small. Compiled programs are kept in
# .cache, which the next run reads.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: quickstart test test-long ablation bench bench-gpu plan-all lint format clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m layerskip_jax quickstart --workdir=$(RUN)

test: $(VENV)/.installed-test lint
	$(PYTEST) -m "not slow" tests

test-long: $(VENV)/.installed-test
	$(PYTEST) -m slow tests

# Five runs of one small model; SIZE=100m for a GPU, with SOURCE=FOLDER of text.
ablation: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python benchmarks/ablation.py --workdir=$(or $(WORKDIR),runs/ablation) \
	    --size=$(or $(SIZE),small) --source=$(or $(SOURCE),stdlib)

bench: $(VENV)/.installed
	PYTHONPATH=. $(BIN)/python benchmarks/train_step.py --json=train_step.json

# Every target of every recipe, compiled for its TPUs without one, LayerSkip and plain.
plan-all: $(VENV)/.installed-test
	$(BIN)/python -m layerskip_jax plan --all --json=plans.json

# The benchmarks on the device that jax finds; the tests' environment has torch to compare with.
bench-gpu: $(VENV)/.installed-test
	PYTHONPATH=. $(BIN)/python benchmarks/train_step.py --json=train_step.json
	PYTHONPATH=. $(BIN)/python benchmarks/train_mfu.py --json=train_mfu.json
	PYTHONPATH=. $(BIN)/python benchmarks/decode.py --json=decode.json

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
$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

clean:
	rm -rf $(VENV) .cache runs
