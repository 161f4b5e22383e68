"""Prices of ops, collectives, optimizers and copies; precision recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from shardwright.errors import ClusterError, PinError
from shardwright.planner.cluster import Device
from shardwright.planner.collectives import collective_seconds
from shardwright.planner.costs import Costs, Shape
from shardwright.planner.fit import fitted, samples
from shardwright.planner.numbers import Weights
from shardwright.planner.outline import DTYPE_BYTES, Factor, Op, Outline, Saved, Tensor, Use
from shardwright.planner.plan import MeshAxis
from shardwright.planner.precision import (
    OPTIMIZERS,
    RECIPES,
    REFUSED,
    choose_precision,
    find_optimizer,
    find_recipe,
    model_precision,
    state_bytes,
    sum_ratio,
)
from shardwright.planner.prices import OpRow, Price, Prices
from shardwright.planner.roofline import wave_factor
from shardwright.planner.stored import Data, Keeping, Stored
from shardwright.profiles.devices import load_device, parse_cluster

CPU = parse_cluster("cpu:2")
"""A device without tiles or issue cost: its prices can be worked out by hand."""
Sizes = dict[str, int]


def make_op(
    target: str,
    kind: str,
    sizes: Sizes,
    operands: Sequence[tuple[str, bool]],
    result: str,
    *,
    flops: float = 0.0,
    saved: Sequence[Saved] = (),
    dtypes: Sequence[str] = (),
    batch: str = "",
) -> tuple[Op, dict[str, Tensor]]:
    """An op from letters: each operand is (letters of its dims, differentiable); every letter is one factor."""
    letters = list(sizes)
    tensors: dict[str, Tensor] = {}

    def use(name: str, dims: str, grad: bool, dtype: str) -> Use:
        role = "activation"
        tensors[name] = Tensor(name, tuple((sizes[c],) for c in dims), dtype, role, grad, name)
        return Use(name, tuple((letters.index(c),) for c in dims))

    dtypes = [*dtypes, *["float32"] * len(operands)]
    uses = tuple(use(f"x{i}", dims, grad, dtypes[i]) for i, (dims, grad) in enumerate(operands))
    grads = sum(grad for _, grad in operands)
    out = use("y", result, grads > 0, "float32")
    factors = tuple(Factor(c, n, batch=c in batch) for c, n in sizes.items())
    op = Op("op", target, kind, uses, (out,), factors, (), flops, flops * grads, tuple(saved))
    return op, tensors


def linear(m: int, n: int, k: int, *, frozen: bool = False) -> tuple[Op, dict[str, Tensor]]:
    operands = [("mk", True), ("nk", not frozen)]
    return make_op("aten.linear", "matmul", {"m": m, "n": n, "k": k}, operands, "mn", flops=2.0 * m * n * k)


def add(m: int, n: int, second: str = "mn") -> tuple[Op, dict[str, Tensor]]:
    return make_op("aten.add", "elementwise", {"m": m, "n": n}, [("mn", True), (second, True)], "mn")


def ask(prices: Prices, made: tuple[Op, dict[str, Tensor]], *sizes: float) -> tuple[Price, Price]:
    op, tensors = made
    return prices.op(op, sizes or tuple(float(f.size) for f in op.factors), tensors)


def test_a_large_matmul_costs_its_flops() -> None:
    prices, device = Prices(CPU, "float32"), CPU.device
    forward, backward = ask(prices, linear(1024, 512, 2048))
    work = 2 * 1024 * 512 * 2048 / (device.peak("float32") * device.efficiency("matmul"))
    assert forward.seconds == pytest.approx(device.kernel_overhead_seconds + work)
    assert backward.seconds == pytest.approx(2 * (device.kernel_overhead_seconds + work))
    assert (forward.source, backward.source) == ("datasheet", "datasheet")
    assert forward.error > 0


def test_a_frozen_weight_halves_the_backward() -> None:
    prices = Prices(CPU, "float32")
    assert ask(prices, linear(1024, 512, 2048, frozen=True))[1].seconds == pytest.approx(
        ask(prices, linear(1024, 512, 2048))[1].seconds / 2
    )


def test_a_thin_matmul_costs_its_bytes() -> None:
    prices, device = Prices(CPU, "float32"), CPU.device
    forward, _ = ask(prices, linear(1, 4096, 4096))
    moved = 4 * (4096 + 4096 + 4096 * 4096)
    reached = device.memory_bytes_per_second * device.efficiency("memory")
    assert forward.seconds == pytest.approx(device.kernel_overhead_seconds + moved / reached)


def test_local_sizes_scale_work() -> None:
    prices, overhead = Prices(CPU, "float32"), CPU.device.kernel_overhead_seconds
    whole = ask(prices, linear(4096, 4096, 4096))[0].seconds - overhead
    for split in ((2048.0, 4096.0, 4096.0), (4096.0, 2048.0, 4096.0), (4096.0, 4096.0, 2048.0)):
        assert ask(prices, linear(4096, 4096, 4096), *split)[0].seconds - overhead == pytest.approx(whole / 2)


def test_floats_move_at_the_compute_dtype_and_integers_at_their_own() -> None:
    cluster = parse_cluster("h100-sxm:8")
    cluster = replace(cluster, device=replace(cluster.device, kernel_overhead_seconds=0.0, issue_seconds=0.0))
    made = make_op(
        "aten.mul", "elementwise", {"m": 1 << 24}, [("m", True), ("m", False)], "m", dtypes=("float32", "int64")
    )
    moved = (2 + 8 + 2) * (1 << 24)
    reached = cluster.device.memory_bytes_per_second * cluster.device.efficiency("elementwise")
    assert ask(Prices(cluster, "bfloat16"), made)[0].seconds == pytest.approx(moved / reached)


def test_what_costs_nothing() -> None:
    prices = Prices(CPU, "float32")
    view = make_op("aten.view", "view", {"m": 1 << 20}, [("m", True)], "m")
    assert [p.seconds for p in ask(prices, view)] == [0.0, 0.0]
    assert ask(prices, add(1024, 1024))[1].seconds == 0.0  # the gradient of a sum is the incoming one
    still = make_op("aten.cos", "elementwise", {"m": 1 << 20}, [("m", False)], "m")
    assert ask(prices, still)[0].seconds > 0.0
    assert ask(prices, still)[1].seconds == 0.0
    assert prices.copy(0.0).seconds == 0.0
    assert prices.collective("all_reduce", 1e9, 1, 1).seconds == 0.0


def test_a_broadcast_operand_needs_a_sum() -> None:
    prices, device = Prices(CPU, "float32"), CPU.device
    backward = ask(prices, add(1024, 1024, "n"))[1].seconds
    moved = 4 * (1024 * 1024 + 1024)
    assert backward == pytest.approx(
        device.kernel_overhead_seconds + moved / (device.memory_bytes_per_second * device.efficiency("elementwise"))
    )


def test_the_backward_reads_what_was_saved() -> None:
    prices = Prices(CPU, "float32")
    sizes = {"m": 1 << 20}
    bare = ask(prices, make_op("aten.neg", "elementwise", sizes, [("m", True)], "m"))[1].seconds
    saving = make_op("aten.gelu", "elementwise", sizes, [("m", True)], "m", saved=[Saved("operand", 0)])
    masked = make_op("aten.f", "elementwise", sizes, [("m", True)], "m", saved=[Saved("new", 0, (0,), 1 << 20)])
    overhead = CPU.device.kernel_overhead_seconds
    assert ask(prices, saving)[1].seconds - overhead == pytest.approx(1.5 * (bare - overhead))
    assert ask(prices, masked)[1].seconds - overhead == pytest.approx(1.125 * (bare - overhead))


def test_an_embedding_reads_rows_and_writes_the_gradient_of_its_table() -> None:
    prices = Prices(CPU, "float32")

    def lookup(rows: int) -> tuple[Price, Price]:
        sizes = {"v": rows, "t": 128, "h": 64}
        return ask(prices, make_op("aten.embedding", "embedding", sizes, [("vh", True), ("t", False)], "th"))

    assert lookup(50_000)[0].seconds == lookup(100)[0].seconds
    assert lookup(50_000)[1].seconds > 10 * lookup(100)[1].seconds


def test_matmuls_fall_short_where_tiles_do_not_fill_the_device() -> None:
    assert wave_factor(1, 8192, 8192, 132) == pytest.approx(1.0, abs=0.1)
    assert wave_factor(1, 128, 128, 132) < 0.05
    assert wave_factor(1, 1 << 14, 1 << 14, 108) > wave_factor(1, 256, 256, 108)


@pytest.mark.parametrize(("spec", "least", "most"), [("a100-sxm-80gb:8", 0.6, 0.8), ("h100-sxm:8", 0.5, 0.7)])
@pytest.mark.parametrize("shape", [(8192, 4096, 4096), (8192, 14336, 4096), (8192, 1536, 12288), (16384, 8192, 8192)])
def test_training_matmuls_reach_published_rates(
    spec: str, least: float, most: float, shape: tuple[int, int, int]
) -> None:
    cluster = parse_cluster(spec)
    forward, backward = ask(Prices(cluster, "bfloat16"), linear(*shape))
    flops = 2.0 * shape[0] * shape[1] * shape[2]
    peak = cluster.device.peak("bfloat16")
    assert least <= flops / forward.seconds / peak <= most
    assert least <= 2 * flops / backward.seconds / peak <= most


def test_a_published_layer() -> None:
    """Korthikanti et al. 2022, table 4: a 22B layer on 8 A100s without recompute, forward 7.7 ms and backward 11.9 ms."""
    cluster = parse_cluster("a100-sxm-80gb:8")
    prices = Prices(cluster, "bfloat16")
    tokens, h, ranks, heads, s = 4 * 2048, 6144, 8, 64, 2048
    batch = 4 * heads // ranks
    parts = [linear(tokens, 3 * h // ranks, h), linear(tokens, h, h // ranks)]
    parts += [linear(tokens, 4 * h // ranks, h), linear(tokens, h, 4 * h // ranks)]
    scores = {"b": batch, "s": s, "t": s, "d": h // heads}
    flops = 2.0 * batch * s * s * h / heads
    parts += [make_op("aten.bmm", "matmul", scores, [("bsd", True), ("btd", True)], "bst", flops=flops)]
    parts += [make_op("aten.bmm", "matmul", scores, [("bst", True), ("btd", True)], "bsd", flops=flops)]
    parts += [
        make_op("aten.softmax", "norm", {"b": batch, "s": s, "t": s}, [("bst", True)], "bst", saved=[Saved("result")])
    ]
    parts += [make_op("aten.layer_norm", "norm", {"m": tokens, "h": h}, [("mh", True), ("h", True)], "mh")] * 2
    parts += [make_op("aten.gelu", "elementwise", {"m": tokens, "f": 4 * h // ranks}, [("mf", True)], "mf")]
    parts += [add(tokens, h)] * 2
    reduce = prices.collective("all_reduce", tokens * h * 2, 1, ranks).seconds
    seconds = [sum(ask(prices, part)[i].seconds for part in parts) + 2 * reduce for i in (0, 1)]
    assert seconds[0] == pytest.approx(7.7e-3, rel=0.15)
    assert seconds[1] == pytest.approx(11.9e-3, rel=0.15)


def test_the_host_needs_its_time_for_every_kernel() -> None:
    cluster = parse_cluster("h100-sxm:8")
    forward, backward = ask(Prices(cluster, "bfloat16"), linear(8, 8, 8))
    assert forward.issue_seconds == cluster.device.issue_seconds
    assert backward.issue_seconds == 2 * cluster.device.issue_seconds


def test_measured_rows_come_first_then_rates_then_the_data_sheet() -> None:
    made = linear(256, 128, 64)
    op, tensors = made
    bare = Prices(CPU, "float32")
    key = bare.op_key(op, (256, 128, 64), tensors)
    assert key.operands == (((256, 64), "float32", True), ((128, 64), "float32", True))
    known = fitted(bare, {key: OpRow(1e-3, 3e-3, 0.02)}, samples(_outline(made), bare), tensors)
    assert ask(known, made) == (Price(1e-3, "measured", 0.02), Price(3e-3, "measured", 0.02))
    half, _ = ask(known, made, 128.0, 128.0, 64.0)
    assert half.source == "modelled"
    assert half.seconds == pytest.approx(0.5e-3, rel=0.02)
    assert ask(known, add(64, 64))[0].source == "datasheet"


def test_samples_are_distinct_and_in_order_of_weight() -> None:
    made = make_op("aten.linear", "matmul", {"m": 64, "n": 32, "k": 16}, [("mk", True), ("nk", True)], "mn", batch="m")
    outline, prices = _outline(made), Prices(CPU, "float32")
    picked = samples(outline, prices)
    sizes = {s.sizes for s in picked}
    assert (64, 32, 16) in sizes  # one rank does it all
    assert (32, 32, 16) in sizes  # the batch over two ranks
    assert (64, 16, 16) in sizes
    assert [s.weight for s in picked] == sorted((s.weight for s in picked), reverse=True)
    keys = [prices.op_key(s.op, s.sizes, outline.tensors) for s in picked]
    assert len(set(keys)) == len(keys)


def _outline(made: tuple[Op, dict[str, Tensor]]) -> Outline:
    op, tensors = made
    return Outline(tensors, (op,), (), (), (), "", (), 64, 64, "")


def test_collectives_are_priced_on_their_level() -> None:
    cluster = parse_cluster("h100-sxm:8x2")
    prices = Prices(cluster, "bfloat16")
    for stride, size in ((1, 8), (8, 2), (1, 16)):
        found = prices.collective("all_gather", 1e8, stride, size)
        assert found.seconds == collective_seconds("all_gather", 1e8, cluster.route(stride, size))
        assert found.source == "datasheet"
    level = cluster.level_of(1, 8).name
    measured = replace(prices, collectives={("all_gather", level, 8): ((1e6, 1e-3), (1e9, 1.0))})
    assert measured.collective("all_gather", 1e9, 1, 8) == Price(1.0, "measured", pytest.approx(0.15))
    assert measured.collective("all_gather", 1e9, 1, 16).source == "datasheet"


def test_prices_are_remembered_per_list_only() -> None:
    made, first, second = add(64, 64), Prices(CPU, "float32"), Prices(parse_cluster("h100-sxm:8"), "bfloat16")
    assert ask(first, made)[0] is ask(first, made)[0]
    assert ask(first, made)[0].seconds != ask(second, made)[0].seconds
    assert Prices(CPU, "float32") == first  # what was asked is no part of the value


def test_optimizer_and_copy_move_bytes() -> None:
    prices, device = Prices(CPU, "float32"), CPU.device
    reached = device.memory_bytes_per_second * device.efficiency("optimizer")
    fp32 = find_recipe("fp32").precision()
    assert prices.optimizer_seconds(1e6, "adamw", fp32) == pytest.approx(1e6 * (2 * 4 + 4 + 2 * 8) / reached)
    assert prices.optimizer_seconds(1e6, "sgd", fp32) == pytest.approx(1e6 * 12 / reached)
    megatron = find_recipe("megatron").precision()
    assert prices.optimizer_seconds(1e6, "adam", megatron) == pytest.approx(1e6 * (2 * 2 + 4 + 2 * 4 + 2 * 8) / reached)
    streamed = 3e6 / (device.memory_bytes_per_second * device.efficiency("copy"))
    assert prices.copy(1e6, 2e6).seconds == pytest.approx(device.kernel_overhead_seconds + streamed)
    assert prices.copy(1e6).seconds == prices.copy(1e6, 1e6).seconds


@pytest.mark.parametrize(
    ("recipe", "total", "copy"),
    [
        ("megatron", 18, 0),
        ("zero", 16, 0),
        ("fsdp-fp32", 16, 2),
        ("fsdp-bf16", 16, 2),
        ("fp16", 16, 2),
        ("fp32", 16, 0),
        ("fp64", 32, 0),
        ("pure-bf16", 8, 0),
    ],
)
def test_bytes_per_element_with_adam(recipe: str, total: int, copy: int) -> None:
    found = state_bytes(find_recipe(recipe).precision(), "adam")
    assert (found.total, found.copy) == (total, copy)


def test_defaults_by_device() -> None:
    assert choose_precision(load_device("h100-sxm")).recipe == "fsdp-fp32"
    assert choose_precision(load_device("v100-sxm-32gb")).recipe == "fp16"
    assert choose_precision(load_device("cpu")).recipe == "fp32"
    assert choose_precision(load_device("h100-sxm"), dtype="fp32").compute == "float32"
    assert choose_precision(load_device("h100-sxm"), recipe="megatron").gradient == "float32"
    assert choose_precision(load_device("cpu"), dtype="fp64").parameter == "float64"
    assert model_precision("bfloat16").recipe == "pure-bf16"
    assert model_precision("float32").recipe == "fp32"


@pytest.mark.parametrize(
    ("device", "pins", "words"),
    [
        ("v100-sxm-32gb", {"dtype": "bf16"}, ["bfloat16", "fp16"]),
        ("h100-sxm", {"dtype": "fp32", "recipe": "zero"}, ["contradicts"]),
        ("h100-sxm", {"dtype": "int4"}, ["int4", "bf16"]),
        ("h100-sxm", {"recipe": "megatrom"}, ["megatron"]),
    ],
)
def test_precision_pins_that_cannot_be(device: str, pins: dict[str, str], words: list[str]) -> None:
    with pytest.raises(PinError) as caught:
        choose_precision(load_device(device), **pins)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)


def test_optimizers_by_name() -> None:
    assert find_optimizer("AdamW").moments == 2
    assert find_optimizer("SGD-momentum") is OPTIMIZERS["sgd+momentum"]
    for name in REFUSED:
        with pytest.raises(PinError, match="not supported"):
            find_optimizer(name)
    with pytest.raises(PinError, match="adamw"):
        find_optimizer("adamww")


def test_a_dtype_without_a_figure_is_named() -> None:
    with pytest.raises(ClusterError, match="float16"):
        Device("d", 1, {"float16": 1.0}, 1.0, 0.0).peak("bfloat16")


def test_recipes_that_run_keep_no_master_copy() -> None:
    assert all(not recipe.master for recipe in RECIPES.values() if recipe.runs)


@pytest.mark.parametrize(
    ("recipe", "summed"), [("fsdp-fp32", 4), ("fsdp-bf16", 2), ("fp16", 4), ("zero", 2), ("fp32", 4), ("pure-bf16", 2)]
)
@pytest.mark.parametrize("level", [0, 1, 3])
def test_gradients_are_summed_in_the_dtype_of_the_recipe(recipe: str, summed: int, level: int) -> None:
    """What is gathered has the compute dtype, what is reduced the one that gradients are summed in."""
    elements, found = 4e7, find_recipe(recipe)
    prices, compute = Prices(parse_cluster("a100-sxm-80gb:8"), found.compute), DTYPE_BYTES[found.compute]
    keeping = Keeping(prices, found.precision(), "adamw", False)
    weights = (Weights(elements, elements, True, False, False, True),)
    moved = keeping.talk(Stored(weights, Data(8, 1, 1, 4, 2), True), level)
    widths = {name: size / elements for name, _, size, _ in moved.shared}
    reduced = "reduce_scatter" if level else "all_reduce"
    assert widths.pop(reduced) == pytest.approx(summed)
    assert all(width == pytest.approx(compute) for width in widths.values())
    costs = Costs(prices, Shape((MeshAxis("dp", 8, "data", ""),)), summed=sum_ratio(found.precision()))
    bucket = costs.bucket(reduced, (0,), elements * compute)
    whole = prices.collective(reduced, elements * summed, 1, 8).seconds
    assert bucket.fixed + bucket.slope * elements * compute == pytest.approx(whole, rel=1e-6)
