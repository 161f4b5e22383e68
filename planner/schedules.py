"""Pipeline schedules as per-rank lists of actions, spelled and ordered as `torch.distributed.pipelining` (2.13) has them.

An action is "2F0": stage, kind, microbatch. F is a forward, B a whole backward, I and W its halves: the gradient of the input,
which the stage before waits for, and the gradients of the weights, which nobody waits for. What is listed here is what runs
and what planner/simulate.py times; a list says only the order on each rank, the sends and waits follow from it.

    gpipe        all forwards, then all backwards              Huang et al. 2019
    1f1b         one forward, one backward                     Narayanan et al. 2021 (PipeDream-flush)
    interleaved  1f1b over several chunks a rank               Narayanan et al. 2021 (Megatron-LM)
    zb-h1        1f1b (or interleaved) with W in the bubble    Qi et al. 2023
    zbv          two chunks a rank in a V                      Qi et al. 2023, section 6
    dualpipev    two chunks a rank in a V, F beside B          DeepSeek-AI 2024 (torch's OVERLAP_F_B pair: F, then B)
    branches     fork and a branch beside a branch and join    "Parallel Perception Network"; not one of torch's
    forward      forwards only (inference)
    none         one rank, one stage
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import PinError, PlanError

COMPUTE = ("F", "B", "I", "W")
"""Kinds a rank computes; all others are written out only in lists with communication."""

COMMUNICATION = ("SEND_F", "RECV_F", "SEND_B", "RECV_B")
WHOLE_STAGE = ("UNSHARD", "RESHARD", "REDUCE_GRAD")
"""Kinds that belong to a stage and carry no microbatch."""

_SPELLING = re.compile(rf"(\d+)({'|'.join((*COMMUNICATION, *WHOLE_STAGE, *COMPUTE))})(\d*)")


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a rank: kind, global stage, microbatch (-1 for kinds that carry none)."""

    kind: str
    stage: int
    microbatch: int = -1

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch if self.microbatch >= 0 else ''}"


Actions = tuple[Action, ...]

Lists = Sequence[Sequence[Action]]
"""One list of actions per rank."""


def parse_action(text: str) -> Action:
    """The inverse of `str(action)`; raises PlanError saying what was expected."""
    match = _SPELLING.fullmatch(text.strip())
    if match is None or (match[2] in WHOLE_STAGE) == bool(match[3]):
        expected = f"a stage, a kind and a microbatch such as 2F0 (no microbatch after {', '.join(WHOLE_STAGE)})"
        raise PlanError(f"action {text!r}: expected {expected}")
    return Action(match[2], int(match[1]), int(match[3]) if match[3] else -1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How one schedule is made.

    `chunks` is the least and the greatest number of stages a rank may hold (None: any). `function(ranks, chunks,
    microbatches)` makes the lists. `fault(ranks, chunks, microbatches)` says why it cannot, "" where it can. `rank(stage, ranks,
    chunks)` says where a stage is, and `edges` are the (source, target) stages of what crosses where stages are no chain.
    """

    name: str
    chunks: tuple[int, int | None]
    splits_backward: bool
    rank: Callable[[int, int, int], int]
    function: Callable[[int, int, int], tuple[Actions, ...]]
    fault: Callable[[int, int, int], str]
    edges: tuple[tuple[int, int], ...] = ()


def fault(name: str, ranks: int, chunks: int, microbatches: int) -> str:
    """Why schedule `name` cannot be made for these numbers, with the smallest change that helps; "" where it can."""
    if name not in SCHEDULES:
        return f"schedule {name!r} is not known; choose one of {', '.join(SCHEDULES)}"
    schedule = SCHEDULES[name]
    if min(ranks, chunks, microbatches) < 1:
        return (
            f"schedule {name} needs at least one rank, chunk and microbatch, not {ranks}, {chunks} and {microbatches}"
        )
    least, most = schedule.chunks
    if chunks < least or (most is not None and chunks > most):
        wanted = f"exactly {least}" if most == least else f"at least {least}"
        return f"schedule {name} takes {wanted} {'chunk' if least == 1 else 'chunks'} a rank, not {chunks}"
    return schedule.fault(ranks, chunks, microbatches)


def actions(name: str, ranks: int, chunks: int, microbatches: int) -> tuple[Actions, ...]:
    """What each rank computes, in order; raises PinError where the schedule cannot be made for these numbers."""
    problem = fault(name, ranks, chunks, microbatches)
    if problem:
        raise PinError(problem)
    return SCHEDULES[name].function(ranks, chunks, microbatches)


def stage_rank(name: str, ranks: int, chunks: int) -> tuple[int, ...]:
    """The rank of each of the `ranks * chunks` stages."""
    if name not in SCHEDULES:
        raise PinError(fault(name, ranks, chunks, 1))
    return tuple(SCHEDULES[name].rank(s, ranks, chunks) for s in range(ranks * chunks))


def stage_edges(name: str, stages: int) -> tuple[tuple[int, int], ...]:
    """(source, target) stages between which activations go; every stage hands on to the next one where stages are a chain."""
    return SCHEDULES[name].edges or tuple((s, s + 1) for s in range(stages - 1))


def _round(stage: int, ranks: int, chunks: int) -> int:
    """Round and round."""
    return stage % ranks


def _down_and_up(stage: int, ranks: int, chunks: int) -> int:
    """A V: down and up again."""
    return stage if stage < ranks else 2 * ranks - 1 - stage


def _one_after_the_other(stage: int, ranks: int, chunks: int) -> int:
    return stage // chunks


# -- one chunk a rank


def _gpipe(ranks: int, chunks: int, microbatches: int) -> tuple[Actions, ...]:
    return tuple(tuple(Action(k, r, i) for k in "FB" for i in range(microbatches)) for r in range(ranks))


def _forward(ranks: int, chunks: int, microbatches: int) -> tuple[Actions, ...]:
    every = range(microbatches)
    return tuple(tuple(Action("F", c * ranks + r, i) for i in every for c in range(chunks)) for r in range(ranks))


def _one_f_one_b(ranks: int, chunks: int, microbatches: int) -> tuple[Actions, ...]:
    return tuple(_alternating(r, min(ranks - 1 - r, microbatches), microbatches) for r in range(ranks))


def _alternating(stage: int, warm: int, microbatches: int) -> Actions:
    """`warm` forwards, then a forward and a backward in turn, then the backwards that are left."""
    made = [Action("F", stage, i) for i in range(warm)]
    for i in range(microbatches):
        if warm + i < microbatches:
            made.append(Action("F", stage, warm + i))
        made.append(Action("B", stage, i))
    return tuple(made)


# -- several chunks a rank, round and round


def _rounds(ranks: int, microbatches: int) -> int:
    """In how many rounds the microbatches pass; a round is one block of microbatches going through every chunk."""
    return max(1, microbatches // ranks)


def _uneven_rounds(ranks: int, chunks: int, microbatches: int) -> str:
    rounds = _rounds(ranks, microbatches)
    if microbatches % rounds == 0:
        return ""
    below = max(m for m in range(1, microbatches) if m % _rounds(ranks, m) == 0)
    above = next(m for m in range(microbatches + 1, microbatches + ranks + 1) if m % _rounds(ranks, m) == 0)
    found = f"{microbatches} microbatches over {ranks} ranks make {rounds} rounds of unequal length"
    return f"{found}; take {below} or {above} microbatches"


def _interleaved(ranks: int, chunks: int, microbatches: int) -> tuple[Actions, ...]:
    return tuple(_looped(r, ranks, chunks, microbatches, hop=2, split=False) for r in range(ranks))


def _zero_bubble_h1(ranks: int, chunks: int, microbatches: int) -> tuple[Actions, ...]:
    return tuple(_looped(r, ranks, chunks, microbatches, hop=1, split=True) for r in range(ranks))


def _looped(rank: int, ranks: int, chunks: int, microbatches: int, *, hop: int, split: bool) -> Actions:
    """Depth-first over chunks, a round of microbatches at a time; a rank warms up by `hop` more forwards than the next.

    With `split`, the weight halves run `rank` steps behind the input halves: they fill the wait for the next gradient and
    leave as many microbatches alive on every rank as the first has (Qi et al. 2023, figure 2).
    """
    block = microbatches // _rounds(ranks, microbatches)
    total = microbatches * chunks
    turns = [(i // block % chunks, i // (block * chunks) * block + i % block) for i in range(total)]
    forwards = [Action("F", c * ranks + rank, m) for c, m in turns]
    backwards = [Action("I" if split else "B", (chunks - 1 - c) * ranks + rank, m) for c, m in turns]
    weights = [Action("W", a.stage, a.microbatch) for a in backwards] if split else []
    warm = min((chunks - 1) * block + hop * (ranks - 1 - rank), total)
    made = forwards[:warm]
    for i, backward in enumerate(backwards):
        if warm + i < total:
            made.append(forwards[warm + i])
        made.append(backward)
        if split and i >= rank:
            made.append(weights[i - rank])
    return (*made, *weights[max(total - rank, 0) :])


# -- two chunks a rank, in a V


class _Pen:
    """Writes the list of one rank of a V: each kind of each chunk takes its microbatches in turn."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.stages = (rank, 2 * ranks - 1 - rank)
        self.made: list[Action] = []
        self.next = {(kind, chunk): 0 for kind in "FIW" for chunk in (0, 1)}
        self.pending: deque[tuple[int, int]] = deque()

    def count(self, kind: str, chunk: int) -> int:
        """How many actions of a kind ("F", "I" or "W") of a chunk were written, whole backwards as both halves."""
        return self.next[kind, chunk]

    def write(self, *steps: tuple[str, int]) -> None:
        """Write (kind, chunk) steps in turn."""
        for kind, chunk in steps:
            microbatch = self.next["I" if kind == "B" else kind, chunk]
            self.made.append(Action(kind, self.stages[chunk], microbatch))
            for half in "IW" if kind == "B" else kind:
                self.next[half, chunk] += 1
            if kind == "I":
                self.pending.append((chunk, microbatch))

    def write_pending_weight(self) -> None:
        """The oldest weight half still owed; nothing where none is."""
        if self.pending:
            chunk, microbatch = self.pending.popleft()
            self.made.append(Action("W", self.stages[chunk], microbatch))


def _zero_bubble_v(ranks: int, chunks: int, microbatches: int) -> tuple[Actions, ...]:
    return tuple(_zero_bubble_v_rank(r, ranks, microbatches) for r in range(ranks))


def _zero_bubble_v_rank(rank: int, ranks: int, microbatches: int) -> Actions:
    """Written for enough microbatches to fill the pipeline; those beyond the wanted ones are then left out."""
    full = max(2 * ranks - 1, microbatches)
    pen = _Pen(rank, ranks)
    pen.write(*[("F", 0)] * (2 * (ranks - rank) - 1))
    pen.write(*[("F", 1), ("F", 0)] * rank)
    pen.write(*[("F", 1), ("I", 1), ("W", 1)] * (ranks - rank))
    while pen.count("F", 1) < pen.count("F", 0) or pen.count("F", 0) < full:
        if pen.count("F", 0) < full:
            pen.write(("F", 0))
        pen.write(("I", 0), ("W", 0), ("F", 1), ("I", 1), ("W", 1))
    pen.write(*[("I", 0), ("I", 1)] * rank)
    pen.write(*[("I", 0), ("W", 0)] * (ranks - rank))
    for chunk in (1, 0):
        pen.write(*[("W", chunk)] * (pen.count("I", chunk) - pen.count("W", chunk)))
    return tuple(a for a in pen.made if a.microbatch < microbatches)


def _too_few_for_dual(ranks: int, chunks: int, microbatches: int) -> str:
    if microbatches >= 2 * ranks:
        return ""
    return (
        f"schedule dualpipev needs a microbatch per stage: at least {2 * ranks} for {ranks} ranks, not {microbatches}"
    )


def _dual_pipe_v(ranks: int, chunks: int, microbatches: int) -> tuple[Actions, ...]:
    return tuple(_dual_pipe_v_rank(r, ranks, microbatches) for r in range(ranks))


def _dual_pipe_v_rank(rank: int, ranks: int, microbatches: int) -> Actions:
    """The eight steps of DeepSeek's DualPipeV; a pair of a forward and a backward is written as two actions."""
    after = ranks - 1 - rank
    pen = _Pen(rank, ranks)
    pen.write(*[("F", 0)] * (2 * after))
    pen.write(*[("F", 0), ("F", 1)] * (rank + 1))
    for _ in range(after):
        pen.write(("I", 1))
        pen.write_pending_weight()
        pen.write(("F", 1))
    pen.write(*[("F", 0), ("B", 1), ("F", 1), ("B", 0)] * (microbatches - 2 * ranks + rank + 1))
    pen.write(*[("B", 1), ("F", 1), ("B", 0)] * after)
    # The last backwards leave their weight halves for the end: the second half of them, rank + 1 of each chunk in all.
    for i in range(2 * (rank + 1)):
        pen.write(("I" if i > rank else "B", 1 - i % 2))
    for _ in range(after):
        pen.write_pending_weight()
        pen.write(("I", 0))
    for _ in range(rank + 1):
        pen.write_pending_weight()
    return tuple(pen.made)


def forwards(placement: Sequence[int], microbatches: int) -> tuple[Actions, ...]:
    """Forwards only, of stages that lie as `placement` says: each rank takes its own in order."""
    mine = [[s for s, rank in enumerate(placement) if rank == r] for r in range(1 + max(placement))]
    return tuple(tuple(Action("F", s, i) for i in range(microbatches) for s in stages) for stages in mine)


# -- branches


FORK = ((0, 1), (0, 2), (1, 3), (2, 3))
"""What goes where between a fork (stage 0), two branches and their join (stage 3)."""


def _branches(ranks: int, chunks: int, microbatches: int) -> tuple[Actions, ...]:
    """The fork's rank is a microbatch ahead, so that the join's never waits for the next one."""
    found = []
    for stages, warm in (((0, 1), min(1, microbatches)), ((2, 3), 0)):
        turns = _alternating(0, warm, microbatches)
        found.append(
            tuple(Action(a.kind, s, a.microbatch) for a in turns for s in (stages if a.kind == "F" else stages[::-1]))
        )
    return tuple(found)


def _two_ranks(ranks: int, chunks: int, microbatches: int) -> str:
    return "" if ranks == 2 else f"schedule branches runs two branches at once, on 2 ranks, not {ranks}"


def _fits(ranks: int, chunks: int, microbatches: int) -> str:
    return ""


def _single(ranks: int, chunks: int, microbatches: int) -> str:
    return "" if ranks == 1 else f"schedule none is for one stage, not {ranks}; take 1f1b"


SCHEDULES: Mapping[str, Schedule] = {
    s.name: s
    for s in (
        Schedule("gpipe", (1, 1), False, _round, _gpipe, _fits),
        Schedule("1f1b", (1, 1), False, _round, _one_f_one_b, _fits),
        Schedule("interleaved", (2, None), False, _round, _interleaved, _uneven_rounds),
        Schedule("zb-h1", (1, None), True, _round, _zero_bubble_h1, _uneven_rounds),
        Schedule("zbv", (2, 2), True, _down_and_up, _zero_bubble_v, _fits),
        Schedule("dualpipev", (2, 2), True, _down_and_up, _dual_pipe_v, _too_few_for_dual),
        Schedule("branches", (2, 2), False, _one_after_the_other, _branches, _two_ranks, FORK),
        Schedule("forward", (1, None), False, _round, _forward, _fits),
        Schedule("none", (1, 1), False, _round, _one_f_one_b, _single),
    )
}
"""Every schedule by name."""
