"""run_glue.py as its users run it: every source of data, every refusal, and what is left on disk."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from glue_fixtures import (
    csv_file,
    save_tiny_decoder,
    save_tiny_model,
    sentence_pairs,
    write_csv,
    write_json_lines,
    write_parquet,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from increlora_hf import IncreLoraArguments, IncreLoraConfig
from increlora_hf.tasks.flags import ModelArguments, ScriptArguments, parse_flags
from increlora_hf.tasks.help import OUR_WORDS, trainer_flags

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import run_glue  # noqa: E402
import run_squad  # noqa: E402

SETTINGS = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 4,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "increlora_interval": 1,
    "increlora_top_h": 3,
}
BUDGET = 12  # six linear layers in the tiny model's one block, r_avg 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "runs" / "out"


@pytest.fixture
def run(model, out, tmp_path, monkeypatch):
    """Run the script with `SETTINGS` and the flags given, from an empty working folder."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.chdir(tmp_path)

    def call(*flags, **settings):
        own = {"model_name_or_path": model, "output_dir": out, "cache_dir": tmp_path / "cache", **SETTINGS, **settings}
        return run_glue.main([f"--{name}={value}" for name, value in own.items() if value is not None] + list(flags))

    return call


@pytest.fixture
def refused(run, out, capsys):
    """Run the script, see that it is refused in one line, and return that line; nothing may have been written."""

    def call(*flags, **settings):
        existed = out.exists()
        with pytest.raises(SystemExit) as exit_info:
            run(*flags, **settings)
        assert exit_info.value.code == 2
        assert out.parent.exists() == existed
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("run_glue.py: error: ")
        return line

    return call


def results(out, name="all"):
    return json.loads((out / f"{name}_results.json").read_text())


# ---- Sources of data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write, suffix", [(write_csv, "csv"), (write_json_lines, "json"), (write_json_lines, "jsonl")]
)
def test_files_of_ones_own(run, out, tmp_path, write, suffix):
    path = write(tmp_path / f"rows.{suffix}", sentence_pairs(["yes", "no"]))
    metrics = run("--do_train", "--do_eval", train_file=path, validation_file=path)
    assert metrics["train_samples"] == metrics["eval_samples"] == 24
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert metrics["total_rank"] == BUDGET


def test_a_folder_of_parquet_files(run, out, tmp_path):
    columns = sentence_pairs([0, 1])
    folder = write_parquet(tmp_path / "mrpc", train=columns, validation=columns)
    metrics = run("--do_train", "--do_eval", dataset_name=folder, task_name="mrpc")
    mean = (metrics["eval_accuracy"] + metrics["eval_f1"]) / 2
    assert metrics["eval_combined_score"] == pytest.approx(mean)


def test_a_json_file_of_settings(model, out, tmp_path):
    path = str(csv_file(tmp_path))
    settings = {
        **SETTINGS,
        "model_name_or_path": str(model),
        "output_dir": str(out),
        "train_file": path,
        "do_train": True,
        "seed": None,
        "lr_scheduler_kwargs": {},
        "increlora_target_modules": ["query", "value"],
    }
    config = tmp_path / "run.json"
    config.write_text(json.dumps(settings))
    assert run_glue.main([str(config)])["total_rank"] == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"r_avg": 2.0},
        {"modules_to_save": []},
        {"target_modules": "all-linear"},
        {"target_modules": ".*query"},
        {"rank_pattern": {"layer": 2}},
    ],
    ids=str,
)
def test_a_json_file_means_what_the_settings_mean(tmp_path, settings):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({f"increlora_{name}": value for name, value in settings.items()}))
    flags = parse_flags(run_glue.DataArguments, [str(path), f"--output_dir={tmp_path}"], run_glue.PROG)
    assert flags.config == IncreLoraConfig(**settings)


def test_flags_after_a_json_file_win(model, out, tmp_path):
    config = tmp_path / "run.json"
    config.write_text(
        json.dumps({**SETTINGS, "train_file": str(csv_file(tmp_path)), "do_train": True, "max_steps": 5})
    )
    flags = ["--model_name_or_path", str(model), "--output_dir", str(out), "--max_steps", "7"]
    run_glue.main([str(config), *flags])
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 7


def mnli_folder(folder):
    names = ("premise", "hypothesis")
    labelled, unlabelled = sentence_pairs([0, 1, 2], names=names), sentence_pairs([-1], rows=6, names=names)
    return write_parquet(
        folder,
        train=labelled,
        validation_matched=labelled,
        validation_mismatched=sentence_pairs([2, 1, 0], rows=9, names=names),
        test_matched=unlabelled,
        test_mismatched=unlabelled,
    )


def test_mnli_is_evaluated_and_predicted_on_both_sets(run, out, tmp_path):
    folder = mnli_folder(tmp_path / "mnli")
    metrics = run("--do_train", "--do_eval", "--do_predict", dataset_name=folder, task_name="mnli")
    assert metrics["eval_samples"] == 24
    assert metrics["eval_samples_mm"] == 9
    assert {"eval_accuracy", "eval_accuracy_mm"} <= set(results(out, "eval"))
    for suffix in ("", "-mm"):
        lines = (out / f"predict_results_mnli{suffix}.txt").read_text().splitlines()
        assert lines[0] == "index\tprediction"
        assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(6)]
        assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "neutral", "contradiction"}


@pytest.mark.parametrize("task", ["stsb", None], ids=["stsb", "floats of ones own"])
def test_a_regression_is_scored_by_correlation_and_predicts_values(run, out, tmp_path, task):
    path = write_csv(tmp_path / "rows.csv", sentence_pairs([0.5, 2.5, 4.0]))
    files = {"train_file": path, "validation_file": path, "test_file": path}
    metrics = run("--do_train", "--do_eval", "--do_predict", **files, task_name=task)
    assert {"eval_pearson", "eval_spearmanr", "eval_combined_score"} <= set(metrics)
    lines = (out / f"predict_results_{task or 'regression'}.txt").read_text().splitlines()
    assert all(float(line.split("\t")[1]) < 100 for line in lines[1:])


def test_a_decoder_without_a_padding_token(run, out, tmp_path):
    model, path = save_tiny_decoder(tmp_path / "decoder"), csv_file(tmp_path)
    files = {"train_file": path, "validation_file": path}
    metrics = run("--do_train", "--do_eval", **files, model_name_or_path=model)
    assert metrics["total_rank"] == 8
    again = run("--do_eval", **files, model_name_or_path=out, output_dir=tmp_path / "again")
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"])


@pytest.mark.parametrize("order", [[2, 0, 1], [0, 1, 2]])
def test_a_model_with_an_order_of_its_own_is_scored_by_names(run, out, tmp_path, order):
    names = ("entailment", "neutral", "contradiction")
    own = dict(enumerate(names[i].upper() for i in order))
    base = save_tiny_model(tmp_path / "base", labels=3)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, id2label=own)
    with torch.no_grad():
        classifier.classifier.weight.zero_()
        classifier.classifier.bias.copy_(torch.tensor([1.0 if own[i] == "CONTRADICTION" else 0.0 for i in range(3)]))
    classifier.save_pretrained(base)
    pairs = sentence_pairs([2], names=("premise", "hypothesis"))
    splits = ("validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    folder = write_parquet(tmp_path / "mnli", **dict.fromkeys(splits, pairs))
    metrics = run("--do_eval", "--do_predict", dataset_name=folder, task_name="mnli", model_name_or_path=base)
    assert metrics["eval_accuracy"] == metrics["eval_accuracy_mm"] == 1
    lines = (out / "predict_results_mnli.txt").read_text().splitlines()
    assert {line.split("\t")[1] for line in lines[1:]} == {"contradiction"}


def test_f1_is_that_of_glue_s_class_whatever_its_number(run, tmp_path):
    base = save_tiny_model(tmp_path / "base", labels=2)
    own = {0: "equivalent", 1: "not_equivalent"}
    classifier = AutoModelForSequenceClassification.from_pretrained(base, id2label=own)
    with torch.no_grad():
        classifier.classifier.weight.zero_()
        classifier.classifier.bias.copy_(torch.tensor([1.0, 0.0]))
    classifier.save_pretrained(base)
    folder = write_parquet(tmp_path / "mrpc", validation=sentence_pairs([0, 1, 1, 1]))
    metrics = run("--do_eval", dataset_name=folder, task_name="mrpc", model_name_or_path=base)
    assert metrics["eval_accuracy"] == 0.75
    assert metrics["eval_f1"] == pytest.approx(6 / 7)


# ---- What a run leaves behind ---------------------------------------------------------------------------------------


def test_a_run_writes_its_results(run, out, tmp_path):
    path = csv_file(tmp_path)
    metrics = run("--do_train", "--do_eval", "--do_predict", train_file=path, validation_file=path, test_file=path)
    assert results(out) == results(out, "train") | results(out, "eval")
    assert results(out).items() <= metrics.items()
    assert len((out / "predict_results_classification.txt").read_text().splitlines()) == 25


def test_trainable_parameters_are_those_of_the_final_ranks_and_the_head(run, out, tmp_path):
    metrics = run("--do_train", train_file=csv_file(tmp_path))
    shapes = {"query": 32, "key": 32, "value": 32, "attention.output.dense": 32, "intermediate.dense": 40}
    ranks = json.loads((out / "increlora_history.json").read_text())["rank_pattern"]
    adapter = sum(
        rank * (next((size for end, size in shapes.items() if name.endswith(end)), 40) + 1)
        for name, rank in ranks.items()
    )
    pooler, classifier = 16 * 16 + 16, 16 * 2 + 2
    assert metrics["trainable_parameters"] == adapter + pooler + classifier


def test_the_adapter_loads_as_the_last_lines_say(run, model, out, tmp_path, capsys):
    path = csv_file(tmp_path)
    run("--do_train", "--do_eval", train_file=path, validation_file=path)
    printed = capsys.readouterr().out
    assert f'AutoModelForSequenceClassification.from_pretrained("{model}", num_labels=2)' in printed
    assert f'PeftModel.from_pretrained(model, "{out}")' in printed
    assert (
        "from peft import PeftModel\n    from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        in printed
    )
    loaded = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(str(model), num_labels=2), str(out)
    )
    assert sum(parameter.numel() for parameter in loaded.parameters()) > 0


def test_a_saved_adapter_is_evaluated_to_the_same_metrics(run, out, tmp_path):
    path = csv_file(tmp_path)
    trained = run("--do_train", "--do_eval", train_file=path, validation_file=path)
    files = {"train_file": path, "validation_file": path}
    again = run("--do_eval", **files, model_name_or_path=out, output_dir=tmp_path / "again")
    assert again["eval_accuracy"] == trained["eval_accuracy"]
    assert again["eval_loss"] == pytest.approx(trained["eval_loss"], abs=1e-6)


@pytest.fixture
def prepared(run, monkeypatch):
    """Prepare a training run, and return its job instead of starting it."""

    def call(*flags, **settings):
        jobs = []

        def keep(job, checkpoint):
            jobs.append(job)
            return {}

        monkeypatch.setattr("increlora_hf.tasks.run.train_and_save", keep)
        run("--do_train", *flags, **settings)
        return jobs[0]

    return call


def test_the_model_knows_the_labels(prepared, tmp_path):
    assert prepared(train_file=csv_file(tmp_path)).trainer.model.config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize(
    "flags, length", [([], 9), (["--pad_to_max_length"], 20)], ids=["to the batch", "to the most"]
)
def test_padding(prepared, tmp_path, flags, length):
    job = prepared(*flags, train_file=csv_file(tmp_path), max_seq_length=20)
    batch = next(iter(job.trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (4, length)


def test_sample_limits(run, out, tmp_path):
    path = csv_file(tmp_path)
    limits = {"max_train_samples": 10, "max_eval_samples": 6, "max_predict_samples": 3}
    files = {"train_file": path, "validation_file": path, "test_file": path}
    metrics = run("--do_train", "--do_eval", "--do_predict", **files, **limits)
    assert (metrics["train_samples"], metrics["eval_samples"]) == (10, 6)
    assert len((out / "predict_results_classification.txt").read_text().splitlines()) == 4


def test_a_run_continues_from_its_last_checkpoint(run, out, tmp_path):
    path = csv_file(tmp_path)
    run("--do_train", train_file=path, save_strategy="steps", save_steps=5)
    finished = (out / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-8")
    run("--do_train", train_file=path, save_strategy="steps", save_steps=5, resume_from_checkpoint="true")
    assert (out / "adapter_model.safetensors").read_bytes() == finished


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "train.csv has no rows"),
        ("sentence1,label\na,x\nb\n", "train.csv, line 3: 1 cells under a header of 2 columns"),
        ("sentence1,answer\na,x\nb,y\n", "train.csv has no column 'label' (columns: sentence1, answer). Name the"),
        ("sentence1,label\na,x\nb,x\n", "train.csv: all 2 rows have the label 'x'"),
    ],
    ids=["empty", "not parseable", "no label", "one class"],
)
def test_a_bad_train_file_is_refused(refused, tmp_path, content, message):
    path = tmp_path / "train.csv"
    path.write_text(content)
    assert message in refused("--do_train", train_file=path)


def test_a_missing_train_file_is_refused(refused, tmp_path):
    path = tmp_path / "train.csv"
    assert f"{path}: there is no such file" in refused("--do_train", train_file=path)


def test_a_validation_label_that_training_does_not_know_is_refused(refused, tmp_path):
    train, validation = csv_file(tmp_path), csv_file(tmp_path, "validation.csv", labels=["yes", "maybe"])
    line = refused("--do_train", "--do_eval", train_file=train, validation_file=validation)
    assert "validation.csv, row 2: the label 'maybe' is not one of classification's classes: no, yes" in line


def test_a_folder_without_the_split_is_refused(refused, tmp_path):
    folder = write_parquet(tmp_path / "rte", train=sentence_pairs([0, 1]), dev=sentence_pairs([0, 1]))
    line = refused("--do_train", "--do_eval", dataset_name=folder, task_name="rte")
    assert "has no split 'validation', only: dev, train" in line


@pytest.mark.parametrize(
    "flags, settings, message",
    [
        (["--do_train"], {"task_name": "snli"}, "--task_name 'snli' is not a GLUE task. Choose one of cola, mnli"),
        (["--do_train"], {}, "there is no data. Give a GLUE task (--task_name)"),
        ([], {"task_name": "rte"}, "there is nothing to do. Give --do_train, --do_eval or --do_predict"),
        (["--do_train"], {"model_name_or_path": None, "task_name": "rte"}, "--model_name_or_path is missing"),
        (["--do_train"], {"increlora_r_avg": 1, "increlora_init_r": 4}, "r_avg=1 is below init_r=4"),
        (["--do_train", "--lerning_rate", "1"], {}, "unknown settings: --lerning_rate 1."),
        (["--do_train"], {"learning_rate": "fast"}, "invalid float value: 'fast'"),
        (["--do_train"], {"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint nowhere: there is no such"),
        (["--do_train"], {"resume_from_checkpoint": "true"}, "contains no checkpoint. Name one"),
        (["--do_eval"], {"dataloader_drop_last": True}, "--dataloader_drop_last True leaves out rows in evaluation"),
        (["--do_predict"], {"prediction_loss_only": True}, "--prediction_loss_only True returns no outputs"),
        (["--do_eval"], {"eval_do_concat_batches": False}, "--eval_do_concat_batches False returns the outputs"),
        (["--do_eval"], {"max_eval_samples": 0}, "--max_eval_samples 0 leaves no rows"),
        (["--do_train"], {"max_seq_length": -1}, "--max_seq_length -1 is not a number of tokens in [1, "),
        (["--do_train"], {"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0 leaves nothing"),
        (["--do_eval"], {"per_device_eval_batch_size": 0}, "--per_device_eval_batch_size 0 leaves nothing"),
        (["--do_train"], {"max_grad_norm": "nan"}, "--max_grad_norm nan is not a number"),
        (["--do_train"], {"classifier_dropout": "nan"}, "--classifier_dropout nan is not a number"),
    ],
    ids=[
        "unknown task", "no data", "nothing to do", "no model", "IncreLoRA setting", "unknown flag", "not a number",
        "no such checkpoint", "no checkpoint", "rows left out", "no outputs", "outputs in pieces", "no rows",
        "no tokens", "no batches", "no rows in a batch", "not a norm", "not a share",
    ],
)  # fmt: skip
def test_bad_flags_are_refused(refused, flags, settings, message):
    assert message in refused(*flags, **settings)


def test_rows_that_a_limit_leaves_with_one_label_are_refused(refused, tmp_path):
    path = write_csv(tmp_path / "sorted.csv", {"text": ["red cat"] * 40, "label": [0] * 20 + [1] * 20})
    assert "all 20 rows have the label '0'" in refused("--do_train", train_file=path, max_train_samples=20)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_seq_length": 3}, "--max_seq_length 3 leaves no room for text: an input has 3 special tokens"),
        ({"classifier_dropout": 1}, "--classifier_dropout 1.0 is not a share in [0, 1)"),
        (
            {"eval_strategy": "steps", "metric_for_best_model": "acuracy"},
            "--metric_for_best_model acuracy is no metric of this task. Choose one of loss, accuracy.",
        ),
    ],
    ids=["no room for text", "dropout", "metric"],
)
def test_settings_that_do_not_fit_the_task_are_refused(refused, tmp_path, settings, message):
    path = csv_file(tmp_path)
    assert message in refused("--do_train", train_file=path, validation_file=path, **settings)


@pytest.mark.parametrize(
    "place, message",
    [
        ("file", "/file is a file. Choose another folder."),
        ("file/more/folders", "/file is a file. Choose another folder."),
        ("a" * 300, "File name too long"),
    ],
    ids=["a file", "below a file", "a long name"],
)
def test_an_output_folder_that_cannot_be_is_refused(run, tmp_path, capsys, place, message):
    (tmp_path / "file").write_text("text")
    with pytest.raises(SystemExit):
        run("--do_train", train_file=csv_file(tmp_path), output_dir=tmp_path / place)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_dropout_before_a_classifier_that_has_none_is_refused(refused, tmp_path):
    model = save_tiny_decoder(tmp_path / "decoder")
    line = refused("--do_train", train_file=csv_file(tmp_path), model_name_or_path=model, classifier_dropout=0.5)
    assert "--classifier_dropout 0.5: a model of type 'gpt2' has no such dropout" in line


def test_a_model_that_is_nowhere_is_refused(refused, tmp_path):
    line = refused("--do_train", train_file=csv_file(tmp_path), model_name_or_path="./no/model")
    assert "--model_name_or_path ./no/model cannot be loaded" in line


def test_a_head_of_another_size_is_refused_or_replaced(refused, run, tmp_path):
    model = save_tiny_model(tmp_path / "headed", labels=3)
    line = refused("--do_train", train_file=csv_file(tmp_path), model_name_or_path=model)
    assert "has a head whose size does not fit the task. Replace the head with --ignore_mismatched_sizes" in line
    run("--do_train", "--ignore_mismatched_sizes", train_file=csv_file(tmp_path), model_name_or_path=model)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"increlora_interval": 5, "increlora_top_h": 1}, "interval"),
        ({"increlora_target_modules": "nothing"}, "nothing"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no"}, "reduce_lr_on_plateau"),
    ],
    ids=["budget out of reach", "no such layers", "schedule without a curve"],
)
def test_a_run_that_cannot_grow_is_refused_before_it_starts(refused, tmp_path, settings, message):
    assert message in refused("--do_train", train_file=csv_file(tmp_path), **settings)


@pytest.mark.parametrize(
    "given, meant",
    [
        ("lerning_rate", "--learning_rate for --lerning_rate"),
        ("evaluation_strategy", "--eval_strategy for --evaluation_strategy"),
        ("warmup_ratio", "--warmup_steps (a share below 1) for --warmup_ratio"),
        ("increlora_ravg", "--increlora_r_avg for --increlora_ravg"),
    ],
)
def test_a_flag_that_looks_like_another_names_it(refused, tmp_path, given, meant):
    assert f"Did you mean {meant}?" in refused("--do_train", train_file=csv_file(tmp_path), **{given: 0.1})


def test_a_report_to_a_package_that_is_missing_is_refused(refused, tmp_path):
    line = refused("--do_train", train_file=csv_file(tmp_path), report_to="wandb")
    assert "--report_to wandb: that package is not installed" in line


def test_trainers_own_learning_rate_is_mentioned(run, tmp_path, caplog):
    run("--do_train", train_file=csv_file(tmp_path), learning_rate=5e-5)
    assert "--learning_rate has Trainer's default, 5e-05" in caplog.text


def test_a_tokenizer_without_a_padding_token_is_refused(refused, model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    line = refused("--do_train", train_file=csv_file(tmp_path), model_name_or_path=folder)
    assert "has neither a padding nor an end-of-sequence token" in line


@pytest.mark.parametrize(
    "content, remedy",
    [
        ("adapter_model.safetensors", "Choose another --output_dir."),
        ("checkpoint-5", "Continue that run with --resume_from_checkpoint true, or choose another --output_dir."),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"resume_from_checkpoint": "false"}], ids=["no flag", "flag says no"])
def test_another_runs_adapter_is_not_overwritten(run, out, tmp_path, capsys, content, remedy, settings):
    (out / content).mkdir(parents=True)
    with pytest.raises(SystemExit):
        run("--do_train", train_file=csv_file(tmp_path), **settings)
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"--output_dir {out} contains another run's weights. {remedy}" in line
    assert [path.name for path in out.iterdir()] == [content]


def test_an_adapter_is_no_base_model(refused, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    line = refused("--do_train", train_file=csv_file(tmp_path), model_name_or_path=tmp_path)
    assert "is an adapter. Train from the base model that its adapter_config.json names" in line


@pytest.mark.parametrize(
    "content, message",
    [
        ('{\n"max_steps": 3,\n}', "run.json, line 3, column 1: not valid JSON"),
        ("[1]", "run.json holds a list. Write one JSON object"),
        ("[" * 100_000, "run.json: not valid JSON (it is nested too deeply)"),
        ('{"seed": 1, "seed": 2}', "run.json: not valid JSON (the key 'seed' stands twice)"),
        ('{"lerning_rate": 1}', "unknown settings: --lerning_rate=1"),
        (None, "run.json: there is no such settings file"),
    ],
    ids=["broken", "array", "too deep", "a key twice", "unknown setting", "missing"],
)
def test_a_bad_file_of_settings_is_refused(tmp_path, capsys, content, message):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as exit_info:
        run_glue.main([str(path)])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_bug_keeps_its_traceback(run, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("not the user's fault")

    monkeypatch.setattr("increlora_hf.IncreLoraTrainer.training_step", broken)
    with pytest.raises(ValueError, match="not the user's fault"):
        run("--do_train", train_file=csv_file(tmp_path))


# ---- Other ways to fine-tune ----------------------------------------------------------------------------------------

HEAD = 16 * 16 + 16 + 16 * 2 + 2  # the pooler and the classifier of the tiny model
TRAINED = {  # parameters that each way trains; six linear layers, r_avg 2
    "lora": 2 * (4 * (16 + 16) + 2 * (16 + 24)) + HEAD,
    "bitfit": HEAD + 16 + 4 * 16 + 16 + 24 + 16 + 16,  # biases of layers and of their normalisations
    "head": HEAD,
}


@pytest.mark.parametrize("tuner", ["lora", "adalora", "bitfit", "full", "head"])
def test_rivals_train_on_the_same_layers_and_load_again(tuner, run, out, tmp_path, capsys):
    path = csv_file(tmp_path)
    data = {"train_file": path, "validation_file": path, "max_steps": 40, "increlora_lora_alpha": 8}
    metrics = run("--do_train", "--do_eval", tuner=tuner, **data)
    assert metrics["trainable_parameters"] == TRAINED.get(tuner, metrics["trainable_parameters"])
    assert "total_rank" not in metrics
    assert ("PeftModel" in capsys.readouterr().out) == (tuner in ("lora", "adalora"))
    if tuner == "adalora":  # a loaded one fails in PEFT where labels are given, as evaluation does
        config = json.loads((out / "adapter_config.json").read_text())
        kept = sum(sum(row) for row in config["rank_pattern"].values())
        assert kept == 12  # from 18: it has allocated
    else:
        again = run("--do_eval", model_name_or_path=out, output_dir=tmp_path / "again", **data)
        assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5)
        assert again["eval_accuracy"] == metrics["eval_accuracy"]
    with pytest.raises(SystemExit):
        run("--do_train", tuner=tuner, **data)  # would overwrite it


def test_lora_takes_the_ranks_of_another_run(run, out, tmp_path):
    path = csv_file(tmp_path)
    run("--do_train", train_file=path)
    ranks = json.loads((out / "increlora_history.json").read_text())["rank_pattern"]
    again = tmp_path / "again"
    flags = {"output_dir": again, "increlora_rank_pattern": out / "increlora_history.json"}
    metrics = run("--do_train", tuner="lora", train_file=path, **flags)
    weights = load_file(again / "adapter_model.safetensors")
    found = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in weights.items()
        if name.endswith("lora_A.weight")
    }
    assert found == {name: rank for name, rank in ranks.items() if rank}  # the cut may leave a layer without any
    assert sum(found.values()) == BUDGET
    assert metrics["trainable_parameters"] == sum(tensor.numel() for tensor in weights.values())


def test_unknown_tuner_is_refused(refused, tmp_path):
    assert "--tuner houlsby is unknown. Choose one of increlora" in refused(
        "--do_train", tuner="houlsby", train_file=csv_file(tmp_path)
    )


# ---- As a program ---------------------------------------------------------------------------------------------------


def test_the_program_shows_plan_and_ranks_and_ends_well(model, out, tmp_path):
    path = csv_file(tmp_path)
    settings = {**SETTINGS, "model_name_or_path": model, "output_dir": out, "train_file": path}
    command: list[Any] = [
        sys.executable,
        ROOT / "run_glue.py",
        "--do_train",
        *(f"--{name}={value}" for name, value in settings.items()),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "6 layers, rank 18 → 24 → 12" in done.stdout
    assert "final ranks, total 12" in done.stdout
    assert f"The adapter is in {out}" in done.stdout


LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc_per_node=2 --master_port={port}",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no "
    "--dynamo_backend=no --main_process_port={port}",
}


@pytest.fixture
def forked():
    """A Python that starts its first two scripts, those of the first launcher, as usual, and forks the later ones."""
    with processes.forking_python(real=2) as python:
        yield python


@pytest.mark.slow
def test_both_launchers_train_the_same_adapter_in_two_processes(model, tmp_path, monkeypatch, forked):
    path = csv_file(tmp_path)
    monkeypatch.setenv("PYTHON_EXEC", forked)  # that both start the script with
    adapters = []
    for name, launcher in LAUNCHERS.items():
        out = tmp_path / name
        settings = {**SETTINGS, "model_name_or_path": model, "output_dir": out, "train_file": path}
        command = [
            sys.executable,
            "-m",
            *launcher.format(port=processes.free_port()).split(),
            str(ROOT / "run_glue.py"),
        ]
        command += ["--do_train", *(f"--{name}={value}" for name, value in settings.items())]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("final ranks, total 12") == 1
        assert json.loads((out / "train_results.json").read_text())["epoch"] > 1  # half the rows each
        adapters.append((out / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def threads_left(rank, argv):
    """The names of the process's threads after a whole run."""
    run_glue.main(argv)
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the names of threads from /proc")
def test_no_thread_of_the_process_group_outlives_a_run(model, tmp_path):
    """One that does wakes up in the interpreter's last moments and now and then aborts it, after all is saved."""
    settings = {
        **SETTINGS,
        "model_name_or_path": model,
        "train_file": csv_file(tmp_path),
        "output_dir": tmp_path / "out",
    }
    argv = ["--do_train", "--use_cpu", *(f"--{name}={value}" for name, value in settings.items())]
    for names in processes.run(2, tmp_path / "results", threads_left, argv):
        assert not [name for name in names if "gloo" in name], names


@pytest.fixture
def printed_help(capsys):
    """What a script prints for a flag that asks for help."""

    def call(script, asked):
        with pytest.raises(SystemExit) as exit_info:
            script.main([asked])
        assert exit_info.value.code == 0
        return capsys.readouterr().out

    return call


def flags_of(script):
    """All flags of a script: its own, IncreLoRA's and Trainer's."""
    kinds = (ModelArguments, script.DataArguments, TrainingArguments, IncreLoraArguments, ScriptArguments)
    return {f"--{field.name}" for kind in kinds for field in fields(kind) if field.init}


@pytest.mark.parametrize("script", [run_glue, run_squad], ids=lambda script: script.PROG)
def test_help_is_short_and_help_all_lists_every_flag(printed_help, script):
    short, full = printed_help(script, "--help"), printed_help(script, "--help_all")
    named = set(re.findall(r"^  (--\w+)", short, re.MULTILINE))
    assert 12 <= len(named) <= 18
    assert named < flags_of(script)
    assert set(re.findall(r"^  (--\w+)", full, re.MULTILINE)) == flags_of(script)
    assert "(default: None)" not in full
    assert len(short.splitlines()) < 60
    assert max(map(len, (short + full).splitlines())) <= 80
    example = short.partition("example:\n  python ")[2].replace("\\\n", " ").split()
    assert parse_flags(script.DataArguments, example[1:], script.PROG).config.r_avg == 2


def test_flags_of_trainer_are_read_from_its_source_as_it_has_them():
    expected = {field.name: field for field in fields(TrainingArguments) if field.init}
    found = {flag.name: flag for flag in trainer_flags()}
    assert found.keys() == expected.keys()
    for name, field in expected.items():
        assert found[name].help == OUR_WORDS.get(name, field.metadata.get("help", ""))
        if found[name].default:
            assert found[name].default == str(field.default)


@pytest.mark.parametrize(
    "script, flags",
    [
        ("run_glue.py", ["--hlep"]),
        ("run_glue.py", ["--increlora_r_avg=0"]),
        ("run_squad.py", ["--help"]),
        ("run_squad.py", ["--max_seq_length=long"]),
    ],
    ids=["typo", "setting out of range", "help", "not a number"],
)
def test_help_and_wrong_flags_are_answered_before_torch_loads(script, flags):
    code = f"import sys, runpy; sys.argv = {[script, *flags]}\ntry: runpy.run_path('{script}', run_name='__main__')\n"
    code += "finally: assert not {'torch', 'datasets', 'peft'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if flags == ["--help"] else 2), done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_all_flags(capsys):
    with pytest.raises(SystemExit) as exit_info:
        run_glue.main(["--help"])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    for name in ("--task_name", "--increlora_r_avg", "--learning_rate", "--model_name_or_path"):
        assert name in printed


POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def test_class_names_beyond_ascii_survive_a_locale_without_utf8(model, out, tmp_path):
    labels = ["größer", "否定"]
    path = write_csv(tmp_path / "rows.csv", sentence_pairs(labels))
    files = {f"{split}_file": path for split in ("train", "validation")}
    test = write_csv(tmp_path / "test.csv", {k: v for k, v in sentence_pairs(labels).items() if k != "label"})
    settings = {**SETTINGS, **files, "test_file": test, "max_steps": 2, "increlora_r_avg": 1, "increlora_overshoot": 0}
    settings |= {"model_name_or_path": model, "output_dir": out, "save_strategy": "steps", "save_steps": 2}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, str(ROOT / "run_glue.py"), "--do_train", "--do_eval", "--do_predict", *flags]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **POSIX})
    printed, errors = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    assert (done.returncode, "Traceback" in errors) == (0, False), errors
    assert "label (2 classes: gr\\xf6\\xdfer, \\u5426\\u5b9a)" in printed
    (file,) = out.glob("predict_results_*.txt")
    predicted = file.read_text(encoding="utf-8")
    assert {line.split("\t")[1] for line in predicted.splitlines()[1:]} <= set(labels)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert json.loads((out / "checkpoint-2" / "increlora_state.json").read_text(encoding="utf-8"))["rounds"] == []
    assert all(label in card for label in labels)
