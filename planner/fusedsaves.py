"""What fused kernels keep for the backward pass (`kernels=fused`): the input of a chain of element-wise ops, not what is inside it.

An eager chain keeps every tensor that the backward of one of its ops asks for; of an RMS norm in half precision those are the
input as float32, the normed input, and the result: 8 bytes an element. A fused kernel (Megatron's and Apex's norms, Liger's, what
Inductor makes) reads its input again and works the rest out, so that only what is written is there to be kept:

    kept     results that a matmul, attention or another unit reads (the kernel writes them), statistics per row, dropout masks
    dropped  results that only element-wise ops of the same unit read, where the tensors they follow from take no more bytes

A chain is followed back to the cheapest tensors that it follows from; those that something else keeps cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .flow import Flow
from .outline import Op, Outline, Saved

CHEAP = frozenset({"elementwise"})
"""Kinds of ops that a fused backward kernel runs again: one result, no state."""

INSIDE = CHEAP | {"reduction", "norm", "random", "copy"}
"""Kinds of ops that a fused kernel may read a tensor in without it being written."""

SMALL = 16
"""A tensor of so many times fewer bytes is a statistic: it is kept."""


@dataclass(frozen=True, slots=True)
class _Way:
    """How a tensor is had in the backward pass: bytes to keep for it, and operands (op, index) that are kept for it."""

    bytes: int
    kept: tuple[tuple[str, int], ...] = ()


def fused_saves(outline: Outline) -> Outline:
    """The outline as fused kernels run it."""
    if not outline.training:
        return outline
    flow = Flow(outline)
    dropped = _Chains(outline, flow).dropped()
    if not dropped:
        return outline
    added: dict[str, set[int]] = {}
    for way in dropped.values():
        for op, index in way.kept:
            added.setdefault(op, set()).add(index)
    return replace(outline, ops=tuple(_rewritten(op, flow, dropped, added.get(op.name, set())) for op in outline.ops))


def _rewritten(op: Op, flow: Flow, dropped: Mapping[str, _Way], added: set[int]) -> Op:
    saved = [s for s in op.saved if s.source == "new" or flow.saved_storage(op, s) not in dropped]
    there = {s.index for s in saved if s.source == "operand"}
    saved += [Saved("operand", i) for i in sorted(added - there)]
    return op if len(saved) == len(op.saved) and not added - there else replace(op, saved=tuple(saved))


class _Chains:
    """Which saved tensors follow from others inside a kernel."""

    def __init__(self, outline: Outline, flow: Flow) -> None:
        self.flow, self.tensors, self.ops = flow, outline.tensors, {op.name: op for op in outline.ops}
        self._ways: dict[str, _Way] = {}
        self._firm = {name for name in flow.saved if not self._inside(name)}

    def dropped(self) -> dict[str, _Way]:
        """What to keep instead of the tensors that fused kernels do not write, by storage.

        In rounds: what is kept instead of one tensor may be what another follows from.
        """
        found: dict[str, _Way] = {}
        while True:
            self._ways.clear()
            more = {
                name: way for name in self.flow.saved if name not in found and (way := self._around(name)) is not None
            }
            if not more:
                return found
            found |= more
            for op, index in (k for way in more.values() for k in way.kept):
                self._firm.add(self.tensors[self.ops[op].operands[index].tensor].storage)

    def _around(self, name: str) -> _Way | None:
        """The way to have a tensor that takes fewer bytes than to keep it, if there is one."""
        if name in self._firm or not self._inside(name) or self._small(name):
            return None
        way = self._deeper(name)
        return way if way.bytes < self.tensors[name].bytes else None

    def _inside(self, name: str) -> bool:
        """Whether an element-wise op makes it for ops that may run in the same kernel alone."""
        op = self.flow.maker.get(name)
        if op is None or op.kind not in CHEAP or len(op.results) != 1 or name in self.flow.left:
            return False
        mine = self.flow.unit.get(op.name)
        return all(
            reader.kind in INSIDE and self.flow.unit.get(reader.name) == mine
            for reader in self.flow.readers.get(name, ())
        )

    def _small(self, name: str) -> bool:
        op = self.flow.maker[name]
        most = max((self.tensors[u.tensor].bytes for u in op.operands), default=0)
        largest = max(
            [most, *(self.tensors[u.tensor].bytes for r in self.flow.readers.get(name, ()) for u in r.results)]
        )
        return SMALL * self.tensors[name].bytes <= largest

    def _way(self, name: str, op: Op, index: int) -> _Way:
        """The cheapest way to have operand `index` of `op` in the backward pass."""
        tensor = self.tensors[name]
        if tensor.role != "activation" or not tensor.differentiable:
            return _Way(0)
        here = _Way(0 if name in self._firm else tensor.bytes, ((op.name, index),))
        if not self._inside(name) or not here.bytes:
            return here
        deeper = self._deeper(name)
        return deeper if deeper.bytes < here.bytes else here

    def _deeper(self, name: str) -> _Way:
        """What its maker's operands take."""
        if name not in self._ways:
            op = self.flow.maker[name]
            found = [self._way(self.tensors[u.tensor].storage, op, i) for i, u in enumerate(op.operands)]
            self._ways[name] = _Way(sum(w.bytes for w in found), tuple(k for w in found for k in w.kept))
        return self._ways[name]
