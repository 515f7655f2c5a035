# make demo   sets up .venv and trains a small DenseNet-BC on real handwritten digits
# make test   adds to .venv what the tests need, and runs them
# make test-faults   kills real runs again and again: slower
# make test-gpu      what needs a GPU; says so where there is none

# python3, or where that does not fit, the newest that does
FITS = import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit(f"Python 3.11 to 3.14 is needed, and {sys.executable} \
is {sys.version.split()[0]}: install one of them, and name it by make PYTHON=...")
PYTHON ?= $(or $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
    if $$python -c '$(FITS)' 2>/dev/null; then echo $$python; break; fi; done),python3)
DEMO = work/demo

.PHONY: demo test test-faults test-gpu lint

demo: .venv/requirements
	.venv/bin/python train.py --dataset digits --depth 16 --growth-rate 8 --epochs 10 --batch-size 32 --drop-rate 0 --save $(DEMO) --force
	.venv/bin/python evaluate.py $(DEMO)
	@ls $(DEMO)/*.png

test: .venv/requirements-test lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadgroup

test-faults: .venv/requirements-test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -m faults

test-gpu: .venv/requirements-test
	@.venv/bin/python -m pytest -n 6 -m gpu

lint: .venv/requirements-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/requirements-test: requirements.txt

.venv/%: %.txt
	@$(PYTHON) -c '$(FITS)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --requirement $<
	touch $@
