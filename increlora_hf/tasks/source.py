"""Where a task's rows come from: files of one's own, a local folder of parquet files, or the Hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from increlora_hf.tasks.glue import TextTask, detect_task, glue_task, prepare_rows, require_two_labels
from increlora_hf.tasks.tables import LABEL, read_table

HUB_DATASET = "nyu-mll/glue"
SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A GLUE task, a dataset (local folder or Hub name), or files by split: one of the last two, or the task alone.

    `hub_options` go to `datasets.load_dataset`: cache_dir, token, ...
    """

    task_name: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    hub_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a source that names no data, or names it twice."""
        if not (self.task_name or self.dataset_name or self.files):
            raise ValueError(
                "there is no data: give a GLUE task (--task_name), a dataset (--dataset_name) or files (--train_file)."
            )
        if self.dataset_name and self.files:
            raise ValueError(
                f"--dataset_name {self.dataset_name} and data files ({', '.join(self.files.values())}) exclude each "
                "other. Give one of them."
            )

    @property
    def name(self) -> str:
        """The dataset's name, the Hub's GLUE unless another is given."""
        return self.dataset_name or HUB_DATASET

    def where(self, split: str) -> str:
        """A split, as error messages name it."""
        return self.files.get(split) or f"split {split!r} of {self.name}"


def load_task(
    source: DataSource, *, train: bool, evaluate: bool, predict: bool
) -> tuple[TextTask, dict[str, Dataset]]:
    """The task that `source` poses, and the splits asked for; those to predict have no `label`."""
    task = glue_task(source.task_name) if source.task_name else None
    splits = _read_splits(source, task)
    if task is None:
        task = detect_task(_split(splits, "train", source), source.where("train"))
    elif source.files:
        task = replace(task, eval_splits=("validation",), test_splits=("test",))
    labelled = ("train",) * train + task.eval_splits * evaluate
    wanted = labelled + task.test_splits * predict
    raw = {name: _split(splits, name, source) for name in wanted}
    rows = {name: prepare_rows(raw[name], task, source.where(name), labelled=name in labelled) for name in wanted}
    if train:
        require_two_labels(rows["train"], task, source.where("train"))
    return task, rows


def _split(splits: Mapping[str, Dataset], name: str, source: DataSource) -> Dataset:
    if name in splits:
        return splits[name]
    if source.files:
        raise ValueError(f"the {name} split is needed, but no --{name}_file is given. Add it.")
    found = ", ".join(sorted(splits))
    raise ValueError(f"{source.name} has no split {name!r}, only: {found}. Add it, or leave out what needs it.")


def _read_splits(source: DataSource, task: TextTask | None) -> Mapping[str, Dataset]:
    if source.files:
        return {
            split: read_table(path, ignore=(LABEL,) if split == "test" else ()) for split, path in source.files.items()
        }
    config = source.dataset_config_name or (task.name if task else None)
    if Path(source.name).is_dir():
        return _read_folder(source, config)
    return _read_hub(source, config if source.name == HUB_DATASET else source.dataset_config_name)


def _read_folder(source: DataSource, config: str | None) -> dict[str, Dataset]:
    """Splits by file name, `SPLIT.parquet` or its numbered shards, in the folder or in its sub-folder `config`.

    `datasets` would guess the splits from words in the names, and merge validation_matched with
    validation_mismatched into one.
    """
    root = Path(source.name)
    files = sorted(root.glob("*.parquet")) or sorted((root / (config or "data")).glob("*.parquet"))
    if not files:
        raise ValueError(f"--dataset_name {root} is a folder without parquet files. Name the folder that holds them.")
    shards: dict[str, list[str]] = {}
    for file in files:
        shards.setdefault(SHARD.sub("", file.stem), []).append(str(file))
    return {split: _read_parquet(paths, source) for split, paths in shards.items()}


def _read_parquet(paths: list[str], source: DataSource) -> Dataset:
    cache_dir = source.hub_options.get("cache_dir")
    try:
        return load_dataset("parquet", data_files=paths, split="train", cache_dir=cache_dir)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{', '.join(paths)} cannot be read as parquet ({error}). Replace the file.") from error


def _read_hub(source: DataSource, config: str | None) -> Mapping[str, Dataset]:
    try:
        return load_dataset(source.name, config, **source.hub_options)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"the dataset {source.name!r} is no local folder, and the Hub does not give it ({error}). Give a folder "
            "of parquet files with --dataset_name, or --train_file and --validation_file."
        ) from error
