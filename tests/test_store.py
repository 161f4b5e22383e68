"""The profile store: what is kept, for whom, and files that are not ours."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from shardwright.errors import ClusterError
from shardwright.profiles.store import Store, default_path


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


def test_many_processes_may_read_and_write(path: Path) -> None:
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


def test_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_path(tmp_path) == tmp_path / "profiles.sqlite"
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "shardwright" / "profiles.sqlite"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert default_path() == tmp_path / "home" / ".cache" / "shardwright" / "profiles.sqlite"
