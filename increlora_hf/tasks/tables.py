"""CSV and JSON files as datasets; whatever is wrong with a file is reported with its line or row."""

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..documents import parsed_json

LABEL = "label"
LAYOUTS = "Give one object a line, or an array of objects."

WHOLE = re.compile(r"0|-?[1-9][0-9]*")  # one spelling a number: 007, +7, 1_0 and " 7" are names of something
DECIMAL = re.compile(
    r"-?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE
)

Row = tuple[str, dict[str, Any]]  # where the row is: "line 3", "row 3"; its cells by column


def read_table(
    path: str | Path,
    *,
    label: str = LABEL,
    texts: Collection[str] = (),
    is_typed: bool = True,
    ignore: Collection[str] = (),
) -> Dataset:
    """The rows of a .csv, .json or .jsonl file, without columns that hold lists or objects. Blank lines are skipped.

    Args:
        label: the column that needs a value in every row.
        texts: columns that, like the label, are refused if they hold lists or objects.
        is_typed: read the labels of a CSV file as int, or else as float, if all of them are. All other cells of a CSV
            file stay text. JSON says itself what is a number.
        ignore: columns to leave out.

    Raises:
        ValueError, FileNotFoundError: the file or one of its rows cannot be used. The message names the row.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: the file format is unknown. Give a file that ends in {', '.join(FORMATS)}.")
    rows = [
        (place, {name: cell for name, cell in row.items() if name not in ignore})
        for place, row in FORMATS[path.suffix](path, read_text(path))
    ]
    if not rows:
        raise ValueError(f"{path} has no rows. Give a file with at least one row of data.")
    for place, row in rows:
        _check_cells(f"{path}, {place}", row, rows[0][1], label, texts)
    columns = {name: [row[name] for _, row in rows] for name in rows[0][1]}
    if path.suffix == ".csv":
        return Dataset.from_dict(
            {name: as_numbers(cells) if is_typed and name == label else cells for name, cells in columns.items()}
        )
    return Dataset.from_dict({name: _json_column(cells) for name, cells in columns.items() if not _nested(cells)})


def _nested(cells: list[Any]) -> bool:
    return any(isinstance(cell, list | dict) for cell in cells)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file. Check the path.")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text ({error.reason}). Save the file as UTF-8.") from None


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    """Rows under a header line. A quoted cell may hold line breaks."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    limit = csv.field_size_limit(len(text) + 1)  # of all readers of the process
    try:
        for cells in reader:
            if cells and not header:
                header = cells
                twice = [name for i, name in enumerate(cells) if name in cells[:i]]
                if twice:
                    raise ValueError(f"{path}, line {line}: two columns are called {twice[0]!r}. Rename one.")
            elif cells:
                yield f"line {line}", _csv_row(path, line, header, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not valid CSV ({error}). Check its quotes and commas.") from None
    finally:
        csv.field_size_limit(limit)


def _csv_row(path: Path, line: int, header: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(header):
        raise ValueError(
            f"{path}, line {line}: {len(cells)} cells under a header of {len(header)} columns. "
            "Quote the cells that hold a comma."
        )
    return dict(zip(header, cells, strict=True))


def json_rows(path: Path, text: str) -> Iterator[Row]:
    """The objects of a JSON array, or one JSON object a line."""
    if text.lstrip().startswith("["):
        for number, row in enumerate(parsed_json(text, str(path), remedy=LAYOUTS), start=1):
            yield f"row {number}", _object(row, f"{path}, row {number}")
        return
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            row = parsed_json(content, str(path), line=line, remedy=LAYOUTS)
            yield f"line {line}", _object(row, f"{path}, line {line}")


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: holds a {type(value).__name__}. {LAYOUTS}")
    return value


def _check_cells(
    place: str, row: Mapping[str, Any], first: Mapping[str, Any], label: str, texts: Collection[str]
) -> None:
    """Every row has the first row's columns, and a label; neither that nor a text is a list or an object."""
    for name in first:
        if name not in row:
            raise ValueError(f"{place}: column {name!r} is missing, but the first row has it. Add it.")
        if name == label and row[name] in (None, ""):
            raise ValueError(f"{place}: column {name!r} has no value. Fill it in or remove the row.")
        if name in (label, *texts) and _nested([row[name]]):
            kind = type(row[name]).__name__
            raise ValueError(
                f"{place}: column {name!r} holds a {kind}. Give a text or a number, or name other columns."
            )


def _fit(numbers: list[int]) -> bool:
    """Whether 64 bits hold them; longer ones are names of something."""
    return all(abs(number) < 2**63 for number in numbers)


def as_numbers(cells: list[str]) -> list[int] | list[float] | list[str]:
    """All cells as int (of 64 bits), else all as float, else as they are."""
    if all(map(WHOLE.fullmatch, cells)):
        whole = [int(cell) for cell in cells]
        return whole if _fit(whole) else cells
    return [float(cell) for cell in cells] if all(map(DECIMAL.fullmatch, cells)) else cells


def _json_column(cells: list[Any]) -> list[Any]:
    """JSON says itself what is a number; mixed numbers are floats, any other mixture is text; null is no value."""
    kinds = {type(cell) for cell in cells} - {type(None)}
    fit = kinds <= {int, float} and _fit([cell for cell in cells if isinstance(cell, int)])
    if kinds == {str} or (kinds == {int} and fit):
        return cells
    convert: Callable[[Any], Any] = float if float in kinds and fit else _as_text
    return [None if cell is None else convert(cell) for cell in cells]


def _as_text(cell: Any) -> str:
    return cell if isinstance(cell, str) else json.dumps(cell)


FORMATS: Mapping[str, Callable[[Path, str], Iterator[Row]]] = {
    ".csv": _csv_rows,
    ".json": json_rows,
    ".jsonl": json_rows,
}
