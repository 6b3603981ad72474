# Two commands from nothing, on a Debian machine with Python 3.10 or later: "make demo" and "make test".
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --retries 10
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --retries 10

.PHONY: help demo test test-browser test-vllm lint docs docs-serve dist test-dist clean
help:
	@echo "make demo   install, fetch the base model, and show the base and the routed model side by side"
	@echo "make test   install, then run linters, type checker and tests"
	@echo "make test-browser  install the browser's driver, then test the playground in chromium"
	@echo "make test-vllm  install the engine vLLM (CPU build) in an environment of its own, then run its tests"
	@echo "make lint   linters and type checker alone"
	@echo "make docs   build the documentation site in docs/_build/html; warnings are errors"
	@echo "make docs-serve  the same, shown at http://127.0.0.1:8000 and built again after each change"
	@echo "make dist   build wheels and sdists of both distributions in dist, and check them"
	@echo "make test-dist  build them, install the wheels into an empty environment, and run spectr demo there"
	@echo "make clean  delete the environment and what the commands wrote"

demo: $(VENV)/.demo
	$(BIN)/spectr demo

# One process a core, each with one thread; a file's tests mostly run in one, and share what they make. At the end, idle
# processes take over half of what the others still have: by file, a long one would leave a core idle.
test: $(VENV)/.test lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal

test-browser: $(VENV)/.test
	@command -v "$${SPECTR_CHROMIUM:-chromium}" >/dev/null || { echo "no chromium here: apt-get install chromium, or set SPECTR_CHROMIUM to one"; exit 1; }
	@$(PIP) -c requirements/constraints.txt playwright
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m browser tests/serving/playground

# The engine pins a torch of its own. Packages of images and sound do not fit that CPU build, and break model loading.
test-vllm: $(VLLM_VENV)/.test
	HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm

$(VLLM_VENV)/.test: pyproject.toml requirements/vllm.txt
	@echo "· making an environment in $(VLLM_VENV), several gigabytes"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) -r requirements/vllm.txt
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM_PIP) -e ".[models]"
	@touch $@

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.test
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

docs-serve: $(VENV)/.test
	$(BIN)/sphinx-autobuild --ignore "*/reference/generated/*" --watch src --watch README.md --watch CHANGELOG.md docs docs/_build/html

dist: $(VENV)/.test
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist experts
	$(BIN)/twine check --strict dist/*

# In an empty folder, where no checkout is near: the wheels have to be enough.
test-dist: dist
	rm -rf .venv-dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip --disable-pip-version-check install --quiet --retries 10 -r requirements/torch.txt
	.venv-dist/bin/python -m pip --disable-pip-version-check install --quiet --retries 10 \
		-c requirements/constraints.txt --find-links dist "spectr-lora[demo]==$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)"
	folder=$$(mktemp -d) && cd $$folder && $(CURDIR)/.venv-dist/bin/spectr demo && test -s out/routing.png && test -s out/routing.html; \
		code=$$?; rm -rf $$folder; exit $$code

# torch first and pinned: a range would pull a CUDA build of several gigabytes.
$(VENV)/.torch: requirements/torch.txt
	@echo "· making an environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "· installing torch (CPU build)"
	@$(PIP) -r requirements/torch.txt
	@touch $@

# The extra "demo" without its experts, which a clone has in experts/.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml requirements/constraints.txt
	@echo "· installing spectr"
	@$(PIP) -c requirements/constraints.txt -e ".[models,plots]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml requirements/constraints.txt
	@echo "· installing spectr with what its tests need"
	@$(PIP) -c requirements/constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) $(VLLM_VENV) .venv-dist dist docs/_build docs/reference/generated out .pytest_cache .ruff_cache
