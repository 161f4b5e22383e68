"""Each cleanup pass keeps what the model computes, and leaves the form that rules are written for."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from eager import check, family
from shardwright.errors import CaptureError, ShardwrightError
from shardwright.passes.base import Contract, Program, run_passes
from shardwright.passes.capture import Captured, capture
from shardwright.passes.cleanup import cleanup_passes
from shardwright.passes.constants import Known
from shardwright.passes.lift import exact, lift_casts, without_dropout
from test_capture import targets
from torch import fx, nn
from torch.nn import functional as F


class Body(nn.Module):
    """A linear layer, then a function of (hidden, x); the loss is the sum of its squares."""

    def __init__(self, body: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, 6)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.linear(x), x).square().sum()


def same(body: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Captured:
    """Capture and compare with eager."""
    torch.manual_seed(1)
    return check(Body(body), torch.randn(4, 6), loss=lambda out: out)


def add_in_place(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = h * 2
    y.add_(1).mul_(x)
    return y + h


def write_through_views(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(4, 6, dtype=h.dtype)
    y[:, 1:] = h[:, :-1]
    y[:, 0] = 3
    y[y > 2] = 0.5
    return y * h


def views_see_the_write(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = x * 1.5
    left, right = y.chunk(2, dim=1)
    flat = y.view(-1)
    right.mul_(2)
    left[0].add_(right[1])
    flat[3:5].neg_()
    z = h * 2
    row = z[1]
    z.view(24)[3:9].add_(y[0])
    return torch.cat([left, right], 1) * h + y.t().reshape(4, 6) + flat.view(4, 6) + row * z


def write_through_many(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = h + 1
    y.transpose(0, 1).unsqueeze(0).permute(2, 0, 1)[1].squeeze(0).mul_(3)
    y.diagonal().add_(1)
    z = x + 1
    z.unbind(1)[2].zero_()
    z.split([2, 4], dim=1)[1].fill_(0.25)
    z.t()[0].mul_(2)
    return y * h + z


def masked_and_indexed(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = h.clone()
    y.masked_fill_(x > 0, 0.1)
    y.index_put_((torch.tensor([0, 2]),), h[:2] * 2)
    y.copy_(y + h.sum(0))
    y /= 3
    F.relu(y, inplace=True)
    return y


def integers(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    ids = (x > 0).long()
    shifted = ids.new_zeros(ids.shape)
    shifted[:, 1:] = ids[:, :-1].clone()
    shifted[:, 0] = 7
    shifted.masked_fill_(shifted == 0, 2)
    return h * shifted


@pytest.mark.parametrize(
    "body", [add_in_place, write_through_views, views_see_the_write, write_through_many, masked_and_indexed, integers]
)
def test_in_place_ops(body: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    assert not any(t.rsplit(".", 1)[0].endswith("_") for t in targets(same(body)))


def no_grad_branch(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = h.abs().mean(-1, keepdim=True)
        with torch.enable_grad():
            live = h * scale
        dead = live * 2
    return h / scale + live + dead


def detach_branch(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return h * h.detach() + x.detach()


def no_grad_write(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = torch.ones(4, 6, dtype=h.dtype)
    with torch.no_grad():
        y[1:].mul_(h[1:])
        ids = x.argmax(-1)
    return h * y + ids[:, None]


@pytest.mark.parametrize(("body", "detached"), [(no_grad_branch, 3), (detach_branch, 1), (no_grad_write, 1)])
def test_no_grad_regions(body: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], detached: int) -> None:
    captured = same(body)
    assert 1 <= sum("detach" in t for t in targets(captured)) <= detached


def test_parameters_under_no_grad_get_no_gradient() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.one(x)
            return self.two(x).sum()

    captured = check(Half(), torch.randn(2, 4), loss=lambda out: out)
    assert not any("detach" in t and "p_one" in str(n.args) and n.meta["differentiable"] for n, t in _calls(captured))


def _calls(captured: Captured) -> list[tuple[torch.fx.Node, str]]:
    return [(n, str(n.target)) for n in captured.graph.graph.nodes if n.op == "call_function"]


def test_views_are_reshapes_and_no_ops_go() -> None:
    def body(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = h.view(2, 2, 6).flatten(0, 1).contiguous().to(h.dtype) + 0
        y = y[:, :].expand(4, 6).reshape(4, 6) * 1
        return F.dropout(y.unflatten(1, (2, 3)), 0.5, training=False)

    names = targets(same(body))
    assert names[:3] == ["aten.linear.default", "aten.add.Tensor", "aten.reshape.default"]
    assert len(names) == 5


def test_bias_is_split() -> None:
    def body(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(x[0], h, torch.ones(6, 6, dtype=h.dtype))

    names = targets(same(body))
    assert "aten.mm.default" in names
    assert "aten.addmm.default" not in names
    linear = next(n for n, t in _calls(same(body)) if t == "aten.linear.default")
    assert len(linear.args) == 2


def test_equal_calls_merge_but_random_ones_do_not() -> None:
    def body(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return h.cos() + h.cos() + F.dropout(h, 0.5) + F.dropout(h, 0.5) + torch.rand_like(h) * torch.rand_like(h)

    names = targets(capture(Body(body).double(), (torch.randn(4, 6).double(),)))
    assert names.count("aten.cos.default") == 1
    assert names.count("aten.dropout.default") == 2
    assert names.count("aten.rand_like.default") == 2


def test_fills_of_one_size_stay_apart() -> None:
    """With a batch as long as the sequence, zeros of samples by positions and of positions by positions are not one tensor."""

    def body(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        shifted = h.new_zeros(h.shape)
        shifted[:, 1:] = h[:, :-1]
        return shifted + torch.minimum(torch.zeros(4, 6, dtype=h.dtype), h)

    assert targets(same(body)).count("aten.full.default") == 2


def test_numbers_of_other_types_are_not_equal() -> None:
    def body(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ids = (x > 0).long()
        return h + (ids + 1) + (ids + 1.0) * h

    assert targets(same(body)).count("aten.add.Tensor") == 5


def test_constants_are_folded() -> None:
    def body(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(6).to(h.dtype) / 2
        fill = torch.zeros(4, 6, dtype=h.dtype).add(3).sqrt()
        return h * steps + fill + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=h.dtype)

    captured = same(body)
    assert [tuple(v.shape) for v in captured.constants.values()] == [(6,), (6,)]
    fills = [n for n, t in _calls(captured) if t == "aten.full.default"]
    assert len(fills) == 1
    assert not any("arange" in t for t in targets(captured))


def test_what_is_known_of_graphs_deeper_than_the_stack() -> None:
    graph = fx.Graph()
    first, other = graph.placeholder("constant"), graph.placeholder("x")
    ends = []
    for node in (first, other):
        node.meta["val"] = torch.empty(2, device="meta")
        for _ in range(2000):
            node = graph.call_function(torch.ops.aten.neg.default, (node,))
            node.meta["val"] = torch.empty(2, device="meta")
        ends.append(node)
    known = Known({"constant": torch.ones(2)}, 16)
    assert [known.independent(node) for node in ends] == [True, False]


def test_random_and_large_values_are_not_folded() -> None:
    def body(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        big = torch.arange(1 << 18).to(h.dtype).cumsum(0)
        return (h * torch.rand(6, dtype=h.dtype)).sum() * big

    captured = capture(Body(body).double(), (torch.randn(4, 6).double(),))
    assert any("rand" in t for t in targets(captured))
    assert any("arange" in t for t in targets(captured))


LOGITS, LABELS = (8, 6), torch.tensor([0, 5, -100, 2, 2, -100, 1, 3])


class Loss(nn.Module):
    def __init__(self, loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logits = nn.Parameter(torch.randn(LOGITS))
        self.loss = loss

    def forward(self) -> torch.Tensor:
        return self.loss(self.logits)


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0, 1.5]).double()
TARGET = torch.rand(LOGITS, generator=torch.Generator().manual_seed(3)).double()
LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cross entropy": lambda x: F.cross_entropy(x, LABELS),
    "other ignored label": lambda x: F.cross_entropy(x, LABELS.clamp(min=0), ignore_index=2),
    "label smoothing": lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1),
    "class weights": lambda x: F.cross_entropy(x, LABELS, weight=WEIGHT),
    "weights and smoothing": lambda x: F.cross_entropy(x, LABELS, weight=WEIGHT, label_smoothing=0.2),
    "probabilities": lambda x: F.cross_entropy(x, TARGET.softmax(-1)),
    "images": lambda x: F.cross_entropy(x.view(2, 2, 2, 6).permute(0, 3, 1, 2), LABELS.view(2, 2, 2)),
    "nll": lambda x: F.nll_loss(x.log_softmax(-1), LABELS),
    "mse": lambda x: F.mse_loss(x, TARGET),
    "l1": lambda x: F.l1_loss(x, TARGET),
    "smooth l1": lambda x: F.smooth_l1_loss(x, TARGET, beta=0.3),
    "huber": lambda x: F.huber_loss(x, TARGET, delta=0.3),
    "bce": lambda x: F.binary_cross_entropy(x.sigmoid(), TARGET),
    "bce with logits": lambda x: F.binary_cross_entropy_with_logits(x, TARGET, pos_weight=WEIGHT),
    "kl": lambda x: F.kl_div(x.log_softmax(-1), TARGET),
    "mean of everything": lambda x: x.square().mean(),
    "mean over the batch": lambda x: (x.square().mean(0) * x.mean((0, 1))).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_mean_losses_become_sums(name: str) -> None:
    captured = check(Loss(LOSSES[name]), loss=lambda out: out)
    names = targets(captured)
    assert "aten.div.Tensor" in names
    assert "aten.mean.default" not in names
    for node, target in _calls(captured):
        if "loss" in target or "cross_entropy" in target:
            reduction = [a.name for a in node.target._schema.arguments].index("reduction")
            assert node.args[reduction] == 2


def graph(captured: Captured, model: nn.Module) -> tuple[torch.Tensor, ...]:
    values = captured.values(model)
    return captured.graph(*[values[e.node] for e in captured.entries])


def test_all_labels_ignored_is_nan_like_eager() -> None:
    model = Loss(lambda x: F.cross_entropy(x, torch.full((8,), -100)))
    assert torch.isnan(graph(capture(model), model)[0])
    assert torch.isnan(model())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_do_not_overflow(dtype: torch.dtype) -> None:
    model = Loss(lambda x: F.cross_entropy(x.repeat(4096, 1) * 100, LABELS.clamp(min=0).repeat(4096))).to(dtype)
    (loss,) = graph(capture(model), model)
    assert loss.dtype is dtype
    assert abs(loss.item() / model.float()().item() - 1) < 0.01


def test_other_reductions_stay() -> None:
    names = targets(
        check(Loss(lambda x: x.square().mean(-1).sum() + F.mse_loss(x, TARGET, reduction="sum")), loss=lambda o: o)
    )
    assert "aten.mean.dim" in names
    assert "aten.div.Tensor" not in names


def test_casts_are_lifted_in_reference_and_capture() -> None:
    model, kwargs = family("llama")
    model.double()
    with exact():
        captured = capture(model, (), kwargs)
    assert not any(n.meta["val"].dtype is torch.float32 for n in captured.graph.graph.nodes if n.op != "output")
    with lift_casts():
        x = torch.ones(2, dtype=torch.float64)
        assert x.float().dtype is x.to(torch.float32).dtype is torch.float64
        assert F.softmax(x, -1, dtype=torch.float32).dtype is torch.float64
    assert torch.ones(2, dtype=torch.float64).float().dtype is torch.float32


def test_dropout_is_off_inside_only() -> None:
    x = torch.ones(1000)
    query = torch.randn(1, 1, 8, 4)
    with without_dropout():
        assert torch.equal(F.dropout(x, 0.5), x)
        assert torch.equal(nn.Dropout(0.5)(x), x)
        first = F.scaled_dot_product_attention(query, query, query, None, 0.5)
        assert torch.equal(first, F.scaled_dot_product_attention(query, query, query, dropout_p=0.0))
    assert not torch.equal(F.dropout(x, 0.5), x)


def test_runner_records_and_checks_order() -> None:
    model, kwargs = family("gpt2")
    seen = []
    captured = capture(model, (), kwargs, after=lambda name, program: seen.append((name, len(program.graph.nodes))))
    assert [r.name for r in captured.records] == [name for name, _ in seen]
    assert [r.after for r in captured.records] == [nodes for _, nodes in seen]
    assert "nodes" in str(captured.records[0])
    with pytest.raises(ShardwrightError, match="requires functional"):
        run_passes(cleanup_passes(), Program(torch.fx.Graph()))


def test_passes_are_values() -> None:
    assert cleanup_passes() == cleanup_passes()

    @dataclass(frozen=True)
    class Nothing(Contract):
        name: str = "nothing"

        def apply(self, program: Program) -> Program:
            return program

    program = Program(torch.fx.Graph())
    assert run_passes([Nothing()], program)[0] is program


def test_write_under_no_grad_to_a_tensor_with_gradient_is_refused() -> None:
    def body(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = h * 2
        with torch.no_grad():
            y.mul_(3)
        return y

    with pytest.raises(CaptureError, match="changed under no_grad"):
        capture(Body(body), (torch.randn(4, 6),))


VIEWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t.t(), lambda t: t[1:], lambda t: t[:, 1:], lambda t: t.view(-1) if t.is_contiguous() else t, lambda t: t[0],
    lambda t: t.unsqueeze(0), lambda t: t.squeeze(0), lambda t: t.transpose(0, -1), lambda t: t.flatten(0, -1),
    lambda t: t[..., ::2], lambda t: t.detach() if not t.requires_grad else t, lambda t: t.chunk(2, 0)[0],
    lambda t: t.unbind(0)[-1],
    lambda t: t.split(1, -1)[0], lambda t: t.narrow(0, 0, 1), lambda t: t.expand(t.shape), lambda t: t.contiguous(),
]  # fmt: skip
WRITES: list[Callable[[torch.Tensor], object]] = [
    lambda t: t.add_(1), lambda t: t.mul_(0.5), lambda t: t.zero_(), lambda t: t.fill_(0.3), lambda t: t.neg_(),
    lambda t: t.copy_(t.detach().clone() * 2 + 1), lambda t: t.clamp_(max=0.7), lambda t: t.masked_fill_(t.detach() > 0.2, 0.1),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_random_programs_of_views_and_writes(seed: int) -> None:
    """Views of one base, written and read in any order."""
    multiple = {11, 12, 13}  # eager refuses writes through these where a gradient flows

    def body(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        draw = random.Random(seed)
        live = seed % 2 == 0
        tensors = [(h if live else x) * 1.0]
        total = h.sum()
        for _ in range(14):
            kind, choice, tensor = draw.randrange(3), draw.randrange(1000), draw.choice(tensors)
            if kind == 0 and tensor.dim() == 2 and min(tensor.shape) > 1:
                index = choice % len(VIEWS)
                tensors.append(tensor if live and index in multiple else VIEWS[index](tensor))
            elif kind == 1:
                WRITES[choice % len(WRITES)](tensor)
            else:
                total = total + (tensor.clone() * h.sum()).cos().sum() if not live else total + tensor.sum()
        return total + sum(t.sum() for t in tensors)

    same(body)


def test_empty_parts_leave_a_concatenation() -> None:
    """Rotary models write the unrotated share of a head even where a head is rotated whole."""

    def rotated(h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((h[..., :6] * 2, h[..., 6:], x, x[..., 6:]), -1)

    found = same(rotated)
    assert not [t for t in targets(found) if "slice" in t]
