"""Outlines of decoders written by hand, for tests of attention: keys and values of their own, a rotary table, fused or eager."""

from __future__ import annotations

from dataclasses import dataclass

from shardwright.planner.outline import Outline, Region, Saved
from solver_outlines import BOTH, Blocks


@dataclass(frozen=True)
class Form:
    """Sizes and form of a decoder. `eager` writes attention as matmuls and a softmax; `groups` queries share a key head."""

    layers: int = 2
    batch: int = 4
    seq: int = 16
    heads: int = 4
    width: int = 8
    vocab: int = 64
    causal: bool = True
    eager: bool = False
    groups: int = 1
    shift: bool = False


def decoder(form: Form) -> Outline:
    """Embedding, layers (norm, rotary attention, gated MLP), head and a summed loss divided by a count."""
    make = _Decoder(form)
    first, instances, parameters = make.embed(), [], []
    x = first
    for k in range(form.layers):
        start = len(make.ops)
        x = make.layer(f"l{k}", x)
        instances.append(tuple(op.name for op in make.ops[start:]))
        parameters.append(tuple(f"l{k}.{n}" for n in ("n1", "wq", "wk", "wv", "wo", "n2", "wg", "wd")))
    start, before = len(make.ops), tuple(op.name for op in make.ops if not op.name.startswith("l"))
    make.head(x)
    last = tuple(op.name for op in make.ops[start:])
    regions = (
        Region("r0", (before,), (("wte",),)), Region("r1", tuple(instances), tuple(parameters)),
        Region("r2", (last,), (("wh",),)),
    )  # fmt: skip
    return make.outline(regions, str(form))


class _Decoder(Blocks):
    def __init__(self, form: Form) -> None:
        super().__init__(form.batch, form.seq, form.heads, form.width)
        self.form = form

    def embed(self) -> str:
        f = self.form
        self.inputs()
        self.tensor("places", [[f.seq]], "constant", False)
        self.tensor("cos", [[f.seq]], grad=False)
        self.op("rope", "elementwise", [("places", ["s"])], [("cos", ["s"])], {"s": self.token})
        self.embedding("x", f.vocab)
        return "x"

    def normed(self, at: str, x: str) -> str:
        return self.norm(f"{at}.norm", at, f"{at}.y", x)

    def projection(self, name: str, x: str, spelled: str, inner, out: str, outer) -> str:
        return self.linear(f"{name}.mm", name, f"{name}.y", x, spelled, inner, out, outer)

    def headed(self, name: str, x: str, heads: int, rotary: bool = True) -> str:
        """[b, s, (h e)] as [b, h, s, e], turned by the rotary table, repeated for its group of queries."""
        f = self.form
        f_rows = {"b": self.sample, "h": heads, "s": self.token, "e": f.width}
        y = self.tensor(f"{name}.h", [[f.batch], [heads], [f.seq], [f.width]])
        self.op(f"{name}.view", "view", [(x, ["b", "s", "he"])], [(y, ["b", "h", "s", "e"])], f_rows, linear=((0,),))
        if rotary:
            z = self.tensor(f"{name}.r", [[f.batch], [heads], [f.seq], [f.width]])
            self.op(f"{name}.turn", "elementwise", [(y, ["b", "h", "s", "e"]), ("cos", ["s"])], [(z, ["b", "h", "s", "e"])],
                    f_rows, linear=((0,),), target="aten.mul", saved=(Saved("operand", 1),))  # fmt: skip
            y = z
        if heads == f.heads:
            return y
        z = self.tensor(f"{name}.x", [[f.batch], [heads, f.groups], [f.seq], [f.width]])
        self.op(f"{name}.repeat", "view", [(y, ["b", "h", "s", "e"])], [(z, ["b", "hg", "s", "e"])],
                f_rows | {"g": f.groups}, linear=((0,),), target="aten.expand")  # fmt: skip
        return z

    def attention(self, at: str, x: str) -> str:
        f = self.form
        few = f.heads // f.groups
        less = {"g": {"size": few}, "d": {"size": f.width}}
        q = self.headed(f"{at}.q", self.projection(f"{at}.wq", x, "he", self.cols, "gd", self.projected), f.heads)
        k = self.headed(f"{at}.k", self.projection(f"{at}.wk", x, "he", self.cols, "gd", less), few)
        v = self.headed(f"{at}.v", self.projection(f"{at}.wv", x, "he", self.cols, "gd", less), few, rotary=False)
        a = self.tensor(f"{at}.a", [[f.batch], [f.heads], [f.seq], [f.width]])
        (self.eager if f.eager else self.fused)(at, q, k, v, a)
        y = self.tensor(f"{at}.ay", [*self.lead, self.hidden])
        self.op(
            f"{at}.back",
            "view",
            [(a, ["b", "h", "s", "e"])],
            [(y, ["b", "s", "he"])],
            self.rows | self.cols,
            linear=((0,),),
        )
        return self.projection(f"{at}.wo", y, "he", self.cols, "gd", self.projected)

    def heads(self) -> tuple[str, dict[str, int]]:
        """The heads of attention as it sees them, spelled and with sizes: in groups where keys are shared."""
        f = self.form
        if f.groups == 1:
            return "h", {"h": f.heads}
        return "ug", {"u": f.heads // f.groups, "g": f.groups}

    def fused(self, at: str, q: str, k: str, v: str, a: str) -> None:
        f = self.form
        if f.groups > 1:  # queries and results as (u g), like the repeated keys
            for name in (q, a):
                self.tensors[name] = type(self.tensors[name])(
                    name,
                    ((f.batch,), (f.heads // f.groups, f.groups), (f.seq,), (f.width,)),
                    "float32",
                    "activation",
                    True,
                    name,
                )
        h, heads = self.heads()
        never = {"split": "never"}
        work = 4.0 * f.batch * f.heads * f.seq**2 * f.width * (0.5 if f.causal else 1.0)
        rows = tuple(range(len(heads) + 2))
        kept = (*BOTH, Saved("operand", 2), Saved("result", 0), Saved("new", 0, rows, 4 * f.batch * f.heads * f.seq))
        self.op(f"{at}.attn", "attention", [(q, ["b", h, "s", "k"]), (k, ["b", h, "t", "k"]), (v, ["b", h, "t", "e"])],
                [(a, ["b", h, "s", "e"])],
                {"b": self.sample, **heads, "s": self.token | (never if f.causal else {}), "k": never | {"size": f.width},
                 "t": self.token | never, "e": f.width},
                flops=work, backward_flops=2.5 * work, target="aten.scaled_dot_product_attention", saved=kept)  # fmt: skip

    def eager(self, at: str, q: str, k: str, v: str, a: str) -> None:
        f = self.form
        square = {"b": self.sample, "h": f.heads, "s": self.token, "t": self.token}
        dims, shape = ["b", "h", "s", "t"], [[f.batch], [f.heads], [f.seq], [f.seq]]
        for name in ("scores", "masked", "soft"):
            self.tensor(f"{at}.{name}", shape)
        if "mask" not in self.tensors:
            self.tensor("mask", [[f.seq], [f.seq]], "constant", False)
        self.op(f"{at}.qk", "matmul", [(q, ["b", "h", "s", "k"]), (k, ["b", "h", "t", "k"])], [(f"{at}.scores", dims)],
                square | {"k": f.width}, linear=((0,), (1,)), saved=BOTH)  # fmt: skip
        self.op(
            f"{at}.add", "elementwise", [(f"{at}.scores", dims), ("mask", ["s", "t"])], [(f"{at}.masked", dims)], square
        )
        self.op(f"{at}.softmax", "norm", [(f"{at}.masked", dims)], [(f"{at}.soft", dims)],
                square | {"t": self.token | {"split": "never"}}, saved=(Saved("result", 0),))  # fmt: skip
        self.op(f"{at}.pv", "matmul", [(f"{at}.soft", dims), (v, ["b", "h", "t", "e"])], [(a, ["b", "h", "s", "e"])],
                square | {"e": f.width}, linear=((0,), (1,)), saved=BOTH)  # fmt: skip

    def layer(self, at: str, x: str) -> str:
        attended = self.attention(at, self.normed(f"{at}.n1", x))
        y = self.add(f"{at}.mid.add", f"{at}.mid", x, attended)
        size = 4 * self.form.heads * self.form.width
        inner = {"f": {"size": size}}
        up = self.projection(f"{at}.wg", self.normed(f"{at}.n2", y), "he", self.cols, "f", inner)
        down = self.projection(
            f"{at}.wd", self.wide(f"{at}.silu", "aten.silu", f"{at}.s", up, size), "f", inner, "he", self.cols
        )
        return self.add(f"{at}.out.add", f"{at}.out", y, down)

    def head(self, x: str) -> None:
        f = self.form
        if f.shift:  # positions rolled by one: they meet without attention
            self.tensor("rolled", [*self.lead, self.hidden])
            self.op("roll", "other", [(x, ["b", "s", "he"])], [("rolled", ["b", "s", "he"])],
                    self.rows | {"s": self.token | {"split": "never"}} | self.cols, target="aten.roll")  # fmt: skip
            x = "rolled"
        logits = self.projection("wh", x, "he", self.cols, "v", {"v": {"size": f.vocab}})
        self.mean_loss(logits, f.vocab)
