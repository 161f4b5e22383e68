"""How a measurement tells of its rows while it runs, so that an end in the middle loses little.

A row is (kind, key, value) as in the profile store. ("begin", kind, key) says what is about to be measured: what a measurement
that had to be stopped was at.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

Row = tuple[str, str, Any]
Tell = Callable[[str, str, Any], None]


def untold(kind: str, key: str, value: Any) -> None:
    """Tells nobody."""


def into(file: IO[str]) -> Tell:
    """Tells by one line of JSON in `file` for each row."""

    def tell(kind: str, key: str, value: Any) -> None:
        file.write(json.dumps([kind, key, value]) + "\n")
        file.flush()

    return tell


class Tail:
    """Reads the rows that were added to a file since the last look; the half line of a killed writer stays unread."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0

    def rows(self) -> list[Row]:
        """New whole rows."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._at += len(whole)
        return [(str(kind), str(key), value) for kind, key, value in map(json.loads, whole.splitlines())]
