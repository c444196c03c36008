# Two commands for a fresh machine: `make demo` and `make test`. Each makes .venv first, once.
#
#   make test PYTHON=python3.12          the interpreter .venv is made with
#   make test TORCH=torch==2.12.0        another torch
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu    no GPU: a smaller download
#   make demo VENV=system                no .venv: run on what $(PYTHON) has, install nothing
#   make demo ARGS="--json out.json"     arguments for the command itself
#   make test JOBS=4                     test files side by side in so many processes; JOBS= for one

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
TORCH_INDEX ?=

LINKS := build/dev
PAGES := build/pages
SOURCES := pyproject.toml setup.py

ifeq ($(VENV),system)
# -P keeps the current folder off the path: it holds auxstream/ without the folders that belong below it.
JOBS ?=
RUN := PYTHONPATH="$(CURDIR)/$(LINKS)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON) -P
else
JOBS ?= 2
RUN := $(VENV)/bin/python -P
endif
PIP := $(VENV)/bin/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help demo test lint docs dev clean ready-demo ready-test ready-lint ready-docs always

help:
	@echo "make demo    the main job: a MoE model, one stream against two, in one table   (ARGS=...)"
	@echo "make test    the tests                                                         (ARGS=...)"
	@echo "make lint    ruff, and pyright on the library"
	@echo "make docs    the documentation as pages, with the API reference: build/site/index.html"
	@echo "make dev     links under $(LINKS)/auxstream, for editors and type checkers"
	@echo "make clean   remove .venv and build"
	@echo "with         PYTHON=$(PYTHON)  TORCH=$(TORCH)  VENV=$(VENV) (or VENV=system)"

demo: ready-demo
	@echo "auxstream: running the demo"
	@$(RUN) -m auxstream demo $(ARGS)

test: ready-test
	@echo "auxstream: running the tests"
	@$(RUN) -m pytest $(if $(JOBS),-n $(JOBS) --dist loadfile) $(ARGS)

lint: ready-lint dev
	@failed=0; \
	echo "auxstream: ruff"; $(RUN) -m ruff check . || failed=1; \
	echo "auxstream: pyright"; $(RUN) -m pyright --pythonpath "$$($(RUN) -c 'import sys; print(sys.executable)')" || failed=1; \
	exit $$failed

# Laid out as in the repository, so that one link serves both; a dead one is an error.
docs: ready-docs dev
	@echo "auxstream: building the documentation"
	@mkdir -p $(PAGES)
	@for source in README.md ARCHITECTURE.md docs examples bench; do \
	  [ -L "$(PAGES)/$$source" ] || ln -s "../../$$source" "$(PAGES)/$$source"; done
	@$(RUN) -m mkdocs build --strict $(ARGS)
	@echo "auxstream: build/site/index.html"

dev:
	@mkdir -p $(LINKS)/auxstream
	@for link in $(LINKS)/auxstream/*; do \
	  if [ -L "$$link" ] && [ ! -e "$$link" ]; then rm "$$link"; fi; done
	@for source in auxstream/*.py auxstream/py.typed runtime capture kernels bench; do \
	  link="$(LINKS)/auxstream/$${source##*/}"; \
	  if [ -e "$$source" ] && [ ! -L "$$link" ]; then ln -s "../../../$$source" "$$link"; fi; done

clean:
	rm -rf .venv build

# -- what a command needs -------------------------------------------------------------------------------------------

ifeq ($(VENV),system)

define CHECK
import importlib.metadata, importlib.util, sys
version, make = sys.version_info[:2], "make " + sys.argv[1]
if version < (3, 11):
    sys.exit("auxstream: Python >= 3.11 is needed and this is %d.%d: %s VENV=system PYTHON=python3.12" % (*version, make))
def found(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
wanted = {"torch": "torch>=2.11", "numpy": "numpy", "tqdm": "tqdm", "rich": "rich", "yaml": "pyyaml"}
if sys.argv[1] in ("demo", "test"):
    wanted.update({"transformers": "transformers>=5.17", "iree.compiler": "iree-base-compiler>=3.13"})
if sys.argv[1] == "test":
    wanted.update(pytest="pytest")
if sys.argv[1] == "lint":
    wanted = {"ruff": "ruff", "pyright": "pyright[nodejs]"}
if sys.argv[1] == "docs":
    wanted = {"mkdocs": "mkdocs>=1.6,<2", "mkdocstrings_handlers.python": "mkdocstrings[python]", "pygments": "pygments"}
useful = {"hypothesis": "the tests that need it are left out", "pytest_timeout": "tests run without time limits"}
if "torch" in wanted and found("torch"):
    import torch
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        sys.exit("auxstream: torch >= 2.11 is needed, %s has %s. Upgrade it, or let make build a .venv: %s" % (
            sys.executable, torch.__version__, make))
    if torch.cuda.is_available():
        wanted.update({"cuda.bindings": "cuda-bindings>=12.9", "triton": "triton>=3.6"})
missing = [package for module, package in wanted.items() if not found(module)]
if missing:
    sys.exit("auxstream: %s lacks %s.\n  pip install %s\n  or, without VENV=system, let make build a .venv: %s" % (
        sys.executable, ", ".join(missing), " ".join("'%s'" % name for name in missing), make))
for module, loss in useful.items():
    if sys.argv[1] == "test" and not found(module):
        print("auxstream: %s is not installed: %s" % (module.replace("_", "-"), loss))
print("auxstream: using %s (VENV=system), installing nothing" % sys.executable)
endef
export CHECK

ready-demo ready-test ready-lint ready-docs: dev
	@$(PYTHON) -c "$$CHECK" $(@:ready-%=%)

else

ready-demo: $(VENV)/.demo
ready-test: $(VENV)/.test
ready-lint: $(VENV)/.lint
ready-docs: $(VENV)/.docs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "auxstream: Python >= 3.11 is needed and '$(PYTHON)' is not. Name one that is: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "auxstream: '$(PYTHON)' cannot make virtual environments: its venv or ensurepip module is missing."; \
	  echo "  Debian, Ubuntu: apt-get install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; \
	  echo "  or name another interpreter: make PYTHON=python3.12 ..."; exit 1; }
	@echo "auxstream: making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# Rewritten only when TORCH changes: another torch is installed, the same one is not.
$(VENV)/.torch-wanted: always | $(VENV)/bin/python
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

# Torch comes first and alone: everything after it takes the torch it finds.
$(VENV)/.torch: $(VENV)/.torch-wanted
	@echo "auxstream: installing $(TORCH) (the longest step, once)"
	@$(PIP) '$(TORCH)'
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	@echo "auxstream: installing auxstream, editable, and what the demo needs"
	@$(PIP) -e '.[hf]' '$(TORCH)'
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	@echo "auxstream: installing auxstream, editable, and what the tests need"
	@$(PIP) -e '.[hf,test]' '$(TORCH)'
	@touch $@

$(VENV)/.lint: $(VENV)/.torch $(SOURCES)
	@echo "auxstream: installing auxstream, editable, ruff and pyright"
	@$(PIP) -e '.[hf,dev]' '$(TORCH)'
	@touch $@

# Pages are made of the source as text: neither torch nor auxstream itself is installed for them.
define DOCS
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
endef
export DOCS

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	@echo "auxstream: installing what the documentation is built with"
	@$(PIP) $$($(VENV)/bin/python -c "$$DOCS")
	@touch $@

endif
