"""The model's own output type, rebuilt around what was computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from ..errors import UsageError
from ..passes.skeleton import buffer_of

if TYPE_CHECKING:
    from .programs import Program


class NotComputed:
    """Stands where an output was not asked for; any use of it says how to ask."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        name = object.__getattribute__(self, "_name")
        raise UsageError(
            f"output {name} was not computed: in grad mode only the loss is, unless you call the module with outputs=True"
        )

    __getattr__ = __getitem__ = __call__ = __iter__ = __len__ = __bool__ = __add__ = __mul__ = __sub__ = _refuse
    __radd__ = __rmul__ = __rsub__ = __truediv__ = __matmul__ = __float__ = __int__ = __array__ = _refuse

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for arg in args:
            if isinstance(arg, cls):
                arg._refuse()
        raise UsageError("an output that was not computed was used; call the module with outputs=True")


class _Sealed(torch.autograd.Function):
    """A value that seems to have a gradient; sending one into it raises."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:  # type: ignore[override]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        raise UsageError(
            "a gradient was sent into an output that is not the loss: under a plan only the loss is differentiated; "
            "compute it inside the model or pass loss_fn="
        )


def beside_loss(program: Program, known: Mapping[str, Any]) -> list[Any]:
    """Outputs beside the loss in their order: readable, but no gradient may enter those that depend on parameters."""
    tensors = program.summary.outline.tensors
    return [
        _Sealed.apply(known[name].detach(), torch.ones((), requires_grad=True))
        if tensors[name].differentiable
        else known[name]
        for name in program.lowered.outputs
    ]


def rebuild(program: Program, flat: Sequence[Any]) -> Any:
    """Put computed values (loss first, then asked-for outputs) into the captured output structure.

    A loss that `loss_fn` makes has no place there: it is returned alone, or as (loss, output) where outputs were asked for.
    """
    captured = program.captured
    apart = bool(captured.loss) and captured.loss not in captured.flat_outputs
    if apart and not program.others:
        return flat[0]
    known = by_name(program, flat)
    leaves = []
    for i, leaf in enumerate(captured.flat_outputs):
        if isinstance(leaf, str):
            leaves.append(known[leaf] if leaf in known else NotComputed(f"{i} ({leaf})"))
        else:
            leaves.append(leaf.value)
    output = tree_unflatten(leaves, captured.output_spec)
    return (flat[0], output) if apart else output


def update_buffers(program: Program, known: Mapping[str, Any], module: nn.Module) -> None:
    """Write what a call makes of buffers (running statistics, counters) where the module has them; `known` are outputs by name."""
    with torch.no_grad():
        for buffer, name in program.writes.items():
            buffer_of(module, buffer).copy_(known[name])


def by_name(program: Program, flat: Sequence[Any]) -> dict[str, Any]:
    """Computed values by name: the loss first, then the outputs of the graph."""
    loss = program.captured.loss
    return dict(zip([*([loss] if loss else []), *program.lowered.outputs], flat, strict=False))
