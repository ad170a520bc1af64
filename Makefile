# The two commands of a fresh machine: `make search` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: search test test-cluster test-faults test-gpu check audit bench docs reference clean

search: $(INSTALLED)
	$(BIN)/sft-ray search experiments/quickstart.yaml

# Processes share the files of tests, the long ones first; each has a Ray, so they are few.
test: $(INSTALLED)
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Slow tests on a real Ray cluster, which `make test` leaves out.  Hosts of their own need root, sshd
# and rsync, which Debian and its kin get here; elsewhere those tests skip, and say why.
test-cluster: $(INSTALLED)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && \
		! { command -v rsync && test -x /usr/sbin/sshd; } > /dev/null; then \
		apt-get update -qq; apt-get install -yqq openssh-server rsync || true; fi
	$(BIN)/pytest -m cluster

# Kills parts of running searches at random moments; goes on where it was stopped.
FAULTS := $(or $(TMPDIR),/tmp)/sft_ray-faults
test-faults: $(INSTALLED)
	$(BIN)/python -m benchmarks.faults --folder $(FAULTS) --out $(FAULTS)/faults.jsonl

test-gpu: $(INSTALLED)
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU: its driver is too old, or it was built without CUDA")'
	$(BIN)/pytest -m gpu

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Known weaknesses of the pinned dependencies; the tool has an environment of its own.
audit:
	test -x .venv-audit/bin/pip-audit || ($(PYTHON) -m venv .venv-audit && \
		.venv-audit/bin/python -m pip install --quiet pip-audit)
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.slot_overhead

# The pages of docs/ as a site in site/.
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

# docs/reference.md from the code.
reference: $(INSTALLED)
	$(BIN)/python docs/make_reference.py

# constraints.txt holds the versions the tests ran with; the extras bring the quickstart's model,
# the test tools and the linters.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[quickstart,onnx,serve,tracking,docs,test,dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .venv-audit build site *.egg-info
