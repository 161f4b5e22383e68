"""Which parameters to update where memory does not allow for all: the most contribution within a budget.

Lin et al. 2022, "On-Device Training Under 256KB Memory", section 3.2: maximise the sum of contributions of the chosen parameters
such that what their update takes fits. An update takes the parameter's own gradient and optimizer states, and what the backward
pass down to it keeps: a value is kept where a gradient flows through one of certain tensors, and it flows through a tensor where
it flows through one of those that it is made of. So the deepest chosen parameter decides how far the backward pass goes, and each
chosen weight what is kept beside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import Infeasible
from .program import Program

ROUNDS = 6
"""Times that a choice is made again with what the plan of the last one says."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A parameter that may be updated: what that is worth, and the bytes of its gradient and optimizer states."""

    value: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that wait for the backward pass where a gradient flows through one of `tensors`; negative for what is then not kept."""

    bytes: int
    tensors: frozenset[str]


@dataclass(frozen=True)
class Backward:
    """What a backward pass needs, whatever is updated: `flows` says of each tensor, in the order of the graph, which ones its
    gradient flows on to (of a parameter none)."""

    flows: Mapping[str, tuple[str, ...]]
    kept: Sequence[Kept]

    def reached(self, chosen: Collection[str]) -> set[str]:
        """The tensors through which a gradient flows where `chosen` are updated."""
        found = set(chosen)
        for name, sources in self.flows.items():
            if any(s in found for s in sources):
                found.add(name)
        return found

    def kept_bytes(self, chosen: Collection[str]) -> int:
        """Bytes that wait for the backward pass at once."""
        reached = self.reached(chosen)
        return sum(k.bytes for k in self.kept if not reached.isdisjoint(k.tensors))


@dataclass(frozen=True)
class UpdateSet:
    """Parameters to update, what they are worth of all that could be, and the planned peak of a step in bytes."""

    names: frozenset[str]
    value: float
    total_value: float
    peak_bytes: int

    def apply(self, model: Any) -> None:
        """Have a module train these parameters alone: plans, the backward pass and optimizers go by `requires_grad`."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.names)


def update_bytes(candidates: Mapping[str, Candidate], backward: Backward, chosen: Collection[str]) -> int:
    """What updating `chosen` takes beyond a forward pass."""
    return sum(candidates[name].bytes for name in chosen) + backward.kept_bytes(chosen)


def most_valuable(candidates: Mapping[str, Candidate], backward: Backward, budget_bytes: float) -> frozenset[str]:
    """The candidates worth most in all whose update takes at most `budget_bytes`; none where none fits."""
    program = Program()
    scale = max((c.value for c in candidates.values()), default=0.0) or 1.0
    on = {name: program.add(-c.value / scale, whole=True) for name, c in candidates.items()}
    takes = [(on[name], c.bytes / max(budget_bytes, 1.0)) for name, c in candidates.items()]
    for name, sources in backward.flows.items():
        through = sorted({on[s] for s in sources if s in on})
        if through:
            on[name] = _any(program, through)
    for item in backward.kept:
        reasons = sorted({on[t] for t in item.tensors if t in on})
        if reasons:
            takes.append((_any(program, reasons), item.bytes / max(budget_bytes, 1.0)))
    program.row(takes, high=1.0)
    answer = program.solve()
    return frozenset(name for name in candidates if answer.values and answer.values[on[name]] > 0.5)


def _any(program: Program, variables: Sequence[int]) -> int:
    """A variable that is 1 where one of some is, and 0 where none is."""
    if len(variables) == 1:
        return variables[0]
    found = program.add()
    for variable in variables:
        program.row([(found, 1.0), (variable, -1.0)], low=0.0)
    program.row([(found, 1.0), *((v, -1.0) for v in variables)], high=0.0)
    return found


def choose(
    candidates: Mapping[str, Candidate], backward: Backward, budget_bytes: int, planned: Callable[[frozenset[str]], int]
) -> UpdateSet:
    """The most valuable set whose `planned` peak (bytes of a step) is at most `budget_bytes`.

    What a step holds beside what an update takes is not known before it is planned: the budget of a choice is what the plan of the
    last one left. Raises Infeasible where a step that updates nothing but the cheapest parameter does not fit.
    """
    least = min(candidates, key=lambda n: (update_bytes(candidates, backward, [n]), n))
    chosen, tried = frozenset((least,)), dict[frozenset[str], int]()
    for _ in range(ROUNDS):
        if chosen in tried or not chosen:
            break
        tried[chosen] = planned(chosen)
        beside = tried[chosen] - update_bytes(candidates, backward, chosen)
        chosen = most_valuable(candidates, backward, budget_bytes - beside)
    fitting = [names for names, peak in tried.items() if peak <= budget_bytes]
    if not fitting:
        peak = min(tried.values())
        raise Infeasible(
            f"a step that updates {least} alone takes {peak:,} bytes, and the budget is {budget_bytes:,}",
            cause="memory", nearest=[f"budget_bytes={peak}", "a smaller batch"],
        )  # fmt: skip
    best = max(fitting, key=lambda names: (sum(candidates[n].value for n in names), sorted(names)))
    worth = [sum(candidates[n].value for n in names) for names in (best, candidates)]
    return UpdateSet(best, worth[0], worth[1], tried[best])
