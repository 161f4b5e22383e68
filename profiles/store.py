"""The profile store: measured figures and past runs in one SQLite file, figures filed by device, library versions, kind and key.

Any number of processes may read while one writes: every call is one transaction under SQLite's own locks (a rollback journal,
which works on shared file systems too), and who waits longer than 30 seconds gives up. A writer that is killed leaves what was
there before. The file carries our application id and schema version. Version 1 had no table of runs: it is read as it is, and
the first write adds the table. A file that is damaged, foreign or newer is named and left as it is.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ClusterError

APPLICATION_ID = 0x53574750  # "SWGP", written into the header of the file
SCHEMA_VERSION = 2
BUSY_SECONDS = 30.0

_FIGURES = """
CREATE TABLE figures (
    device TEXT NOT NULL, versions TEXT NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (device, versions, kind, key)
) WITHOUT ROWID
"""
_RUNS = "CREATE TABLE runs (id TEXT NOT NULL PRIMARY KEY, plan TEXT NOT NULL, value TEXT NOT NULL) WITHOUT ROWID"


class Figure(NamedTuple):
    """One measured figure: where it belongs, and a value that JSON can hold."""

    device: str
    versions: str
    kind: str
    key: str
    value: Any


class Run(NamedTuple):
    """One row of the ledger: its id, the digest of the plan that ran, and the rest (profiles/ledger.py)."""

    id: str
    plan: str
    value: Any


@dataclass(frozen=True, slots=True)
class Store:
    """Figures and runs in the SQLite file at `path` (made when first written to). `path` None keeps nothing.

    Every method raises ClusterError, naming the file, for one that is damaged, foreign, newer or not to be read or written.
    """

    path: Path | None

    def read(self, device: str, versions: str, kind: str) -> dict[str, Any]:
        """All figures of one kind (such as "op") measured on `device` with `versions`, by key."""
        query = "SELECT key, value FROM figures WHERE device = ? AND versions = ? AND kind = ? ORDER BY key"
        return {key: self._value(value) for key, value in self._rows(query, device, versions, kind)}

    def write(self, device: str, versions: str, kind: str, figures: Mapping[str, Any]) -> None:
        """Keep `figures` (values JSON can hold) in one transaction, replacing those with the same key."""
        self.add([Figure(device, versions, kind, key, value) for key, value in figures.items()])

    def add(self, figures: Iterable[Figure] = (), runs: Iterable[Run] = ()) -> None:
        """Keep figures (in place of those filed alike) and runs (those not known yet): all of them or, on any error, none.

        Raises ValueError for a value that is no JSON (NaN and infinity are none).
        """
        kept = sorted((*figure[:-1], text(figure.value)) for figure in figures)
        ran = sorted((run.id, run.plan, text(run.value)) for run in runs)
        if self.path is None or not (kept or ran):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._problem(f"cannot be made ({error.strerror or error})") from None
        with self._writing() as connection:
            connection.executemany("INSERT OR REPLACE INTO figures VALUES (?, ?, ?, ?, ?)", kept)
            connection.executemany("INSERT OR IGNORE INTO runs VALUES (?, ?, ?)", ran)

    def figures(self) -> list[Figure]:
        """Every figure, in order of device, versions, kind and key."""
        query = "SELECT device, versions, kind, key, value FROM figures ORDER BY device, versions, kind, key"
        return [Figure(d, v, kind, key, self._value(value)) for d, v, kind, key, value in self._rows(query)]

    def runs(self, plan: str | None = None) -> list[Run]:
        """Every run of the ledger, or those of the plan with that digest, in order of id."""
        query = "SELECT id, plan, value FROM runs WHERE ? IS NULL OR plan = ? ORDER BY id"
        return [Run(id, of, self._value(value)) for id, of, value in self._rows(query, plan, plan)]

    def _rows(self, query: str, *values: str | None) -> list[tuple[Any, ...]]:
        """What a query finds; nothing in a store that does not exist, is empty, or is too old to have the table."""
        if self.path is None or not self.path.exists():
            return []
        # Not made where missing; opened for writing where possible, so that a killed writer's changes can be taken back.
        with self._connection("rw") as connection:
            version = self._version(connection)
            if version == 0 or (version == 1 and "FROM runs" in query):
                return []
            return connection.execute(query, values).fetchall()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A connection in one writing transaction on a sound file of this version."""
        with self._connection("rwc") as connection:
            connection.execute("BEGIN IMMEDIATE")
            with connection:
                version = self._version(connection)
                if version and connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                    raise self._problem("is damaged")
                for table in (_FIGURES, _RUNS)[version:]:
                    connection.execute(table)
                if version == 0:
                    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                if version < SCHEMA_VERSION:
                    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                yield connection

    @contextmanager
    def _connection(self, mode: str) -> Iterator[sqlite3.Connection]:
        """A connection without a transaction; closes it and turns SQLite's complaints into a ClusterError."""
        assert self.path is not None
        if self.path.exists() and not self.path.is_file():
            raise self._problem("is not a file" if not self.path.is_dir() else "is a folder")
        connection = None
        try:
            address = f"{self.path.absolute().as_uri()}?mode={mode}"
            connection = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
            yield connection
        except sqlite3.Error as error:
            raise self._problem(f"cannot be used ({error})") from error
        finally:
            if connection is not None:
                connection.close()

    def _version(self, connection: sqlite3.Connection) -> int:
        """The schema version, 0 for an empty file; refuses what is not ours or newer."""
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application == APPLICATION_ID:
            if 1 <= version <= SCHEMA_VERSION:
                return int(version)
            raise self._problem(f"has schema version {version}, this version reads up to {SCHEMA_VERSION}")
        if application or version or connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise self._problem("is a database of another program")
        return 0

    def _value(self, found: Any) -> Any:
        try:
            return json.loads(found)
        except (ValueError, TypeError):
            raise self._problem("holds values that are not JSON") from None

    def _problem(self, what: str) -> ClusterError:
        return ClusterError(
            f"profile store {self.path}: {what}; it was left as it is: move it away, or name another file"
        )


def text(value: Any) -> str:
    """The one JSON text of a value, on one line; raises ValueError for NaN, infinity and what JSON has no word for."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from None


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
