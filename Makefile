# Every command sets up what it needs, once, in .venv. Outside this folder only caches are written: pip's and the course's.
# Another Python: `make lab PYTHON=python3.12`. Options for the command behind it: `make train ARGS="--epochs 1"`.

ifeq ($(OS),Windows_NT)
  ifneq ($(shell printf posix),posix)
    $(error These commands need a POSIX shell: run make in Git Bash)
  endif
  PYTHON ?= python
  BIN := .venv/Scripts
else
  PYTHON ?= python3
  BIN := .venv/bin
endif

ARGS ?=
WHAT ?= all
LESSON ?= *
PY := $(BIN)/python
PINS := $(if $(filter 1,$(LOCKED)),constraints-lock.txt,constraints.txt)
LESSONS := notebooks/$(LESSON).ipynb
ELSEWHERE := tests/test_nbconvert.py tests/test_browser.py
SHARED := --numprocesses logical --maxprocesses 4 --dist loadfile
NO_NETWORK := $(foreach name,http_proxy https_proxy HTTP_PROXY HTTPS_PROXY,$(name)=http://127.0.0.1:9)
NBVAL := -p tests.lesson_memory --nbval-lax --nbval-current-env --nbval-cell-timeout 300 --nbval-sanitize-with tests/nbval.cfg
EXECUTE := --to notebook --execute --inplace --ExecutePreprocessor.timeout=300 \
  --ExecutePreprocessor.store_widget_state=False --ExecutePreprocessor.record_timing=False

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help lab doctor train test test-all thorough lint unit lessons browser notebooks site pages handout format evidence bench clean
.PHONY: setup setup-dev setup-bench setup-site lock

help:  ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

# Git Bash would take /lab/tree for a path of this machine, and rewrite it: MSYS_NO_PATHCONV stops that.
lab: setup  ## open the lessons in JupyterLab
	@MSYS_NO_PATHCONV=1 $(PY) -m jupyterlab --ServerApp.root_dir=. --ServerApp.ip=127.0.0.1 --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb \
	  $$([ "$$(id -u)" = 0 ] && echo --allow-root) $(ARGS)

# Nothing is set up for it: what keeps the set-up from working is what it is asked about.
doctor:  ## say what a bug report needs, what is wrong on this machine, and what to do
	@if [ -x $(PY) ]; then $(PY) -m utils.doctor; else "$(PYTHON)" -m utils.doctor; fi

train: setup  ## train the network on the embedded data
	@$(PY) cnn.py $(ARGS)

test: setup-dev  ## lint, unit tests, every lesson executed again, and one of them in a real browser
	@"$(MAKE)" --no-print-directory --keep-going lint unit lessons browser

test-all: setup-dev  ## all that, then what takes longer: injected faults, thousands of bad inputs, every lesson in the browser
	@"$(MAKE)" --no-print-directory --keep-going test thorough

thorough: setup-dev  ## what test-all adds to test
	@"$(MAKE)" --no-print-directory --keep-going unit browser ARGS="-m thorough $(ARGS)"

lint: setup-dev  ## the style of the code, notebooks included
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# The tests are of the code, so they run on the CPU unless CNN_DEVICE says otherwise: an accelerator may be there in name
# only, like that of a hosted macOS machine, which has no memory.
unit: setup-dev  ## the tests of the code (some of them: ARGS="-k batches")
	CNN_DEVICE="$${CNN_DEVICE:-cpu}" $(PY) -m pytest $(SHARED) tests $(patsubst %,--ignore=%,$(ELSEWHERE)) $(ARGS)

# Threads that wait for each other do so passively here: on busy cores spinning takes the time that the other one needs.
# A lesson that is only tested writes its results and figures beside the repository's own, into .cache. And it has to do
# without a network: there is no proxy where it is told to look for one, so a download fails.
lessons: setup-dev  ## execute every lesson again, and compare what it prints (one: LESSON=01_data_statistics)
	@rm -rf .cache/lessons && mkdir -p .cache/lessons/results .cache/lessons/figures
	@if [ -d results ]; then cp -R results .cache/lessons; fi
	$(NO_NETWORK) CNN_DEVICE="$${CNN_DEVICE:-cpu}" OMP_WAIT_POLICY=passive PYTHONPATH="$(CURDIR)" CNN_RESULTS_DIR="$(CURDIR)/.cache/lessons/results" \
	  CNN_FIGURES_DIR="$(CURDIR)/.cache/lessons/figures" $(PY) -m pytest $(NBVAL) $(LESSONS)

# Last, so that what was left out on a machine without a browser stands in the last lines.
browser: setup-dev  ## open a lesson in JupyterLab, in a real browser
	CNN_DEVICE="$${CNN_DEVICE:-cpu}" $(PY) -m pytest $(ELSEWHERE) $(ARGS)

notebooks: setup-dev  ## sync the lessons with their text twins and execute them (one: LESSON=01_data_statistics)
	$(PY) -m jupytext --quiet --sync notebooks/src/$(LESSON).py
	$(PY) -m ruff format --quiet $(LESSONS)
	$(PY) -m nbconvert $(EXECUTE) $(LESSONS)
	$(PY) -m jupytext --quiet --sync $(LESSONS)

site: pages  ## build the course as a static site, and serve it on this machine
	$(PY) -m http.server --bind 127.0.0.1 --directory site/html $(or $(PORT),8000)

pages: setup-site  ## build that site into site/html/, and no more
	$(PY) -m sphinx -M html . site -c docs --quiet --fail-on-warning --keep-going

handout: setup-dev  ## copy the course into handout/, its lessons without solutions and outputs, for a class
	rm -rf handout && mkdir -p handout/notebooks
	cp -R .gitattributes .gitignore binder data docs figures results utils *.cff *.md *.py *.toml *.txt *.yml LICENSE Makefile handout
	find handout -name __pycache__ -prune -exec rm -rf {} +
	$(PY) -m nbconvert --to notebook --ClearOutputPreprocessor.enabled=True --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=solution --output-dir handout/notebooks $(LESSONS)

format: setup-dev  ## sync the lessons with their text twins, then format all code
	$(PY) -m jupytext --quiet --sync notebooks/src/*.py
	-$(PY) -m ruff check --quiet --fix .
	$(PY) -m ruff format .
	$(PY) -m jupytext --quiet --sync notebooks/*.ipynb

evidence: setup  ## run every experiment that is not kept (hours; resumable; all again: ARGS=--refresh) and renew the table of claims
	@$(PY) cnn.py ablate all $(ARGS)
	@$(PY) cnn.py readme

bench: setup-bench  ## measure speed, against other loops too (a part: WHAT="loop wide")
	@$(PY) cnn.py bench $(WHAT) $(ARGS)

lock: setup  ## write constraints-lock.txt anew: the hashes of all files of the versions in constraints.txt
	$(PIP_INSTALL) uv
	{ sed '/^#/!d' constraints-lock.txt; echo 'pip>=26.1' | $(PY) -m uv pip compile - requirements-dev.txt requirements-bench.txt -c constraints.txt \
	  --universal --python-version 3.11 --generate-hashes --no-annotate --no-header --quiet; } > constraints-lock.new
	mv constraints-lock.new constraints-lock.txt

clean:  ## remove .venv and what was built; trained networks in runs/ stay, and kept downloads (python cnn.py cache)
	rm -rf .venv .venv.unfinished .cache site handout .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -prune -exec rm -rf {} +

setup:
	$(call install,.venv/installed-course.txt,requirements.txt)

setup-dev:
	$(call install,.venv/installed-dev.txt,requirements.txt requirements-cluster.txt requirements-site.txt requirements-dev.txt)
	@cat requirements.txt $(PINS) > .venv/installed-course.txt
	@cat requirements-site.txt $(PINS) > .venv/installed-site.txt

setup-bench:
	$(call install,.venv/installed-bench.txt,requirements.txt requirements-bench.txt)
	@cat requirements.txt $(PINS) > .venv/installed-course.txt

setup-site:
	$(call install,.venv/installed-site.txt,requirements-site.txt)

# $(call install,STAMP,LISTS): bring .venv up to the last of LISTS. The stamp is a copy of what was asked for, written at
# the end; an unchanged one costs no time. A .venv that was interrupted, or whose Python is gone or too old, is made anew.
# LOCKED=1 takes only files with the hashes in constraints-lock.txt: first pip, as older ones read no hashes of constraints,
# into a new .venv, as pip does not look again at what is installed.
PIP_INSTALL := $(PY) -m pip install --quiet --quiet --disable-pip-version-check
comma := ,
RIGHT_PYTHON := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
define install
@wanted="$$(cat $(2) $(PINS))"; \
usable() { [ ! -e .venv.unfinished ] $(if $(filter 1,$(LOCKED)),&& [ -e .venv/pip.txt ] )&& $(PY) -c 'import pip; $(RIGHT_PYTHON)' 2>/dev/null; }; \
if usable && [ "$$wanted" = "$$(cat $(1) 2>/dev/null)" ]; then exit 0; fi; \
if ! usable; then \
  "$(PYTHON)" -c '$(RIGHT_PYTHON)' || { \
    echo "Python 3.11 to 3.14 is needed, which $(PYTHON) is not. Name one: make lab PYTHON=/path/to/python3.12"; exit 1; }; \
  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
    echo "$(PYTHON) lacks its venv module. Install it first (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }; \
fi; \
echo "Setting up .venv from $(lastword $(2))$(if $(filter %-site.txt,$(lastword $(2))),,; torch alone is some GB, so the first time takes minutes)"; \
rm -f $(1); \
usable || { touch .venv.unfinished; "$(PYTHON)" -m venv --clear .venv || exit 1; }; \
trap 'exit 130' INT TERM; \
touch .venv.unfinished; \
$(if $(filter 1,$(LOCKED)),sed -n '/^pip==/$(comma)/[^\\]$$/p' $(PINS) > .venv/pip.txt && $(PIP_INSTALL) --require-hashes -r .venv/pip.txt && )\
$(PIP_INSTALL) -r $(lastword $(2)) -c $(PINS); \
failed=$$?; \
rm -f .venv.unfinished; \
[ $$failed = 0 ] || { echo "Set-up failed, for the reason above. When that is mended, repeat the command"; exit 1; }; \
printf '%s\n' "$$wanted" > $(1)
endef
