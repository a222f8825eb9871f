# `make run` starts the service, `make test` checks everything. Both create .venv and install
# requirements.lock into it first; once that is done, the stamp file lets them skip it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help

PORT ?= 8000
PRESET ?= toybox
TEST_LIMIT ?= 20m
PYTHON_CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)
# With PyTorch for the CPU: 2.5 stay in .venv, 0.2 are caches of `make test`, and pip keeps the wheels beside them while it
# installs. The CUDA libraries of PyTorch, where pip brings them, come on top.
NEEDED_GB := 4

VENV := .venv
# The folder is part of the fingerprint because an editable install holds its path.
FINGERPRINT := $(shell { cat requirements.lock pyproject.toml; pwd; } | sha256sum | cut -c 1-16)
STAMP := $(VENV)/installed-$(FINGERPRINT)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

.PHONY: run
run: port $(STAMP)  ## start the service and print the address of the chat page [PORT=8000 PRESET=toybox]
	@exec $(VENV)/bin/patchbay serve --preset "$(PRESET)" --host 127.0.0.1 --port "$(PORT)"

.PHONY: test
test: $(STAMP) chromium  ## run ruff, mypy and pytest [TEST_LIMIT=20m]
	@$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy
	# One thread per process leaves the second core to Ray's workers. No test may need a model hub.
	export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
	# SIGINT makes pytest say where it hung and end the fixtures' processes.
	timeout --signal=INT --kill-after=60s "$(TEST_LIMIT)" $(VENV)/bin/python -m pytest || {
		code=$$?
		if [ $$code = 124 ] || [ $$code = 137 ]; then
			echo "make test: pytest ran longer than TEST_LIMIT=$(TEST_LIMIT). Free the machine, or raise it: make test TEST_LIMIT=60m" >&2
		fi
		exit $$code
	}

.PHONY: format
format: $(STAMP)  ## let ruff mend formatting and imports
	@$(VENV)/bin/python -m ruff check --fix .
	$(VENV)/bin/python -m ruff format .

.PHONY: lock
lock: $(STAMP)  ## write what .venv holds into requirements.lock
	@{ echo '# Everything that running and testing Patchbay installs, pinned. Written by `make lock`.'
	  $(VENV)/bin/python -m pip freeze --all --exclude pip --exclude patchbay | sed 's/+.*//' | LC_ALL=C sort -f
	} > requirements.lock.new
	mv requirements.lock.new requirements.lock

.PHONY: port
port:
	@if (exec 3<> "/dev/tcp/127.0.0.1/$(PORT)") 2> /dev/null; then
		echo "make run: port $(PORT) on 127.0.0.1 is taken by another program. Stop it, or choose another port: make run PORT=$$(($(PORT) + 1))" >&2
		exit 1
	fi

.PHONY: chromium
chromium:
	@if command -v chromium > /dev/null; then exit 0; fi
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
		echo "Installing Chromium for the browser tests"
		export DEBIAN_FRONTEND=noninteractive
		apt-get -qq update && apt-get -qq -y -o DPkg::Lock::Timeout=300 install --no-install-recommends chromium fonts-dejavu-core > /dev/null || true
	fi
	if ! command -v chromium > /dev/null; then
		echo "make test: no 'chromium' on PATH, so the browser tests will be skipped. Install your distribution's chromium package to run them." >&2
	fi

$(STAMP):
	@if ! $(VENV)/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
		for python in $(PYTHON_CANDIDATES) none; do
			if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then break; fi
		done
		if [ "$$python" = none ]; then
			last=$(lastword $(PYTHON_CANDIDATES))
			echo "make: found $$(command -v "$$last" > /dev/null && "$$last" --version 2>&1 || echo "no $$last"); Patchbay needs Python 3.11 or newer. Install it, or say where it is: make run PYTHON=/path/to/python3.11" >&2
			exit 1
		fi
		if ! "$$python" -c 'import ensurepip, venv' 2> /dev/null; then
			echo "make: $$python cannot create a virtual environment, because its venv or ensurepip module is missing. Install it (on Debian and Ubuntu: the python3-venv package)." >&2
			exit 1
		fi
		free_kb=$$(df -Pk . | awk 'NR == 2 {print $$4}')
		if [ "$$free_kb" -lt $$(($(NEEDED_GB) * 1024 * 1024)) ]; then
			echo "make: $$((free_kb / 1024)) MB are free in $$PWD; installing takes about $(NEEDED_GB) GB, of which 2.5 stay (more where pip brings PyTorch with CUDA). Make room, or put the checkout on another disk." >&2
			exit 1
		fi
		"$$python" -m venv --clear $(VENV)
	fi
	echo "Installing requirements.lock into $(VENV); the first time takes a few minutes"
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.lock || {
		echo "make: the installation failed; pip says why above. Free disk space here: $$(df -Ph . | awk 'NR == 2 {print $$4}'). What was downloaded is kept: run the same command again." >&2
		exit 1
	}
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/installed-*
	touch $@
