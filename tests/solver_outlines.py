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
BOTH = (Saved("operand", 0), Saved("operand", 1))


@dataclass(frozen=True)
class FakePrice:
    seconds: float
    source: str = "modelled"
    error: float = 0.1
    issue_seconds: float = 0.0


@dataclass
class FakePrices:
    """Seconds from sizes by arbitrary but fixed factors; `seed` changes the factors of every op and collective."""

    seed: int = 0
    byte: float = 1e-9
    latency: float = 1e-6
    pieces: bool = False
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


class Blocks(Builder):
    """The pieces of a language model over [batch, token, (heads width)] that both outlines are made of."""

    def __init__(self, batch: int, seq: int, heads: int, width: int) -> None:
        super().__init__()
        self.token = {"size": seq, "token": True}
        self.sample = {"size": batch, "batch": True, "token": True}
        self.rows = {"b": self.sample, "s": self.token}
        self.cols = {"h": {"size": heads}, "e": {"size": width}}
        self.projected = {"g": {"size": heads}, "d": {"size": width}}
        self.lead, self.hidden, self.places = [[batch], [seq]], [heads, width], batch * seq

    def inputs(self) -> None:
        for name in ("ids", "labels"):
            self.tensor(name, self.lead, "input", False, "int64")

    def embedding(self, result: str, vocab: int, **more) -> None:
        self.tensor("wte", [[vocab], self.hidden], "parameter")
        self.tensor(result, [*self.lead, self.hidden])
        self.op("embed", "embedding", [("ids", ["b", "s"]), ("wte", ["v", "he"])], [(result, ["b", "s", "he"])],
                {**self.rows, "v": {"size": vocab, "split": "vocab_embedding"}, **self.cols},
                saved=(Saved("operand", 0),), linear=((1,),), **more)  # fmt: skip

    def norm(self, name: str, weight: str, result: str, x: str) -> str:
        self.tensor(weight, [self.hidden], "parameter")
        self.tensor(result, [*self.lead, self.hidden])
        fixed = {c: spec | {"split": "never"} for c, spec in self.cols.items()}
        self.op(name, "norm", [(x, ["b", "s", "he"]), (weight, ["he"])], [(result, ["b", "s", "he"])],
                self.rows | fixed, target="aten.rms_norm",
                saved=(*BOTH, Saved("new", 0, (0, 1), self.places * 4)))  # fmt: skip
        return result

    def linear(self, name: str, weight: str, result: str, x: str, spelled: str, inner, out: str, outer) -> str:
        """A product of `x` (its last dim `spelled`, of factors `inner`) and a new weight, to a dim `out` of `outer`."""
        sizes = [[i["size"] for i in side.values()] for side in (outer, inner)]
        self.tensor(weight, sizes, "parameter")
        self.tensor(result, [*self.lead, sizes[0]])
        self.product(name, weight, result, x, spelled, inner, out, outer)
        return result

    def product(self, name: str, weight: str, result: str, x: str, spelled: str, inner, out: str, outer) -> None:
        self.op(name, "matmul", [(x, ["b", "s", spelled]), (weight, [out, spelled])], [(result, ["b", "s", out])],
                self.rows | inner | outer, projection=True, linear=((0,), (1,)), target="aten.linear", saved=BOTH)  # fmt: skip

    def add(self, name: str, result: str, left: str, right: str) -> str:
        self.tensor(result, [*self.lead, self.hidden])
        self.op(name, "elementwise", [(left, ["b", "s", "he"]), (right, ["b", "s", "he"])], [(result, ["b", "s", "he"])],
                self.rows | self.cols, linear=((0, 1),), target="aten.add")  # fmt: skip
        return result

    def wide(self, name: str, target: str, result: str, x: str, size: int) -> str:
        """The activation between the two products of an MLP."""
        self.tensor(result, [*self.lead, [size]])
        self.op(name, "elementwise", [(x, ["b", "s", "f"])], [(result, ["b", "s", "f"])],
                self.rows | {"f": {"size": size}}, target=target, saved=(Saved("operand", 0),))  # fmt: skip
        return result

    def mean_loss(self, logits: str, vocab: int) -> None:
        """A summed loss, divided by the number of labels that count."""
        self.tensor("total", [])
        self.op("loss", "loss", [(logits, ["b", "s", "v"]), ("labels", ["b", "s"])], [("total", [])],
                self.rows | {"v": {"size": vocab, "split": "vocab_loss"}},
                saved=(Saved("operand", 1), Saved("new", 0, (0, 1, 2), self.places * vocab * 4)))  # fmt: skip
        self.tensor("valid", self.lead, grad=False, dtype="bool")
        self.op("ne", "elementwise", [("labels", ["b", "s"])], [("valid", ["b", "s"])], self.rows)
        self.tensor("count", [], grad=False)
        self.op("sum", "reduction", [("valid", ["b", "s"])], [("count", [])], self.rows, linear=((0,),))
        self.tensor("mean", [])
        self.op("div", "elementwise", [("total", []), ("count", [])], [("mean", [])], {}, linear=((0,),),
                saved=(Saved("operand", 1),))  # fmt: skip

    def outline(self, regions: tuple[Region, ...], fingerprint: str) -> Outline:
        names = [n for n, t in self.tensors.items() if t.role == "parameter"]
        found = tuple(Parameter((n,), n, True) for n in names)
        batch = self.sample["size"]
        return Outline(self.tensors, tuple(self.ops), regions, found, ("ids", "labels"), "mean", (), batch,
                       self.places, fingerprint)  # fmt: skip


def transformer(
    layers: int = 2, batch: int = 8, seq: int = 16, hidden: int = 32, heads: int = 4, vocab: int = 64
) -> Outline:
    """Embedding, `layers` pre-norm blocks (attention, mlp), tied head and a summed loss divided by a count."""
    make = Blocks(batch, seq, heads, hidden // heads)
    make.inputs()
    make.embedding("x0", vocab, flops=float(batch * seq * hidden))
    instances, parameters, x = [], [], "x0"
    for k in range(layers):
        start = len(make.ops)
        x = _layer(make, k, x)
        instances.append(tuple(op.name for op in make.ops[start:]))
        parameters.append(tuple(f"l{k}.{n}" for n in ("n1", "q", "o", "n2", "up", "down")))
    start = len(make.ops)
    make.tensor("logits", [*make.lead, [vocab]])
    make.product("head", "wte", "logits", x, "he", make.cols, "v", {"v": {"size": vocab}})
    make.mean_loss("logits", vocab)
    regions = (
        Region("r0", (("embed",),), (("wte",),)),
        Region("r1", tuple(instances), tuple(parameters)),
        Region("r2", (tuple(op.name for op in make.ops[start:]),), ((),)),
    )
    return make.outline(regions, f"t{layers}{batch}{seq}{hidden}")


def _layer(make: Blocks, k: int, x: str) -> str:
    heads, e = make.hidden
    wide = {"f": {"size": 4 * heads * e}}

    def norm(name: str, source: str) -> str:
        return make.norm(f"l{k}.norm_{name}", f"l{k}.{name}", f"l{k}.{name}y", source)

    def linear(name: str, source: str, spelled: str, inner, out: str, outer) -> str:
        return make.linear(f"l{k}.lin_{name}", f"l{k}.{name}", f"l{k}.{name}y", source, spelled, inner, out, outer)

    q = linear("q", norm("n1", x), "he", make.cols, "gd", make.projected)
    make.tensor(f"l{k}.a", [*make.lead, make.hidden])
    make.op(f"l{k}.attn", "attention", [(q, ["b", "s", "ge"])], [(f"l{k}.a", ["b", "s", "ge"])],
            make.rows | {"s": make.token | {"split": "never"}, "g": {"size": heads}, "e": {"size": e, "split": "never"}},
            saved=(Saved("operand", 0), Saved("result", 0)),
            flops=float(4 * make.places * make.token["size"] * heads * e))  # fmt: skip
    o = linear("o", f"l{k}.a", "he", make.cols, "gd", make.projected)
    y = make.add(f"l{k}.add_r1", f"l{k}.r1", x, o)
    up = linear("up", norm("n2", y), "he", make.cols, "f", wide)
    g = make.wide(f"l{k}.gelu", "aten.gelu", f"l{k}.g", up, 4 * heads * e)
    return make.add(f"l{k}.add_r2", f"l{k}.r2", y, linear("down", g, "f", wide, "he", make.cols))


__all__ = ["BOTH", "FP32", "SOURCE", "Blocks", "Builder", "FakePrices", "replace", "transformer"]
