"""A design without what it would run again for nothing.

The region program breaks ties by time only as far as its gap says, so a design may run an op again though nothing needs its result
in the backward pass. The runtime makes only what is needed (runtime/again.py), so plans that run here are priced without the rest.
"""

from __future__ import annotations

from dataclasses import replace

from .bench import Bench
from .front import Design
from .memory import buffer
from .placement import Placement
from .remake import Again, Copy, Values


def trimmed(bench: Bench, design: Design) -> Design:
    """`design` with those of its ops and copies that run again and that its unit needs; exits and the loss are kept."""
    part = bench.part
    wanted: dict[str, tuple[Placement, ...]] = {}
    choices: dict[str, tuple[str, ...]] = {}
    produced: dict[str, Placement] = dict(bench.layouts[design.entry])
    for index, (op, choice) in enumerate(zip(part.outline.ops, design.choices, strict=True)):
        step = bench.step(index, op, choice)
        if step is None:
            return design
        wanted[op.name] = step.wanted
        choices[op.name] = bench.full(op, choice)
        produced |= {use.tensor: placement for use, placement in zip(op.results, step.made, strict=True)}
    roots = {part.facts.aliases[name].root for name in (*part.exit, part.outline.loss) if name}
    leaving = {op.name for op in part.outline.ops if any(use.tensor in roots for use in op.results)}
    copies: dict[Copy, tuple[str, str]] = {}
    for op in part.outline.ops:
        for use, placement in zip(op.operands, wanted[op.name], strict=True):
            root, stands = buffer(part.facts, use.tensor, placement)
            if (root, str(stands[-1])) in design.regather:
                copies[use.tensor, placement] = root, str(stands[-1])
    values = Values(part.outline, part.facts, wanted, produced, choices)
    needed = values.needed(Again(design.again - leaving, frozenset(copies)))
    return replace(design, again=needed.ops, regather=frozenset(copies[c] for c in needed.copies))
