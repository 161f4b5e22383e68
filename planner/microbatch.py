"""Can the batch be cut into microbatches, and what must be known first?

A cut into microbatches is one more axis, on which nothing can be communicated while the loop runs. Every op splits its batch
factor or runs whole; only the loss may end as a partial sum. A partial sum that no gradient flows through (a count of labels)
is *hoisted*: computed on the whole batch before the loop. Anything else that would need communication couples the samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .outline import Op, Tensor


@dataclass(frozen=True, slots=True)
class BatchCut:
    """States along the microbatch axis: "R", "P", or (dim, factor); tensors to hoist; ops that couple the samples."""

    states: Mapping[str, str | tuple[int, int]]
    choice: Mapping[str, str]
    hoisted: tuple[str, ...]
    blockers: tuple[str, ...]


NO_WRITES: Mapping[str, str] = MappingProxyType({})
COUPLED = frozenset({"never", "batch_norm"})
"""How a batch factor may not be split between microbatches: not at all, or only by ranks that communicate."""


def cut_batch(
    ops: tuple[Op, ...], tensors: Mapping[str, Tensor], inputs: Mapping[str, tuple[int, int] | None],
    writes: Mapping[str, str] = NO_WRITES,
) -> BatchCut:  # fmt: skip
    """Propagate a batch split from `inputs` (tensor -> place of its batch factor, None where it has none).

    `writes` are buffers and their new values; one that is made of some samples cannot be what all samples make.
    """
    states: dict[str, str | tuple[int, int]] = {name: place or "R" for name, place in inputs.items()}
    choice: dict[str, str] = {}
    hoisted: list[str] = []
    blockers: list[str] = []

    def refuse(op: Op, why: str) -> None:
        blockers.append(f"{op.name} ({op.target}) {why}" + (f", {op.source}" if op.source else ""))

    for op in ops:
        batch = [i for i, f in enumerate(op.factors) if f.batch and f.split not in COUPLED]
        never = [f for f in op.factors if f.batch and f.split in COUPLED]
        arrived = {use.tensor: states.get(use.tensor, "R") for use in op.operands}
        partial = [i for i, use in enumerate(op.operands) if arrived[use.tensor] == "P"]
        for i in list(partial):
            name = op.operands[i].tensor
            if (
                not batch
                and not tensors[name].differentiable
                and not any(tensors[r.tensor].differentiable for r in op.results)
            ):
                continue
            if not tensors[name].differentiable:
                hoisted.append(name)
                states[name] = arrived[name] = "R"
                partial.remove(i)
        if never and any(isinstance(s, tuple) for s in arrived.values()):
            refuse(op, "mixes samples along the batch")
            _set(states, op, "R")
        elif len(batch) > 1:
            refuse(op, "pairs samples with each other")
            _set(states, op, "R")
        elif batch:
            _split(op, batch[0], states, arrived, tensors, refuse)
            choice[op.name] = op.factors[batch[0]].name
            continue
        elif partial:
            _pass_partial(op, partial, states, tensors, hoisted, choice, refuse)
            continue
        elif any(isinstance(s, tuple) for s in arrived.values()):
            refuse(op, "needs the whole batch")
            _set(states, op, "R")
        else:
            _set(states, op, "R")
        choice.setdefault(op.name, "R")
    blockers += [
        f"buffer {n} is updated from the samples" for n, value in writes.items() if states.get(value, "R") != "R"
    ]
    return BatchCut(states, choice, tuple(dict.fromkeys(hoisted)), tuple(blockers))


def _set(states: dict[str, str | tuple[int, int]], op: Op, state: str) -> None:
    for use in op.results:
        states[use.tensor] = state


def _split(op: Op, factor: int, states, arrived, tensors, refuse) -> None:  # type: ignore[no-untyped-def]
    for use in op.operands:
        place, here = use.place(factor), arrived[use.tensor]
        if here == "P":
            refuse(op, "uses a sum over all samples for each sample")
        elif place is None and isinstance(here, tuple):
            refuse(op, "needs the whole batch of one operand")
        elif place is not None and isinstance(here, tuple) and place != here:
            refuse(op, "needs the batch on another dim")
    for use in op.results:
        place = use.place(factor)
        states[use.tensor] = place if place is not None else "P"


def _pass_partial(op: Op, partial, states, tensors, hoisted, choice, refuse) -> None:  # type: ignore[no-untyped-def]
    for i, group in enumerate(op.linear):
        if set(partial) == set(group):
            choice[op.name] = f"P{i}"
            _set(states, op, "P")
            return
    names = [op.operands[i].tensor for i in partial]
    if all(not tensors[n].differentiable for n in names):
        hoisted.extend(names)
        for name in names:
            states[name] = "R"
        choice[op.name] = "R"
        _set(states, op, "R")
        return
    refuse(op, "is not linear in a sum over all samples")
    choice[op.name] = "R"
    _set(states, op, "R")
