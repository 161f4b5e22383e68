"""Who makes, reads and keeps every storage of an outline, views left out: what kernels that are fused look at."""

from __future__ import annotations

from .outline import Op, Outline, Saved


class Flow:
    """By storage: its `maker`, its `readers` in order, those that some op has `saved` for its backward pass (an ordered set),
    those that are `left` to the caller; and the `unit` (region, repeat) of every op by name."""

    def __init__(self, outline: Outline) -> None:
        self.tensors = outline.tensors
        self.maker: dict[str, Op] = {}
        self.readers: dict[str, list[Op]] = {}
        self.saved: dict[str, None] = {}
        self.left = {self.tensors[n].storage for n in (*outline.outputs, outline.loss) if n in self.tensors}
        self.unit = {
            n: (r, k) for r, region in enumerate(outline.regions) for k, ops in enumerate(region.instances) for n in ops
        }
        for op in outline.ops:
            for use in op.results:
                self.maker.setdefault(self.storage(use.tensor), op)
            if op.kind != "view":
                for use in op.operands:
                    self.readers.setdefault(self.storage(use.tensor), []).append(op)
            for item in op.saved:
                if item.source != "new":
                    self.saved.setdefault(self.saved_storage(op, item))

    def storage(self, tensor: str) -> str:
        """The storage a tensor lives in."""
        return self.tensors[tensor].storage

    def saved_storage(self, op: Op, item: Saved) -> str:
        """The storage of an operand or a result that `op` saves."""
        return self.storage((op.operands if item.source == "operand" else op.results)[item.index].tensor)
