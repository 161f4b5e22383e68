"""Sends and receives among the actions of a schedule, in an order that cannot deadlock.

The lists of planner/schedules.py say what each rank computes. Played here one action a turn, an action whose inputs have been made
runs, and what it makes is sent at once: the send stands in the list of the sender and, at the same moment of the play, the receive
in the list of the receiver. So all sends and receives have one order, which every rank follows: any pair of ranks agrees on the
order of its messages (NCCL matches by order alone), and waiting for each one where it stands ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import PlanError
from .schedules import Action, Lists


@dataclass(frozen=True, slots=True)
class Message:
    """What stage `source` sends to stage `target` of one microbatch: activations, or their gradients where `back` is set."""

    source: int
    target: int
    microbatch: int
    back: bool = False


@dataclass(frozen=True, slots=True)
class Send:
    """The sender's end of a message."""

    message: Message


@dataclass(frozen=True, slots=True)
class Receive:
    """The receiver's end of a message."""

    message: Message


Step = Action | Send | Receive


def with_messages(
    lists: Lists, rank_of: Sequence[int], edges: Mapping[tuple[int, int], bool]
) -> tuple[tuple[Step, ...], ...]:
    """The lists with their messages. `edges` are (source, target) stages with crossing tensors; True where a gradient returns.

    Stages on the same rank hand over without a message. Raises PlanError where the lists wait for each other.
    """
    made: list[list[Step]] = [[] for _ in lists]
    at = [0] * len(lists)
    done: set[tuple[str, int, int]] = set()

    def ready(a: Action) -> bool:
        if a.kind == "F":
            return all(("F", s, a.microbatch) in done for s, t in edges if t == a.stage)
        if a.kind == "W":
            return ("B", a.stage, a.microbatch) in done
        later = all(("B", t, a.microbatch) in done for (s, t), back in edges.items() if back and s == a.stage)
        return ("F", a.stage, a.microbatch) in done and later

    def send(a: Action) -> None:
        pairs = [(a.stage, t, False) for s, t in edges if s == a.stage] if a.kind == "F" else []
        if a.kind in ("B", "I"):
            pairs = [(a.stage, s, True) for (s, t), back in edges.items() if back and t == a.stage]
        for source, target, back in sorted(pairs):
            if rank_of[source] != rank_of[target]:
                message = Message(source, target, a.microbatch, back)
                made[rank_of[source]].append(Send(message))
                made[rank_of[target]].append(Receive(message))

    while any(i < len(actions) for i, actions in zip(at, lists, strict=True)):
        moved = False
        for r, actions in enumerate(lists):
            if at[r] < len(actions) and ready(actions[at[r]]):
                action = actions[at[r]]
                at[r] += 1
                moved = True
                made[r].append(action)
                done.add(("B" if action.kind == "I" else action.kind, action.stage, action.microbatch))
                send(action)
        if not moved:
            waiting = ", ".join(str(actions[i]) for i, actions in zip(at, lists, strict=True) if i < len(actions))
            raise PlanError(f"the schedule cannot go on: {waiting} wait for each other")
    return tuple(tuple(steps) for steps in made)
