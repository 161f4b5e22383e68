"""The byte timeline of a run, with what gloo frees out of sight."""

from __future__ import annotations

from shardwright.runtime.allocations import changes
from shardwright.runtime.torch_compat import Event

LAUNCH = [
    ("begin", 1, "_c10d_functional::reduce_scatter_tensor", 0),
    ("memory", 0, "", 50),
    ("begin", 2, "c10d::reduce_scatter_tensor_coalesced_", 0),
    ("memory", 0, "", 100),
    ("end", 2, "", 0),
    ("end", 1, "", 0),
    ("begin", 3, "_c10d_functional::wait_tensor", 0),
]


def events(*rows: tuple[str, int, str, int]) -> list[Event]:
    return [Event(kind, op, name, float(i), size) for i, (kind, op, name, size) in enumerate(rows)]


def test_a_copy_freed_inside_the_wait_is_counted_once() -> None:
    found = changes([events(*LAUNCH, ("memory", 0, "", -100), ("end", 3, "", 0), ("memory", 0, "", -50))])
    assert [size for _, size in found] == [50, 100, -100, -50]


def test_a_copy_nobody_saw_going_has_gone_after_the_wait() -> None:
    found = changes([events(*LAUNCH, ("end", 3, "", 0), ("memory", 0, "", -50))])
    assert found == [(1.0, 50), (3.0, 100), (7.0, -100), (8.0, -50)]


def test_ends_of_other_threads_ops_do_not_end_the_wait() -> None:
    found = changes([events(*LAUNCH, ("end", 9, "", 0), ("memory", 0, "", -100), ("end", 3, "", 0))])
    assert [size for _, size in found] == [50, 100, -100]


def test_two_collectives_at_once() -> None:
    second = [(kind, op + 10 if op else 0, name, 3 * size) for kind, op, name, size in LAUNCH]
    found = changes([events(*LAUNCH[:-1], *second[:-1], LAUNCH[-1], ("end", 3, "", 0), second[-1], ("end", 13, "", 0))])
    assert [size for _, size in found] == [50, 100, 150, 300, -100, -300]


def test_memory_of_ordinary_ops_is_left_as_it_is() -> None:
    rows = [("begin", 1, "aten::add", 0), ("memory", 0, "", 8), ("end", 1, "", 0), ("memory", 0, "", -8)]
    assert changes([events(*rows), events(("memory", 0, "", 4))]) == [(0.0, 4), (1.0, 8), (3.0, -8)]
