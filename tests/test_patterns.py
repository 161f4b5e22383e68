"""The matcher, rewrites as tables, and the runner that judges passes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from eager import family
from shardwright.errors import PinError, ShardwrightError
from shardwright.passes.base import Contract, Program, run_passes
from shardwright.passes.capture import Captured, capture
from shardwright.passes.checked import Verifying, difference, inputs_of, outcome
from shardwright.passes.choose import Choice, asked, chosen, run
from shardwright.passes.fuse import PASSES
from shardwright.passes.gain import Paying
from shardwright.passes.pattern import Any_, Near, Number, call, casts, either, find
from shardwright.passes.printing import listing
from shardwright.passes.rewrite import Make, Rewriting, Row, rewritten
from shardwright.planner.pins import parse_pins
from shardwright.planner.prices import Prices
from shardwright.profiles.devices import parse_cluster
from torch import fx, nn

X, Y = Any_("x"), Any_("y")
aten = torch.ops.aten


class Body(nn.Module):
    """A function as a module with one trained parameter, so that gradients flow."""

    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(6, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x * self.weight).sum()


def captured(function, shape: tuple[int, ...] = (4, 6)) -> Captured:  # type: ignore[no-untyped-def]
    return capture(Body(function), (torch.randn(shape, dtype=torch.float64),))


def found(pattern, function):  # type: ignore[no-untyped-def]
    """The first match in a graph, of its last node on."""
    nodes = reversed(list(captured(function).graph.graph.nodes))
    return next((m for n in nodes if (m := find(pattern, n)) is not None), None)


GATE = call("aten.mul", call("aten.silu", X), Y)


@pytest.mark.parametrize(
    ("pattern", "function", "wanted"),
    [
        (GATE, lambda h: torch.nn.functional.silu(h) * h.exp(), True),
        (GATE, lambda h: h.exp() * torch.nn.functional.silu(h), True),  # either order
        (GATE, lambda h: (lambda s: s * h.exp() + s)(torch.nn.functional.silu(h)), False),  # a second user
        (GATE, lambda h: torch.nn.functional.silu(h) + h.exp(), False),
        (call("aten.mul", call("aten.exp", X), X), lambda h: h.exp() * h, True),  # one name, one node
        (call("aten.mul", call("aten.exp", X), X), lambda h: h.exp() * h.sin(), False),
        (call("aten.mul", X, Near(0.5)), lambda h: h * 0.50000000001, True),
        (call("aten.mul", X, Near(0.5)), lambda h: h * 0.5000001, False),
        (call("aten.mul", X, Number("n")), lambda h: h * 3, True),
        (call("aten.sum", X, [-1], True), lambda h: h.sum(-1, keepdim=True), True),
        (call("aten.sum", X, [-1]), lambda h: h.sum(-1, keepdim=True), False),  # an argument that is not the default
        (call("aten.sum", X, [-1], open=True), lambda h: h.sum(-1, keepdim=True), True),
        (either(call("aten.cos", X), call("aten.sin", X)), torch.sin, True),
        (call("aten.cat", [X, Y], -1), lambda h: torch.cat([h.cos(), h.sin()], -1), True),
        (call("aten.cat", [X, Y], -1), lambda h: torch.cat([h.cos(), h.sin(), h], -1), False),
        (call("aten.exp", casts(call("aten.sin", X))), lambda h: h.sin().float().exp(), True),
        (call("aten.exp", casts(call("aten.sin", X))), lambda h: h.sin().cos().exp(), False),
    ],
)
def test_matching(pattern, function, wanted: bool) -> None:  # type: ignore[no-untyped-def]
    assert (found(pattern, function) is not None) == wanted


def test_a_match_says_what_it_covers() -> None:
    match = found(GATE, lambda h: torch.nn.functional.silu(h) * h.exp())
    assert {str(n.target) for n in match.nodes} == {"aten.mul.Tensor", "aten.silu.default"}
    assert str(match["x"].target) == "aten.mul.Tensor"
    assert str(match["y"].target) == "aten.exp.default"
    assert match.get("z") is None


def _wrong(match, make: Make) -> fx.Node:  # type: ignore[no-untyped-def]
    return make(aten.silu.default, match["x"])


@dataclass(frozen=True)
class Wrong(Rewriting):
    """Turns GELU into SiLU."""

    name: str = "wrong"
    table: tuple[Row, ...] = (Row(call("aten.gelu", X), _wrong),)


@dataclass(frozen=True)
class Shrinks(Rewriting):
    """Makes a value of another shape."""

    name: str = "shrinks"
    table: tuple[Row, ...] = (Row(call("aten.gelu", X), lambda m, make: make(aten.sum.default, m["x"])),)


def test_a_pass_that_changes_the_function_is_taken_back_and_named() -> None:
    one = captured(nn.functional.gelu)
    after = rewritten(one, [Wrong()], weigh=Verifying(one.constants))
    record = after.records[-1]
    assert record.verdict is not None
    assert not record.verdict.stays
    assert record.verdict.why.startswith("wrong changes output 0 by")
    assert "taken back" in str(record)
    assert [str(n.target) for n in after.graph.graph.nodes] == [str(n.target) for n in one.graph.graph.nodes]
    unchecked = rewritten(one, [Wrong()])
    values = inputs_of(one.graph.graph, 1)
    assert difference(outcome(one.graph.graph, values), outcome(unchecked.graph.graph, values))


def test_a_pass_may_not_change_shapes() -> None:
    with pytest.raises(ShardwrightError, match=r"aten.sum.default makes .* in the place of gelu"):
        rewritten(captured(nn.functional.gelu), [Shrinks()])


@dataclass(frozen=True)
class First(Contract):
    name: str = "first"
    conflicts: tuple[str, ...] = ("second",)

    def apply(self, program: Program) -> Program:
        return program


@dataclass(frozen=True)
class Second(First):
    name: str = "second"
    conflicts: tuple[str, ...] = ()


@pytest.mark.parametrize("order", [(First(), Second()), (Second(), First())])
def test_conflicting_passes_are_refused(order) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ShardwrightError, match="conflicts with"):
        run_passes(order, Program(fx.Graph()))


def tanh_gelu(h: torch.Tensor) -> torch.Tensor:
    return 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))


def test_what_does_not_pay_is_taken_back() -> None:
    one = captured(tanh_gelu, (512, 6))
    prices = Prices(parse_cluster("cpu:1"), "float64")
    verdict = rewritten(one, [PASSES["gelu"]], weigh=Paying(prices)).records[-1].verdict
    assert verdict is not None
    assert verdict.stays
    assert verdict.seconds is not None
    assert verdict.seconds > 0

    @dataclass(frozen=True)
    class Back(Rewriting):
        name: str = "back"
        table: tuple[Row, ...] = (Row(call("aten.gelu", X), lambda m, make: _written_out(m["x"], make)),)

    plain = captured(nn.functional.gelu, (512, 6))
    after = rewritten(plain, [Back()], weigh=Paying(prices))
    verdict = after.records[-1].verdict
    assert verdict is not None
    assert not verdict.stays
    assert "it would take" in verdict.why
    assert len(after.graph.graph.nodes) == len(plain.graph.graph.nodes)


def _written_out(x: fx.Node, make: Make) -> fx.Node:
    inner = make(aten.erf.default, make(aten.mul.Tensor, x, math.sqrt(0.5)))
    return make(aten.mul.Tensor, make(aten.mul.Tensor, x, 0.5), make(aten.add.Tensor, inner, 1.0))


def saved_bytes(one: Captured) -> int:
    """What autograd keeps when a graph runs, parameters left out."""
    values = one.constants | inputs_of(one.graph.graph, 0)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() if x.numel() > 1 else 0
        return x

    leaves = [
        v.requires_grad_(v.is_floating_point() and e.trainable) for e, v in ((e, values[e.node]) for e in one.entries)
    ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = one.graph(*leaves)
    assert outputs[0].requires_grad
    own = {v.untyped_storage().data_ptr() for v in leaves}
    return sum(n for at, n in kept.items() if at not in own)


@pytest.mark.parametrize("shape", [(8, 6), (3, 5, 6)])
def test_predicted_bytes_are_those_that_autograd_keeps(shape: tuple[int, ...]) -> None:
    one = captured(tanh_gelu, shape)
    after = rewritten(one, [PASSES["gelu"]], weigh=Paying(Prices(parse_cluster("cpu:1"), "float64")))
    verdict = after.records[-1].verdict
    assert verdict is not None
    assert verdict.saved_bytes == saved_bytes(one) - saved_bytes(after)


def test_a_listing_is_python_with_provenance() -> None:
    model, kwargs = family("gpt2")
    text = listing(capture(model, (), kwargs).graph.graph)
    compile(text, "listing", "exec")
    assert 'p_transformer_wte_weight: "f32[100, 64]"' in text
    assert "# f32[64, 256]" in text
    assert "modeling_gpt2.py" in text


def test_pins_choose_passes() -> None:
    prices = Prices(parse_cluster("cpu:1"), "float32")
    assert asked(parse_pins(["passes=none"]), prices).names == ()
    assert set(asked(parse_pins(["passes=auto"]), prices).names) == set(PASSES) - {"padding"}
    assert "gelu" not in asked(parse_pins(["passes=auto", "passes!=gelu"]), prices).names
    assert asked(parse_pins(["passes=gelu"]), prices).forced
    with pytest.raises(PinError, match="did you mean gelu"):
        asked(parse_pins(["passes=gellu"]), prices)
    with pytest.raises(PinError, match="auto, none, or names"):
        parse_pins(["passes=auto,gelu"])


def test_a_forced_pass_has_to_find_something() -> None:
    one = captured(tanh_gelu)
    prices = Prices(parse_cluster("cpu:1"), "float64")
    (plan,) = chosen(run(one, Choice(("gelu",), prices, forced=True)))
    assert plan.name == "gelu"
    assert plan.saved_bytes > 0
    with pytest.raises(PinError, match="finds nothing"):
        run(captured(torch.sin), Choice(("gelu",), prices, forced=True))
    assert chosen(run(one, Choice())) == ()


def test_every_pass_can_be_pinned() -> None:
    assert parse_pins([f"passes={','.join(PASSES)}"]).passes == ",".join(sorted(PASSES))
    assert all(step.name == name for name, step in PASSES.items())
    assert [name for name, step in PASSES.items() if step.semantics != "EXACT"] == ["padding"]
