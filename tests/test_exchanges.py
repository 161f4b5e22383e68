"""Sends and receives among the actions of a schedule: complete, in order, and free of deadlock even where both ends must meet."""

from __future__ import annotations

import pytest
from shardwright.errors import PlanError
from shardwright.planner.exchanges import Receive, Send, Step, with_messages
from shardwright.planner.schedules import Action, actions, stage_rank

SHAPES = [
    ("gpipe", 2, 1, 4), ("gpipe", 4, 1, 1), ("1f1b", 2, 1, 8), ("1f1b", 4, 1, 6), ("interleaved", 2, 2, 4),
    ("interleaved", 4, 3, 8), ("zb-h1", 4, 1, 6), ("zbv", 3, 2, 6), ("dualpipev", 2, 2, 6), ("forward", 3, 2, 1),
]  # fmt: skip


def edges_of(stages: int, skips: bool) -> dict[tuple[int, int], bool]:
    """Each stage reads the one before; with skips also some that lie further back, one of them without gradient."""
    found = {(s, s + 1): True for s in range(stages - 1)}
    if skips:
        found |= {(0, stages - 1): True} | ({(0, 2): False, (1, stages - 1): True} if stages > 3 else {})
    return dict(sorted(found.items()))


def meet(lists: tuple[tuple[Step, ...], ...], rank_of: tuple[int, ...]) -> list[Step]:
    """Play the lists with sends that end only when the receiver is there; everything that ran, in order."""
    at, ran = [0] * len(lists), list[Step]()
    while any(i < len(steps) for i, steps in zip(at, lists, strict=True)):
        before = list(at)
        for r, steps in enumerate(lists):
            if at[r] == len(steps):
                continue
            step = steps[at[r]]
            if isinstance(step, Action):
                ran.append(step)
                at[r] += 1
            elif isinstance(step, Send):
                other = rank_of[step.message.target]
                if at[other] < len(lists[other]) and lists[other][at[other]] == Receive(step.message):
                    ran += [step, lists[other][at[other]]]
                    at[r], at[other] = at[r] + 1, at[other] + 1
        assert at != before, "all ranks wait"
    return ran


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(("name", "ranks", "chunks", "microbatches"), SHAPES)
def test_every_message_is_there_before_it_is_read(
    name: str, ranks: int, chunks: int, microbatches: int, skips: bool
) -> None:
    lists, rank_of = actions(name, ranks, chunks, microbatches), stage_rank(name, ranks, chunks)
    edges = {edge: back and name != "forward" for edge, back in edges_of(ranks * chunks, skips).items()}
    made = with_messages(lists, rank_of, edges)
    for steps, wanted in zip(made, lists, strict=True):
        assert tuple(s for s in steps if isinstance(s, Action)) == tuple(wanted)
    here: set[tuple[int, int, int, bool]] = set()
    for step in meet(made, rank_of):
        if isinstance(step, Receive):
            m = step.message
            here.add((m.source, m.target, m.microbatch, m.back))
        elif isinstance(step, Action):
            i, s = step.microbatch, step.stage
            for (a, b), back in edges.items():
                if rank_of[a] != rank_of[b]:
                    assert step.kind != "F" or b != s or (a, b, i, False) in here
                    assert step.kind not in ("B", "I") or a != s or not back or (b, a, i, True) in here
    crossing = [e for e in edges if rank_of[e[0]] != rank_of[e[1]]]
    assert len(here) == microbatches * (len(crossing) + sum(edges[e] for e in crossing))


def test_lists_that_wait_for_each_other_are_refused() -> None:
    lists = [[Action("B", 0, 0), Action("F", 0, 0)], [Action("F", 1, 0), Action("B", 1, 0)]]
    with pytest.raises(PlanError, match="0B0, 1F0 wait"):
        with_messages(lists, (0, 1), {(0, 1): True})
