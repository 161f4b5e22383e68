"""Timing of single ops at local shapes, forward and backward, the way a training step runs them.

A request says what to call without holding tensors, so that it can be sent to other processes and filed: the op, per
operand its local shape, dtype and whether a gradient flows into it, and the plain arguments with `Operand(i)` where
operand i goes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..planner.prices import OpRow
from ..planner.rule_types import Operand
from ..planner.work import OpKey
from .failures import KIND, UNSUPPORTED, failure, key_of
from .progress import Tell, untold
from .timing import Timing, agree, device, spread_mean, time_call

SECONDS_PER_OP = 0.04
"""Time spent on one direction of one op, warm-up excluded."""
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class OpRequest:
    """One op to time. `operands` are (local shape, dtype, differentiable); `args` and `kwargs` are its local arguments.

    `arguments` is the canonical text of the op's unsplit plain arguments (`argument_text`): prices look rows up by it.
    `called` is the op that runs in its place where there is one; `args` and `kwargs` are its own then, and the operand after
    the last is a seed.
    """

    target: str
    operands: tuple[tuple[tuple[int, ...], str, bool], ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    arguments: str = ""
    called: str = ""

    @property
    def key(self) -> OpKey:
        """What the row of this request is filed under."""
        return OpKey(self.target, self.operands, self.arguments)


def argument_text(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The canonical text of plain arguments (tensors as `Operand` markers); "" where a value has none."""
    try:
        return json.dumps(
            [encode(list(args)), {k: encode(v) for k, v in sorted(kwargs.items())}], separators=(",", ":")
        )
    except TypeError:
        return ""


def key_text(key: OpKey) -> str:
    """An OpKey as one line, for the store."""
    return json.dumps([key.target, key.operands, key.arguments], separators=(",", ":"))


def parse_key(text: str) -> OpKey:
    """The inverse of `key_text`."""
    target, operands, arguments = json.loads(text)
    return OpKey(target, tuple((tuple(shape), dtype, bool(grad)) for shape, dtype, grad in operands), arguments)


def encode_request(request: OpRequest) -> list[Any] | None:
    """A request as JSON values, or None when its arguments cannot be sent."""
    try:
        kwargs = {k: encode(v) for k, v in request.kwargs.items()}
        return [request.target, request.operands, encode(list(request.args)), kwargs, request.arguments, request.called]
    except TypeError:
        return None


def decode_request(data: Sequence[Any]) -> OpRequest:
    """The inverse of `encode_request`."""
    target, operands, args, kwargs, arguments, called = data
    shapes = tuple((tuple(shape), dtype, bool(grad)) for shape, dtype, grad in operands)
    return OpRequest(target, shapes, tuple(decode(args)), {k: decode(v) for k, v in kwargs.items()}, arguments, called)


def time_requests(requests: Iterable[OpRequest], budget_seconds: float, tell: Tell = untold) -> dict[OpKey, OpRow]:
    """Time requests in order, then again, until the budget is spent; `tell` hears of rows, and why there is none.

    Of up to `ROUNDS` times of an op the quickest counts: a machine that others use has slow spells of seconds, and an op is
    timed within a fraction of one. Called on every rank of a measurement: ranks time one op at the same moment and their means
    are returned everywhere.
    """
    rows: dict[OpKey, OpRow] = {}
    spent = 0.0
    asked = list({request.key: request for request in requests}.values())
    for turn in range(ROUNDS):
        for request in asked:
            if spent >= budget_seconds or (turn and request.key not in rows):
                continue
            begin = time.perf_counter()
            name = key_text(request.key)
            tell("begin", "op", name)
            timed = _time_request(request)
            spent += agree(time.perf_counter() - begin)
            if not isinstance(timed, OpRow):
                tell(KIND, key_of("op", name), timed)
                continue
            row = rows[request.key] = _quicker(rows.get(request.key, timed), timed)
            tell("op", name, (row.forward, row.backward, row.error))
    return rows


def _quicker(a: OpRow, b: OpRow) -> OpRow:
    return OpRow(min(a.forward, b.forward), min(a.backward, b.backward), min(a.error, b.error))


def _time_request(request: OpRequest) -> OpRow | dict[str, str]:
    """The row of one op; the failure where it fails on any rank."""
    call, grads, why = None, False, {"type": UNSUPPORTED, "message": "it failed on another rank"}
    try:
        call, grads = _prepare(request)
    except (
        Exception
    ) as error:  # whatever a custom op raises on made-up inputs: it stays unmeasured, its price is modelled
        why = failure(error)
    if agree(0.0 if call is not None else 1.0) > 0.0 or call is None:
        return why
    forward, backward = call
    ahead = time_call(forward, SECONDS_PER_OP)
    back = time_call(backward, SECONDS_PER_OP) if grads else Timing(0.0, 0.0)
    spread = max(ahead.spread, back.spread)
    return OpRow(spread_mean(ahead.seconds), spread_mean(back.seconds), round(spread, 3))


def _prepare(request: OpRequest) -> tuple[tuple[Callable[[], object], Callable[[], object]], bool]:
    """(forward, backward) as calls without arguments, both run once; whether there is a backward."""
    target = resolve(request.called or request.target)
    operands = [*(_tensor(request, i) for i in range(len(request.operands))), torch.zeros((), dtype=torch.int64)]
    args = [filled(a, operands) for a in request.args]
    kwargs = {k: filled(v, operands) for k, v in request.kwargs.items()}
    result = target(*args, **kwargs)
    outputs = [r for r in (result if isinstance(result, tuple | list) else (result,)) if isinstance(r, torch.Tensor)]
    ends = [r for r in outputs if r.requires_grad]
    wanted = [t for t in operands if t.requires_grad]
    incoming = [torch.ones_like(r) for r in ends]

    def forward() -> object:
        return target(*args, **kwargs)

    def backward() -> object:
        return torch.autograd.grad(ends, wanted, incoming, retain_graph=True, allow_unused=True)

    if ends and wanted:
        backward()
    return (forward, backward), bool(ends and wanted)


def resolve(target: str) -> Any:
    """The callable of a rule key such as "aten.linear"; raises AttributeError for what torch.ops does not have."""
    found: Any = torch.ops
    for part in target.split("."):
        found = getattr(found, part)
    return found


def _tensor(request: OpRequest, index: int) -> torch.Tensor:
    """A contiguous tensor for an operand: floats in (0.1, 1), integers that are valid as indices and labels."""
    shape, name, grad = request.operands[index]
    dtype = getattr(torch, name)
    if dtype.is_floating_point:
        return (torch.rand(shape, device=device()) * 0.9 + 0.1).to(dtype).requires_grad_(grad)
    if dtype == torch.bool:
        return torch.rand(shape, device=device()) < 0.5
    return torch.randint(0, _bound(request), shape, dtype=dtype, device=device())


def _bound(request: OpRequest) -> int:
    """An upper end for made-up integers: rows of the table, classes of the logits, else the smallest size around."""
    first = next((s for s, dtype, _ in request.operands if "float" in dtype), ())
    if "embedding" in request.target and first:
        return max(1, first[0])
    if "loss" in request.target and first:
        return max(1, first[1] if len(first) > 1 else first[0])
    return max(1, min((size for shape, dtype, _ in request.operands if "float" in dtype for size in shape), default=2))


def filled(value: Any, operands: Sequence[torch.Tensor] | Mapping[int, torch.Tensor]) -> Any:
    """Arguments with tensors where their `Operand` marks stand."""
    if isinstance(value, Operand):
        return operands[value.index]
    if isinstance(value, list | tuple):
        return [filled(v, operands) for v in value]
    return value


def encode(value: Any) -> Any:
    """Plain values as JSON; operands, dtypes and devices as one-entry objects. TypeError for anything else."""
    if isinstance(value, Operand):
        return {"operand": value.index}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"no JSON for {type(value).__name__}")


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "operand":
        return Operand(content)
    return getattr(torch, content) if kind == "dtype" else torch.device(content)
