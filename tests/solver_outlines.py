"""Outlines and prices written by hand for the solver's tests: a small transformer, and random graphs of a few ops."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from shardwright.planner.outline import Factor, Op, Outline, Parameter, Region, Saved, Tensor, Use
from shardwright.planner.plan import Precision, Source

FP32 = Precision("fp32", "float32", "float32", "float32", "float32")
SOURCE = Source("module", "test", 8)


@dataclass(frozen=True)
class FakePrice:
    seconds: float
    source: str = "modelled"
    error: float = 0.1


@dataclass
class FakePrices:
    """Seconds from sizes by arbitrary but fixed factors; `seed` changes the factors of every op and collective."""

    seed: int = 0
    byte: float = 1e-9
    latency: float = 1e-6
    _factors: dict[str, float] = field(default_factory=dict)

    def factor(self, name: str) -> float:
        if name not in self._factors:
            self._factors[name] = random.Random(f"{self.seed}{name}").uniform(0.5, 2.0)
        return self._factors[name]

    def op(self, op: Op, local_sizes: tuple[int, ...], tensors: Mapping[str, Tensor]) -> tuple[FakePrice, FakePrice]:
        share = math.prod(local_sizes) / math.prod(f.size for f in op.factors) if op.factors else 1.0
        work = (op.flops * share + 10.0) * 1e-8 * self.factor(op.target)
        back = op.backward_flops * share * 1e-8
        return FakePrice(work), FakePrice(back)

    def collective(self, name: str, full_bytes: float, stride: int, size: int) -> FakePrice:
        if size == 1:
            return FakePrice(0.0)
        weight = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0 / size}[name]
        moved = weight * full_bytes * (size - 1) / size
        return FakePrice(self.latency + moved * self.byte * self.factor(f"{name}{stride}"))

    def copy(self, bytes_read: float) -> FakePrice:
        return FakePrice(1e-8 + bytes_read * self.byte * 0.05)

    def optimizer_seconds(self, elements: float, optimizer: str, precision: Precision) -> float:
        return elements * self.byte * 2


class Builder:
    """Collects tensors and ops; dims of tensors are written as factor sizes."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.ops: list[Op] = []

    def tensor(self, name: str, dims, role: str = "activation", grad: bool = True, dtype: str = "float32") -> str:
        self.tensors[name] = Tensor(name, tuple(tuple(d) for d in dims), dtype, role, grad, name)
        return name

    def op(self, name: str, kind: str, uses, results, factors, **more) -> None:
        """`uses`/`results`: (tensor, per dim a string of one-letter factors); `factors`: letter -> Factor arguments."""
        letters = list(factors)
        found = tuple(Factor(c, **spec) if isinstance(spec, dict) else Factor(c, spec) for c, spec in factors.items())

        def side(items) -> tuple[Use, ...]:
            return tuple(Use(t, tuple(tuple(letters.index(c) for c in d) for d in dims)) for t, dims in items)

        work = math.prod(f.size for f in found)
        more.setdefault("flops", float(2 * work if kind == "matmul" else work))
        grad = any(self.tensors[t].differentiable for t, _ in results)
        more.setdefault("backward_flops", 2 * more["flops"] if grad else 0.0)
        target = more.pop("target", f"aten.{kind}")
        self.ops.append(Op(name, target, kind, side(uses), side(results), found, **more))


def transformer(
    layers: int = 2, batch: int = 8, seq: int = 16, hidden: int = 32, heads: int = 4, vocab: int = 64
) -> Outline:
    """Embedding, `layers` pre-norm blocks (attention, mlp), tied head and a summed loss divided by a count."""
    b, s, h = batch, seq, hidden
    e = h // heads
    make = Builder()
    token = {"size": s, "token": True}
    sample = {"size": b, "batch": True, "token": True}
    make.tensor("ids", [[b], [s]], "input", False, "int64")
    make.tensor("labels", [[b], [s]], "input", False, "int64")
    make.tensor("wte", [[vocab], [heads, e]], "parameter")
    make.tensor("x0", [[b], [s], [heads, e]])
    head, part = heads, e
    make.op("embed", "embedding", [("ids", ["b", "s"]), ("wte", ["v", "he"])], [("x0", ["b", "s", "he"])],
            {"b": sample, "s": token, "v": {"size": vocab, "split": "vocab_embedding"}, "h": head, "e": part},
            saved=(Saved("operand", 0),), flops=float(b * s * h), linear=((1,),))  # fmt: skip
    instances, parameters, x = [], [], "x0"
    for k in range(layers):
        start = len(make.ops)
        x = _layer(make, k, x, sample, token, b, s, heads, e)
        instances.append(tuple(op.name for op in make.ops[start:]))
        parameters.append(tuple(f"l{k}.{n}" for n in ("n1", "q", "o", "n2", "up", "down")))
    start = len(make.ops)
    rows = {"b": sample, "s": token}
    make.tensor("logits", [[b], [s], [vocab]])
    make.op("head", "matmul", [(x, ["b", "s", "he"]), ("wte", ["v", "he"])], [("logits", ["b", "s", "v"])],
            rows | {"h": head, "e": part, "v": vocab}, projection=True, linear=((0,), (1,)), target="aten.linear",
            saved=(Saved("operand", 0), Saved("operand", 1)))  # fmt: skip
    make.tensor("total", [])
    make.op("loss", "loss", [("logits", ["b", "s", "v"]), ("labels", ["b", "s"])], [("total", [])],
            rows | {"v": {"size": vocab, "split": "vocab_loss"}},
            saved=(Saved("operand", 1), Saved("new", 0, (0, 1, 2), b * s * vocab * 4)))  # fmt: skip
    make.tensor("mask", [[b], [s]], grad=False, dtype="bool")
    make.op("ne", "elementwise", [("labels", ["b", "s"])], [("mask", ["b", "s"])], rows)
    make.tensor("count", [], grad=False)
    make.op("count", "reduction", [("mask", ["b", "s"])], [("count", [])], rows, linear=((0,),))
    make.tensor("mean", [])
    make.op(
        "div",
        "elementwise",
        [("total", []), ("count", [])],
        [("mean", [])],
        {},
        linear=((0,),),
        saved=(Saved("operand", 1),),
    )
    regions = (
        Region("r0", (("embed",),), (("wte",),)),
        Region("r1", tuple(instances), tuple(parameters)),
        Region("r2", (tuple(op.name for op in make.ops[start:]),), ((),)),
    )
    names = [n for n, t in make.tensors.items() if t.role == "parameter"]
    found = tuple(Parameter((n,), n, True) for n in names)
    return Outline(
        make.tensors, tuple(make.ops), regions, found, ("ids", "labels"), "mean", (), b, b * s, f"t{layers}{b}{s}{h}"
    )


def _layer(make: Builder, k: int, x: str, sample, token, b: int, s: int, heads: int, e: int) -> str:
    h = [heads, e]
    f = 4 * heads * e
    rows = {"b": sample, "s": token}
    cols = {"h": {"size": heads}, "e": {"size": e}}
    fixed = {"h": {"size": heads, "split": "never"}, "e": {"size": e, "split": "never"}}
    t = lambda n, dims: make.tensor(f"l{k}.{n}", dims)  # noqa: E731
    p = lambda n, dims: make.tensor(f"l{k}.{n}", dims, "parameter")  # noqa: E731

    def norm(name: str, source: str) -> str:
        p(name, [h])
        t(f"{name}y", [[b], [s], h])
        make.op(f"l{k}.norm_{name}", "norm", [(source, ["b", "s", "he"]), (f"l{k}.{name}", ["he"])],
                [(f"l{k}.{name}y", ["b", "s", "he"])], rows | fixed, target="aten.rms_norm",
                saved=(Saved("operand", 0), Saved("operand", 1), Saved("new", 0, (0, 1), b * s * 4)))  # fmt: skip
        return f"l{k}.{name}y"

    def linear(name: str, source: str, spelled: str, inner, out: str, outer, result) -> str:
        p(name, [[i["size"] for i in outer.values()], [i["size"] for i in inner.values()]])
        t(f"{name}y", result)
        make.op(f"l{k}.lin_{name}", "matmul", [(source, ["b", "s", spelled]), (f"l{k}.{name}", [out, spelled])],
                [(f"l{k}.{name}y", ["b", "s", out])], rows | inner | outer, projection=True, linear=((0,), (1,)),
                target="aten.linear", saved=(Saved("operand", 0), Saved("operand", 1)))  # fmt: skip
        return f"l{k}.{name}y"

    def add(name: str, left: str, right: str) -> str:
        t(name, [[b], [s], h])
        make.op(f"l{k}.add_{name}", "elementwise", [(left, ["b", "s", "he"]), (right, ["b", "s", "he"])],
                [(f"l{k}.{name}", ["b", "s", "he"])], rows | cols, linear=((0, 1),), target="aten.add")  # fmt: skip
        return f"l{k}.{name}"

    q = linear("q", norm("n1", x), "he", cols, "gd", {"g": {"size": heads}, "d": {"size": e}}, [[b], [s], h])
    t("a", [[b], [s], h])
    make.op(f"l{k}.attn", "attention", [(q, ["b", "s", "ge"])], [(f"l{k}.a", ["b", "s", "ge"])],
            rows | {"s": token | {"split": "never"}, "g": {"size": heads}, "e": {"size": e, "split": "never"}},
            saved=(Saved("operand", 0), Saved("result", 0)), flops=float(4 * b * s * s * heads * e))  # fmt: skip
    o = linear("o", f"l{k}.a", "he", cols, "gd", {"g": {"size": heads}, "d": {"size": e}}, [[b], [s], h])
    y = add("r1", x, o)
    up = linear("up", norm("n2", y), "he", cols, "f", {"f": {"size": f}}, [[b], [s], [f]])
    t("g", [[b], [s], [f]])
    make.op(f"l{k}.gelu", "elementwise", [(up, ["b", "s", "f"])], [(f"l{k}.g", ["b", "s", "f"])],
            rows | {"f": {"size": f}}, target="aten.gelu", saved=(Saved("operand", 0),))  # fmt: skip
    down = linear("down", f"l{k}.g", "f", {"f": {"size": f}}, "he", cols, [[b], [s], h])
    return add("r2", y, down)


__all__ = ["FP32", "SOURCE", "Builder", "FakePrices", "replace", "transformer"]
