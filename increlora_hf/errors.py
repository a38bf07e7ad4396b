"""The errors that this package raises beside Python's own."""

from __future__ import annotations

from pathlib import Path


class AdapterFormatError(ValueError):
    """A file of an adapter or checkpoint has the wrong content; the message names file, key, expected and found."""

    def __init__(self, file: Path | str, key: str, expected: str, found: str) -> None:
        """Keep the four parts, and put them into one message."""
        self.file, self.key, self.expected, self.found = str(file), key, expected, found
        super().__init__(f"{file}: {key}: expected {expected}, found {found}. Nothing was loaded.")


class HubPushError(OSError):
    """The Hub did not take a folder. The message says why, and how to push the folder later; it is still complete."""
