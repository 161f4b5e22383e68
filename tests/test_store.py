"""The profile store: what is kept, for whom, several processes at once, and files that are damaged, foreign, old or shut."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from shardwright.errors import ClusterError
from shardwright.profiles import store as store_module
from shardwright.profiles.store import SCHEMA_VERSION, Figure, Run, Store, default_path

SHUT = pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everything")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "profiles.sqlite"


def test_figures_are_filed_by_device_versions_and_kind(path: Path) -> None:
    store = Store(path)
    assert store.read("cpu", "torch 1", "op") == {}
    assert not path.exists()
    store.write("cpu", "torch 1", "op", {"a": [1, 2.5], "b": {"c": "d"}})
    store.write("cpu", "torch 1", "op", {"a": 3})
    assert store.read("cpu", "torch 1", "op") == {"a": 3, "b": {"c": "d"}}
    for other in (("gpu", "torch 1", "op"), ("cpu", "torch 2", "op"), ("cpu", "torch 1", "machine")):
        assert store.read(*other) == {}


def test_without_a_file_nothing_is_kept() -> None:
    store = Store(None)
    store.write("cpu", "torch 1", "op", {"a": 1})
    assert store.read("cpu", "torch 1", "op") == {}


def test_an_empty_file_is_taken_for_a_new_store(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"")
    Store(path).write("cpu", "torch 1", "op", {"a": 1})
    assert Store(path).read("cpu", "torch 1", "op") == {"a": 1}


def _text(path: Path) -> None:
    path.write_bytes(b"these are notes, not a database\n" * 200)


def _foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()


def _newer(path: Path) -> None:
    Store(path).write("cpu", "torch 1", "op", {"a": 1})
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()


def _cut(path: Path) -> None:
    Store(path).write("cpu", "torch 1", "op", {str(i): "x" * 500 for i in range(100)})
    path.write_bytes(path.read_bytes()[:9000])


@pytest.mark.parametrize("spoil", [_text, _foreign, _newer, _cut])
def test_damaged_and_foreign_files_are_named_and_left_alone(path: Path, spoil: object) -> None:
    path.parent.mkdir()
    spoil(path)  # type: ignore[operator]
    before = path.read_bytes()
    for use in (
        lambda: Store(path).read("cpu", "torch 1", "op"),
        lambda: Store(path).write("cpu", "t", "op", {"a": 1}),
    ):
        with pytest.raises(ClusterError, match=r"profiles\.sqlite"):
            use()
    assert path.read_bytes() == before


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "kept").write_text("a file")


@pytest.mark.parametrize("use", ["read", "write", "runs"])
def test_a_folder_in_its_place_is_named(path: Path, use: str) -> None:
    path.parent.mkdir()
    _folder(path)
    with pytest.raises(ClusterError, match=r"profiles\.sqlite: is a folder"):
        {"read": _read, "write": _write, "runs": lambda p: Store(p).runs()}[use](path)
    assert [f.name for f in path.iterdir()] == ["kept"]


def test_a_place_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("a file")
    with pytest.raises(ClusterError, match="cannot be made"):
        _write(tmp_path / "notes" / "profiles.sqlite")
    assert _read(tmp_path / "notes" / "profiles.sqlite") == {}


@SHUT
def test_what_may_not_be_written_can_be_read(path: Path) -> None:
    _write(path)
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        assert _read(path) == {"a": 1}
        with pytest.raises(ClusterError, match="readonly"):
            _write(path)
    finally:
        path.parent.chmod(0o700)


@SHUT
def test_what_may_not_be_read_is_named(path: Path) -> None:
    _write(path)
    path.chmod(0)
    with pytest.raises(ClusterError, match="unable to open"):
        _read(path)


def test_damage_inside_is_seen_before_anything_is_written(path: Path) -> None:
    Store(path).write("cpu", "torch 1", "op", {str(i): "x" * 500 for i in range(100)})
    data = bytearray(path.read_bytes())
    data[-4096:] = bytes(4096)  # the last page of the table, length unchanged
    path.write_bytes(bytes(data))
    with pytest.raises(ClusterError, match="damaged"):
        Store(path).write("gpu", "torch 1", "op", {"a": 1})
    assert path.read_bytes() == bytes(data)


def test_values_that_are_no_json_are_refused_whole(path: Path) -> None:
    _write(path)
    for value in (math.nan, math.inf, {1, 2}):
        with pytest.raises(ValueError, match="JSON"):
            Store(path).write("cpu", "torch 1", "op", {"b": 2, "c": value})
    assert _read(path) == {"a": 1}
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE figures SET value = '{'")
    connection.close()
    with pytest.raises(ClusterError, match="not JSON"):
        _read(path)


def _old(path: Path) -> None:
    """A store as version 1 made it."""
    path.parent.mkdir(exist_ok=True)
    with sqlite3.connect(path) as connection:
        connection.execute(store_module._FIGURES)
        connection.execute("INSERT INTO figures VALUES ('cpu', 'torch 1', 'op', 'a', '1')")
        connection.execute(f"PRAGMA application_id = {store_module.APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")
    connection.close()


def test_version_1_is_read_as_it_is_and_grows_with_the_first_write(path: Path) -> None:
    _old(path)
    before = path.read_bytes()
    assert _read(path) == {"a": 1}
    assert Store(path).runs() == []
    assert path.read_bytes() == before
    Store(path).add([Figure("cpu", "torch 1", "op", "b", [2.5])], [Run("1", "plan", {"x": 1})])
    assert _read(path) == {"a": 1, "b": [2.5]}
    assert Store(path).runs() == [Run("1", "plan", {"x": 1})]
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
    connection.close()


def test_runs_are_kept_once_and_found_by_plan(path: Path) -> None:
    one, two = Run("1", "p", {"x": 1}), Run("2", "q", {"x": 2})
    Store(path).add(runs=[two, one])
    Store(path).add(runs=[one])
    assert Store(path).runs() == [one, two]
    assert Store(path).runs("q") == [two]
    assert Store(path).figures() == []


def test_threads_may_read_and_write(path: Path) -> None:
    errors: list[BaseException] = []

    def work(own: int) -> None:
        try:
            for i in range(10):
                Store(path).write("cpu", "torch 1", "op", {f"{own}.{i}": i})
                Store(path).read("cpu", "torch 1", "op")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert len(Store(path).read("cpu", "torch 1", "op")) == 40


WRITER = """
import sys
from pathlib import Path
from shardwright.profiles.store import Store
store, own = Store(Path(sys.argv[1])), sys.argv[2]
for i in range(20):
    store.write("cpu", "torch 1", "op", {f"{own}.{i}.{k}": i for k in range(3)})
    found = store.read("cpu", "torch 1", "op")
    counts = {}
    for key in found:
        counts[key.rpartition(".")[0]] = counts.get(key.rpartition(".")[0], 0) + 1
    assert set(counts.values()) == {3}, counts
"""


def test_processes_see_whole_writes_of_each_other(path: Path) -> None:
    """Four processes make the file, write and read at once: nothing is lost, and no half transaction is ever seen."""
    started = [subprocess.Popen([sys.executable, "-c", WRITER, path, str(n)], stderr=subprocess.PIPE) for n in range(4)]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert len(Store(path).read("cpu", "torch 1", "op")) == 4 * 20 * 3


KILLED = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")  # pages go to the file before the transaction ends
connection.execute("BEGIN IMMEDIATE")
connection.execute("DELETE FROM figures")
connection.executemany("INSERT INTO figures VALUES ('cpu', 'torch 1', 'op', ?, ?)",
                       ((str(i), '"' + "y" * 500 + '"') for i in range(400)))
print("written", flush=True)
time.sleep(60)
"""


def test_a_writer_killed_in_the_middle_leaves_what_was_there(path: Path) -> None:
    figures = {str(i): "x" * 300 for i in range(200)}
    Store(path).write("cpu", "torch 1", "op", figures)
    before = path.read_bytes()
    with subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() != before  # it had begun
    assert Store(path).read("cpu", "torch 1", "op") == figures
    assert path.read_bytes() == before
    _write(path)
    assert _read(path) == {**figures, "a": 1}


def test_who_waits_too_long_gives_up_and_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(path)
    monkeypatch.setattr(store_module, "BUSY_SECONDS", 0.1)
    with sqlite3.connect(path, isolation_level=None) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(ClusterError, match="locked"):
            _write(path)
        assert _read(path) == {"a": 1}
    connection.close()


def _read(path: Path) -> object:
    return Store(path).read("cpu", "torch 1", "op")


def _write(path: Path) -> None:
    Store(path).write("cpu", "torch 1", "op", {"a": 1})


def test_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_path(tmp_path) == tmp_path / "profiles.sqlite"
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "shardwright" / "profiles.sqlite"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert default_path() == tmp_path / "home" / ".cache" / "shardwright" / "profiles.sqlite"
