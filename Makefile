# Needs Python 3.11 or newer, make and a package index; `make help` says what there is to make.
#
# PyTorch is installed by name, which on Linux may mean the large CUDA build; it runs on a CPU too.
# To choose, name PyTorch's own index for a build (its path ends in /cpu, /cu130, ...):
#
#     make install TORCH_INDEX=URL
#
# LAUNCHER=joblib runs several cells at a time, LAUNCHER=slurm or ray each as a job; further options
# of a launcher may follow: LAUNCHER='joblib launcher.jobs=4'.
#
# SCALE=paper makes a table of the paper's own checkpoints on ScienceQA: see docs/paper-scale.md.

PYTHON ?= python3
TORCH_INDEX ?=
SCALE ?= miniature
LAUNCHER ?= here
BUDGET ?= 6
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/installed

# Any other scale than the default is an option, and has results of its own (conf/scale).
OPTION := $(if $(filter-out miniature,$(SCALE)), scale=$(SCALE))
WHERE := $(if $(filter-out here,$(LAUNCHER)), launcher=$(LAUNCHER))
RESULTS := results$(if $(OPTION),/$(SCALE))

# Runs what is missing of an experiment, then makes its table of what is recorded.
define table
$(BIN)/python run.py -m experiment=$(1)$(OPTION)$(WHERE)
$(BIN)/python -m qvlm.tables.$(1) --runs $(RESULTS)/runs --out $(RESULTS) \
	--command 'make $(1)$(if $(OPTION), SCALE=$(SCALE))'
endef

.DEFAULT_GOAL := help
.PHONY: help install preflight table1 table2 table4 table4-scale table5 gpu claims figure2 fit test \
	lint format miniature mini_llava mini_moe_llava preview clean

help:  ## lists these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## makes the environment in .venv with pinned packages

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) -e '.[dev]'
	touch $@

table1: install  ## regenerates Table 1: the parts of Q-VLM, each alone
	$(call table,$@)

table2: install  ## regenerates Table 2: models x methods x bits; reuses what is recorded
	$(call table,$@)

table5: install  ## regenerates Table 5: entropy against quantization error as proxy
	$(call table,$@)

table4: install  ## measures packed models: seconds, memory, accuracy
	for name in table4 table4_exact; do $(BIN)/python run.py -m experiment=$$name$(WHERE) || exit; done
	$(BIN)/python experiments/table4.py

table4-scale: install  ## measures time and memory of the true architectures, random weights
	$(BIN)/python experiments/table4_scale.py

gpu: install  ## measures packed models, kernels and methods on a GPU; goes on where it stopped
	$(BIN)/python experiments/gpu.py

fit: install  ## what each model takes at each bit width, and whether it fits BUDGET (GiB)
	@$(BIN)/python -m qvlm.fit --budget $(BUDGET)

preflight: install  ## says what Table 2 would read, need and take; try SCALE=paper
	$(BIN)/python run.py -m experiment=table2$(OPTION) preflight=true

claims: install  ## which claims of the paper hold, over questions and over calibration draws
	for name in table2 table1 table5 draws; do $(BIN)/python run.py -m experiment=$$name$(WHERE) || exit; done
	$(BIN)/python experiments/claims.py

figure2: install  ## draws what a joint search gains against the dependency of layers
	$(BIN)/python experiments/dependency_figure.py

test: install  ## runs the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: install  ## checks style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy qvlm hydra_plugins run.py experiments

format: install  ## rewrites the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

miniature: install  ## trains both embedded models from nothing (up to two hours; goes on where it stopped)
	$(MAKE) --no-print-directory -j 2 mini_llava mini_moe_llava

# Products this small gain nothing from a second thread, so the two share the cores.
mini_llava mini_moe_llava: install
	$(BIN)/python experiments/train_miniature.py --model $@ --threads 1

preview: install  ## writes a contact sheet of generated problems, per skill
	$(BIN)/python -m qvlm.data.preview

clean:  ## removes the environment and all caches; results stay
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
