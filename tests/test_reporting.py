"""What a round and the end of training show: loggers, terminal, notebook, files."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import BytesIO, StringIO, TextIOWrapper
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers
from conftest import arguments, tiny_bert, token_rows
from hub_server import TOKEN
from PIL.Image import Image
from PIL.Image import open as open_image
from processes import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import MLflowCallback, TrackioCallback, WandbCallback

from increlora_hf import IncreLoraConfig, IncreLoraTrainer, attach
from increlora_hf.report.callback import GrowthReportCallback, say
from increlora_hf.report.plots import orthogonality_curve
from increlora_hf.report.text import plan_line, rank_table, round_line, sparkline

CONFIG = IncreLoraConfig.paper(r_avg=2, top_h=5, interval=4, start=4, lam_lr_multiplier=10.0)  # 5, 5, 2 at 8, 12, 16
WITH_CUT = IncreLoraConfig(r_avg=2, top_h=5, interval=4, start=4)  # the same rounds, the cut at 19
PICTURES = [
    f"increlora_{name}.{kind}" for name in ("budget", "orthogonality", "rank_map", "scores") for kind in ("png", "svg")
]


def make(folder: Path, *callbacks: Any, config: IncreLoraConfig = CONFIG, **settings: Any) -> IncreLoraTrainer:
    return IncreLoraTrainer(
        tiny_bert(),
        arguments(folder, **{"max_steps": 20, **settings}),
        train_dataset=token_rows(),
        eval_dataset=token_rows(seed=9),
        increlora_config=config,
        callbacks=list(callbacks),
    )


def drawn(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("increlora_*") if path.suffix in (".png", ".svg"))


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def is_of_a_round(values: dict[str, Any]) -> bool:
    return any(name.startswith("increlora/rank/") for name in values)


class Service(ModuleType):
    """Stands for the wandb or trackio package."""

    def __init__(self) -> None:
        super().__init__("service")
        self.logged: list[dict[str, Any]] = []
        self.run = SimpleNamespace(summary={})

    def Image(self, picture: Any) -> tuple[str, Any]:
        return "a picture of", picture.shape

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)


class Wandb(WandbCallback):
    def __init__(self, service: Service) -> None:
        self._wandb, self._initialized = service, True

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None: ...

    def on_save(self, *args: Any, **kwargs: Any) -> None: ...

    def on_train_end(self, *args: Any, **kwargs: Any) -> None: ...


class Trackio(TrackioCallback):
    def __init__(self, service: Service) -> None:
        self._trackio, self._initialized = service, True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None: ...


@pytest.fixture
def pictures_of_rounds(pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures, but none at the end."""
    monkeypatch.setattr("increlora_hf.report.plots.draw_all", lambda *args: None)


# ---- Loggers ------------------------------------------------------------------------------------------------------


def test_tensorboard_has_each_round_at_its_step_and_the_ranks_in_a_group_of_their_own(
    tmp_path: Path, pictures_of_rounds: None, monkeypatch: Any
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make(tmp_path / "out", report_to="tensorboard", logging_steps=6)
    trainer.train()
    found = events(tmp_path / "events")
    totals = {event.step: event.value for event in found.Scalars("train/increlora/total_rank")}
    assert totals == {6: 12, 8: 17, 12: 22, 16: 24, 18: 24}
    assert len(found.Scalars("train/increlora/orth_loss")) == 3
    ranks = dict.fromkeys(trainer.increlora.layers, 1)
    for record in trainer.increlora.rounds:
        for name in record.layers:
            ranks[name] += 1
            values = {event.step: event.value for event in found.Scalars(f"increlora/rank/{name}")}
            assert values[record.step] == ranks[name]
    logged = [tag for tag in found.Tags()["scalars"] if tag.startswith("increlora/")]
    assert len(logged) == sum(rank > 1 for rank in ranks.values())
    assert sum(len(found.Scalars(tag)) for tag in logged) == 5 + 5 + 2
    images = found.Images("increlora/rank_map")
    assert [image.step for image in images] == [8, 12, 16]
    assert all(open_image(BytesIO(image.encoded_image_string)).size == (image.width, image.height) for image in images)


@pytest.mark.parametrize("kind", [Wandb, Trackio])
def test_services_get_ranks_and_the_rank_map(
    kind: Callable[[Service], TrainerCallback], tmp_path: Path, pictures_of_rounds: None
) -> None:
    service = Service()
    trainer = make(tmp_path, kind(service), logging_steps=100)
    trainer.train()
    rounds = [values for values in service.logged if is_of_a_round(values)]
    totals = [(one["train/global_step"], one.get("train/increlora/total_rank")) for one in service.logged]
    assert {(8, 17), (12, 22), (16, 24)} <= set(totals)
    assert [one["train/global_step"] for one in rounds] == [8, 12, 16]
    first = trainer.increlora.rounds[0]
    assert {name: rounds[0][f"increlora/rank/{name}"] for name in first.layers} == dict.fromkeys(first.layers, 2)
    assert rounds[0]["increlora/rank_map"][0] == "a picture of"
    assert rounds[0]["increlora/rank_map"][1][2] == 3


def test_services_get_the_ranks_that_the_cut_lowers(tmp_path: Path) -> None:
    service = Service()
    trainer = make(tmp_path, Wandb(service), config=WITH_CUT, logging_steps=100)
    trainer.train()
    cut, ranks = trainer.increlora.rounds[-1], trainer.increlora.rank_pattern
    shown = {key: value for one in service.logged if one["train/global_step"] == 19 for key, value in one.items()}
    assert shown.items() >= {f"increlora/rank/{name}": ranks[name] for name in cut.removed}.items()
    assert sum(is_of_a_round(one) for one in service.logged) == 3 + 1
    assert shown["train/increlora/total_rank"] == 24


def test_rounds_do_not_disturb_the_log_of_the_run(tmp_path: Path) -> None:
    reported = make(tmp_path / "a", Wandb(Service()), logging_steps=4)
    plain = make(tmp_path / "b", logging_steps=4)
    plain.remove_callback(GrowthReportCallback)
    for trainer in (reported, plain):
        trainer.train()
    logs = [[entry for entry in trainer.state.log_history if "loss" in entry] for trainer in (reported, plain)]
    assert logs[0] == logs[1]
    assert [entry["step"] for entry in logs[0]] == [4, 8, 12, 16, 20]
    assert len(reported.state.log_history) == 6  # and one line at the end


def test_resumed_run_reports_only_its_own_rounds(tmp_path: Path) -> None:
    make(tmp_path, save_strategy="steps", save_steps=10).train()
    service = Service()
    make(tmp_path, Wandb(service), logging_steps=100).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert [one["train/global_step"] for one in service.logged if is_of_a_round(one)] == [12, 16]


def test_other_processes_report_nothing(tmp_path: Path, pictures: None, caplog: pytest.LogCaptureFixture) -> None:
    service = Service()
    trainer = make(tmp_path, Wandb(service), disable_tqdm=False)
    report = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GrowthReportCallback))
    trainer.remove_callback(report)
    trainer.train()
    service.logged.clear()
    state = SimpleNamespace(is_world_process_zero=False, global_step=8, log_history=[])
    with caplog.at_level(logging.INFO):
        for event in (report.on_train_begin, report.on_step_end, report.on_train_end):
            report._reported = 0
            event(trainer.args, state, trainer.control, model=trainer.model)
    assert not service.logged
    assert not [record for record in caplog.records if "step 8" in record.getMessage()]
    assert not drawn(tmp_path)


# ---- Settings -----------------------------------------------------------------------------------------------------


SETTINGS = {f"increlora_{name}": value for name, value in replace(CONFIG, seed=42).to_dict().items()}


@dataclass
class WithModelArguments(TrainingArguments):
    """As TRL's arguments."""

    model_init_kwargs: dict[str, Any] | None = None


def test_tensorboard_gets_no_token(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    plain = arguments(tmp_path / "out", report_to="tensorboard", max_steps=20, hub_token=TOKEN)
    settings = WithModelArguments(**plain.to_dict() | {"model_init_kwargs": {"token": "my-secret", "other": [TOKEN]}})
    IncreLoraTrainer(tiny_bert(), settings, train_dataset=token_rows(), increlora_config=CONFIG).train()
    written = [path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert any(b"model_init_kwargs" in data for data in written)
    assert not any(secret in data for data in written for secret in (b"my-secret", TOKEN.encode()))


def test_tensorboard_shows_the_settings_among_the_training_arguments(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make(tmp_path / "out", report_to="tensorboard")
    trainer.train()
    (event,) = events(tmp_path / "events").Tensors("args/text_summary")
    shown = json.loads(event.tensor_proto.string_val[0])
    assert SETTINGS.items() <= shown.items()
    assert shown["learning_rate"] == trainer.args.learning_rate


def test_mlflow_gets_every_setting_as_a_parameter(tmp_path: Path, monkeypatch: Any) -> None:
    mlflow = MagicMock(__version__="3.0.0")
    mlflow.utils.validation.MAX_PARAM_VAL_LENGTH, mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH = 500, 100
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_mlflow_available", lambda: True)
    make(tmp_path, MLflowCallback()).train()
    parameters = {name: value for call in mlflow.log_params.call_args_list for name, value in call.args[0].items()}
    assert SETTINGS.items() <= parameters.items()


def test_weights_and_biases_gets_every_setting_in_its_configuration(tmp_path: Path, monkeypatch: Any) -> None:
    wandb = MagicMock()
    for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        monkeypatch.setitem(sys.modules, name, wandb)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: True)
    make(tmp_path, WandbCallback(), max_steps=17).train()
    assert SETTINGS.items() <= wandb.config.update.call_args_list[0].args[0].items()


@pytest.mark.parametrize("first", ["train", "evaluate"])
def test_integrations_get_the_settings_whichever_event_sets_them_up(first: str, tmp_path: Path) -> None:
    class Reader(TrainerCallback):
        """Sends the training arguments at the first event, as Weights & Biases, Trackio, Comet and others do."""

        sent: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.sent = self.sent or args.to_dict()

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.sent = self.sent or args.to_dict()

    reader = Reader()
    trainer = make(tmp_path, reader)
    getattr(trainer, first)()
    assert SETTINGS.items() <= reader.sent.items()


def test_settings_are_shown_without_changing_what_is_saved(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="steps", save_steps=10)
    before = trainer.args.to_dict()
    trainer.train()
    assert trainer.args.to_dict() == before
    assert "to_dict" not in vars(pickle.loads(pickle.dumps(trainer.args)))
    saved = json.loads((tmp_path / "checkpoint-10" / "training_args.json").read_text())
    assert TrainingArguments(**saved).learning_rate == trainer.args.learning_rate
    assert "increlora" not in trainer.model.config.to_json_string()


# ---- Terminal -----------------------------------------------------------------------------------------------------


def messages(shown: str) -> list[str]:
    """What IncreLoRA says in the output of a training, a message each: plan, rounds and table."""
    lines = [line.rpartition("\r")[2] for line in shown.splitlines() if not line.startswith("{'")]
    starts = [i for i, line in enumerate(lines) if "IncreLoRA: " in line]
    return ["\n".join(lines[i:j]) for i, j in pairwise([*starts, len(lines)])]


SCRIPT = """
import logging
from conftest import arguments, tiny_bert, token_rows
from increlora_hf import IncreLoraTrainer
from increlora_hf.report import callback

callback._can_draw = lambda: False  # it takes long
for is_set_up in (False, True):
    if is_set_up:
        print("SET UP", flush=True)
        logging.basicConfig(level=logging.INFO, format="LOG %(message)s")
    args = arguments("out", max_steps=20, disable_tqdm=False)
    config = {"r_avg": 2, "top_h": 5, "interval": 4, "start": 4}
    IncreLoraTrainer(tiny_bert(), args, train_dataset=token_rows(), increlora_config=config).train()
"""


def test_script_without_a_set_up_of_logging_shows_plan_rounds_and_table_once(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command, environment = [sys.executable, "-c", SCRIPT], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    plain, set_up = done.stdout.split("SET UP\n")
    shown = messages(plain)
    assert [one.split(",")[0] for one in shown] == [
        "IncreLoRA: 12 layers", "IncreLoRA: step 8", "IncreLoRA: step 12", "IncreLoRA: step 16",
        "IncreLoRA: step 19",  # the cut: before the last step, with less than an interval left after the last round
        "IncreLoRA: final ranks",
    ]  # fmt: skip
    assert len(shown[0].splitlines()) == 2
    assert [one.count("Each bar is") for one in shown] == [0, 1, 0, 0, 0, 0]
    assert "= attention.self.query" in shown[-1]
    assert not messages(set_up)
    assert done.stderr.count("IncreLoRA: ") == done.stderr.count("LOG IncreLoRA: ") == len(shown)
    assert all(f"LOG {one}\n" in done.stderr for one in shown)


def shown_by(folder: Path, **settings: Any) -> tuple[list[str], str]:
    """What a training says where logging is not set up, and the rank table that it should end with."""
    handlers, logging.root.handlers = logging.root.handlers, []  # pytest's
    try:
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as bars:
            trainer = make(folder, **settings)
            trainer.train()
    finally:
        logging.root.handlers = handlers
    assert "IncreLoRA" not in bars.getvalue()
    assert ("it/s" in bars.getvalue()) is not trainer.args.disable_tqdm
    return messages(out.getvalue()), rank_table(trainer.increlora.rank_pattern)


def test_disable_tqdm_takes_away_the_bar_and_nothing_else(tmp_path: Path) -> None:
    with_bar, table = shown_by(tmp_path, disable_tqdm=False)
    without, _ = shown_by(tmp_path, disable_tqdm=True)
    assert with_bar == without
    assert len(without) == 5
    assert table in without[-1]


@pytest.mark.parametrize("level, count", [("passive", 5), ("info", 5), ("warning", 0), ("error", 0)])
def test_log_level_is_respected(level: str, count: int, tmp_path: Path) -> None:
    before = transformers.logging.get_verbosity()  # Trainer sets it
    try:
        assert len(shown_by(tmp_path, log_level=level)[0]) == count
    finally:
        transformers.logging.set_verbosity(before)


def test_raised_verbosity_of_transformers_hides_information(tmp_path: Path) -> None:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        assert not shown_by(tmp_path)[0]
    finally:
        transformers.logging.set_verbosity(before)


def _in_process(rank: int, folder: Path, set_up: bool) -> tuple[list[str], list[str]]:
    logging.root.handlers = []  # pytest's
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        if set_up:
            logging.basicConfig(level=logging.INFO)
        make(folder, log_level_replica="info").train()
    return messages(out.getvalue()), messages(err.getvalue())


@pytest.mark.parametrize("set_up", [False, True], ids=["plain", "with logging set up"])
def test_several_processes_show_everything_once(set_up: bool, tmp_path: Path) -> None:
    (out, err), others = run(2, tmp_path / "processes", _in_process, tmp_path, set_up)
    shown, silent = (err, out) if set_up else (out, err)
    assert [one.partition("IncreLoRA: ")[2].split(",")[0] for one in shown] == [
        "12 layers", "step 8", "step 12", "step 16", "final ranks",
    ]  # fmt: skip
    assert not silent
    assert others == ([], [])


@pytest.mark.parametrize(
    "blocks, steps, overshoot", [(1, 40, 0), (1, 40, 4), (24, 5_000, 0), (40, 999_999, 4)], ids=str
)
def test_plan_is_two_lines_that_fit_a_terminal(blocks: int, steps: int, overshoot: int) -> None:
    with torch.device("meta"):
        block = nn.ModuleDict({name: nn.Linear(8192, 28_672) for name in "qkvogud"})  # as of Llama 70B
        model = nn.ModuleList([copy.deepcopy(block) for _ in range(blocks)])
    growth = attach(model, IncreLoraConfig(r_avg=8, overshoot=overshoot, interval=max(2, steps // 200))).increlora
    plan = growth.begin_run(steps, 0)
    cut = f" → {56 * blocks}" if overshoot else ""
    for head in (0, 2_000, 590_000_000):
        first, second = plan_line(growth, head).splitlines()
        assert max(len(first), len(second)) <= 80
        ranks = f"rank {growth.total_rank} → {plan.peak_total_rank}{cut}, adapter"
        assert first.startswith(f"IncreLoRA: {7 * blocks} layers, {ranks}")
        assert f"{plan.first_step:,}-{plan.last_step:,} of {steps:,}" in second
        assert (f"cut at {plan.cut_step:,}" in second) is bool(overshoot)


@pytest.mark.parametrize("layers", [1, 12, 80])
def test_line_has_a_block_for_each_row_and_fits_a_terminal(layers: int) -> None:
    ranks = {f"layers.{i}.{name}": i + 1 for i in range(layers) for name in "qkv"}
    growth: Any = SimpleNamespace(total_rank=sum(ranks.values()), peak_total_rank=10_000, rank_pattern=ranks)
    line = round_line(growth, 123_456)
    blocks = line.rpartition(" ")[2]
    assert len(line) <= 80
    assert len(blocks) == min(layers, 80 - len(line.rpartition(" ")[0]) - 1)
    assert list(blocks) == sorted(blocks)
    assert blocks[-1] == "█"


def test_blocks_are_on_a_scale_from_zero() -> None:
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 80) == "▁▂▃▄▅▆▇█"
    assert sparkline([6, 6, 6], 80) == "███"
    assert sparkline([4, 8, 8, 8], 2) == "▆█"


# ---- Notebook -----------------------------------------------------------------------------------------------------


class Notebook:
    """Stands for IPython with a kernel behind it: what is displayed, and what replaces it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shell: Any) -> None:
        self.shown: list[tuple[str, Any]] = []
        ipython, displays = ModuleType("IPython"), ModuleType("IPython.display")
        ipython.get_ipython = lambda: shell
        ipython.version_info = (9, 0)  # matplotlib asks for it
        displays.display = self.display
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", displays)

    def display(self, picture: Any, display_id: bool) -> Any:
        assert display_id
        self.shown.append(("new", picture))
        return SimpleNamespace(update=lambda picture: self.shown.append(("update", picture)))


@pytest.mark.parametrize("quiet", [False, True], ids=["with bars", "without bars"])
def test_notebook_shows_one_rank_map_that_grows(
    quiet: bool, tmp_path: Path, pictures_of_rounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = Notebook(monkeypatch, SimpleNamespace(kernel=object()))
    make(tmp_path, disable_tqdm=quiet).train()
    assert [kind for kind, _ in notebook.shown] == ["new", "update", "update", "update", "update"]
    assert all(isinstance(picture, Image) for _, picture in notebook.shown)
    maps = [picture.tobytes() for _, picture in notebook.shown]
    assert len(set(maps[:4])) == 4
    assert maps[3] == maps[4]  # the end of training, the same ranks


@pytest.mark.parametrize("shell", [SimpleNamespace(), None], ids=["terminal-ipython", "ipython-not-running"])
def test_nothing_is_displayed_elsewhere(
    shell: Any, tmp_path: Path, pictures_of_rounds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = Notebook(monkeypatch, shell)
    make(tmp_path, disable_tqdm=False).train()
    assert not notebook.shown


# ---- Files --------------------------------------------------------------------------------------------------------


def test_training_ends_with_pictures_in_the_output_folder_only(tmp_path: Path, pictures: None) -> None:
    trainer = make(tmp_path, save_strategy="steps", save_steps=10)
    trainer.train()
    assert drawn(tmp_path) == PICTURES
    assert all((tmp_path / name).is_file() for name in PICTURES)


def test_a_run_too_short_to_log_has_a_picture_of_its_orthogonality(
    tmp_path: Path, pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs: list[Any] = []
    monkeypatch.setattr("increlora_hf.report.plots.draw_all", lambda history, log, folder: logs.append(log))
    silent, logged = (make(tmp_path, logging_steps=steps) for steps in (500, 4))
    silent.train()
    points = {entry["step"]: entry["increlora/orth_loss"] for entry in logs[0] if "increlora/orth_loss" in entry}
    assert list(points) == [0, 8, 12, 16, 20]
    logged.train()
    for entry in logged.state.log_history:
        if entry["step"] in points and "loss" in entry:
            assert points[entry["step"]] == entry["increlora/orth_loss"]
    assert orthogonality_curve(silent.increlora.history(), logs[0]) is not None


def test_best_model_is_drawn_with_its_own_ranks(
    tmp_path: Path, pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    histories: list[Any] = []
    monkeypatch.setattr("increlora_hf.report.plots.draw_all", lambda history, log, folder: histories.append(history))
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 10, "save_steps": 10}
    trainer = make(tmp_path, load_best_model_at_end=True, metric_for_best_model="mark", **settings)
    marks = iter([2.0, 1.0])
    trainer.compute_metrics = lambda predictions: {"mark": next(marks)}
    trainer.train()
    assert trainer.state.best_global_step == 10
    assert histories[0]["total_rank"] == trainer.increlora.total_rank == 17
    assert histories[0]["rank_pattern"] == trainer.increlora.rank_pattern


def test_picture_that_fails_is_a_warning_and_training_ends_well(
    tmp_path: Path, pictures: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("increlora_hf.report.plots.draw_all", fail)
    monkeypatch.setattr("increlora_hf.report.plots.rank_map", fail)
    service = Service()
    trainer = make(tmp_path, Wandb(service))
    assert trainer.train().global_step == 20
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert (
        warnings
        == [
            "IncreLoRA: could not show the growth (OSError: No space left on device). "
            "Training and adapter are not affected."
        ]
        * 4
    )  # a round each, and the end
    assert trainer.increlora.total_rank == 24
    assert sum(map(is_of_a_round, service.logged)) == 3


def test_without_matplotlib_there_are_no_pictures_and_no_words_about_it(
    tmp_path: Path, pictures: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "increlora_hf.report.plots", raising=False)
    make(tmp_path, Wandb(Service())).train()
    assert not drawn(tmp_path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_callback_can_be_left_out(tmp_path: Path, pictures: None) -> None:
    trainer = make(tmp_path)
    trainer.remove_callback(GrowthReportCallback)
    trainer.train()
    assert not drawn(tmp_path)


# ---- The history --------------------------------------------------------------------------------------------------


def test_history_of_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}}
    whole = make(tmp_path, save_strategy="steps", save_steps=10, **settings)
    whole.train()
    resumed = make(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert resumed.increlora.history() == whole.increlora.history()
    saved = json.loads((tmp_path / "checkpoint-10" / "increlora_history.json").read_text())
    assert saved["schedule"] == whole.increlora.schedule
    assert saved["schedule"] == {
        "name": "cosine_with_min_lr",
        "warmup_steps": 3,
        "total_steps": 20,
        "learning_rate": 1e-2,
        "kwargs": {"min_lr": 1e-4},
    }
    assert saved["initial_ranks"] == dict.fromkeys(whole.increlora.layers, 1)


@pytest.mark.parametrize("hide", ["level", "disabled", "everything"])
def test_a_reader_of_the_log_can_hide_the_messages(
    hide: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = logging.getLogger("increlora_hf")
    if hide == "level":
        monkeypatch.setattr(package, "level", logging.WARNING)
    elif hide == "disabled":
        monkeypatch.setattr(package, "disabled", True)
    else:
        monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)
    say(arguments(tmp_path), "hello")
    assert "hello" not in "".join(capsys.readouterr())


def test_a_message_is_shown_on_a_stdout_that_lacks_its_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    monkeypatch.setattr("increlora_hf.report.callback.logger", logging.Logger("without-handlers"))
    say(arguments(tmp_path), "rank 36 → 72")
    narrow.flush()
    assert narrow.buffer.getvalue() == b"rank 36 \\u2192 72\n"
