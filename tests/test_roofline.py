"""Prices from a device's figures: the host that starts kernels, fused chains, attention by generation, products in 8 bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from shardwright.errors import ClusterError
from shardwright.planner.costs import Costs, Shape
from shardwright.planner.fusing import fusions
from shardwright.planner.interval import step_interval
from shardwright.planner.numbers import Pass
from shardwright.planner.outline import Op, Outline, Region, Saved, Tensor
from shardwright.planner.plan import MeshAxis
from shardwright.planner.precision import choose_precision, semantics_of
from shardwright.planner.prices import Prices
from shardwright.planner.roofline import CAST_BYTES, CAUSAL_HALF, WHOLE_HALF, Roofline
from shardwright.planner.work import Work, work_of
from shardwright.profiles.devices import load_device, parse_cluster
from solver_outlines import Builder

H100 = parse_cluster("h100-sxm:8")


class Chain(Builder):
    """Ops over one dim of `size` elements."""

    def __init__(self, size: int = 1 << 20) -> None:
        super().__init__()
        self.size = size
        self.tensor("x", [[size]])

    def point(self, name: str, reads: list[str], result: str, kind: str = "elementwise", **more) -> None:
        self.tensor(result, [[self.size]])
        self.op(name, kind, [(t, ["n"]) for t in reads], [(result, ["n"])], {"n": {"size": self.size}}, **more)

    def outline(self, outputs: tuple[str, ...]) -> Outline:
        names = tuple(op.name for op in self.ops)
        region = Region("layer", (names,), ((),))
        return Outline(self.tensors, tuple(self.ops), (region,), (), ("x",), "", outputs, 1, 1, "", trains=True)


def bytes_of(outline: Outline, fused: bool) -> dict[str, tuple[float, float]]:
    found = fusions(outline) if fused else {}
    sizes = (float(outline.ops[0].factors[0].size),)
    works = {
        op.name: work_of(op, outline.tensors, "float32", "", *([found[op.name]] if op.name in found else []))
        for op in outline.ops
    }
    return {name: (w.forward_bytes(sizes), w.backward_bytes(sizes)) for name, w in works.items()}


def chain(*, saved: bool = False, second_user: bool = False) -> Outline:
    """x -> gelu -> dropout -> add(x): the middle ones are used once, unless asked otherwise."""
    made = Chain()
    made.point("gelu", ["x"], "a", saved=(Saved("operand", 0),))
    made.point("scale", ["a"], "b", saved=(Saved("operand", 0),) if saved else ())
    made.point("add", ["b", "x"], "y")
    if second_user:
        made.point("sum", ["b"], "z", kind="reduction")
    return made.outline(("y", "z") if second_user else ("y",))


def test_a_chain_of_kernels_moves_only_its_ends() -> None:
    n = 4.0 * (1 << 20)
    eager, fused = bytes_of(chain(), False), bytes_of(chain(), True)
    assert sum(f for f, _ in eager.values()) == 7 * n
    assert {k: f for k, (f, _) in fused.items()} == {"gelu": n, "scale": 0.0, "add": 2 * n}  # x read twice, y written
    # Backward: y's gradient is read once, x's is written by gelu, whose input was saved; the one that add passes on is the same.
    assert sum(b for _, b in fused.values()) < sum(b for _, b in eager.values())


def test_what_the_backward_pass_needs_is_still_written() -> None:
    n = 4.0 * (1 << 20)
    fused = bytes_of(chain(saved=True), True)
    assert fused["gelu"][0] == 2 * n  # its result is saved by the op after it
    assert fused["scale"][0] == 0.0  # and read from registers


def test_a_second_user_of_another_kind_keeps_the_tensor() -> None:
    n = 4.0 * (1 << 20)
    fused = bytes_of(chain(second_user=True), True)
    assert fused["scale"][0] == n  # b goes to the reduction through memory
    assert fused["sum"][0] > 0


def test_fusion_never_costs_more() -> None:
    for outline in (chain(), chain(saved=True), chain(second_user=True)):
        eager, fused = bytes_of(outline, False), bytes_of(outline, True)
        assert all(fused[name][i] <= eager[name][i] for name in eager for i in (0, 1))


def test_kernels_in_the_middle_of_a_chain_are_not_started() -> None:
    outline = chain()
    prices = Prices(H100, "bfloat16", fused=fusions(outline))
    issue = {op.name: prices.op(op, (float(1 << 20),), outline.tensors)[0].issue_seconds for op in outline.ops}
    assert issue == {"gelu": 0.0, "scale": 0.0, "add": H100.device.issue_seconds}


def test_a_pass_takes_what_the_device_or_the_host_needs() -> None:
    assert Pass(1.0, 0.5, 1.2).seconds == 1.5
    slow = Pass(1.0, 0.5, 4.0)
    assert slow.seconds == 4.0
    assert slow.busy == 3.5  # what other communication may hide under
    assert slow.busy + slow.talk == slow.seconds


def linear(m: int, n: int, k: int) -> tuple[Op, dict[str, Tensor]]:
    made = Builder()
    made.tensor("x", [[m], [k]])
    made.tensor("w", [[n], [k]], "parameter")
    made.tensor("y", [[m], [n]])
    made.op("linear", "matmul", [("x", ["m", "k"]), ("w", ["n", "k"])], [("y", ["m", "n"])],
            {"m": {"size": m}, "n": {"size": n}, "k": {"size": k}})  # fmt: skip
    return made.ops[0], made.tensors


def test_ops_wait_for_the_host_unless_it_runs_ahead() -> None:
    op, tensors = linear(8, 8, 8)
    shape = Shape((MeshAxis("tp", 1, "model", ""),))
    prices = Prices(H100, "bfloat16")
    waiting, ahead = (Costs(prices, shape, True, ahead=a).run(op, tensors, ("R",)) for a in (False, True))
    assert waiting is not None
    assert ahead is not None
    issue = H100.device.issue_seconds
    assert (waiting.forward, waiting.backward) == (issue, 2 * issue)
    assert (waiting.issue, waiting.issue_backward) == (0.0, 0.0)
    assert ahead.forward < issue
    assert (ahead.issue, ahead.issue_backward) == (issue, 2 * issue)


def seconds_of(roofline: Roofline, work: Work, sizes: tuple[float, ...]) -> tuple[float, float]:
    alone = replace(roofline, device=replace(roofline.device, kernel_overhead_seconds=0.0))
    return alone.seconds(work, sizes)


def test_products_in_eight_bits_pay_for_their_casts() -> None:
    m = n = k = 8192
    op, tensors = linear(m, n, k)
    work, sizes = work_of(op, tensors, "bfloat16"), (float(m), float(n), float(k))
    device = load_device("h100-sxm")
    wide = seconds_of(Roofline(device, "bfloat16"), work, sizes)
    narrow = seconds_of(Roofline(device, "bfloat16", "float8_e4m3fn"), work, sizes)
    assert narrow[0] < wide[0]
    assert narrow[1] < wide[1]
    cast = (m * k + n * k) * CAST_BYTES / (device.memory_bytes_per_second * device.efficiency("elementwise"))
    rate = device.peak("float8_e4m3fn") * device.efficiency("matmul_float8_e4m3fn")
    assert narrow[0] - cast == pytest.approx(2 * m * n * k / rate, rel=0.1)  # tiles and the contraction's ends


def test_eight_bits_are_for_products_with_parameters() -> None:
    op, tensors = linear(512, 512, 512)
    tensors["w"] = replace(tensors["w"], role="activation")
    work, sizes = work_of(op, tensors, "bfloat16"), (512.0,) * 3
    device = load_device("h100-sxm")
    assert Roofline(device, "bfloat16", "float8_e4m3fn").seconds(work, sizes) == Roofline(device, "bfloat16").seconds(
        work, sizes
    )


def test_a_device_without_eight_bits_is_named() -> None:
    op, tensors = linear(512, 512, 512)
    work = work_of(op, tensors, "bfloat16")
    with pytest.raises(ClusterError, match="a100-sxm-80gb has no float8_e4m3fn"):
        Roofline(load_device("a100-sxm-80gb"), "bfloat16", "float8_e4m3fn").seconds(work, (512.0,) * 3)


def test_a_plan_in_eight_bits_says_that_it_is_lossy() -> None:
    device = load_device("h100-sxm")
    assert semantics_of(choose_precision(device, recipe="megatron-fp8")) == "LOSSY"
    assert semantics_of(choose_precision(device, recipe="megatron")) == "EXACT"


def attention(seq: int, *, causal: bool) -> tuple[Op, dict[str, Tensor]]:
    made = Builder()
    for name in ("q", "k", "v", "y"):
        made.tensor(name, [[1], [8], [seq], [128]])
    query = {"size": seq, "token": True, "split": "never"} if causal else {"size": seq, "token": True}
    places = {"s": query, "t": {"size": seq, "token": True}}
    work = 4.0 * 8 * seq * seq * 128 * (0.5 if causal else 1.0)
    reads = [("q", ["b", "h", "s", "e"]), ("k", ["b", "h", "t", "e"]), ("v", ["b", "h", "t", "d"])]
    made.op("attention", "attention", reads,
            [("y", ["b", "h", "s", "d"])],
            {"b": {"size": 1, "batch": True}, "h": {"size": 8}, **places, "e": {"size": 128}, "d": {"size": 128}},
            flops=work)  # fmt: skip
    return made.ops[0], made.tensors


@pytest.mark.parametrize(("causal", "half"), [(True, CAUSAL_HALF), (False, WHOLE_HALF)])
def test_short_attention_is_slow_attention(causal: bool, half: float) -> None:
    device, rates = load_device("a100-sxm-80gb"), []
    for seq in (512, 16384):
        op, tensors = attention(seq, causal=causal)
        work = work_of(op, tensors, "bfloat16")
        sizes = tuple(float(f.size) for f in op.factors)
        rates.append(op.flops / seconds_of(Roofline(device, "bfloat16"), work, sizes)[0])
    assert rates[0] / rates[1] == pytest.approx((1 + half / 16384) / (1 + half / 512))
    assert rates[1] == pytest.approx(device.peak("bfloat16") * device.efficiency("attention"), rel=0.03)


def test_attention_by_generation() -> None:
    op, tensors = attention(8192, causal=True)
    work, sizes = work_of(op, tensors, "bfloat16"), tuple(float(f.size) for f in op.factors)
    kinds = ("attention_flash1", "attention", "attention_flash3")
    taken = [seconds_of(Roofline(load_device("h100-sxm"), "bfloat16", attention=k), work, sizes)[0] for k in kinds]
    assert taken == sorted(taken, reverse=True)
    assert taken[0] > 1.5 * taken[2]


def test_an_interval_is_that_of_the_least_known_device() -> None:
    one = replace(H100, device=replace(H100.device, accuracy_low=0.9, accuracy_high=1.2))
    assert step_interval(one, 2.0) == (1.8, 2.4)
    both = parse_cluster("h100-sxm:8+v100-sxm-32gb:8")
    low, high = step_interval(both, 1.0)
    devices = [pool.device for pool in both.pool_list()]
    assert (low, high) == (min(d.accuracy_low for d in devices), max(d.accuracy_high for d in devices))
