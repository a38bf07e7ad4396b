"""Complete checkpoints: their manifest, which is written last and checked first, rotation, and the one to resume."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..documents import check_format, read_json_object, sync, write_json
from ..errors import AdapterFormatError
from ..growth.tensors import check_finite
from .run_state import STATE_JSON, STATE_TENSORS, read_state

MANIFEST_NAME = "increlora_manifest.json"
MANIFEST_FORMAT = 1
OPTIMIZER_NAME, TRAINER_STATE = "optimizer.pt", "trainer_state.json"  # as transformers names them
GROWTH_FILES = (STATE_JSON, STATE_TENSORS)
RESUMED = re.compile(  # the files that a training continues from, as transformers names them; others may change
    "|".join(map(re.escape, (*GROWTH_FILES, OPTIMIZER_NAME, "scheduler.pt", "scaler.pt", TRAINER_STATE)))
    + r"|rng_state(_\d+)?\.pth"
)
CHUNK = 1 << 20  # bytes hashed at a time

logger = logging.getLogger(__name__)


def write_manifest(folder: Path) -> None:
    """Write size and SHA-256 of the files that a training continues from, once every file is flushed to disk.

    ``written`` orders the checkpoints of a folder: the time in ns, or one more than the latest of its neighbours where
    the clock went back.
    """
    entries = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if RESUMED.fullmatch(name):
            entries[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        sync(path)
    latest = max((_written(other) for other in checkpoints(folder.parent) if other != folder), default=0)
    document = {"format_version": MANIFEST_FORMAT, "written": max(time.time_ns(), latest + 1), "files": entries}
    write_json(folder / MANIFEST_NAME, document, durable=True)
    sync(folder)
    sync(folder.parent)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_manifest(folder: Path, *, names: Sequence[str] | None = None, hashes: bool = True) -> None:
    """Raise AdapterFormatError unless what a training continues from is there, complete and unchanged.

    Args:
        folder: a checkpoint.
        names: check these files alone; default: all that are listed.
        hashes: compare SHA-256 too, which reads the files; otherwise sizes alone.
    """
    path = folder / MANIFEST_NAME
    document = read_json_object(path)
    check_format(path, document, MANIFEST_FORMAT)
    files = document.get("files")
    if not isinstance(files, dict):
        raise AdapterFormatError(path, "files", "an object of file names", repr(files)[:80])
    present = [] if names else sorted(other.name for other in folder.iterdir() if RESUMED.fullmatch(other.name))
    for name in (*GROWTH_FILES, *present):
        if name not in files:
            raise AdapterFormatError(path, "files", f"{name} among them", "a manifest without it")
    for name in names or filter(RESUMED.fullmatch, files):
        _check_entry(folder, name, files[name], hashes)


def _check_entry(folder: Path, name: str, entry: Any, hashes: bool) -> None:
    listed = folder / name
    if not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
        raise AdapterFormatError(folder / MANIFEST_NAME, name, "size and sha256", repr(entry)[:80])
    if not listed.is_file():
        raise AdapterFormatError(listed, "file", f"{entry['size']} bytes", "no such file")
    if listed.stat().st_size != entry["size"]:
        raise AdapterFormatError(listed, "size", f"{entry['size']} bytes", f"{listed.stat().st_size}")
    if hashes and _sha256(listed) != entry.get("sha256"):
        raise AdapterFormatError(listed, "sha256", str(entry.get("sha256"))[:80], "other content")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders checkpoint-N in ``output_dir``, the newest first.

    The numbers do not count: an earlier and longer run may have left higher ones.
    """
    found = [(_written(path), number, path) for number, path in _numbered(output_dir) if path.is_dir()]
    return [path for *_, path in sorted(found, reverse=True)]


def _numbered(output_dir: str | Path) -> Iterator[tuple[int, Path]]:
    """Whatever has the name checkpoint-N in a folder, with its N."""
    for path in Path(output_dir).glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", path.name):
            yield int(match[1]), path


def _written(folder: Path) -> int:
    """Time of writing in ns: from the manifest, which survives copying; without one, the folder's own time."""
    try:
        written = read_json_object(folder / MANIFEST_NAME).get("written")
    except AdapterFormatError:
        written = None
    return written if isinstance(written, int) else folder.stat().st_mtime_ns


def refuse_files_in_the_way(output_dir: str | Path, last_step: int) -> None:
    """Raise ValueError for a file with the name of a checkpoint that the run may write."""
    for number, path in _numbered(output_dir):
        if number <= last_step and path.is_file() and not path.is_symlink():
            raise ValueError(
                f"{path} is a file, but the run writes its checkpoints to folders of such names. Move it, or choose "
                "another output_dir."
            )


@contextmanager
def new_checkpoint(folder: Path) -> Iterator[None]:
    """Complete the checkpoint that is written inside this context, or delete it where that fails."""
    _delete(folder)  # leftovers of a save that crashed at this step
    try:
        yield
        write_manifest(folder)
    except BaseException:
        _delete(folder)
        raise


def _delete(folder: Path) -> None:
    """Delete a folder, or the link to one."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def resolve_checkpoint(wanted: str | Path | bool, output_dir: str) -> Path:
    """The checkpoint to resume: the named one, or for True the newest complete one in ``output_dir``.

    Raises:
        AdapterFormatError: the named one is not complete.
        ValueError: there is none, it is another kind of folder, or it holds no optimizer state.
    """
    if wanted is True:
        folder, skipped = newest_complete(output_dir)
        for name, reason in skipped.items():
            logger.warning("IncreLoRA: skipped the checkpoint %s: %s", name, reason)
        if folder is None:
            reasons = " ".join(skipped.values()) or "There is no checkpoint-N folder."
            raise ValueError(
                f"No valid checkpoint found in output directory ({output_dir}). {reasons} To start a new run, leave "
                "resume_from_checkpoint out."
            )
    else:
        folder = Path(str(wanted))
        _require_checkpoint(folder)
        _require_resumable(folder)
    return folder


def _require_resumable(folder: Path) -> None:
    """Raise ValueError, or AdapterFormatError where it is damaged, for a checkpoint that training cannot resume."""
    missing = not any((folder / name).exists() for name in (MANIFEST_NAME, *GROWTH_FILES))
    if missing and (folder / TRAINER_STATE).is_file():
        raise ValueError(
            f"{folder} has no {STATE_JSON}: another Trainer class wrote it, or its saving was cut off. Resume it with "
            "the Trainer that wrote it, or attach its adapter to start a new run."
        )
    check_manifest(folder)
    if not (folder / OPTIMIZER_NAME).is_file():
        raise ValueError(
            f"{folder} has no {OPTIMIZER_NAME} (save_only_model), so training cannot resume from it exactly. "
            "Resume from a checkpoint with optimizer state, or attach this adapter to start a new run."
        )


def _require_checkpoint(folder: Path) -> None:
    if not folder.is_dir():
        beside = [path.name for path in checkpoints(folder.parent)]
        there = f"{folder.parent} holds {', '.join(beside)}" if beside else f"{folder.parent} holds no checkpoint"
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r}: there is no such folder; {there}. Name an existing one, or "
            "give True for the newest complete checkpoint in output_dir."
        )
    within = [path.name for path in checkpoints(folder)]
    if within and not (folder / MANIFEST_NAME).exists():
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} is an output folder, not a checkpoint. It holds "
            f"{', '.join(within)}. Name one of these, or give True for the newest complete one in output_dir."
        )


def newest_complete(output_dir: str | Path) -> tuple[Path | None, dict[str, str]]:
    """The newest checkpoint to resume, of finite values, and for each newer one the reason why it was skipped."""
    skipped: dict[str, str] = {}
    for folder in checkpoints(output_dir):
        try:
            _require_resumable(folder)
            check_finite(folder / STATE_TENSORS, read_state(folder)["tensors"])
        except ValueError as error:
            skipped[folder.name] = str(error)
        else:
            return folder, skipped
    return None, skipped


def rotate(output_dir: str | Path, limit: int, best: str | None) -> None:
    """Delete the oldest complete checkpoints beyond ``limit``, never the newest one or the best.

    Incomplete ones stay: another process may be writing them. `new_checkpoint` deletes leftovers of its own number.
    """
    complete = [folder for folder in checkpoints(output_dir) if _is_complete(folder)]
    protected = complete[:1] + [folder for folder in complete[1:] if best and folder == Path(best)]
    others = [folder for folder in complete if folder not in protected]
    for folder in others[max(limit - len(protected), 0) :]:
        _delete(folder)


def _is_complete(folder: Path) -> bool:
    try:
        check_manifest(folder, hashes=False)
    except AdapterFormatError:
        return False
    return True
