"""The errors that this package raises beside Python's own."""

from __future__ import annotations

from pathlib import Path


class AdapterFormatError(ValueError):
    """A file of an adapter or checkpoint has wrong content. The message names file, key, expected and found value."""

    def __init__(self, file: Path | str, key: str, expected: str, found: str) -> None:
        """Keep the four parts, and put them into one message."""
        self.file, self.key, self.expected, self.found = str(file), key, expected, found
        found = found.removesuffix(".")  # where it is a message itself
        super().__init__(f"{file}: {key}: expected {expected}, found {found}. Nothing was loaded.")


class HubPushError(OSError):
    """A push to the Hub failed. The message says why, and how to push the folder later. It is complete."""
