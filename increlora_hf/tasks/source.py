"""Where a task's rows come from: files of one's own, a local folder of parquet files, or the Hub."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

READ_ROWS = 1000  # as many as `datasets` writes at a time
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Files by split, or a dataset: a local folder or a Hub name, `hub_dataset` unless another is given.

    `hub_options` go to `datasets.load_dataset`: cache_dir, token, ...
    """

    hub_dataset: str
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    hub_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a source that names its data twice."""
        if self.dataset_name and self.files:
            raise ValueError(
                f"--dataset_name {self.dataset_name} and data files ({', '.join(self.files.values())}) cannot be used "
                "together. Give one of them."
            )

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.dataset_name or self.hub_dataset

    @property
    def hub_id(self) -> str | None:
        """Its name on the Hub; None where it comes from this machine."""
        return None if self.files or Path(self.name).exists() else self.name

    def where(self, split: str) -> str:
        """A split, as error messages name it."""
        return self.files.get(split) or f"split {split!r} of {self.name}"


def read_splits(
    source: DataSource, read_file: Callable[[str, str], Dataset], config: str | None = None
) -> Mapping[str, Dataset]:
    """All splits that `source` has.

    Args:
        read_file: from the path of a file and its split to its rows.
        config: the configuration in `hub_dataset` or a local folder, where the source names none.
    """
    if source.files:
        return {split: read_file(path, split) for split, path in source.files.items()}
    config = source.dataset_config_name or config
    if Path(source.name).is_dir():
        return _read_folder(source, config)
    return _read_hub(source, config if source.name == source.hub_dataset else source.dataset_config_name)


def require_split(splits: Mapping[str, Dataset], name: str, source: DataSource, why: str = "") -> Dataset:
    """That split, with at least one row, or an error that says where it should have been, and why it is needed."""
    if name in splits:
        if not len(splits[name]):
            raise ValueError(f"{source.where(name)} has no rows. Give data with at least one row.")
        return splits[name]
    if source.files:
        raise ValueError(f"--{name}_file is missing: the run needs a {name} set{why}. Add it.")
    found = ", ".join(sorted(splits))
    raise ValueError(
        f"{source.name} has no split {name!r}, only: {found}. Add it, or leave out the step that needs it."
    )


def require_columns(rows: Dataset, columns: Iterable[str], where: str, remedy: str = "Add or rename one.") -> None:
    """Refuse rows that lack one of the columns."""
    for column in columns:
        if column not in rows.column_names:
            names = ", ".join(rows.column_names)
            raise ValueError(f"{where} has no column {column!r} (columns: {names}). {remedy}")


def each_row(rows: Dataset) -> Iterator[dict[str, Any]]:
    """The rows one by one, read in batches."""
    for batch in rows.iter(batch_size=READ_ROWS):
        yield from (dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True))


def _read_folder(source: DataSource, config: str | None) -> dict[str, Dataset]:
    """Splits by file name, `SPLIT.parquet` or its numbered shards, in the folder or else in its sub-folder `config`.

    If the user names the sub-folder, only that one is read.

    `datasets` would guess the splits from words in the names, and merge validation_matched with
    validation_mismatched into one.
    """
    root = Path(source.name)
    inside = root / (config or "data")
    places = (inside,) if source.dataset_config_name else (root, inside)
    files = next((found for place in places if (found := sorted(place.glob("*.parquet")))), [])
    if not files and source.dataset_config_name:
        others = ", ".join(sorted({file.parent.name for file in root.glob("*/*.parquet")})) or "none"
        raise ValueError(
            f"--dataset_config_name {config}: {root} has no such sub-folder of parquet files (there is: {others}). "
            "Name one, or leave it out."
        )
    if not files:
        raise ValueError(f"--dataset_name {root} is a folder without parquet files. Name the folder that has them.")
    splits: dict[str, list[Path]] = {}
    for file in files:
        match = SHARD.fullmatch(file.stem)
        splits.setdefault(match[1] if match else file.stem, []).append(file)
    for split, found in splits.items():
        _require_whole(split, found)
    return {split: _read_parquet([str(file) for file in found], source) for split, found in splits.items()}


def _require_whole(split: str, files: list[Path]) -> None:
    """Refuse a split of which shards are missing, or that is there twice."""
    count = len(files)
    if [file.stem for file in files] in ([split], [f"{split}-{i:05}-of-{count:05}" for i in range(count)]):
        return
    raise ValueError(
        f"split {split!r} is not whole, or is there twice: {files[0].parent} holds "
        f"{', '.join(file.name for file in files)}. Keep one file, or all shards of one set."
    )


def _read_parquet(paths: list[str], source: DataSource) -> Dataset:
    cache_dir = source.hub_options.get("cache_dir")
    try:
        full = [path for path in paths if pq.read_metadata(path).num_rows]  # load_dataset fails on the others
        if not full:
            return Dataset(pq.read_table(paths[0]))
        return load_dataset("parquet", data_files=full, split="train", cache_dir=cache_dir)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{', '.join(paths)} cannot be read as parquet ({error}). Replace the file.") from error


def _read_hub(source: DataSource, config: str | None) -> Mapping[str, Dataset]:
    try:
        return load_dataset(source.name, config, **source.hub_options)
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"the dataset {source.name!r} is not a local folder, and the Hub does not give it ({error}). Give a "
            "folder of parquet files with --dataset_name, or give --train_file and --validation_file."
        ) from error
