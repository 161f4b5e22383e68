"""What the backward pass of a graph keeps for the update of each parameter: what a sparse update chooses from.

An op is observed once for every operand that a gradient may flow on to: for several it keeps what it keeps for each. (A frozen
weight's input is not kept, nor is anything below the deepest parameter that is updated; planner and runtime go by
`requires_grad`.)
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import torch
from torch import fx, nn

from ..errors import UsageError
from ..planner.plan import Plan
from ..planner.precision import state_bytes
from ..planner.sparse import Backward, Candidate, Kept, UpdateSet, choose
from .base import tensor_name
from .capture import capture
from .choose import listed, run
from .gradients import flows
from .kept import HELD, own
from .observe import SMALL, Observer
from .skeleton import skeleton, to_meta
from .summarize import operands_of


def choose_parameters(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], budget_bytes: int, plan: Callable[[], Plan],
    contribution: Mapping[str, float], loss_fn: Callable[..., Any] | None = None,
) -> UpdateSet:  # fmt: skip
    """The parameters of `model` to update (planner/sparse.py), each worth its `contribution` by name.

    `plan` makes a plan of the model as it stands; the model is left as it was. Raises UsageError where a name is that of no
    trained parameter.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    unknown = sorted(set(contribution) - set(trained))
    if unknown:
        raise UsageError(f"contribution: {unknown[0]!r} is no parameter that requires a gradient")
    whole, observer = plan(), Observer()
    captured = capture(skeleton(model), to_meta(args), to_meta(dict(kwargs)), loss_fn=loss_fn)
    captured = run(captured, listed(whole), observer)
    state = state_bytes(whole.precision, whole.optimizer)
    nodes = {e.fqn: e.node for e in captured.entries if e.role == "parameter" and e.fqn in contribution}
    candidates = {
        name: Candidate(float(contribution[name]), trained[name].numel() * (state.total - state.parameter))
        for name in nodes
    }
    backward = backward_of(captured.graph.graph, observer, {node: name for name, node in nodes.items()})

    def peak(chosen: frozenset[str]) -> int:
        with _trained(trained, chosen):
            return plan().predicted.peak_bytes_per_device

    return choose(candidates, backward, budget_bytes, peak)


def squared_gradients(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], loss_of: Callable[[Any], torch.Tensor]
) -> dict[str, float]:
    """By how much a small step along each gradient lowers the loss of these samples, per unit of the learning rate: |g|^2.

    Takes a whole backward pass. Gradients that are there are left alone.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if any(p.is_meta for p in named.values()):
        raise UsageError("the model has no values on the meta device: pass contribution=, a number for every parameter")
    found = torch.autograd.grad(loss_of(model(*args, **kwargs)), list(named.values()), allow_unused=True)
    return {
        name: float(g.detach().double().square().sum()) if g is not None else 0.0
        for name, g in zip(named, found, strict=True)
    }


@contextmanager
def _trained(parameters: Mapping[str, nn.Parameter], names: frozenset[str]) -> Iterator[None]:
    """With a gradient for `names` alone among `parameters`."""
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def backward_of(graph: fx.Graph, observer: Observer, names: Mapping[str, str]) -> Backward:
    """The backward pass of a captured graph in which every parameter that may be updated is marked as trained.

    `names` are those of parameters, by their placeholders. The bytes kept for a set of them are those that `kept_bytes` (kept.py)
    counts where no others are trained.
    """
    root: dict[str, str] = {}
    sizes: dict[str, int] = {}
    found: dict[str, tuple[str, ...]] = {}
    reasons: dict[str, set[str]] = defaultdict(set)
    made: list[Kept] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            own(node, root, sizes)
            sizes |= {node.name: 0} if node.meta["role"] in HELD else {}
        elif node.op == "call_function" and tensor_name(node) == node.name:
            operands, results = operands_of(node)[0], own(node, root, sizes)
            causes = tuple(dict.fromkeys(tensor_name(n) for n in node.all_input_nodes if flows(n)))
            told = {cause: names.get(cause, cause) for cause in causes}
            found |= dict.fromkeys(_with_gradient(node), tuple(told.values()))
            alias = observer.observe(node).alias
            if alias is not None:
                root |= dict.fromkeys(results, root[operands[alias]])
            for cause in causes:
                with _only(node, {cause}):
                    seen = observer.observe(node)
                for name in (*(operands[i] for i in seen.operands), *(results[i] for i in seen.results)):
                    reasons[root[name]].add(told[cause])
            new = _new_bytes(node, causes, observer)
            made += [Kept(size, frozenset(told[c] for c in why)) for why, size in new.items() if size]
    return Backward(found, [*(Kept(sizes[n], frozenset(why)) for n, why in reasons.items() if sizes[n] > SMALL), *made])


def _with_gradient(node: fx.Node) -> list[str]:
    """The results of a call that a gradient may flow through."""
    flags = node.meta["differentiable"]
    if isinstance(flags, tuple):
        return [f"{node.name}:{i}" for i, flag in enumerate(flags) if flag]
    return [node.name] if flags else []


MANY = 4
"""Operands with gradients of which every set is tried; for more, what is kept for all is taken to be kept for each."""


def _new_bytes(node: fx.Node, causes: Sequence[str], observer: Observer) -> dict[frozenset[str], int]:
    """Bytes w by set T of operands such that for any set S, what an op keeps of its own is the sum of w over the T that S meets.

    With f the bytes seen for a set and U' the operands not in U, f(S) = F(all) - F(S') where F(U) = f(all) - f(U') is the sum of
    w over the T within U; so w follows from F by inclusion and exclusion.
    """

    def seen(some: Iterable[str]) -> int:
        with _only(node, set(some)):
            return sum(size for _, size in observer.observe(node).new)

    every = frozenset(causes)
    if not every:
        return {}
    whole = seen(every)
    if (not whole and len(every) == 1) or len(every) > MANY:
        return {every: whole}
    sets = [frozenset(some) for n in range(len(every) + 1) for some in combinations(causes, n)]
    within = {some: whole - (seen(every - some) if some != every else 0) for some in sets}
    return {
        some: sum((-1) ** (len(some) - len(part)) * within[part] for part in sets if part <= some) for some in sets if some
    }  # fmt: skip


@contextmanager
def _only(node: fx.Node, causes: Collection[str]) -> Iterator[None]:
    """With `causes` as the only operands of a call that have a gradient."""
    holders = {n.args[0] if n.target is operator.getitem else n for n in node.all_input_nodes}
    before = {holder: holder.meta.get("differentiable", False) for holder in holders if isinstance(holder, fx.Node)}
    try:
        for holder, flags in before.items():
            several = isinstance(flags, tuple)
            holder.meta["differentiable"] = (
                tuple(f"{holder.name}:{i}" in causes for i in range(len(flags))) if several else holder.name in causes
            )
        yield
    finally:
        for holder, flags in before.items():
            holder.meta["differentiable"] = flags
