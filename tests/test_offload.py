"""Offload in closed form: capacities of published systems, fetch times, and the interleaved optimizer step."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from shardwright.errors import ClusterError
from shardwright.planner.cluster import Host
from shardwright.planner.hostupdate import (
    ALL_CPU,
    UpdateRates,
    balanced_stride,
    best_stride,
    update_rates,
    update_seconds,
)
from shardwright.planner.offload import (
    ON_DEVICE,
    ON_DISK,
    ON_HOST,
    Offload,
    Split,
    Tiers,
    Traffic,
    activation_traffic,
    capacity,
    duplex_bytes_per_second,
    efficiency,
    fetch_seconds,
    gradient_traffic,
    held_bytes,
    lane_seconds,
    largest_model,
    parameter_traffic,
)
from shardwright.planner.precision import RECIPES, StateBytes, state_bytes
from shardwright.planner.prices import Prices
from shardwright.profiles.devices import parse_cluster

ZERO = state_bytes(RECIPES["zero"].precision(), "adam")
"""2 + 2 + 12 bytes a parameter, as in the ZeRO paper."""

INFINITY = StateBytes(parameter=2, gradient=6, master=4, moments=8, copy=0)
"""20 bytes a parameter: ZeRO-Infinity (arXiv 2104.07857, section 3) keeps fp16 and fp32 gradients."""

HOST = Host(4, int(512e9), 20e9, 200e9, 1e-9, copy_latency_seconds=1e-5, disk_bytes=int(4e12),
            disk_read_bytes_per_second=8e9, disk_write_bytes_per_second=4e9)  # fmt: skip


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_memory_table(zero: int, gigabytes: float) -> None:
    """ZeRO (arXiv 1910.02054), figure 1: 7.5 B parameters on 64 devices."""
    held = held_bytes(7.5e9, ZERO, Offload(), zero=zero, shards=64)
    assert held.device / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert (held.host, held.disk) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("zero", "billions", "measured"), [(0, 2.0, 1.3), (1, 7.6, 6.2), (2, 14.4, None), (3, 128.0, None)]
)
def test_largest_model_of_zero(zero: int, billions: float, measured: float | None) -> None:
    """ZeRO (arXiv 1910.02054), table 2: the theoretical largest on 64 V100 of 32 GB, and the largest that trained."""
    found = largest_model(Tiers(32e9), ZERO, Offload(), zero=zero, shards=64) / 1e9
    assert found == pytest.approx(billions, rel=0.006)
    if measured is not None:
        assert 0.6 * found < measured < found


CPU_ALL = Offload(optimizer=ON_HOST, gradients=ON_HOST, parameters=ON_HOST)
DISK_ALL = Offload(optimizer=ON_DISK, gradients=ON_DISK, parameters=ON_DISK)


@pytest.mark.parametrize(
    ("state", "offload", "zero", "ranks", "billions"),
    [
        (ZERO, Offload(), 0, 16, 1.4),  # data parallel
        (ZERO, Offload(), 2, 16, 10.0),  # ZeRO-2
        (ZERO, Offload(optimizer=ON_HOST, gradients=ON_HOST), 2, 16, 13.0),  # ZeRO-Offload
        (INFINITY, Offload(), 3, 16, 20.0),  # ZeRO-3
        (INFINITY, CPU_ALL, 3, 16, 70.0),  # ZeRO-Infinity on host memory
        (INFINITY, DISK_ALL, 3, 16, 1000.0),  # ZeRO-Infinity on NVMe
    ],
)
def test_largest_model_on_one_dgx2(state: StateBytes, offload: Offload, zero: int, ranks: int, billions: float) -> None:
    """ZeRO-Infinity (arXiv 2104.07857), figure 6a: the largest model that trained on 16 V100 of 32 GB, 1.5 TB, 28 TB NVMe.

    Model states alone bound it from above; activations and buffers took up to a third in the papers.
    """
    limits = capacity(parse_cluster("v100-sxm-32gb:16"))
    found = largest_model(limits, state, offload, zero=zero, shards=ranks) / 1e9
    assert 0.65 * found <= billions <= 1.01 * found


def test_zero_offload_on_one_device() -> None:
    """ZeRO-Offload (arXiv 2101.06840): 13 B parameters on one V100 of 32 GB against 1.4 B without; host memory is no bound."""
    dgx2 = capacity(parse_cluster("v100-sxm-32gb:16"))
    alone = Tiers(dgx2.device, 16 * dgx2.host)
    found = largest_model(alone, ZERO, Offload(optimizer=ON_HOST, gradients=ON_HOST), zero=2, shards=1) / 1e9
    plain = largest_model(alone, ZERO, Offload(), zero=0, shards=1) / 1e9
    assert 13.0 < found < 13.0 / 0.8
    assert 1.4 < plain < 1.4 / 0.7
    assert found / plain == pytest.approx(8.0)  # the paper: 13 / 1.4 = 9.3


def test_zero_infinity_on_32_nodes() -> None:
    """ZeRO-Infinity, figure 1: 32 trillion parameters trained on 32 DGX-2, 512 devices; a DGX-2 takes 1 trillion."""
    limits = capacity(parse_cluster("v100-sxm-32gb:16x32"))
    found = largest_model(limits, INFINITY, DISK_ALL, zero=3, shards=512) / 1e12
    assert 32.0 <= found <= 32.0 / 0.65
    on_devices = largest_model(limits, INFINITY, Offload(), zero=3, shards=800) / 1e12
    assert 1.0 <= on_devices <= 1.0 / 0.8  # the paper: 800 V100 just to fit a trillion, states and all else


@pytest.mark.parametrize(
    ("layers", "hidden", "heads", "states", "checkpoints", "working", "activations"),
    [
        (100, 20 * 1024, 160, 9.16, 0.12, 6.25, 2.50),
        (128, 25 * 1024, 256, 18.31, 0.20, 9.77, 3.56),
        (195, 64 * 1024, 512, 182.81, 0.76, 64.00, 8.00),
        (315, 160 * 1024, 1024, 1845.70, 3.08, 400.00, 18.00),
    ],
)
def test_memory_table_of_zero_infinity(
    layers: int, hidden: int, heads: int, states: float, checkpoints: float, working: float, activations: float
) -> None:
    """ZeRO-Infinity (arXiv 2104.07857), figure 2a, by F5: TiB and GiB, sequence 1024, batch 32 a node and 4 a device."""
    held = held_bytes(12 * layers * hidden**2, INFINITY, CPU_ALL, zero=3, shards=1)
    assert held.host / 2**40 == pytest.approx(states, rel=0.005)
    assert 2 * 32 * 1024 * hidden * layers / 2**40 == pytest.approx(checkpoints, rel=0.03)
    assert 4 * hidden * 4 * hidden / 2**30 == pytest.approx(working, rel=0.005)
    assert 4 * 1024 * (16 * hidden + 2 * heads * 1024) / 2**30 == pytest.approx(activations, rel=0.005)


@pytest.mark.parametrize(
    ("flops_per_byte", "gigabytes", "least"),
    [
        (1024 * 1, 70, 0.50),  # parameters and gradients: sequence x batch of 1
        (1024 * 2 / 4, 1500, 0.90),  # optimizer states: sequence x batch of 2 / 4
        (24 * 2048, 2, 0.50),  # activation checkpoints: 24 x hidden of 2K
        (24 * 8192, 1, 0.50),  # and of 8K
    ],
)
def test_efficiency_of_zero_infinity(flops_per_byte: float, gigabytes: float, least: float) -> None:
    """ZeRO-Infinity (arXiv 2104.07857), section 4.2 and figure 3, at 70 TFLOP/s achievable."""
    assert least <= efficiency(flops_per_byte, gigabytes * 1e9, 70e12) < least + 0.25
    assert efficiency(flops_per_byte, gigabytes * 1e11, 70e12) > 0.98


def test_shares_of_the_states_add_up() -> None:
    megatron = state_bytes(RECIPES["megatron"].precision(), "adamw")
    half = held_bytes(1e9, megatron, Offload(optimizer=Split(host=0.25, disk=0.25)), zero=1, shards=4)
    assert half.device == pytest.approx(1e9 * (2 + 4 + 6 / 4))
    assert half.host == half.disk == pytest.approx(1e9 * 3 / 4)
    # Without a master copy the parameter leaves with its moments, and its compute copy stays.
    mixed = state_bytes(RECIPES["fsdp-fp32"].precision(), "adamw")
    gone = held_bytes(1e9, mixed, Offload(optimizer=ON_HOST), zero=3, shards=8)
    assert (gone.device, gone.host) == (pytest.approx(1e9 * (2 + 4) / 8), pytest.approx(1e9 * 12 / 8))
    with pytest.raises(ValueError, match="split"):
        Split(0.7, 0.5)


def test_every_rank_fetches_its_part() -> None:
    """ZeRO-Infinity, section 5.2: partitioned fetches use all links, an owner's broadcast one of them."""
    own = fetch_seconds(HOST, 16e9, 4, partitioned=False)
    assert own == pytest.approx(16e9 / 20e9 + 1e-5)
    assert own / fetch_seconds(HOST, 16e9, 4) == pytest.approx(4.0, rel=1e-3)
    assert fetch_seconds(HOST, 16e9, 4, "disk") == pytest.approx(4e9 / 2e9)  # a quarter of 8 GB/s: slower than the link
    with pytest.raises(ClusterError, match="disk_bytes"):
        fetch_seconds(replace(HOST, disk_bytes=0), 1e9, 4, "disk")


def test_traffic_by_class() -> None:
    forward, backward = parameter_traffic(1e9, ZERO, Split(host=0.5, disk=0.5), shards=4)
    assert forward == backward == Traffic(in_bytes=0.5e9, read_bytes=0.25e9, copies=1)
    assert parameter_traffic(1e9, ZERO, ON_DEVICE) == (Traffic(), Traffic())
    assert gradient_traffic(1e9, ZERO, ON_DISK) == Traffic(out_bytes=2e9, write_bytes=2e9, copies=1)
    out, back = activation_traffic(1e9, ON_HOST, copies=3)
    assert (out.out_bytes, back.in_bytes, out.in_bytes, back.copies) == (1e9, 1e9, 0.0, 3)
    lanes = lane_seconds(HOST, out + back)
    assert lanes.copy_in == pytest.approx(1e9 / duplex_bytes_per_second(HOST) + 6e-5)
    assert lanes.window == max(lanes.copy_in, lanes.copy_out)
    assert lane_seconds(HOST, out).copy_out == pytest.approx(1e9 / 20e9 + 3e-5)
    assert duplex_bytes_per_second(HOST) == pytest.approx(200e9 / 4 * 0.75 / 2)  # host memory is the narrower


# The optimizer step ----------------------------------------------------------------------------------------------------


RATES = UpdateRates(cpu=1.0, gpu=0.1, copy_in=0.4, copy_out=0.4, parameters_in=0.1)


def test_step_lengths_by_hand() -> None:
    """Four subgroups of one element: the CPU's row and the last copy; two trips through two slots and what they overlap by."""
    assert update_seconds(4, RATES, ALL_CPU, subgroup=1) == pytest.approx(4 * 1.0 + 0.1)
    assert update_seconds(4, RATES, 1, subgroup=1) == pytest.approx(2 * (0.4 + 0.1 + 0.4) + 0.4)
    assert update_seconds(4, RATES, 2, subgroup=1) == pytest.approx(2 * 1.0 + 0.1)
    assert update_seconds(0, RATES) == 0.0
    slow_out = replace(RATES, copy_out=3.0)  # two slots: the third copy in waits for the first one out
    assert update_seconds(3, slow_out, 1, subgroup=1) == pytest.approx(0.4 + 0.1 + 3 * 3.0)
    with pytest.raises(ValueError, match="at least 1"):
        update_seconds(1, RATES, 0.5)


def test_disk_bounds_the_step() -> None:
    disk = replace(RATES, read=2.0, write=3.0)
    assert update_seconds(4, disk, ALL_CPU, subgroup=1) == pytest.approx(2.0 + 1.0 + 4 * 3.0)
    assert update_seconds(4, disk, 1, subgroup=1) == pytest.approx(2.0 + 0.4 + 0.1 + 0.4 + 4 * 3.0)


def test_scaling_all_rates_scales_the_step() -> None:
    for stride in (1, 2, 3, ALL_CPU):
        doubled = UpdateRates(*(2 * getattr(RATES, name) for name in RATES.__slots__))
        assert update_seconds(9, doubled, stride, 1) == pytest.approx(2 * update_seconds(9, RATES, stride, 1))


def test_the_closed_form_finds_the_stride() -> None:
    """techniques.md F11: over 400 random draws the neighbours of k* hold the best stride but for 1 % of its seconds."""
    draw = random.Random(11)
    near, worst = 0, 0.0
    for _ in range(400):
        copy = draw.uniform(0.1, 3.0)
        rates = UpdateRates(draw.uniform(0.2, 4.0), draw.uniform(0.01, 0.2), copy, copy, copy / 6)
        groups = draw.randint(16, 40)
        times = {float(k): update_seconds(groups, rates, k, 1) for k in range(1, groups + 2)}
        best = min(times.values())
        stride, seconds = best_stride(groups, rates, 1)
        assert seconds == pytest.approx(update_seconds(groups, rates, stride, 1))
        worst = max(worst, seconds / best - 1)
        kept = [k for k, t in times.items() if t <= best * (1 + 1e-9)]
        near += min(abs(min(k, groups) - min(balanced_stride(rates), groups)) for k in kept) <= 1 + 1e-9
    assert worst <= 0.01
    assert near >= 0.97 * 400


LOGGED = {
    "7B": (6.7e9, 2054, {2: 1344, 3: 1462, 4: 1471, 6: 1483, 8: 1514}),
    "13B": (13e9, 3812, {2: 2590, 3: 2708, 4: 2837, 6: 2901, 8: 3110}),
    "20B": (20e9, 5202, {2: 3481, 3: 3594, 4: 3783, 6: 3932, 8: 3945}),
}
"""Parameters, step ms all on the CPU and by stride: public logs of Deep Optimizer States (techniques.md F11; Maurya et al. 2024,
github.com/mauryaavinash95/deep-optimizer-states-results), ZeRO-3 on four A100 40 GB of one Polaris node."""


@pytest.mark.parametrize("size", LOGGED)
def test_deep_optimizer_states_ranks_its_strides(size: str) -> None:
    """Stride 2 is the best of the logged ones and the order of the others is the logs'; absolute times are not claimed.

    The CPU's rate is the logged step all on the CPU. The node (Polaris user guide): PCIe 4.0 x16 to each device (25 GB/s
    reached), one socket with eight channels of DDR4-3200.
    """
    parameters, base, by_stride = LOGGED[size]
    elements = parameters / 4
    node = Host(4, int(512e9), 25e9, 204.8e9, base / 1e3 / elements)
    both = duplex_bytes_per_second(node)
    gpu = 30 / (1.555e12 * 0.8)
    rates = UpdateRates(node.host_update_seconds_per_element, gpu, 12 / both, 12 / both, 2 / both)
    times = {k: update_seconds(elements, rates, k) for k in by_stride}
    assert min(times, key=times.__getitem__) == min(by_stride, key=by_stride.__getitem__) == 2
    assert sorted(times, key=times.__getitem__) == sorted(by_stride, key=by_stride.__getitem__)
    assert 1.0 < balanced_stride(rates) < 2.5
    stride, seconds = best_stride(elements, rates)  # all on the GPU and all on the CPU are candidates too
    assert stride == 2
    assert seconds < update_seconds(elements, rates, ALL_CPU) == pytest.approx(base / 1e3, rel=0.01)
    measured, predicted = by_stride[2] / base, seconds / (base / 1e3)
    assert predicted == pytest.approx(measured, abs=0.2)


def test_rates_of_a_cluster() -> None:
    cluster = parse_cluster("a100-sxm-80gb:8x2")
    host = cluster.host
    assert host is not None
    zero = RECIPES["zero"].precision()
    rates = update_rates(Prices(cluster, "bfloat16"), zero, "adamw")
    assert rates.copy_in == rates.copy_out == pytest.approx(6 * rates.parameters_in)
    assert rates.cpu == pytest.approx(host.host_update_seconds_per_element * 28 / 30)
    assert rates.gpu < rates.cpu / 20
    on_disk = update_rates(Prices(cluster, "bfloat16"), zero, "adamw", "disk")
    assert on_disk.read == pytest.approx(12 / host.rank_disk_read_bytes_per_second)
    assert update_seconds(1e9, on_disk) > update_seconds(1e9, rates)
    assert update_rates(Prices(cluster, "bfloat16"), zero, "sgd").copy_in == pytest.approx(rates.copy_in / 3)
    with pytest.raises(ClusterError, match="no host memory"):
        update_rates(Prices(parse_cluster("cpu:2"), "float32"), RECIPES["fp32"].precision(), "adamw")


def test_steps_never_get_slower_with_a_faster_lane() -> None:
    draw = random.Random(3)
    for _ in range(60):
        rates = UpdateRates(*(draw.uniform(0.05, 2.0) for _ in range(5)))
        stride, _ = best_stride(24, rates, 1)
        assert stride == ALL_CPU or stride == math.floor(stride) >= 1
        lane = draw.choice(["cpu", "gpu", "copy_in", "copy_out", "parameters_in"])
        faster = replace(rates, **{lane: getattr(rates, lane) / 2})
        assert update_seconds(24, faster, ALL_CPU, 1) <= update_seconds(24, rates, ALL_CPU, 1) + 1e-9
        assert update_seconds(24, faster, 1, 1) <= update_seconds(24, rates, 1, 1) + 1e-9
