"""The collector is held back and let go again."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest
from shardwright.garbage import THRESHOLDS, held_back


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_held_back_and_let_go() -> None:
    gc.set_threshold(700, 10, 10)
    with held_back():
        assert gc.get_threshold() == THRESHOLDS
        with held_back():
            assert gc.get_threshold() == THRESHOLDS
        assert gc.get_threshold() == THRESHOLDS
    assert gc.get_threshold() == (700, 10, 10)


def test_let_go_after_a_failure() -> None:
    gc.set_threshold(700, 10, 10)
    with pytest.raises(ZeroDivisionError), held_back():
        1 / 0  # noqa: B018
    assert gc.get_threshold() == (700, 10, 10)


def test_rarer_settings_stay() -> None:
    gc.set_threshold(10**6, 50, 5)
    with held_back():
        assert gc.get_threshold() == (10**6, 50, 20)
    gc.set_threshold(0, 10, 10)
    with held_back():
        assert gc.get_threshold() == (0, 10, 10)


def test_leave_unswept_ends_well() -> None:
    code = "from shardwright.garbage import leave_unswept; leave_unswept(); print('done')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (found.stdout, found.stderr) == ("done\n", "")
