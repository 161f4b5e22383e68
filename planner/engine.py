"""Precedences of action lists as integer arrays, their longest path, and step time as a linear function of durations.

Each rank works off its list in order, sends leave in the order their data is made, and so does everything else that has a
queue: when everything starts as soon as it can, the end of each node is the greatest end of its predecessors plus its own
duration (max-plus), whatever the durations are. Nodes are numbered so that predecessors come first, and have at most two of
them (zero-length gates join more). One `Compiled` serves any number of durations.

Nodes: an action of a rank; a send to another rank (`send_forward` of stage s goes along its edges, to s + 1 in a chain, and
`send_backward` of s against them; one queue per pair of ranks and direction, asynchronous, the receiver waits for the arrival); a
copy of saved activations to the host and back, for stages that have one. A microbatch whose backward is the rank's very next action
is not copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import PlanError
from .schedules import COMPUTE, Action, Lists

PARTS = ("forward", "backward", "input", "weight", "send_forward", "send_backward", "copy_out", "copy_in", "gate")
"""What a node is; its code is `index of the part * stages + stage`."""

FORWARD, BACKWARD, INPUT, WEIGHT, SEND_FORWARD, SEND_BACKWARD, COPY_OUT, COPY_IN, GATE = range(len(PARTS))

Edges = tuple[tuple[int, int], ...]
"""(source, target) stages."""

_PART_OF_KIND = {"F": FORWARD, "B": BACKWARD, "I": INPUT, "W": WEIGHT}


class ScheduleError(PlanError):
    """Action lists that cannot run: an action missing, twice, on the wrong rank, out of order, or waiting in a circle."""


@dataclass(frozen=True, eq=False)
class Compiled:
    """Precedences of one set of lists. Node 0 is the start of the step; `first` and `second` are predecessors (0: none).

    `rank` is where a node runs and `microbatch` what it belongs to. `last[rank]` is a rank's last action, `final[stage]` a
    stage's last backward (its last forward where there is none), `copies[rank]` its last copies (out, in; 0: none),
    `position` the place of an action in its list (-1 for other nodes). `edges` are the (source, target) stages of activations.
    """

    lists: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...]
    microbatches: int
    first: tuple[int, ...]
    second: tuple[int, ...]
    code: tuple[int, ...]
    rank: tuple[int, ...]
    microbatch: tuple[int, ...]
    position: tuple[int, ...]
    last: tuple[int, ...]
    final: tuple[int, ...]
    copies: tuple[tuple[int, int], ...]
    copied: frozenset[int]
    edges: Edges

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def ranks(self) -> int:
        return len(self.lists)

    def sent_to(self, stage: int, back: bool) -> int:
        """The other rank that a stage sends to, forward or back."""
        ends = ((t, s) if back else (s, t) for s, t in self.edges)
        return next(self.placement[t] for s, t in ends if s == stage and self.placement[t] != self.placement[s])


def compile_lists(
    lists: Lists, placement: Sequence[int], copied: frozenset[int] = frozenset(), edges: Edges = ()
) -> Compiled:
    """Check the lists and lay out their precedences.

    `placement[s]` is the rank of stage s, `copied` the stages whose saved activations go to the host, `edges` what stages hand on
    to which others (a chain where nothing is said). Raises ScheduleError naming rank and action where the lists are incomplete, out
    of order, or wait for each other in a circle.
    """
    fixed = tuple(tuple(actions) for actions in lists)
    edges = edges or tuple((s, s + 1) for s in range(len(placement) - 1))
    return _Builder(fixed, tuple(placement), check_lists(fixed, placement), copied, edges).build()


def check_lists(lists: Lists, placement: Sequence[int]) -> int:
    """The number of microbatches; raises ScheduleError where an action is missing, twice, misplaced or before its forward.

    Lists are for training (every forward has its B, or I and W) or hold forwards only.
    """
    done: dict[str, set[tuple[int, int]]] = {kind: set() for kind in COMPUTE}
    for rank, actions in enumerate(lists):
        for action in actions:
            problem = _misplaced(action, rank, placement, done)
            if problem:
                raise ScheduleError(f"rank {rank}, action {action}: {problem}")
            done[action.kind].add((action.stage, action.microbatch))
    microbatches = 1 + max((m for _, m in done["F"]), default=-1)
    if not microbatches:
        raise ScheduleError("the action lists hold no forward")
    training = bool(done["B"] or done["I"])
    for stage, rank in enumerate(placement):
        for m in range(microbatches):
            wanted = _missing((stage, m), done, training)
            if wanted:
                raise ScheduleError(f"rank {rank}: action {stage}{wanted}{m} is missing from its list")
    return microbatches


def _misplaced(action: Action, rank: int, placement: Sequence[int], done: Mapping[str, set[tuple[int, int]]]) -> str:
    """What is wrong with an action where it stands, "" if nothing."""
    key = (action.stage, action.microbatch)
    if action.kind not in COMPUTE:
        return f"only {', '.join(COMPUTE)} can be timed; sends, receives and gathers follow from them"
    if not 0 <= action.stage < len(placement) or action.microbatch < 0:
        return f"no such stage or microbatch (there are {len(placement)} stages)"
    if placement[action.stage] != rank:
        return f"stage {action.stage} lives on rank {placement[action.stage]}"
    if key in done[action.kind] or (action.kind in "BI" and key in done["I" if action.kind == "B" else "B"]):
        return "the microbatch has had it already"
    before = {"F": "", "B": "F", "I": "F", "W": "I"}[action.kind]
    if before and key not in done[before]:
        return f"comes before {action.stage}{before}{action.microbatch}"
    return ""


def _missing(key: tuple[int, int], done: Mapping[str, set[tuple[int, int]]], training: bool) -> str:
    if key not in done["F"]:
        return "F"
    if not training or key in done["B"]:
        return ""
    if key not in done["I"]:
        return "B"
    return "" if key in done["W"] else "W"


class _Builder:
    """Numbers the nodes: walks every list as far as it goes, sleeps where data is missing, wakes where it arrives."""

    def __init__(
        self, lists: tuple[tuple[Action, ...], ...], placement: tuple[int, ...], microbatches: int, copied: frozenset[int],
        edges: Edges,
    ) -> None:  # fmt: skip
        self.lists, self.placement, self.microbatches, self.copied = lists, placement, microbatches, copied
        self.stages, self.edges = len(placement), edges
        # What goes along an edge has a slot for each microbatch, from `base` on, and the same against it: by part and stage
        # the (base, other stage) that an action waits for, and those that it fills.
        self.givers: dict[int, list[list[tuple[int, int]]]] = {
            p: [[] for _ in placement] for p in _PART_OF_KIND.values()
        }
        self.takers: dict[int, list[list[tuple[int, int]]]] = {
            p: [[] for _ in placement] for p in _PART_OF_KIND.values()
        }
        for i, (source, target) in enumerate(edges):
            for base, parts, here, there in (
                (2 * i * microbatches, (FORWARD,), source, target),
                ((2 * i + 1) * microbatches, (BACKWARD, INPUT), target, source),
            ):
                for part in parts:
                    self.takers[part][here].append((base, there))
                    self.givers[part][there].append((base, here))
        self.first, self.second, self.code, self.rank, self.microbatch, self.position = [0], [0], [-1], [0], [0], [-1]
        self.at = [0] * len(lists)
        self.last = [0] * len(lists)
        self.final = [0] * self.stages
        self.queue: dict[tuple[int, int], int] = {}
        self.copy_out = [0] * len(lists)
        self.copy_in = [0] * len(lists)
        self.on_host: dict[tuple[int, int], int] = {}
        self.arrived = [0] * (
            2 * len(edges) * microbatches
        )  # by slot: the node that brings the activation, or the gradient
        self.asleep: dict[int, int] = {}
        self.awake = list(range(len(lists) - 1, -1, -1))

    def build(self) -> Compiled:
        while self.awake:
            self._walk(self.awake.pop())
        if any(at < len(actions) for at, actions in zip(self.at, self.lists, strict=True)):
            raise ScheduleError(self._circle())
        return Compiled(
            self.lists, self.placement, self.microbatches, tuple(self.first), tuple(self.second), tuple(self.code),
            tuple(self.rank), tuple(self.microbatch), tuple(self.position), tuple(self.last), tuple(self.final),
            tuple(zip(self.copy_out, self.copy_in, strict=True)), self.copied, self.edges,
        )  # fmt: skip

    def _node(
        self, part: int, stage: int, microbatch: int, rank: int, first: int, second: int, position: int = -1
    ) -> int:
        self.first.append(first)
        self.second.append(second)
        self.code.append(part * self.stages + stage)
        self.rank.append(rank)
        self.microbatch.append(microbatch)
        self.position.append(position)
        return len(self.code) - 1

    def _walk(self, rank: int) -> None:
        """Take the actions of a rank up to the first one whose data is not there."""
        actions, position = self.lists[rank], self.at[rank]
        givers, arrived = self.givers, self.arrived
        while position < len(actions):
            action = actions[position]
            part, stage, m = _PART_OF_KIND[action.kind], action.stage, action.microbatch
            waits = [arrived[base + m] for base, _ in givers[part][stage]]
            if 0 in waits:
                self.asleep[givers[part][stage][waits.index(0)][0] + m] = rank
                break
            arrival = self._joined(waits, stage, m, rank) if len(waits) > 1 else waits[0] if waits else 0
            if part in (BACKWARD, INPUT) and (stage, m) in self.on_host:
                arrival = self._fetch(rank, action, arrival)
            node = self._node(part, stage, m, rank, self.last[rank], arrival, position)
            self.last[rank] = node
            if part != FORWARD or not self.final[stage] or self.code[self.final[stage]] == self.code[node]:
                self.final[stage] = node
            if part == FORWARD:
                self._offload(rank, action, position)
            self._hand_on(part, stage, m, node)
            position += 1
        self.at[rank] = position

    def _joined(self, nodes: Sequence[int], stage: int, m: int, rank: int) -> int:
        """A node that ends when all of these have ended; 0 for none."""
        found = 0
        for node in nodes:
            found = self._node(GATE, stage, m, rank, found, node) if found else node
        return found

    def _hand_on(self, part: int, stage: int, m: int, node: int) -> None:
        """Give what an action made to the stages that need it, through a send where they are on another rank."""
        here = self.placement[stage]
        for base, target in self.takers[part][stage]:
            there, given = self.placement[target], node
            if here != there:
                send = SEND_FORWARD if part == FORWARD else SEND_BACKWARD
                given = self._node(send, stage, m, here, node, self.queue.get((here, there), 0))
                self.queue[here, there] = given
            self.arrived[base + m] = given
            sleeper = self.asleep.pop(base + m, None)
            if sleeper is not None and there != here:
                self.awake.append(sleeper)

    def _offload(self, rank: int, action: Action, position: int) -> None:
        """Copy out what a forward saved, unless its backward is the very next action."""
        if action.stage not in self.copied:
            return
        following = self.lists[rank][position + 1] if position + 1 < len(self.lists[rank]) else None
        if following is not None and (following.stage, following.microbatch) == (action.stage, action.microbatch):
            return
        stage, m = action.stage, action.microbatch
        self.copy_out[rank] = self._node(COPY_OUT, stage, m, rank, self.last[rank], self.copy_out[rank])
        self.on_host[stage, m] = self.copy_out[rank]

    def _fetch(self, rank: int, action: Action, arrival: int) -> int:
        """Copy back in, from when the rank is free for the action before; returns the gate to the backward."""
        stage, m = action.stage, action.microbatch
        freed = self.first[self.last[rank]]
        ready = self._node(GATE, stage, m, rank, freed, self.on_host[stage, m])
        self.copy_in[rank] = self._node(COPY_IN, stage, m, rank, ready, self.copy_in[rank])
        return self._node(GATE, stage, m, rank, self.copy_in[rank], arrival) if arrival else self.copy_in[rank]

    def _circle(self) -> str:
        """The circle of waits that a stuck rank is part of."""
        stuck = {
            r: actions[at] for r, (at, actions) in enumerate(zip(self.at, self.lists, strict=True)) if at < len(actions)
        }
        rank = min(stuck)
        seen: list[int] = []
        while rank not in seen:
            seen.append(rank)
            action = stuck[rank]
            rank = self.placement[self._missing_giver(action)]
        lines = []
        for member in seen[seen.index(rank) :]:
            action = stuck[member]
            source = self._missing_giver(action)
            given = f"{source}{action.kind}{action.microbatch} of rank {self.placement[source]}"
            lines.append(f"rank {member}, action {action} waits for {given}")
        return "the action lists wait in a circle: " + "; ".join(lines)

    def _missing_giver(self, action: Action) -> int:
        """The first stage whose data an action waits for."""
        givers = self.givers[_PART_OF_KIND[action.kind]][action.stage]
        return next(stage for base, stage in givers if not self.arrived[base + action.microbatch])
