"""Bytes of a pipeline rank over its actions."""

from __future__ import annotations

from shardwright.planner.exchanges import with_messages
from shardwright.planner.rankmemory import RankMemory, StageMemory
from shardwright.planner.schedules import actions

KEPT, GRADIENTS, RUNNING = 100.0, 30.0, 7.0


def stage() -> StageMemory:
    """Gradients come into being half by half in the first backward pass, and stay."""
    first = [
        {"gradients": share * GRADIENTS - GRADIENTS, "saved": KEPT, "temporaries": RUNNING} for share in (0.0, 0.5)
    ]
    later = [{"gradients": 0.0, "saved": KEPT, "temporaries": RUNNING}]
    return StageMemory(KEPT, {"gradients": GRADIENTS, "gathered": 0.0}, first, later, {}, 0.0, [])


def test_gradients_are_there_from_the_second_backward_pass_on() -> None:
    lists = actions("gpipe", 1, 1, 3)
    moments = RankMemory({0: stage()}, with_messages(lists, [0], {})[0], [0], {}, {}, {}).play()
    saved = [m["saved"] for m in moments]
    assert saved == [KEPT, 2 * KEPT, 3 * KEPT, 3 * KEPT, 3 * KEPT, 2 * KEPT, KEPT]
    assert [m["gradients"] for m in moments] == [0, 0, 0, 0, GRADIENTS / 2, GRADIENTS, GRADIENTS]
    assert max(sum(m.values()) for m in moments) == 3 * KEPT + GRADIENTS / 2 + RUNNING
