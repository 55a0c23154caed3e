# make demo   sets up .venv, pre-trains on real images, prints what was reached (DATA=DIR: on images of your own)
# make test   sets up .venv, checks the code's form and runs the tests
# make check  the same without the tests that run a script or several processes, to be run every few minutes
# make bench  measures what is faster here than in the published code, into benchmarks/results.md (and results_gpu.md)
# make replicate  compares PCL with MoCo on CIFAR-10 and Fashion-MNIST, in hours, into benchmarks/replication/
#             (DATA=DIR: on images of your own, into replication/; QUICK=1: in minutes, to see that it works)

PYTHON ?= python3
DATA ?=
QUICK ?=

.PHONY: demo test check bench replicate format

demo: .venv/installed
	.venv/bin/python benchmarks/demo.py $(if $(DATA),--data "$(DATA)")

test: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder

check: .venv/installed
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -q -n 3 --dist loadscope --no-loadscope-reorder -m "not slow and not dist"

bench: .venv/installed
	.venv/bin/python benchmarks/bench.py
	.venv/bin/python benchmarks/gpu.py

replicate: .venv/installed
	@failed=0; \
	for part in "" $(if $(DATA)$(QUICK),,"--dataset fashion" --resnet8 "--resnet8 --dataset fashion"); do \
	    .venv/bin/python benchmarks/replicate.py $$part $(if $(DATA),--data "$(DATA)") $(if $(QUICK),--quick) || failed=$$?; \
	    test $$failed -lt 128 || break; \
	done; exit $$failed

format: .venv/installed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@
