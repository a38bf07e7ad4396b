"""Tasks and their data: what is read, what it is turned into, and what is refused."""

import csv
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from glue_fixtures import sentence_pairs, write_csv, write_json_lines, write_parquet

from increlora_hf.tasks.glue.own import detect_task
from increlora_hf.tasks.glue.rows import GlueSource, in_model_order, load_task, prepare_rows, require_two_labels
from increlora_hf.tasks.glue.tasks import TASKS, HubData, TextTask, glue_task
from increlora_hf.tasks.tables import read_table

# ---- The nine tasks -------------------------------------------------------------------------------------------------


def test_there_are_nine_tasks():
    assert sorted(TASKS) == ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"]


def test_only_stsb_is_a_regression_and_only_mnli_has_three_classes():
    assert {name: task.num_labels for name, task in TASKS.items() if task.num_labels != 2} == {"mnli": 3, "stsb": 1}
    assert [name for name, task in TASKS.items() if task.is_regression] == ["stsb"]


def test_only_cola_and_sst2_have_one_sentence():
    assert [name for name, task in TASKS.items() if len(task.columns) == 1] == ["cola", "sst2"]


def test_only_mnli_has_two_evaluation_sets():
    assert {name: task.eval_splits for name, task in TASKS.items() if task.eval_splits != ("validation",)} == {
        "mnli": ("validation_matched", "validation_mismatched")
    }
    assert TASKS["mnli"].test_splits == ("test_matched", "test_mismatched")


def test_a_task_goes_by_its_name_in_any_case():
    assert glue_task("RTE") is TASKS["rte"]


def test_an_unknown_task_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"--task_name 'snli' is not a GLUE task\. Choose one of cola, mnli, .*wnli"):
        glue_task("snli")


def test_a_row_from_another_data_set_is_read_there(monkeypatch):
    row = TextTask(
        name="imdb",
        columns=("text",),
        labels=("neg", "pos"),
        metrics=("accuracy",),
        data=HubData("IMDb", "stanfordnlp/imdb", "plain_text"),
    )
    monkeypatch.setitem(TASKS, "imdb", row)
    asked = []

    def hub(*names, **options):
        asked.append(names)
        return {"validation": Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})}

    monkeypatch.setattr("increlora_hf.tasks.source.load_dataset", hub)
    task, rows = load(GlueSource(task_name="imdb"), train=False)
    assert asked == [("stanfordnlp/imdb", "plain_text")]
    assert (task, rows["validation"]["label"][:]) == (row, [1, 0])


# ---- A task of one's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels, expected",
    [
        (["yes", "no"], ("no", "yes")),
        ([10, 9, 2], ("2", "9", "10")),
        ([0.5, 1.0], ()),
    ],
    ids=["strings are classes", "whole numbers are classes", "floats are values"],
)
def test_the_labels_say_what_is_predicted(labels, expected):
    task = detect_task(Dataset.from_dict(sentence_pairs(labels)), "here")
    assert task.labels == expected
    assert task.name == ("classification" if expected else "regression")


def test_the_classes_of_a_class_label_column_keep_their_order():
    rows = Dataset.from_dict(sentence_pairs([1, 0])).cast_column("label", ClassLabel(names=["z", "a"]))
    assert detect_task(rows, "here").labels == ("z", "a")


@pytest.mark.parametrize(
    "columns, expected",
    [
        (["text", "label"], ("text",)),
        (["idx", "first", "label", "second", "third"], ("first", "second")),
        (["topic", "sentence2", "sentence1", "label"], ("sentence1", "sentence2")),
        (["ID", "text", "label"], ("text",)),
    ],
    ids=["one text", "the first two", "sentence1 and sentence2 first", "an id is no text"],
)
def test_the_text_columns_are_found(columns, expected):
    rows = Dataset.from_dict({column: ["a", "b"] for column in columns})
    assert detect_task(rows, "here").columns == expected


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"text": ["a", "b"]}, r"here has no column 'label' \(columns: text\)"),
        ({"n": [1, 2], "label": [0, 1]}, r"here has no text column beside 'label' \(columns: n, label\)"),
        ({"t": ["", " "], "label": [0, 1]}, r"here has no text column beside 'label'"),
        ({"n": ["1", ""], "label": [0, 1]}, r"here has no text column beside 'label'"),
        ({"t": ["a", "b"], "label": [[0], [1]]}, r"here: column 'label' is List\(Value\('int64'\)\)\. Give one of"),
        ({"t": ["a", "b"], "label": [{"n": 0}] * 2}, r"here: column 'label' is {'n': Value\('int64'\)}"),
    ],
    ids=["no label", "no text", "blank text", "numbers and blanks", "lists as labels", "objects as labels"],
)
def test_rows_that_pose_no_task_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        detect_task(Dataset.from_dict(columns), "here")


# ---- Labels ---------------------------------------------------------------------------------------------------------


def prepared_labels(columns, task, features=None):
    return prepare_rows(Dataset.from_dict(columns, features=features), task, "here")["label"][:]


def test_glue_labels_may_be_names_or_numbers():
    names = sentence_pairs(["not_entailment", "entailment"], rows=2)
    numbers = sentence_pairs([1, 0], rows=2)
    assert prepared_labels(names, TASKS["rte"]) == prepared_labels(numbers, TASKS["rte"]) == [1, 0]


def test_class_names_in_another_order_are_matched_by_name():
    text = Value("string")
    features = Features(sentence1=text, sentence2=text, label=ClassLabel(names=["equivalent", "not_equivalent"]))
    assert prepared_labels(sentence_pairs([0, 1], rows=2), TASKS["mrpc"], features) == [1, 0]


@pytest.mark.parametrize(
    "names, expected",
    [
        (["NEUTRAL", "CONTRADICTION", "ENTAILMENT"], ("neutral", "contradiction", "entailment")),
        (["entailment", "neutral", "contradiction"], TASKS["mnli"].labels),
        (["LABEL_0", "LABEL_1", "LABEL_2"], TASKS["mnli"].labels),
        (["neutral", "entailment"], TASKS["mnli"].labels),
        (["neutral", "neutral", "entailment"], TASKS["mnli"].labels),
    ],
    ids=["another order", "the same", "no names", "fewer", "a name twice"],
)
def test_classes_are_numbered_as_a_model_that_knows_them_does(names, expected):
    rows = Dataset.from_dict(sentence_pairs([0, 1, 2], rows=3, names=TASKS["mnli"].columns))
    prepared = {"train": prepare_rows(rows, TASKS["mnli"], "here"), "test": rows.remove_columns("label")}
    task, ordered = in_model_order(TASKS["mnli"], prepared, names)
    assert task.labels == expected
    assert [task.labels[i] for i in ordered["train"]["label"][:]] == list(TASKS["mnli"].labels)
    assert "label" not in ordered["test"].column_names


@pytest.mark.parametrize("cell", [None, "", " \n"], ids=["null", "empty", "blank"])
def test_an_empty_cell_of_text_is_refused_with_its_row(cell):
    rows = Dataset.from_dict({"sentence": ["a", "b", cell], "label": [0, 1, 0]})
    with pytest.raises(ValueError, match="here, row 3: column 'sentence' has no value"):
        prepare_rows(rows, TASKS["cola"], "here")


def test_one_text_of_a_pair_may_be_blank_as_in_glues_qqp():
    pairs = {"question1": ["a", ""], "question2": ["", "b"], "label": [0, 1]}
    assert prepare_rows(Dataset.from_dict(pairs), TASKS["qqp"], "here")[:] == pairs
    for wrong, column in (("", "question1"), (None, "question2")):
        rows = Dataset.from_dict({**pairs, "question2": ["", wrong]})
        with pytest.raises(ValueError, match=f"here, row 2: column '{column}' has no value"):
            prepare_rows(rows, TASKS["qqp"], "here")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view()], ids=str)
@pytest.mark.parametrize("labels", [["x", "y"], [0, 1]], ids=["names", "numbers"])
def test_texts_and_labels_are_of_any_type_of_string(tmp_path, kind, labels):
    def column(cells):
        return pa.array(cells, kind) if isinstance(cells[0], str) else cells

    pq.write_table(pa.table({"text": column(["a", "b"]), "label": column(labels)}), tmp_path / "train.parquet")
    task, rows = load(folder_source(tmp_path, None, tmp_path), evaluate=False)
    assert task.labels == tuple(map(str, labels))
    assert rows["train"][:] == {"text": ["a", "b"], "label": [0, 1]}


def test_columns_of_text_beyond_two_are_mentioned(caplog):
    rows = Dataset.from_dict({"date": ["a", "b"], "review": ["a", "b"], "text": ["a", "b"], "label": [0, 1]})
    assert detect_task(rows, "here").columns == ("date", "review")
    assert "from the columns date and review, and not from text. Choose others with --text_columns" in caplog.text


def test_own_classes_are_numbered_in_order():
    rows = Dataset.from_dict(sentence_pairs([3, 1, 2], rows=3))
    assert prepare_rows(rows, detect_task(rows, "here"), "here")["label"][:] == [2, 0, 1]


def test_values_become_single_precision_whatever_they_were():
    rows = prepare_rows(Dataset.from_dict(sentence_pairs([1, 5], rows=2)), TASKS["stsb"], "here")
    assert rows["label"][:] == [1.0, 5.0]
    assert rows.features["label"] == Value("float32")


def test_only_text_and_label_are_kept_and_text_is_text():
    rows = Dataset.from_dict({"idx": [7, 8], "sentence": [1, 2], "label": [0, 1]})
    prepared = prepare_rows(rows, TASKS["cola"], "here")
    assert prepared[:] == {"sentence": ["1", "2"], "label": [0, 1]}


def test_rows_to_predict_lose_their_label():
    rows = Dataset.from_dict(sentence_pairs([-1]))
    assert prepare_rows(rows, TASKS["rte"], "here", labelled=False).column_names == ["sentence1", "sentence2"]


@pytest.mark.parametrize(
    "task, labels, message",
    [
        ("rte", [0, 2], r"here, row 2: the label 2 is not one of rte's classes: entailment, not_entailment"),
        ("rte", [0, -1], r"row 2: the label -1 is not one of"),
        ("rte", ["entailment", "neutral"], r"row 2: the label 'neutral' is not one of"),
        ("rte", [0, None], r"row 2: the label None is not one of"),
        ("stsb", ["1.5", "high"], r"here, row 2: the label 'high' is not a number"),
        ("stsb", ["1.5", "1_1"], r"row 2: the label '1_1' is not a number"),
        ("stsb", ["1.5", " 3"], r"row 2: the label ' 3' is not a number"),
        ("stsb", ["1.5", "٣"], r"row 2: the label '٣' is not a number"),
        ("stsb", [1.5, float("nan")], r"row 2: the label nan is not a number"),
        ("stsb", [1.5, None], r"row 2: the label None is not a number"),
    ],
    ids=[
        "number",
        "unlabelled",
        "name",
        "missing class",
        "text for a value",
        "underscore",
        "blank",
        "digit",
        "not finite",
        "missing value",
    ],
)
def test_a_label_that_the_task_does_not_know_is_refused(task, labels, message):
    with pytest.raises(ValueError, match=message):
        prepare_rows(Dataset.from_dict(sentence_pairs(labels, rows=2)), TASKS[task], "here")


@pytest.mark.parametrize(
    "task, labels, message",
    [
        ("rte", [1], "here: all 24 rows have the label 'not_entailment'. Training needs at least two labels"),
        ("stsb", [2.5], "here: all 24 rows have the label 2.5"),
    ],
    ids=["class", "value"],
)
def test_one_label_is_nothing_to_learn(task, labels, message):
    rows = prepare_rows(Dataset.from_dict(sentence_pairs(labels)), TASKS[task], "here")
    with pytest.raises(ValueError, match=message):
        require_two_labels(rows, TASKS[task], "here")


def test_a_missing_text_column_is_named():
    with pytest.raises(ValueError, match=r"here has no column 'question' \(columns: sentence1, sentence2, label\)"):
        prepare_rows(Dataset.from_dict(sentence_pairs([0, 1])), TASKS["qnli"], "here")


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_csv_cells_may_hold_commas_quotes_and_line_breaks(tmp_path):
    texts = ["a, b", 'say "c"', "two\nlines", ""]
    path = write_csv(tmp_path / "x.csv", {"text": texts, "label": [0, 1, 0, 1]})
    assert read_table(path)[:] == {"text": texts, "label": [0, 1, 0, 1]}


@pytest.mark.parametrize(
    "cells, expected",
    [
        (["1", "2"], [1, 2]),
        (["1", "2.5"], [1.0, 2.5]),
        (["1", "x"], ["1", "x"]),
        (["1", "9" * 20], ["1", "9" * 20]),
    ],
    ids=["int", "float", "str", "too long for an int"],
)
def test_a_csv_label_has_the_type_that_holds_all_its_cells(tmp_path, cells, expected):
    path = write_csv(tmp_path / "x.csv", {"c": cells})
    assert read_table(path, label="c")["c"][:] == expected
    assert read_table(path)["c"][:] == read_table(path, label="c", is_typed=False)["c"][:] == cells


@pytest.mark.parametrize(
    "cells, expected",
    [
        ([1, 2], [1, 2]),
        ([1, 2.5], [1.0, 2.5]),
        (["1", "2"], ["1", "2"]),
        ([True, "x", 3], ["true", "x", "3"]),
        ([1, 10**20], ["1", "1" + "0" * 20]),
        ([1.5, 10**400], ["1.5", "1" + "0" * 400]),
    ],
    ids=["int", "float", "numbers as text", "mixed", "too long for an int", "too long for a float"],
)
def test_a_json_column_keeps_its_types_where_it_can(tmp_path, cells, expected):
    assert read_table(write_json_lines(tmp_path / "x.jsonl", {"c": cells}))["c"][:] == expected


@pytest.mark.parametrize("cells", [["1_1", "11"], [" 1", "1"], ["+1", "1"], ["007", "7"], ["١", "1"], ["1.", "x"]])
def test_cells_that_are_spelled_differently_stay_different(tmp_path, cells):
    assert read_table(write_csv(tmp_path / "x.csv", {"c": cells}), label="c")["c"][:] == cells


def test_a_csv_file_means_the_same_whatever_else_is_in_it(tmp_path):
    train = write_csv(tmp_path / "train.csv", {"text": ["1.10", "x"], "label": ["1.10", "2.x"]})
    validation = write_csv(tmp_path / "validation.csv", {"text": ["1.10", "1e3"], "label": ["1.10", "1.10"]})
    source = GlueSource(files={"train": str(train), "validation": str(validation)})
    _, rows = load_task(source, train=True, evaluate=True, predict=False)
    assert list(rows["validation"]) == [{"text": "1.10", "label": 0}, {"text": "1e3", "label": 0}]


def test_a_json_column_that_nobody_uses_may_hold_null(tmp_path):
    rows = [{"text": "a", "note": None, "label": 0}, {"text": "b", "note": 3, "label": 1}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert read_table(tmp_path / "x.json")["note"][:] == [None, 3]


def test_a_csv_cell_may_be_of_any_length(tmp_path):
    limit = csv.field_size_limit()
    cells = ["a" * (limit + 1), "b"]
    assert read_table(write_csv(tmp_path / "x.csv", {"c": cells}))["c"][:] == cells
    assert csv.field_size_limit() == limit


def test_a_json_array_holds_the_rows_of_json_lines(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    assert list(read_table(tmp_path / "x.json")) == rows


def test_lists_and_objects_are_left_out(tmp_path):
    path = write_json_lines(tmp_path / "x.json", {"text": ["a"], "tokens": [["a"]], "meta": [{"k": 1}]})
    assert read_table(path).column_names == ["text"]


def test_blank_lines_and_a_byte_order_mark_are_skipped(tmp_path):
    (tmp_path / "x.csv").write_bytes("\ufefftext,label\n\na,0\n\nb,1\n".encode())
    (tmp_path / "x.jsonl").write_bytes('\ufeff{"text": "a", "label": 0}\n\n{"text": "b", "label": 1}\n'.encode())
    assert read_table(tmp_path / "x.csv")[:] == read_table(tmp_path / "x.jsonl")[:]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.csv", b"", r"x\.csv has no rows"),
        ("x.csv", b"text,label\n", r"x\.csv has no rows"),
        ("x.jsonl", b"\n\n", r"x\.jsonl has no rows"),
        ("x.csv", b"text,label\na,0\nb,c,1\n", r"x\.csv, line 3: 3 cells under a header of 2 columns"),
        ("x.csv", b'text,label\n"a\nb",0\n"c,1\n', r"x\.csv, line 4: not valid CSV \(unexpected end of data\)"),
        ("x.csv", b"text,label\na,0\nb,\n", r"x\.csv, line 3: column 'label' has no value"),
        ("x.csv", b"text,label\na,0\n\xff,1\n", r"x\.csv, line 3: not UTF-8 text"),
        ("x.json", b'{"a": 1}\n{"a": }\n', r"x\.json, line 2, column 7: not valid JSON \(Expecting value\)"),
        ("x.json", b'[{"a": 1},\n {"a": }]\n', r"x\.json, line 2, column 8: not valid JSON \(Expecting value\)"),
        ("x.json", b'{"a": 1}\n' + b"[" * 100_000, r"x\.json, line 2: not valid JSON \(it is nested too deeply\)"),
        ("x.json", b'{"label": 1}\n{"label": [1]}\n', r"x\.json, line 2: column 'label' holds a list\. Give a text"),
        ("x.json", b'[{"a": 1}, 2]\n', r"x\.json, row 2: holds a int\. Give one object a line, or an array"),
        ("x.json", b'{"a": 1}\n{"b": 1}\n', r"x\.json, line 2: column 'a' is missing"),
        ("x.json", b'{"label": 1}\n\n{"label": null}\n', r"x\.json, line 3: column 'label' has no value"),
        ("x.csv", b"text,text,label\na,b,0\n", r"x\.csv, line 1: two columns are called 'text'"),
        ("x.txt", b"a", r"x\.txt: the file format is unknown\. Give a file that ends in \.csv, \.json, \.jsonl"),
    ],
    ids=[
        "no header", "header only", "blank", "cells", "quote", "no label", "encoding", "broken JSON",
        "broken array", "nested deeply", "label no value", "array of numbers", "missing key",
        "null", "one name twice", "format",
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv: there is no such file"):
        read_table(tmp_path / "none.csv")


# ---- Sources --------------------------------------------------------------------------------------------------------


def load(source, *, train=True, evaluate=True, predict=False):
    return load_task(source, train=train, evaluate=evaluate, predict=predict)


def folder_source(folder, task_name, tmp_path, **options):
    return GlueSource(
        task_name=task_name,
        dataset_name=str(folder),
        hub_options={"cache_dir": str(tmp_path / "cache")},
        **options,
    )


def mnli_folder(folder):
    def columns(rows):
        return sentence_pairs([0, 1, 2], rows, names=("premise", "hypothesis"))

    return write_parquet(folder, train=columns(9), validation_matched=columns(3), validation_mismatched=columns(6))


def test_mnli_keeps_its_two_evaluation_sets_apart(tmp_path):
    task, rows = load(folder_source(mnli_folder(tmp_path / "mnli"), "mnli", tmp_path))
    assert task is TASKS["mnli"]
    assert {split: len(split_rows) for split, split_rows in rows.items()} == {
        "train": 9,
        "validation_matched": 3,
        "validation_mismatched": 6,
    }


def test_a_split_may_be_one_file_or_several_in_order(tmp_path):
    columns = sentence_pairs([0, 1], rows=4)
    folder = write_parquet(tmp_path / "rte", train=columns)
    (folder / "train-00000-of-00001.parquet").rename(folder / "train-00001-of-00002.parquet")
    write_parquet(folder, train=sentence_pairs([1], rows=2))
    (folder / "train-00000-of-00001.parquet").rename(folder / "train-00000-of-00002.parquet")
    write_parquet(folder, validation=columns)
    (folder / "validation-00000-of-00001.parquet").rename(folder / "validation.parquet")
    _, rows = load(folder_source(folder, "rte", tmp_path))
    assert rows["train"]["label"][:] == [1, 1, 0, 1, 0, 1]
    assert len(rows["validation"]) == 4


def test_a_sub_folder_is_found_by_the_task_or_the_configuration(tmp_path):
    columns = sentence_pairs([0, 1])
    write_parquet(tmp_path / "glue" / "rte", train=columns, validation=columns)
    assert load(folder_source(tmp_path / "glue", "rte", tmp_path))[0] is TASKS["rte"]
    own = folder_source(tmp_path / "glue", None, tmp_path, dataset_config_name="rte")
    assert load(own)[0].labels == ("0", "1")


def test_a_configuration_that_is_no_sub_folder_is_refused(tmp_path):
    columns = sentence_pairs([0, 1])
    write_parquet(write_parquet(tmp_path / "glue", train=columns) / "rte", train=columns)
    source = folder_source(tmp_path / "glue", "rte", tmp_path, dataset_config_name="rtee")
    with pytest.raises(ValueError, match=r"--dataset_config_name rtee: .*/glue has no such .* \(there is: rte\)"):
        load(source, evaluate=False)


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00003"],
        ["train-00000-of-00002", "train-00002-of-00002"],
        ["train-00000-of-00001", "train"],
        ["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"],
    ],
    ids=["a third", "a number too high", "two spellings", "two sets"],
)
def test_a_split_that_is_not_whole_or_there_twice_is_refused(tmp_path, names):
    folder = write_parquet(tmp_path / "rte", train=sentence_pairs([0, 1], rows=4))
    for name in names:
        shutil.copy(folder / "train-00000-of-00001.parquet", tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=f"split 'train' is not whole, or is there twice: .* holds {names[0]}"):
        load(folder_source(tmp_path, "rte", tmp_path), evaluate=False)


def test_a_split_without_rows_is_refused_where_it_is_used(tmp_path):
    folder = write_parquet(tmp_path / "rte", train=sentence_pairs([0, 1]), validation=sentence_pairs([0, 1], rows=0))
    source = folder_source(folder, "rte", tmp_path)
    assert len(load(source, evaluate=False)[1]["train"]) == 24
    with pytest.raises(ValueError, match=r"split 'validation' of .*rte has no rows\. Give data with at least one"):
        load(source)
    (folder / "train-00000-of-00001.parquet").rename(folder / "train-00001-of-00002.parquet")
    (folder / "validation-00000-of-00001.parquet").rename(folder / "train-00000-of-00002.parquet")
    assert len(load(source, evaluate=False)[1]["train"]) == 24  # of two shards, the first without rows


def test_files_replace_the_data_of_a_glue_task(tmp_path):
    columns = sentence_pairs(["neutral", "entailment", "contradiction"], names=("premise", "hypothesis"))
    path = str(write_csv(tmp_path / "x.csv", columns))
    task, rows = load(GlueSource(task_name="mnli", files={"train": path, "validation": path}))
    assert task.eval_splits == ("validation",)
    assert rows["validation"]["label"][:3] == [1, 0, 2]


def test_only_the_splits_asked_for_are_needed(tmp_path):
    folder = write_parquet(tmp_path / "rte", validation=sentence_pairs([0, 1]))
    _, rows = load(folder_source(folder, "rte", tmp_path), train=False)
    assert list(rows) == ["validation"]


def test_a_test_file_needs_no_label(tmp_path):
    train = str(write_csv(tmp_path / "train.csv", sentence_pairs(["a", "b"])))
    blank = str(write_csv(tmp_path / "test.csv", sentence_pairs([""])))
    _, rows = load(GlueSource(files={"train": train, "test": blank}), evaluate=False, predict=True)
    assert rows["test"].column_names == ["sentence1", "sentence2"]


def test_a_missing_split_names_those_found(tmp_path):
    folder = write_parquet(tmp_path / "rte", train=sentence_pairs([0, 1]), dev=sentence_pairs([0, 1]))
    with pytest.raises(ValueError, match=r"rte has no split 'validation', only: dev, train\."):
        load(folder_source(folder, "rte", tmp_path))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_missing_file_argument_is_named(tmp_path, split):
    path = str(write_csv(tmp_path / "x.csv", sentence_pairs([0, 1])))
    files = {name: path for name in ("train", "validation", "test") if name != split}
    with pytest.raises(ValueError, match=rf"--{split}_file is missing: the run needs a {split} set"):
        load(GlueSource(files=files), predict=True)


def test_a_folder_without_parquet_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder without parquet files"):
        load(folder_source(tmp_path, "rte", tmp_path))


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "train.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read as parquet"):
        load(folder_source(tmp_path, "rte", tmp_path))


@pytest.mark.parametrize("name", ["no/such", "../no/such/folder", None], ids=["name", "path", "GLUE itself"])
def test_a_dataset_that_is_nowhere_is_refused(tmp_path, name):
    source = GlueSource(task_name="rte", dataset_name=name, hub_options={"cache_dir": str(tmp_path)})
    with pytest.raises(
        ValueError, match=rf"the dataset '{name or 'nyu-mll/glue'}' is not a local folder, and the Hub"
    ):
        load(source)


def test_a_source_must_name_data():
    with pytest.raises(ValueError, match=r"there is no data. Give a GLUE task \(--task_name\), a dataset"):
        GlueSource()


def test_a_dataset_and_files_exclude_each_other():
    with pytest.raises(ValueError, match=r"--dataset_name here and data files \(x\.csv\) cannot be used together"):
        GlueSource(dataset_name="here", files={"train": "x.csv"})


# ---- Real data ---------------------------------------------------------------------------------------------------

REAL_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


MANY_COLUMNS = {
    "id": ["1", "2"],
    "source": ["web", "web"],
    "text": ["red cat", "blue cat"],
    "note": ["x", "y"],
    "kind": ["good", "bad"],
    "label": ["", ""],
}


def test_columns_are_chosen_and_said(tmp_path, caplog):
    path = write_csv(tmp_path / "x.csv", MANY_COLUMNS)
    source = GlueSource(files={"train": str(path)}, text_columns=["text"], label_column="kind")
    with caplog.at_level("INFO", logger="increlora_hf"):
        task, rows = load_task(source, train=True, evaluate=False, predict=False)
    assert list(rows["train"]) == [{"text": "red cat", "label": 1}, {"text": "blue cat", "label": 0}]
    assert task.labels == ("bad", "good")
    assert "text: text; label: kind (2 classes: bad, good)" in caplog.text


def test_a_test_file_needs_no_label_of_another_name(tmp_path):
    train = write_csv(tmp_path / "train.csv", MANY_COLUMNS)
    test = write_csv(tmp_path / "test.csv", {"text": ["green cat"]})
    files = {"train": str(train), "test": str(test)}
    source = GlueSource(files=files, text_columns=["text"], label_column="kind")
    _, rows = load_task(source, train=True, evaluate=False, predict=True)
    assert list(rows["test"]) == [{"text": "green cat"}]


def test_a_task_of_the_table_may_read_other_columns(tmp_path):
    columns = {"left": ["a", "b"], "right": ["c", "d"], "score": [0.5, 4.0]}
    path = write_csv(tmp_path / "x.csv", columns)
    source = GlueSource(
        task_name="stsb", files={"train": str(path)}, text_columns=["left", "right"], label_column="score"
    )
    task, rows = load_task(source, train=True, evaluate=False, predict=False)
    assert task.columns == ("left", "right")
    assert rows["train"]["label"][:] == [0.5, 4.0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"label_column": "klass"}, r"x\.csv has no column 'klass' \(columns: id, source"),
        ({"text_columns": ["texts"]}, r"x\.csv has no column 'texts'"),
        ({"text_columns": ["id", "source", "text"]}, "id source text: a model reads one text or a pair"),
        ({"text_columns": ["text", "text"]}, "--text_columns text text: they are the same"),
        ({"text_columns": ["label"]}, "--text_columns label: 'label' is the label's own name"),
        ({"text_columns": ["kind"], "label_column": "kind"}, "--text_columns kind: 'kind' is the label's own name"),
    ],
    ids=["label", "text", "three texts", "one text twice", "the label", "another label"],
)
def test_columns_that_are_not_there_are_refused(tmp_path, options, message):
    path = write_csv(tmp_path / "x.csv", {**MANY_COLUMNS, "label": [0, 1]})
    with pytest.raises(ValueError, match=message):
        load_task(GlueSource(files={"train": str(path)}, **options), train=True, evaluate=False, predict=False)


def test_a_text_column_of_lists_is_refused(tmp_path):
    columns = {"words": [["red"], ["cat"]], "label": [0, 1]}
    options = {"text_columns": ["words"]}
    lines = GlueSource(files={"train": str(write_json_lines(tmp_path / "x.jsonl", columns))}, **options)
    folder = folder_source(write_parquet(tmp_path / "folder", train=columns), None, tmp_path, **options)
    for source, message in ((lines, "line 1: column 'words' holds a list"), (folder, "column 'words' is List")):
        with pytest.raises(ValueError, match=message):
            load(source, evaluate=False)


@pytest.mark.parametrize("name", ["stsb", "mrpc"])
def test_the_labels_of_another_task_are_refused(name):
    rows = Dataset.from_dict(
        {"sentence1": ["a"], "sentence2": ["b"], "label": [0]},
        features=Features(
            {
                "sentence1": Value("string"),
                "sentence2": Value("string"),
                "label": ClassLabel(names=["entailment", "not_entailment"]),
            }
        ),
    )
    with pytest.raises(ValueError, match=f"are the classes entailment, not_entailment, but {name} predicts"):
        prepare_rows(rows, TASKS[name], "here")


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, train_rows, validation_rows",
    [("rte", 2490, 277), ("cola", 8551, 1043), ("mrpc", 3668, 408), ("stsb", 5749, 1500)],
)
def test_real_glue_data_is_read_whole(tmp_path, task, train_rows, validation_rows):
    if not (REAL_DATA / task).is_dir():
        pytest.skip(f"no data in {REAL_DATA / task}")
    found, rows = load(folder_source(REAL_DATA / task, task, tmp_path))
    assert found is TASKS[task]
    assert (len(rows["train"]), len(rows["validation"])) == (train_rows, validation_rows)
    assert len(set(rows["train"]["label"])) >= 2
