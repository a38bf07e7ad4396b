"""Pictures of a growth, from real runs and from made-up ranks."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import arguments, tiny_bert, token_rows
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from transformers import TrainerCallback

from increlora_hf import IncreLoraConfig, IncreLoraTrainer
from increlora_hf.report import plots
from increlora_hf.report.plots import (
    budget_curve,
    compare,
    draw_all,
    learning_rates,
    orthogonality_curve,
    pixels,
    rank_map,
    save,
    score_history,
)
from increlora_hf.report.rank_map import BACKGROUND, block_names, module_names

CONFIG = IncreLoraConfig.paper(r_avg=2, top_h=5, interval=4, start=4, lam_lr_multiplier=10.0)  # 5, 5, 2 at 8, 12, 16
LLAMA = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


class Rates(TrainerCallback):
    """Keeps the learning rates of every group that the optimizer has used, by birth, from step to step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[int, float]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        for group in optimizer.param_groups:
            self.seen.setdefault(group.get("birth_step", 0), {})[state.global_step] = group["lr"]


def run(folder: Path, config: IncreLoraConfig = CONFIG, **settings: Any) -> tuple[IncreLoraTrainer, Rates]:
    rates = Rates()
    trainer = IncreLoraTrainer(
        tiny_bert(),
        arguments(folder, **settings),
        train_dataset=token_rows(),
        increlora_config=config,
        callbacks=[rates],
    )
    trainer.train()
    return trainer, rates


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> IncreLoraTrainer:
    return run(tmp_path_factory.mktemp("run"))[0]


def document(ranks: dict[str, int]) -> dict[str, Any]:
    return {"rank_pattern": ranks, "total_rank": sum(ranks.values()), "target_total_rank": 2 * sum(ranks.values())}


def decoder(layers: int) -> dict[str, int]:
    return {f"model.layers.{i}.{name}": 1 + (3 * i + len(name)) % 7 for i in range(layers) for name in LLAMA}


def texts(figure: Figure) -> list[str]:
    """The numbers and words inside the axes."""
    return [text.get_text() for axes in figure.axes for text in axes.texts]


# ---- Rank maps ----------------------------------------------------------------------------------------------------


def test_rank_map_shows_every_rank_and_the_totals(trained: IncreLoraTrainer) -> None:
    history = trained.increlora.history()
    figure = rank_map(history)
    ranks = np.array(list(history["rank_pattern"].values())).reshape(2, 6)
    expected = [*ranks.flatten(), *ranks.sum(axis=1), *ranks.sum(axis=0)]
    assert texts(figure) == [str(number) for number in expected]
    title = figure.axes[0].get_title()
    assert title == f"Rank map: total rank 24 of a budget of 24\n12 layers of ranks {ranks.min()} to {ranks.max()}"


def test_rank_map_leaves_cells_blank_where_nothing_is_adapted() -> None:
    figure = rank_map(document({"layers.0.q": 1, "layers.0.v": 2, "layers.1.v": 3}))
    assert texts(figure) == ["1", "2", "3", "3", "3", "1", "5"]
    mesh = figure.axes[0].collections[0]
    assert mesh.get_array().mask.tolist() == [[False, False], [True, False]]
    assert figure.axes[1].get_xlabel().endswith("blank: not adapted")


def test_rank_map_of_one_layer_says_so() -> None:
    figure = rank_map(document({"x.layer.0.query": 5}))
    assert figure.axes[0].get_title().endswith("1 layer of rank 5")


@pytest.mark.parametrize("layers", [1, 12, 24, 80])
def test_rank_map_grows_with_the_model_and_its_cells_do_not_shrink(layers: int) -> None:
    figure = rank_map(document(decoder(layers)))
    pixels(figure)  # lays it out
    axes, inches = figure.axes[0], figure.get_size_inches()
    box = axes.get_position()
    assert box.height * inches[1] / (layers + 1) > 0.2
    assert box.width * inches[0] / (len(LLAMA) + 0.7) > 0.35
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == [f"layers.{i}" for i in range(layers)] + ["total"]
    assert all(label.get_window_extent().x0 >= 0 for label in labels)
    assert axes.get_xticklabels()[0].get_text() == "q_proj"


def test_names_of_modules_do_not_overlap() -> None:
    columns = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    figure = rank_map(document({f"bert.encoder.layer.{i}.{name}": 1 for i in range(3) for name in columns}))
    pixels(figure)  # lays it out
    boxes = [tick.label2.get_window_extent() for tick in figure.axes[0].xaxis.get_major_ticks()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_text_is_readable_on_every_colour_of_the_scales() -> None:
    figure = compare({f"l.{i}.q": i for i in range(20)}, {f"l.{i}.q": 19 - i for i in range(20)}, ("a", "b"))
    for axes in figure.axes[:3]:
        mesh = axes.collections[0]
        cells = [text for text in axes.texts if text.get_color() in ("black", "white")]
        for text, colour in zip(cells, mesh.to_rgba(mesh.get_array().flatten()), strict=True):
            luminance = relative_luminance(colour)
            ink = 0.0 if text.get_color() == "black" else 1.0
            assert (max(ink, luminance) + 0.05) / (min(ink, luminance) + 0.05) > 4.5  # WCAG's AA


def relative_luminance(colour: Any) -> float:
    linear = np.where(colour[:3] <= 0.04045, colour[:3] / 12.92, ((colour[:3] + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_more_rank_is_darker_in_grey() -> None:
    figure = rank_map(document({f"l.{i}.q": i + 1 for i in range(30)}))
    mesh = figure.axes[0].collections[0]
    greys = [relative_luminance(colour) for colour in mesh.to_rgba(mesh.get_array().flatten())]
    assert greys == sorted(greys, reverse=True)


def test_comparison_has_one_scale_and_signed_differences() -> None:
    figure = compare({"l.0.q": 1, "l.1.q": 4}, {"l.0.q": 9, "l.1.q": 3}, ("ours", "theirs"))
    first, second, difference = figure.axes[:3]
    scales = [axes.collections[0].norm for axes in (first, second)]
    assert [(scale.vmin, scale.vmax) for scale in scales] == [(1, 9), (1, 9)]
    assert [text.get_text() for text in difference.texts] == ["+8", "-1", "+8", "-1", "+7"]
    assert first.get_title() == "A: ours\ntotal rank 5"
    assert second.get_title() == "B: theirs\ntotal rank 12"
    assert difference.get_title() == "B − A"


@pytest.mark.parametrize(
    "a, b",
    [({"l.0.q": 1}, {"l.0.v": 2}), ({"l.0.q": 1, "l.0.k": 3, "l.1.q": 2}, {"l.0.q": 4, "l.1.v": 5, "h": 1})],
    ids=["no common layer", "some common layers"],
)
def test_sums_of_a_comparison_are_those_of_all_layers(a: dict[str, int], b: dict[str, int]) -> None:
    figure = compare(a, b, ("ours", "theirs"))
    totals = (sum(a.values()), sum(b.values()), sum(b.values()) - sum(a.values()))
    for axes, total in zip(figure.axes[:3], totals, strict=True):
        cells = axes.collections[0].get_array().filled(0)
        shown = [int(text.get_text()) for text in axes.texts][-sum(cells.shape) :]
        assert shown == [*cells.sum(axis=1).astype(int), *cells.sum(axis=0).astype(int)]
        assert cells.sum() == total
    assert figure.axes[2].get_title().endswith("no layer in common") is not bool(a.keys() & b.keys())
    pixels(figure)


@pytest.mark.parametrize(
    "rows, names",
    [
        (["bert.encoder.layer.0", "bert.encoder.layer.1"], ["layer.0", "layer.1"]),
        (["encoder.block.0", "decoder.block.0"], ["encoder.block.0", "decoder.block.0"]),
        (["model.layers.3"], ["layers.3"]),
        (["", "h.0", "h.1"], ["elsewhere", "h.0", "h.1"]),
        ([""], ["all"]),
    ],
    ids=["encoder", "both", "one", "without-a-number", "no-numbers"],
)
def test_blocks_lose_what_all_have_in_common(rows: list[str], names: list[str]) -> None:
    assert block_names(rows) == names


def test_modules_keep_what_tells_them_apart() -> None:
    columns = ["attention.self.query", "attention.output.dense", "output.dense", "layer.1.mlp.wi", "layer.2.mlp.wi"]
    names = ["query", "attention.output.dense", "output.dense", "layer.1.mlp.wi", "layer.2.mlp.wi"]
    assert module_names(columns) == names


# ---- Curves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": np.float32(2.0), "lr_end": 1e-4}},
    ],
    ids=["linear", "with-a-floor", "numpy-settings"],
)
def test_rates_are_those_that_the_optimizer_had(settings: dict[str, Any], tmp_path: Path) -> None:
    trainer, used = run(tmp_path, replace(CONFIG, lam_lr_multiplier=1.0), **settings)
    drawn = learning_rates(trainer.increlora.history())
    assert drawn.keys() == used.seen.keys() == {0, 8, 12, 16}
    for birth, (steps, rates) in drawn.items():
        found = {int(step): float(rate) for step, rate in zip(steps, rates, strict=True) if step < 30}
        assert found == used.seen[birth]


def test_long_run_is_drawn_with_its_exact_peak() -> None:
    schedule = {"name": "linear", "warmup_steps": 333, "total_steps": 100_000, "learning_rate": 2e-4, "kwargs": {}}
    empty: dict[str, Any] = {
        "config": {"increment": 1},
        "plan": None,
        "rounds": [],
        "initial_ranks": {},
        "rank_pattern": {},
        "target_total_rank": 0,
    }
    steps, rates = learning_rates({**empty, "schedule": schedule})[0]
    assert len(steps) < 500
    assert steps[np.argmax(rates)] == 333
    assert max(rates) == 2e-4


def test_budget_curve_steps_up_to_the_budget(trained: IncreLoraTrainer) -> None:
    figure = budget_curve(trained.increlora.history())
    assert figure is not None
    curve, budget = figure.axes[0].lines
    assert list(zip(*curve.get_data(), strict=True)) == [(0, 12), (8, 17), (12, 22), (16, 24), (30, 24)]
    assert list(budget.get_ydata()) == [24, 24]
    assert len(figure.axes[1].lines) == 4
    assert len(figure.axes[1].get_legend().get_texts()) == 3
    assert figure.axes[1].get_legend().get_title().get_text() == "that of λ: 10 × as high"


def test_budget_curve_takes_the_growth_after_the_best_model_from_the_log(trained: IncreLoraTrainer) -> None:
    history = trained.increlora.history()
    best = {**history, "rounds": history["rounds"][:1]}
    figure = budget_curve(best, trained.state.log_history)
    assert figure is not None
    assert figure.axes[0].lines[0].get_xydata()[-1].tolist() == [30, 24]
    assert (15, 22) in [tuple(point) for point in figure.axes[0].lines[0].get_xydata()]


def test_rounds_of_an_earlier_training_are_not_drawn(trained: IncreLoraTrainer) -> None:
    history = trained.increlora.history()
    again = {**history, "plan": {**history["plan"], "initial_total_rank": 22}, "rounds_before_run": 2}
    figure = budget_curve(again)
    assert figure is not None
    assert figure.axes[0].get_title() == "Total rank in 1 round"


def test_fixed_ranks_have_a_map_and_no_curves_of_growth(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, IncreLoraConfig(rank_pattern={"bert.encoder.layer.0.attention.self.query": 2}))
    history = trainer.increlora.history()
    assert budget_curve(history) is None
    assert score_history(history) is None
    names = {path.name for path in draw_all(history, [], tmp_path / "pictures")}
    assert names == {"increlora_rank_map.png", "increlora_rank_map.svg"}


def test_orthogonality_curve_is_the_logged_one(trained: IncreLoraTrainer) -> None:
    log = trained.state.log_history
    figure = orthogonality_curve(trained.increlora.history(), log)
    assert figure is not None
    logged = [entry["increlora/orth_loss"] for entry in log if "loss" in entry]
    assert figure.axes[0].lines[-1].get_ydata().tolist() == logged
    assert orthogonality_curve(trained.increlora.history(), log[:1]) is None


def test_scores_name_few_layers_and_mark_their_rounds(trained: IncreLoraTrainer) -> None:
    history = trained.increlora.history()
    figure = score_history(history)
    assert figure is not None
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) <= len(plots.STYLES) + 1
    marked = [line for line in figure.axes[0].lines if line.get_marker() != "None"]
    times = [sum(name in record["layers"] for record in history["rounds"]) for name in history["rank_pattern"]]
    assert sorted((len(line.get_markevery()) for line in marked), reverse=True) == [
        count for count in sorted(times, reverse=True)[:6] if count
    ]
    assert all(line.get_xdata().tolist() == [8, 12, 16] for line in marked)


def test_a_curve_that_drops_says_why() -> None:
    ranks = {"l.0.q": 3, "l.1.q": 3}
    rounds = [
        {"step": 4, "birth_step": 4, "layers": list(ranks), "scores": ranks},
        {"step": 8, "birth_step": 8, "layers": [], "scores": ranks, "removed": {"l.0.q": [0, 1]}},
    ]
    history = {
        "config": {"increment": 1},
        "plan": {"initial_total_rank": 4, "total_steps": 20},
        "rounds": rounds,
        "initial_ranks": {"l.0.q": 2, "l.1.q": 2},
        "rank_pattern": {"l.0.q": 1, "l.1.q": 3},
        "target_total_rank": 4,
    }
    penalty = [{"step": step, "increlora/orth_loss": 1.0} for step in (0, 20)]
    for figure in (budget_curve(history), orthogonality_curve(history, penalty)):
        (line,) = (line for line in figure.axes[0].lines if "the cut removes" in line.get_label())
        assert line.get_xdata()[0] == 8
        assert line.get_label().endswith("down to rank 4")


def test_text_of_the_curves_is_readable_on_a_phone(trained: IncreLoraTrainer) -> None:
    history, log = trained.increlora.history(), trained.state.log_history
    for figure in (rank_map(history), budget_curve(history, log), orthogonality_curve(history, log)):
        pixels(figure)  # lays it out
        scale = 360 / figure.get_size_inches()[0] / 72  # CSS pixels of a point where the picture is 360 wide
        words = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert min(text.get_fontsize() for text in words) * scale > 9


# ---- Files --------------------------------------------------------------------------------------------------------


def test_everything_is_drawn_into_files_that_open(trained: IncreLoraTrainer, tmp_path: Path) -> None:
    paths = draw_all(trained.increlora.history(), trained.state.log_history, tmp_path / "new")
    stems = [f"increlora_{name}" for name in ("rank_map", "budget", "orthogonality", "scores")]
    assert [path.name for path in paths] == [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]
    assert sorted((tmp_path / "new").iterdir()) == sorted(paths)
    assert all(imread(path).std() > 0 for path in paths if path.suffix == ".png")
    assert all("<svg" in path.read_text() for path in paths if path.suffix == ".svg")


def test_same_picture_is_the_same_file(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save(rank_map(document(decoder(2))), tmp_path / name / "map.svg")
    assert (tmp_path / "first" / "map.svg").read_bytes() == (tmp_path / "second" / "map.svg").read_bytes()


def test_picture_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "map.png"
    path.write_text("old")

    def torn(self: Figure, file: Path, **kwargs: Any) -> None:
        Path(file).write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(OSError, match="No space left"):
        save(rank_map(document(decoder(1))), path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("map.png", "old")]


def test_pixels_are_the_picture() -> None:
    figure = rank_map(document(decoder(2)))
    width, height = figure.get_size_inches() * figure.dpi
    picture = pixels(figure)
    assert picture.dtype == np.uint8
    assert picture.shape == (int(height), int(width), 3)
    assert picture[0, 0].tolist() == [round(255 * part) for part in to_rgb(BACKGROUND)]
