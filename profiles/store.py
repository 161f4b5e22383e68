"""The profile store: measured figures in one SQLite file, filed by device, library versions, kind and key.

Readers and one writer may use it at once (SQLite locks; a waiting process gives up after 30 seconds). The file carries
our application id and schema version; a file that is damaged, foreign or of another version is named and left alone.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ClusterError

APPLICATION_ID = 0x53574750  # "SWGP", written into the header of the file
SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0

_TABLE = """
CREATE TABLE figures (
    device TEXT NOT NULL, versions TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (device, versions, kind, key)
) WITHOUT ROWID
"""


@dataclass(frozen=True, slots=True)
class Store:
    """Figures in the SQLite file at `path` (made when first written to). `path` None keeps nothing."""

    path: Path | None

    def read(self, device: str, versions: str, kind: str) -> dict[str, Any]:
        """All figures of one kind (such as "op") measured on `device` with `versions`, by key."""
        if self.path is None or not self.path.exists():
            return {}
        query = "SELECT key, value FROM figures WHERE device = ? AND versions = ? AND kind = ? ORDER BY key"
        with self._connection(self.path) as connection:
            rows = connection.execute(query, (device, versions, kind)).fetchall()
        try:
            return {key: json.loads(value) for key, value in rows}
        except ValueError:
            raise self._problem(self.path, "holds values that are not JSON") from None

    def write(self, device: str, versions: str, kind: str, figures: Mapping[str, Any]) -> None:
        """Keep `figures` (values JSON can hold) in one transaction, replacing those with the same key."""
        if self.path is None or not figures:
            return
        rows = [(device, versions, kind, key, json.dumps(value)) for key, value in sorted(figures.items())]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._connection(self.path) as connection:
            connection.executemany("INSERT OR REPLACE INTO figures VALUES (?, ?, ?, ?, ?)", rows)

    @contextmanager
    def _connection(self, path: Path) -> Iterator[sqlite3.Connection]:
        """A checked connection in one transaction; closes it and turns SQLite's complaints into a ClusterError."""
        connection = None
        try:
            connection = sqlite3.connect(path, timeout=BUSY_SECONDS)
            with connection:
                self._check(connection, path)
                yield connection
        except sqlite3.Error as error:
            raise self._problem(path, f"cannot be used ({error})") from error
        finally:
            if connection is not None:
                connection.close()

    def _check(self, connection: sqlite3.Connection, path: Path) -> None:
        """Make the table in an empty file; refuse a file that is not ours or of another version."""
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application == APPLICATION_ID and version == SCHEMA_VERSION:
            return
        connection.execute("BEGIN IMMEDIATE")
        # Another process may have made the table while this one waited for the lock.
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application == APPLICATION_ID and version == SCHEMA_VERSION:
            return
        if application == APPLICATION_ID:
            raise self._problem(path, f"has schema version {version}, this version reads {SCHEMA_VERSION}")
        if application or version or connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise self._problem(path, "is a database of another program")
        connection.execute(_TABLE)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @staticmethod
    def _problem(path: Path, text: str) -> ClusterError:
        return ClusterError(f"profile store {path}: {text}; it was left as it is: move it away, or name another file")


def default_path(cache_dir: Path | None = None) -> Path:
    """Where the store stands unless a caller says otherwise: in the user's cache folder for shardwright."""
    if cache_dir is not None:
        return cache_dir / "profiles.sqlite"
    return _user_cache() / "shardwright" / "profiles.sqlite"


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    named = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    return Path(named) if os.path.isabs(named) else Path.home() / ".cache"
