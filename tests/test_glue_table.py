"""The runner of the paper's tables: what it would run, what it keeps, what it reports."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from glue_fixtures import save_tiny_model, sentence_pairs, write_parquet
from processes import forking_python

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "evidence"))

import glue_report  # noqa: E402
import glue_table  # noqa: E402
from glue_report import paired, report, score, table, trained, tuning_table  # noqa: E402
from glue_table import Results, Run, held_out, run_all, run_study, studies  # noqa: E402


def line(row: str, seed: int, value: float, best: float | None = None, **more: Any) -> dict[str, Any]:
    """A line of the results."""
    run = Run("methods", row, "rte", seed, {}, [])
    return {
        **{"key": run.key, **run._asdict(), "error": None, "seconds": 10.0},
        "metrics": {"eval_accuracy": value, "trainable_parameters": 100},
        "evaluations": [{"eval_accuracy": value if best is None else best}, {"eval_accuracy": value}],
        "training": [{"step": 9, "loss": 0.7}, {"step": 10, "loss": value / 2}],
        **more,
    }


def test_studies_are_those_of_the_paper() -> None:
    found = studies(2)
    assert list(found["ablation"]) == ["- - -", "- A -", "O - -", "O - R", "O A -", "O A R"]
    assert "increlora_orth_reg_weight" not in found["ablation"]["O A R"]
    assert list(found["methods"])[:3] == ["default r=2", "lora r=2", "adalora r=2"]
    assert found["methods"]["lora r=8"] == {"tuner": "lora", "increlora_r_avg": 8}
    assert len(found["budgets"]) == 12
    assert studies(8)["methods"]["lora r=32"]["increlora_r_avg"] == 32


def test_scores_are_of_the_last_step_or_the_best_evaluation() -> None:
    one = line("lora", 1, 0.5, best=0.75)
    assert (score(one, best=False), score(one, best=True)) == (50, 75)
    assert score({**one, "task": "squad_v2", "metrics": {"eval_f1": 44.8}, "evaluations": []}, best=True) == 44.8


def test_differences_are_paired_by_seed() -> None:
    assert paired({1: 10.0, 2: 20.0, 3: 30.0}, {1: 9.0, 2: 19.0, 4: 0.0}) == "+1.00 [+1.00, +1.00]"
    assert paired({1: 10.0}, {1: 9.0}) == "—"
    mean, low, high = (
        float(x.strip("[,]")) for x in paired({1: 1.0, 2: 5.0, 3: 3.0}, {1: 0.0, 2: 0.0, 3: 0.0}).split()
    )
    assert low < mean < high


def test_table_holds_means_spreads_and_the_papers_column() -> None:
    rows = [line("increlora r=2", seed, 0.5 + seed / 10) for seed in (1, 2)]
    rows += [line("lora r=2", seed, 0.5) for seed in (1, 2)]
    first, second = table(rows, best=False).splitlines()[2:]
    assert first == "| increlora r=2 | 65.00 ± 7.07 (2) |  | 88.52 | default | 0.325 | 100 | 10 |"
    assert second == "| lora r=2 | 50.00 ± 0.00 (2) | +15.00 [+10.00, +20.00] | 85.56 | default | 0.250 | 100 | 10 |"


def test_table_tells_what_failed_from_what_was_not_run() -> None:
    rows = [line("lora r=2", 1, 0.5), {**line("lora r=2", 1, 0.5), "task": "mrpc"}]
    rows += [{**line("head", 1, 0.5), "error": "out of memory"}]
    *_, head = table(rows, best=False).splitlines()
    assert [cell.strip() for cell in head.split("|")[2:8:5]] == ["failed", "not run"]


def test_report_compares_with_the_row_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "short.jsonl"
    rows = [line("lora r=2", 1, 0.5), line("increlora r=2", 1, 0.75), line("lora r=2", 2, 0.5)]
    file.write_text("".join(json.dumps({**one, "key": i}) + "\n" for i, one in enumerate(rows)))
    report(argparse.Namespace(results_files=[file], first=["increlora r=2"], output=None, figures=None))
    printed = capsys.readouterr().out
    assert printed.startswith("### short\n\n#### methods\n\n3 runs, 0 failed.\n")
    first, second = [text for text in printed.splitlines() if "lora" in text][:2]
    assert first.startswith("| increlora r=2 | 75.00 (1) |  |")
    assert second.startswith("| lora r=2 | 50.00 ± 0.00 (2) | — |")


def test_what_is_done_is_not_run_again_and_what_failed_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Run("methods", "lora", "rte", seed, {}, []) for seed in (1, 2, 3)]
    asked = []

    def execute(run: Run, *_: Any) -> dict[str, Any]:
        asked.append(run.seed)
        failed = run.seed == 2 and len(asked) <= 3
        return {**line("lora", run.seed, 0.5), "key": run.key, "error": "boom" if failed else None}

    monkeypatch.setattr(glue_table, "execute", execute)
    settings = argparse.Namespace(devices=None, parallel=1)
    for expected in ([1, 2, 3], [1, 2, 3, 2], [1, 2, 3, 2]):
        run_all(((run, tmp_path) for run in runs), Results(tmp_path / "r.jsonl"), settings)
        assert asked == expected
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 4
    assert len(glue_report.lines(tmp_path / "r.jsonl")) == 3


def test_ranks_of_another_run_become_a_file(tmp_path: Path) -> None:
    done = [line("adalora r=2", 1, 0.5, ranks={"a": 3, "b": 1})]
    flags = studies(2)["ranks"]["lora, adalora's ranks"]
    found = glue_table.with_ranks(flags, "rte", 1, done, tmp_path)
    assert found["tuner"] == "lora"
    assert json.loads(Path(found["increlora_rank_pattern"]).read_text()) == {"a": 3, "b": 1}
    with pytest.raises(SystemExit, match="Run the study methods first"):
        glue_table.with_ranks(flags, "rte", 2, done, tmp_path)


def test_adalora_ranks_are_read_from_its_adapter(tmp_path: Path) -> None:
    pattern = {"layer.0.query.lora_E": [[True], [False], [True]], "layer.0.key.lora_E": [[False]]}
    config = {"peft_type": "ADALORA", "rank_pattern": pattern}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert glue_table.ranks(tmp_path) == {"layer.0.query": 2, "layer.0.key": 0}
    assert glue_table.ranks(tmp_path / "nothing") is None


def test_budgets_are_drawn(tmp_path: Path) -> None:
    rows = [
        {**line(f"lora r={rank}", seed, 0.5), "study": "budgets", "flags": {"increlora_r_avg": rank}, "training": []}
        for rank in (2, 4)
        for seed in (1, 2)
    ]
    glue_report.figures([{**row, "evaluations": []} for row in rows], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["budgets-rte.png"]


def test_held_out_rows_come_from_the_training_set_alone(tmp_path: Path) -> None:
    columns = sentence_pairs([0, 1], rows=40) | {"idx": list(range(40))}
    write_parquet(
        tmp_path / "data" / "rte", train=columns, validation=sentence_pairs([0, 1], rows=4) | {"idx": [90] * 4}
    )
    folder = held_out(tmp_path / "data", "rte", tmp_path / "held")
    parts = [
        glue_table.load_dataset("parquet", data_files=str(folder / f"{name}.parquet"), split="train")["idx"]
        for name in ("train", "validation")
    ]
    assert [len(part) for part in parts] == [36, 4]
    assert sorted([*parts[0], *parts[1]]) == list(range(40))


def test_held_out_rows_stand_in_for_every_evaluation_set(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "mnli", train=sentence_pairs([0, 1, 2], names=("premise", "hypothesis")))
    folder = held_out(tmp_path / "data", "mnli", tmp_path / "held")
    assert {path.stem for path in folder.iterdir()} == {"train", "validation_matched", "validation_mismatched"}


def test_penalty_of_a_run_is_read_from_its_training_log(tmp_path: Path) -> None:
    log = [{"step": 5, "loss": 1.0, "increlora/orth_loss": 0.5, "epoch": 1}, {"step": 5, "eval_accuracy": 0.5}]
    (tmp_path / "all_results.json").write_text("{}")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert glue_table.read(tmp_path)["training"] == [{"step": 5, "loss": 1.0, "orth_loss": 0.5}]


def test_counts_of_the_best_evaluation_leave_out_what_grew_later(tmp_path: Path) -> None:
    wide, tall = 20 + 10 + 1, 10 + 30 + 1
    rounds: list[dict[str, Any]] = [{"step": step, "layers": ["wide", "tall"], "removed": {}} for step in (4, 8)]
    history = {
        **{"config": {"increment": 2, "overshoot": 0}, "initial_ranks": {"wide": 1, "tall": 1}, "rounds": rounds},
        **{"component_parameters": {"wide": wide, "tall": tall}, "target_total_rank": 9},  # the last layer grew by one
    }
    (tmp_path / "increlora_history.json").write_text(json.dumps({**history, "rank_pattern": {"wide": 5, "tall": 4}}))
    assert glue_table.gained(tmp_path) == [(4, 2 * wide + 2 * tall), (8, 2 * wide + tall)]
    cut = {"config": {"increment": 2, "overshoot": 2}, "target_total_rank": 5}  # on average
    rounds.append({"step": 9, "layers": [], "removed": {"wide": [0, 1, 4], "tall": [1]}})
    (tmp_path / "cut").mkdir()
    left = {"rank_pattern": {"wide": 2, "tall": 3}}
    (tmp_path / "cut" / "increlora_history.json").write_text(json.dumps({**history, **cut, **left}))
    assert glue_table.gained(tmp_path / "cut")[1:] == [(8, 2 * wide + tall), (9, -3 * wide - tall)]
    rounds.pop()
    (tmp_path / "all_results.json").write_text(json.dumps({"trainable_parameters": 1000}))
    log = [{"step": step, "eval_accuracy": value} for step, value in ((3, 0.1), (4, 0.9), (8, 0.9), (9, 0.5))]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    one = {**line("increlora", 1, 0.5), **glue_table.read(tmp_path)}
    assert trained(one, best=False) == 1000
    assert trained(one, best=True) == 1000 - 2 * wide - tall  # of equals the first and smallest


@pytest.mark.slow
def test_a_study_is_tuned_run_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "model")
    rows = sentence_pairs([0, 1], rows=40) | {"idx": list(range(40))}
    write_parquet(tmp_path / "data" / "rte", train=rows, validation=rows)
    settings = argparse.Namespace(
        **{"study": "methods", "r_avg": 2, "tasks": ["rte"], "seeds": [1], "tune": [1e-3], "tuning_seed": 0},
        **{"tuning_epochs": None},
        **{
            "model": str(model),
            "data": tmp_path / "data",
            "results": tmp_path / "r.jsonl",
            "cache": tmp_path / "cache",
        },
        **{"adapters_python": None, "devices": None, "parallel": 2, "rows": ["paper r=2", "head", "broken"]},
        more=["--max_steps=12", "--use_cpu", "--warmup_steps=2", "--logging_steps=4", "--dataloader_pin_memory=false"],
    )
    methods = studies(2)["methods"]
    with pytest.MonkeyPatch.context() as patch, forking_python(real=1) as python:
        patch.setattr(sys, "executable", python)
        patch.setattr(glue_table, "studies", lambda rank: {"methods": methods | {"broken": {"tuner": "nothing"}}})
        run_study(settings)
    found = [json.loads(text) for text in settings.results.read_text().splitlines()]
    assert len(found) == 3 + 2  # a rate for each of three rows, then the runs of the two that could be tuned
    broken = [one for one in found if one["row"] == "broken"]
    assert all("--tuner nothing is unknown" in one["error"] for one in broken)
    ours = next(one for one in found if one["row"] == "paper r=2" and one["study"] == "methods")
    assert ours["flags"]["learning_rate"] in settings.tune
    assert sum(ours["ranks"].values()) == 12
    assert "orth_loss" in ours["training"][0]
    report(argparse.Namespace(results_files=[settings.results], first=[], output=None, figures=tmp_path / "figures"))
    printed = capsys.readouterr().out
    assert "3 runs, 1 failed" in printed
    assert "2 runs, 0 failed" in printed
    assert (tmp_path / "figures" / "r" / "methods-rte-penalty.png").stat().st_size > 1000
    document = tmp_path / "evidence.md"
    document.write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n")
    report(argparse.Namespace(results_files=[settings.results], first=[], output=document, figures=None))
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| paper r=2 |" in text


@pytest.mark.parametrize(("best", "rates"), [(1e-3, 3), (1e-2, 5), (1e-4, 5)])
def test_a_grid_goes_on_until_its_best_rate_is_inside(
    best: float, rates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(run: Run, *_: Any) -> dict[str, Any]:
        value = -abs(math.log(run.flags["learning_rate"] / best))
        return {**line(run.row, run.seed, value), **run._asdict(), "key": run.key, "error": None}

    monkeypatch.setattr(glue_table, "execute", execute)
    monkeypatch.setattr(glue_table, "held_out", lambda data, task, folder: folder)
    results = Results(tmp_path / "r.jsonl")
    settings = argparse.Namespace(
        **{"tune": [3e-4, 1e-3, 3e-3], "tasks": ["rte"], "tuning_seed": 0, "tuning_epochs": 3, "parallel": 1},
        **{"devices": None, "data": tmp_path, "cache": tmp_path},
    )
    found = glue_table.tuned({"lora": {"tuner": "lora"}}, settings, [], results)
    assert found["lora", "rte"]["learning_rate"] == pytest.approx(best, rel=0.2)
    assert len(results.done) == rates


def test_tuning_is_a_table_of_its_own_with_the_best_rate_marked():
    runs = [{**line("lora", 1, value), "flags": {"learning_rate": rate}} for rate, value in ((1e-3, 0.7), (1e-2, 0.8))]
    assert tuning_table(runs).splitlines() == ["| | 0.001 | 0.01 |", "|---|---|---|", "| lora | 70.00 | **80.00** |"]
