"""A projection and its loss as one op: what is rewritten, values and gradients, bytes, and what is left alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager import run
from fusing import drawn_seeds
from shardwright.errors import UsageError
from shardwright.passes.capture import Captured, capture
from shardwright.passes.checked import Verifying
from shardwright.passes.fuse.head_loss import FuseHeadLoss
from shardwright.passes.heads.op import linear_cross_entropy
from shardwright.passes.lift import exact
from shardwright.passes.pattern import target_of
from shardwright.passes.rewrite import rewritten
from shardwright.passes.verify import verify_rule
from shardwright.planner import rule_heads
from shardwright.runtime.monitor import measure_peak
from test_rules import instance
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

TARGET = "shardwright.linear_cross_entropy"


def fused(captured: Captured, **options: Any) -> Captured:
    """The graph after the pass, which must have changed neither values nor gradients."""
    step = FuseHeadLoss(**options)
    after = rewritten(captured, [step], weigh=Verifying(captured.constants))
    verdict = after.records[-1].verdict
    assert verdict is None or verdict.stays, verdict
    return after


def heads(captured: Captured) -> list[Any]:
    return [n for n in captured.graph.graph.nodes if target_of(n) == TARGET]


# -- the op


class Products(TorchDispatchMode):
    """Counts products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return func(*args, **(kwargs or {}))


def operands(rows: int = 10, k: int = 6, classes: int = 12, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((rows, k), (classes, k), (classes,))]
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[::4] = -100
    return [x.to(dtype).requires_grad_() for x in found] + [target]


def eager(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    logits = F.linear(x, weight) * 0.5 + bias
    logits = 3.0 * torch.tanh(logits / 3.0)
    wide = logits.float() if logits.dtype == torch.bfloat16 else logits
    return F.cross_entropy(wide, target, reduction="sum", label_smoothing=smoothing)


def op(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, smoothing: float = 0.0, chunk: int = 0) -> Tensor:
    return linear_cross_entropy(x, weight, target, bias, "mul 0.5;bias;div 3.0;tanh;mul 3.0", -100, smoothing, chunk)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [0, 1, 3, 7, 10, 99])
def test_value_and_gradients_are_those_of_eager(chunk: int, smoothing: float) -> None:
    *wanted, target = operands()
    one, other = eager(*wanted, target, smoothing), op(*wanted, target, smoothing, chunk)
    assert torch.allclose(one, other, rtol=0, atol=1e-12)
    expected = torch.autograd.grad(one * 3, wanted)
    for _ in range(2):  # a graph that is kept is read again
        found = torch.autograd.grad(other * 3, wanted, retain_graph=True)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(expected, found, strict=True))
    found = torch.autograd.grad(other * 3, wanted)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(expected, found, strict=True))


def test_half_precision_is_normalised_and_summed_in_float32() -> None:
    *wanted, target = operands(64, 16, 40, torch.bfloat16)
    one, other = eager(*wanted, target), op(*wanted, target, chunk=8)
    assert other.dtype == torch.float32
    assert torch.equal(one, other) or abs(one.item() - other.item()) < 1e-4 * one.item()
    exact = torch.autograd.grad(eager(*(x.double() for x in wanted), target), wanted)
    error = [max(((a - b).double().norm() / b.double().norm()).item() for a, b in zip(found, exact, strict=True))
             for found in (torch.autograd.grad(other, wanted), torch.autograd.grad(one, wanted))]  # fmt: skip
    assert error[0] < 1.5 * error[1]


def test_casts_are_made_where_the_model_makes_them() -> None:
    x, weight, _, target = operands()
    for steps, form in (
        ("to float32", lambda z: z.float()),
        ("mul 3.0;to bfloat16;tanh", lambda z: (3 * z).bfloat16().tanh()),
    ):
        one = F.cross_entropy(form(F.linear(x, weight)), target, reduction="sum")
        other = linear_cross_entropy(x, weight, target, None, steps, chunk=4)
        assert other.dtype == torch.float32
        assert torch.allclose(one.float(), other, rtol=1e-6 if one.dtype == torch.float32 else 1e-2)
        pairs = zip(*(torch.autograd.grad(loss, (x, weight)) for loss in (one, other)), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6 if one.dtype == torch.float32 else 5e-2) for a, b in pairs)


def test_products_are_those_whose_gradient_is_wanted() -> None:
    *wanted, target = operands()

    def count(*flags: bool) -> int:
        given = [x.detach().requires_grad_(flag) for x, flag in zip(wanted, flags, strict=True)]
        with Products() as products:
            loss = op(*given, target, chunk=5)
            if any(flags):
                loss.backward()
        return products.count

    assert count(True, True, True) == 6
    assert count(True, False, False) == 4
    assert count(False, True, True) == 4
    assert count(False, False, False) == 2
    with torch.no_grad(), Products() as products:
        op(*wanted, target, chunk=5)
    assert products.count == 2


def test_a_gradient_of_one_costs_no_pass_and_another_is_scaled_in_place() -> None:
    kept: list[Tensor] = []
    for factor in (1.0, 2.0):
        kept.clear()
        *wanted, target = operands()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = op(*wanted, target)
        versions = [t._version for t in kept]
        found = torch.autograd.grad(loss, wanted, torch.tensor(factor, dtype=torch.float64))
        assert [g.data_ptr() for g in found] == [t.data_ptr() for t in kept]
        assert [t._version - before for t, before in zip(kept, versions, strict=True)] == [int(factor != 1)] * 3


def test_second_derivatives_and_wrong_calls_are_refused() -> None:
    *wanted, target = operands()
    with pytest.raises(UsageError, match="second derivative"):
        torch.autograd.grad(op(*wanted, target), wanted[0], create_graph=True)
    x, weight, bias = wanted
    with pytest.raises(UsageError, match="no step 'cube'"):
        linear_cross_entropy(x, weight, target, None, "cube")
    with pytest.raises(UsageError, match="bias"):
        linear_cross_entropy(x, weight, target, bias)
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x, weight, torch.full_like(target, 12))


def test_all_rows_ignored_and_no_rows() -> None:
    *wanted, target = operands()
    loss = op(*wanted, torch.full_like(target, -100), smoothing=0.1, chunk=4)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, wanted))
    x, weight, bias = wanted
    none = op(x[:0], weight, bias, target[:0])
    assert none.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(none, wanted))


def test_compiled() -> None:
    *wanted, target = operands()
    step = torch.compile(lambda *given: op(*given, chunk=4) * 2, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(step(*wanted, target), wanted)
    expected = torch.autograd.grad(eager(*wanted, target) * 2, wanted)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_logits_than_a_chunk_are_made(dtype: torch.dtype) -> None:
    rows, k, classes = 4096, 32, 8192
    *wanted, target = operands(rows, k, classes, dtype)
    name, width = str(dtype).removeprefix("torch."), wanted[0].element_size()
    chunk = rule_heads.chunk_rows(rows, classes, k, name)
    assert chunk * classes * 4 <= max(rule_heads.CHUNK_BYTES, 1024 * classes * 4)

    def step(of: Callable[..., Tensor]) -> int:
        return measure_peak(lambda: torch.autograd.grad(of(*wanted[:2], target), wanted[:2])).bytes

    peak = step(lambda x, w, t: linear_cross_entropy(x, w, t))
    plain = step(lambda x, w, t: F.cross_entropy(F.linear(x, w).float(), t, reduction="sum"))
    kept = (rows * k + classes * k) * width
    inside = chunk * classes * (8 if width == 4 else 10) + (4 * classes * k if width == 2 else 0)
    assert plain > 2 * rows * classes * 4
    assert peak < 1.02 * (inside + 2 * kept)
    assert peak < 0.25 * plain


# -- the rule


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_rule_is_true_of_the_op(seed: int, smoothing: float) -> None:
    *wanted, target = operands(8, 6, 4)
    args, kwargs = (*wanted[:2], target), {"label_smoothing": smoothing, "chunk": seed}
    if seed % 2:
        kwargs |= {"bias": wanted[2], "steps": "bias;mul 2.0"}
    found = instance(linear_cross_entropy, args, kwargs)
    assert found is not None
    assert found.free() == ("b",)
    assert found.implementation == {"v": "vocab_head"}
    assert "k" in found.never
    assert found.linear == ()
    assert verify_rule(linear_cross_entropy, args, kwargs, found, seed=seed) == []


# -- random graphs


STEPS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "mul": lambda z, c: c * z,
    "div": lambda z, c: z / c,
    "tanh": lambda z, c: torch.tanh(z),
    "cap": lambda z, c: c * torch.tanh(z / c),
    "bias": lambda z, bias: bias + z,
    "wide": lambda z, c: (z.float() * 2).double(),
}


class Body(nn.Module):
    """Layers, a projection to classes in a random form, what stands between it and a random loss."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.b, self.s, self.k, self.v = draw.randint(1, 4), draw.randint(2, 7), draw.randint(2, 9), draw.randint(3, 17)
        self.table = nn.Embedding(self.v, self.k)
        self.layers = nn.ModuleList(nn.Linear(self.k, self.k) for _ in range(draw.randint(0, 2)))
        self.form = draw.choice(("linear", "biased", "matmul", "transposed", "tied"))
        self.weight = nn.Parameter(torch.randn((self.k, self.v) if self.form == "matmul" else (self.v, self.k)))
        self.bias = nn.Parameter(torch.randn(self.v))
        self.steps = [draw.choice(("mul", "div", "tanh", "cap", "bias", "wide")) for _ in range(draw.randint(0, 3))]
        if self.form == "biased" or self.steps.count("bias") > 1:
            self.steps = [s for s in self.steps if s != "bias"]
        self.numbers = [draw.choice((0.5, 2.0, 3, 0.0625)) for _ in self.steps]
        self.shape = draw.choice(("flat", "shifted", "classes second", "no batch"))
        self.smoothing = draw.choice((0.0, 0.0, 0.1))
        self.loss = draw.choice(("mean", "sum", "log"))
        self.ignore = draw.choice((-100, 0, self.v - 1))
        if draw.random() < 0.2:
            self.weight.requires_grad_(False)

    def project(self, h: Tensor) -> Tensor:
        if self.form == "matmul":
            return h @ self.weight
        if self.form == "transposed":
            return torch.matmul(h, self.weight.t())
        weight = self.table.weight if self.form == "tied" else self.weight
        return F.linear(h, weight, self.bias if self.form == "biased" else None)

    def logits(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        for layer in self.layers:
            h = h + torch.sin(layer(h))
        z = self.project(h)
        for step, c in zip(self.steps, self.numbers, strict=True):
            z = STEPS[step](z, self.bias if step == "bias" else c)
        return z

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.logits(ids)
        z, t = logits, labels
        if self.shape == "shifted":
            z, t = z[:, :-1], t[:, 1:]
        if self.shape == "no batch":
            z, t = z[0], t[0]
        z, t = (z.transpose(1, 2), t) if self.shape == "classes second" else (z.reshape(-1, self.v), t.reshape(-1))
        if self.loss == "log":
            loss = F.nll_loss(F.log_softmax(z, 1), t, ignore_index=self.ignore)
        else:
            loss = F.cross_entropy(z, t, ignore_index=self.ignore, reduction=self.loss, label_smoothing=self.smoothing)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("seed", drawn_seeds(40))
def test_random_graphs(seed: int) -> None:
    body = Body(seed).double()
    ids = torch.randint(0, body.v, (body.b, body.s))
    labels = torch.randint(0, body.v, (body.b, body.s))
    labels[:, 1] = body.v // 2  # a row that counts
    if body.ignore == -100:
        labels[:, 0] = -100
    before = capture(body, (ids, labels), lift_float64=True)
    after = fused(before, chunk=random.Random(seed).choice((0, 1, 3)))
    assert len(heads(after)) == 1
    assert not any(target_of(n) in ("aten.cross_entropy_loss", "aten.log_softmax") for n in after.graph.graph.nodes)
    assert len(after.outputs) == 1
    result = run(after, body, (ids, labels), {})
    with exact():
        expected = body(ids, labels)
    assert torch.allclose(result[after.loss], expected["loss"], rtol=0, atol=1e-10, equal_nan=True)
    wanted = [p for p in body.parameters() if p.requires_grad]
    pairs = (torch.autograd.grad(x, wanted, allow_unused=True) for x in (expected["loss"], result[after.loss]))
    for a, b in zip(*pairs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=0, atol=1e-10, equal_nan=True)
