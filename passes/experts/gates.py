"""The function between the two products of an expert, as text: a straight line of elementwise aten ops on one tensor.

    c f|[["chunk.default","%0",2,-1],["silu.default","%1.0"],["mul.Tensor","%2","%1.1"]]

The layout of the input's columns, then JSON: a list of [op, argument, ..] lines, where "%0" is the input, "%2" the result of
the second line and "%1.0" the first part of the first. No line names a size, so that the program runs on any part of the
width that the layout allows: "c f" (all gates, then all ups), "f c" (in turn) or "f" (no gate). That is tried on numbers
when it is traced, not assumed.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

LAYOUTS = ("c f", "f c", "f")
_TRIAL = 8
"""Width of an expert in the trial of a layout; a part of it is half."""


class GateError(Exception):
    """A function that is no such line; the text says why."""


def run_gate(gate: str, x: Tensor) -> Tensor:
    """Apply the program to `x` ([.., c f] -> [.., f]); the result has the dtype of `x`, whatever it was traced in."""
    values: list[Any] = [x]
    for op, args, kwargs in _program(gate):
        values.append(op(*[_value(a, values) for a in args], **{k: _value(v, values) for k, v in kwargs.items()}))
    return values[-1].to(x.dtype)  # type: ignore[no-any-return]


def _value(arg: Any, values: list[Any]) -> Any:
    if isinstance(arg, _Ref):
        found = values[arg.line]
        return found if arg.part is None else found[arg.part]
    return arg


class _Ref:
    """The result of a line, or one part of it."""

    def __init__(self, text: str) -> None:
        line, _, part = text.removeprefix("%").partition(".")
        self.line, self.part = int(line), int(part) if part else None


@functools.lru_cache(maxsize=256)
def _program(gate: str) -> tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]:
    lines = []
    for name, *args in json.loads(gate.partition("|")[2]):
        packet, _, overload = name.partition(".")
        kwargs = args.pop() if args and isinstance(args[-1], dict) else {}
        op = getattr(getattr(torch.ops.aten, packet), overload)
        lines.append((op, tuple(map(_parsed, args)), {k: _parsed(v) for k, v in kwargs.items()}))
    return tuple(lines)


def _parsed(arg: Any) -> Any:
    if isinstance(arg, str) and arg.startswith("%"):
        return _Ref(arg)
    if isinstance(arg, str) and arg.startswith("torch."):
        return getattr(torch, arg.removeprefix("torch."))
    return arg


def trace_gate(function: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype) -> str:
    """The program of a function from [rows, width] to [rows, width or half of it].

    Raises GateError where it holds tensors of its own, calls ops that are not elementwise, or mixes columns.
    """
    x = torch.zeros(2, width, dtype=dtype, device="cpu")
    try:
        graph = make_fx(lambda x: function(x), pre_dispatch=True)(x).graph  # it counts the arguments of a code object
    except Exception as error:
        raise GateError(f"it cannot be traced: {error}") from error
    lines = json.dumps(_lines(graph, width), separators=(",", ":"))
    return f"{_layout(lines)}|{lines}"


def _lines(graph: fx.Graph, width: int) -> list[list[Any]]:
    names: dict[fx.Node, str] = {}
    lines: list[list[Any]] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = "%0"
        elif node.op == "get_attr":
            raise GateError("it holds a tensor of its own")
        elif node.target is operator.getitem:
            names[node] = f"{names[node.args[0]]}.{node.args[1]}"
        elif node.op == "call_function":
            lines.append(_line(node, names, width))
            names[node] = f"%{len(lines)}"
        elif node.op == "output" and (not lines or names.get(node.args[0]) != f"%{len(lines)}"):
            raise GateError("its result is not what it computes last")
    return lines


def _line(node: fx.Node, names: dict[fx.Node, str], width: int) -> list[Any]:
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        raise GateError(f"it calls {target}")
    if not (torch.Tag.pointwise in target.tags or target.overloadpacket in _PARTS):
        raise GateError(f"it calls {target}, which is not elementwise")
    args = [_written(a, names) for a in node.args]
    kwargs = {k: _written(v, names) for k, v in node.kwargs.items()}
    if target is torch.ops.aten.split.Tensor and 2 * args[1] == width:
        return ["chunk.default", args[0], 2, *args[2:]]  # the same, without naming a size
    return [str(target).removeprefix("aten."), *args, *([kwargs] if kwargs else [])]


_PARTS = frozenset(
    getattr(torch.ops.aten, name) for name in ("chunk", "split", "slice", "_to_copy", "to", "contiguous", "clone")
)
"""Ops besides elementwise ones: they take columns apart or change the dtype; the trial of the layout judges them."""


def _written(arg: Any, names: dict[fx.Node, str]) -> Any:
    if isinstance(arg, fx.Node):
        return names[arg]
    if isinstance(arg, torch.dtype):
        return str(arg)
    if arg is None or isinstance(arg, bool | int | float) or (isinstance(arg, str) and arg[:1].isalpha()):
        return arg
    raise GateError(f"it has an argument {arg!r}")


def _layout(lines: str) -> str:
    """The layout under which a part of the width gives that part of the result; raises GateError where there is none."""
    generator = torch.Generator().manual_seed(0)
    for layout in LAYOUTS:
        both = "c" in layout
        x = (torch.randn(3, _TRIAL * (2 if both else 1), generator=generator) * 3).double()
        try:
            whole = run_gate(f"{layout}|{lines}", x)
            parts = [run_gate(f"{layout}|{lines}", _half(x, layout, h)) for h in (0, 1)]
        except Exception:  # sizes that do not fit: another layout
            continue
        same = whole.shape == (3, _TRIAL) and torch.allclose(torch.cat(parts, 1), whole, rtol=1e-2, atol=1e-6)
        if same:  # vector code rounds otherwise at every length, and a program may round to bfloat16
            return layout
    raise GateError("it mixes columns")


def _half(x: Tensor, layout: str, half: int) -> Tensor:
    """One half of the width of an expert."""
    if layout == "c f":
        return torch.cat([c.chunk(2, 1)[half] for c in x.chunk(2, 1)], 1)
    return x.chunk(2, 1)[half]
