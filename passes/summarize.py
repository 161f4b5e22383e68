"""From the cleaned graph to the outline: rules, factors, regions, FLOPs, and what autograd saves. Torch ends here.

What an op saves is *observed*: it is run once per distinct signature on fake CPU tensors under `saved_tensors_hooks`
(meta tensors would take the math kernel of attention, fake CUDA tensors abort a CPU build).
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..errors import UnsupportedOp
from ..planner import rule_experts, rule_heads, rule_packed, rule_patches
from ..planner.factors import Classes, LetteredOp, Refined, classes, refine
from ..planner.microbatch import BatchCut, cut_batch
from ..planner.outline import Op, Outline, Parameter, Saved, Tensor, Use
from ..planner.placement import shape_of
from ..planner.regions import Node, find_regions
from ..planner.rule_types import Operand, RuleInstance
from ..planner.rules import instantiate
from .base import tensor_name
from .capture import Captured
from .observe import Observation, Observer


@dataclass(frozen=True)
class Call:
    """One op of the graph with its rule: what lowering needs to emit it on local shapes."""

    node: fx.Node
    operands: tuple[str, ...]
    results: tuple[str, ...]
    rule: RuleInstance


@dataclass(frozen=True)
class Summary:
    """The outline together with the graph nodes it came from."""

    captured: Captured
    outline: Outline
    calls: Mapping[str, Call]
    batch_cut: BatchCut
    inputs: Mapping[str, tuple[int, int] | None]
    discovered: Mapping[str, str]


HOLDING = {rule_patches.KIND: rule_patches.backward_of, rule_packed.KIND: rule_packed.backward_of}
"""FLOPs of the backward of ops that hold a program, by kind."""

Discover = Callable[[fx.Node], RuleInstance | None]


def summarize(
    captured: Captured, *, batch: int | None = None, discover: Discover | None = None, observer: Observer | None = None
) -> Summary:
    """Outline a captured graph. `batch` is the size of dim 0 of its inputs (inferred when None).

    `discover` finds rules for ops that have none; without it they raise UnsupportedOp. `observer` may know ops of it already.
    """
    values = _values(captured)
    calls, found = _calls(captured, values, discover)
    calls = _order(calls)
    shapes = {name: tuple(v.shape) for name, v in values.items()}
    refined = refine(shapes, [_lettered(c) for c in calls.values()])
    observer = observer or Observer()
    seen = {name: observer.observe(call.node) for name, call in calls.items()}
    size = batch if batch is not None else _batch_size(captured, values)
    ops, tensors = _assemble(captured, values, calls, refined, seen, size)
    inputs = {
        e.node: _batch_place(tensors[e.node], size) if e.role == "input" else None
        for e in captured.entries if e.node in tensors
    }  # fmt: skip
    cut = cut_batch(ops, tensors, inputs, captured.writes)
    outline = _outline(captured, ops, tensors, calls, size, cut)
    return Summary(captured, outline, calls, cut, inputs, found)


def _values(captured: Captured) -> dict[str, torch.Tensor]:
    """Every tensor of the graph by name; results of multi-output ops are `node:index`."""
    found: dict[str, torch.Tensor] = {}
    for node in captured.graph.graph.nodes:
        if node.op in ("output", "get_attr") or node.target is operator.getitem:
            continue
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            found[node.name] = value
        elif isinstance(value, tuple | list):
            found |= {f"{node.name}:{i}": v for i, v in enumerate(value) if isinstance(v, torch.Tensor)}
    return found


def target_name(target: Any) -> str:
    """The rule key of an op: "aten.linear" for every overload of aten::linear."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


def _calls(
    captured: Captured, values: Mapping[str, torch.Tensor], discover: Discover | None
) -> tuple[dict[str, Call], dict[str, str]]:
    found: dict[str, Call] = {}
    discovered: dict[str, str] = {}
    missing: list[str] = []
    for node in captured.graph.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        operands, args, kwargs = operands_of(node)
        results = tuple(n for n in (node.name, *(f"{node.name}:{i}" for i in range(_width(node)))) if n in values)
        rule = instantiate(
            target_name(node.target), args, kwargs,
            [tuple(values[o].shape) for o in operands], [tuple(values[r].shape) for r in results],
        )  # fmt: skip
        if rule is None and discover is not None:
            rule = discover(node)
            if rule is not None:
                discovered[node.name] = target_name(node.target)
        if rule is None:
            missing.append(f"{target_name(node.target)} at {node.meta.get('source', node.name)}")
            continue
        found[node.name] = Call(node, operands, results, rule)
    if missing:
        lines = "\n".join(f"  - {m}" for m in dict.fromkeys(missing))
        raise UnsupportedOp(f"no rule for these ops; add a line for each to planner/rule_lines.py:\n{lines}")
    return found, discovered


def _width(node: fx.Node) -> int:
    value = node.meta["val"]
    return len(value) if isinstance(value, tuple | list) else 0


def operands_of(node: fx.Node) -> tuple[tuple[str, ...], tuple[Any, ...], dict[str, Any]]:
    """Tensor operands in order of appearance, and the arguments with `Operand(i)` in their places."""
    names: list[str] = []

    def mark(arg: fx.Node) -> Operand:
        names.append(tensor_name(arg))
        return Operand(len(names) - 1)

    args = fx.map_arg(node.args, mark)
    kwargs = fx.map_arg(node.kwargs, mark)
    return tuple(names), tuple(args), dict(kwargs)  # type: ignore[arg-type]


def _order(calls: dict[str, Call]) -> dict[str, Call]:
    """Ops no gradient flows through first, so that what layers share stands before the first layer.

    What reads nothing (a fill) and serves later ops alone stands before the first of them: every layer may have its own.
    """
    late: set[str] = set()
    wanted: set[str] = set()
    early: dict[str, Call] = {}
    rest: dict[str, Call] = {}
    for name, call in calls.items():
        grad = call.node.meta["differentiable"]
        if any(o in late for o in call.operands) or (any(grad) if isinstance(grad, tuple | list) else grad):
            late.update(call.results)
            rest[name] = call
        else:
            wanted.update(call.operands)
            early[name] = call
    makers = {
        result: name
        for name, call in early.items() if not call.operands and wanted.isdisjoint(call.results)
        for result in call.results
    }  # fmt: skip
    placed: dict[str, Call] = {}
    for name, call in rest.items():
        mine = dict.fromkeys(makers[o] for o in call.operands if o in makers)
        placed |= {maker: early.pop(maker) for maker in mine if maker in early}
        placed[name] = call
    return early | placed


def _lettered(call: Call) -> LetteredOp:
    rule = call.rule
    uses = [*zip(call.operands, rule.operands, strict=True), *zip(call.results, rule.results, strict=True)]
    return LetteredOp(call.node.name, tuple(uses), rule.sizes, rule.never, rule.implementation)


def _batch_size(captured: Captured, values: Mapping[str, torch.Tensor]) -> int:
    sizes = [values[e.node].shape[0] for e in captured.entries if e.role == "input" and values[e.node].dim() > 0]
    return Counter(sizes).most_common(1)[0][0] if sizes else 1


def _batch_place(tensor: Tensor, batch: int) -> tuple[int, int] | None:
    """An input whose dim 0 has the batch's size carries the batch there."""
    if tensor.dims and tensor.dims[0] and tensor.dims[0][0] == batch and len(tensor.dims[0]) == 1 and batch > 1:
        return 0, 0
    return None


def _assemble(
    captured: Captured, values: Mapping[str, torch.Tensor], calls: Mapping[str, Call], refined: Refined,
    seen: Mapping[str, Observation], batch: int,
) -> tuple[tuple[Op, ...], dict[str, Tensor]]:  # fmt: skip
    tensors = _tensors(captured, values, calls, refined, seen, _reaching(captured))
    groups = classes(refined)
    batches = {
        groups.find((e.node, 0, 0))
        for e in captured.entries
        if e.role == "input" and e.node in tensors and _batch_place(tensors[e.node], batch)
    }
    weighted = _weighted(calls, tensors, groups)
    ops = tuple(_op(call, refined, tensors, seen[name], groups, batches, weighted) for name, call in calls.items())
    return ops, tensors


def _reaching(captured: Captured) -> frozenset[str] | None:
    """Nodes that a gradient of the loss comes back to; None for a graph without loss.

    A trained parameter that none reaches (used under no_grad only, or for other outputs) has no gradient in eager either.
    """
    if not captured.loss:
        return None
    found: set[str] = set()
    queue = [captured.graph.graph.output_node().args[0][0]]  # type: ignore[index]
    while queue:
        node = queue.pop()
        flags = node.meta["differentiable"]
        if node.name not in found and (any(flags) if isinstance(flags, tuple | list) else flags):
            found.add(node.name)
            queue.extend(node.all_input_nodes)
    return frozenset(found)


def _tensors(captured, values, calls, refined, seen, reaching) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    found: dict[str, Tensor] = {}
    for entry in captured.entries:
        value = values[entry.node]
        grad = entry.trainable and (reaching is None or entry.node in reaching)
        found[entry.node] = Tensor(entry.node, refined.dims[entry.node], _dtype(value), entry.role, grad, entry.node)
    for name, call in calls.items():
        grad = call.node.meta["differentiable"]
        flags = grad if isinstance(grad, tuple | list) else (grad,)
        if reaching is not None and name not in reaching:
            flags = (False,) * len(flags)
        for index, result in enumerate(call.results):
            alias = seen[name].alias
            root = found[call.operands[alias]].storage if alias is not None else result
            place = int(result.rsplit(":", 1)[1]) if ":" in result else index
            found[result] = Tensor(
                result, refined.dims[result], _dtype(values[result]), "activation", bool(flags[place]), root
            )
    return found


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _weighted(calls: Mapping[str, Call], tensors: Mapping[str, Tensor], groups: Classes) -> set[tuple[str, int, int]]:
    """Classes of factors that stand in the weight of a projection or in an embedding table."""
    found: set[tuple[str, int, int]] = set()
    for call in calls.values():
        if call.rule.kind not in ("matmul", "conv", "embedding", "experts", rule_heads.KIND, *HOLDING):
            continue
        for operand in call.operands:
            root = tensors[tensors[operand].storage]
            if root.role == "parameter":
                for dim, members in enumerate(tensors[operand].dims):
                    found.update(groups.find((operand, dim, i)) for i in range(len(members)))
    return found


def _op(call, refined, tensors, seen, groups, batches, weighted) -> Op:  # type: ignore[no-untyped-def]
    name, rule = call.node.name, call.rule
    uses: tuple[Use, ...] = refined.uses[name]
    operands, results = uses[: len(call.operands)], uses[len(call.operands) :]
    place = {f: (use.tensor, d, i) for use in uses for d, m in enumerate(use.factors) for i, f in enumerate(m)}
    factors = []
    for index, factor in enumerate(refined.factors[name]):
        group = groups.find(place[index]) if index in place else None
        factors.append(replace(factor, batch=group in batches, token=group is not None and group not in weighted))
    weights = [o for o in call.operands if tensors[tensors[o].storage].role == "parameter"]
    backward = rule.backward_flops if any(tensors[r].differentiable for r in call.results) else 0.0
    if rule.kind == "matmul" and backward:
        # Each matmul's backward is one matmul of the same size per operand that takes a gradient.
        backward = rule.flops * sum(tensors[o].differentiable for o in call.operands[:2])
    if rule.kind == "experts" and backward:
        shapes = [shape_of(tensors[o].dims) for o in call.operands]
        backward = rule_experts.backward_flops(shapes, [tensors[o].differentiable for o in call.operands])
    forward = rule.flops
    if rule.kind == rule_heads.KIND:  # the gradients are made with the loss
        made = rule_heads.products([tensors[o].differentiable for o in call.operands]) if backward else (0,)
        forward, backward = rule.flops * len(made), 0.0
        saved = rule_heads.saved(operands, tensors, seen.new)
    else:
        saved = _saved(seen, refined.factors[name], results, rule.kind)
    program, grid = "", (1, 1)
    if rule.kind == rule_patches.KIND:
        program, grid = rule_patches.detail(call.node.args)
    if rule.kind == rule_packed.KIND:
        program = call.node.args[rule_packed.PROGRAM]
        saved = (*(s for s in saved if s.source != "new"), *rule_packed.saved(refined.factors[name], seen.new))
    if rule.kind in HOLDING and backward:
        shapes = [shape_of(tensors[o].dims) for o in call.operands]
        flowing = [tensors[o].differentiable for o in call.operands]
        backward = HOLDING[rule.kind](call.node.args, shapes, flowing)
    return Op(
        name, target_name(call.node.target), rule.kind, operands, results, tuple(factors), rule.linear, forward, backward, saved,
        projection=(rule.kind in ("matmul", "conv") and len(weights) == 1) or (rule.kind == "experts" and bool(weights)),
        source=str(call.node.meta.get("source", "")), program=program, grid=grid,
    )  # fmt: skip


def _saved(seen: Observation, factors, results: tuple[Use, ...], kind: str) -> tuple[Saved, ...]:  # type: ignore[no-untyped-def]
    """Observed tensors as operand, result or new; a new one scales with the result's factors it can be matched to."""
    found = [Saved("operand", i) for i in seen.operands] + [Saved("result", i) for i in seen.results]
    order = [f for use in results[:1] for members in use.factors for f in members]
    order += [i for i in range(len(factors)) if i not in order]
    for shape, bytes_ in seen.new:
        if kind == "experts":
            found.append(Saved("new", 0, rule_experts.saved_factors(factors, len(shape)), bytes_))
            continue
        left, scales = 1, []
        for size in shape:
            left *= size
        for f in order:
            if left > 1 and left % factors[f].size == 0 and factors[f].size > 1:
                scales.append(f)
                left //= factors[f].size
        found.append(Saved("new", 0, tuple(scales), bytes_))
    return tuple(found)


def _outline(captured, ops, tensors, calls, batch, cut: BatchCut) -> Outline:  # type: ignore[no-untyped-def]
    parameters = [e for e in captured.entries if e.role == "parameter"]
    nodes = []
    for op in ops:
        call = calls[op.name]
        sizes = tuple(tensors[r].elements for r in call.results)
        nodes.append(Node(op.name, signature(call, tensors), call.operands, call.results, sizes))
    given = [e.node for e in captured.entries if e.role in ("buffer", "constant")]
    regions = find_regions(nodes, [e.node for e in parameters], given)
    text = "\n".join(f"{n.name} {n.signature} {n.operands} {n.results}" for n in nodes)
    # One plan serves float32, float64 (verification) and mixed precision: floating dtypes do not tell graphs apart.
    text = re.sub(r"b?float(16|32|64)", "float", text)
    names = "\n".join(f"{e.node} {e.role} {e.fqn} {tensors[e.node].dims}" for e in captured.entries)
    tokens = batch
    for entry in captured.entries:
        shape = shape_of(tensors[entry.node].dims)
        if entry.role == "input" and len(shape) == 2 and tensors[entry.node].dtype.startswith("int"):
            tokens = shape[0] * shape[1]
            break
    return Outline(
        tensors, ops, regions,
        tuple(Parameter((e.fqn, *e.aliases), e.node, tensors[e.node].differentiable) for e in parameters),
        tuple(e.node for e in captured.entries if e.role == "input"),
        captured.loss, tuple(o for o in captured.outputs if o != captured.loss), batch, tokens,
        hashlib.sha256(f"{names}\n{text}".encode()).hexdigest()[:16], cut.blockers, tuple(captured.notes),
        writes=tuple(captured.writes.values()),
    )  # fmt: skip


def signature(call: Call, tensors: Mapping[str, Tensor]) -> str:
    """Two ops with one signature do the same work on tensors of the same factors."""
    _, args, kwargs = operands_of(call.node)
    sides = [(tensors[o].dims, tensors[o].dtype, tensors[o].role, tensors[o].differentiable) for o in call.operands]
    return f"{target_name(call.node.target)}|{args}|{sorted(kwargs.items(), key=str)}|{sides}"
