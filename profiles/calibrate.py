"""One factor per device and software stack: what runs took over what was predicted, put back into the figures of a cluster.

A factor multiplies every figure in seconds and divides every rate, of compute, links and host alike, so that the predicted step
of any plan is that many times as long, and its bound with it. Peaks stay: model FLOPs are counted against them. Measured
rows are multiplied where prices are built (passes/measure.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..planner.cluster import Cluster, Device, Host, Level, Pool, join_pools
from ..planner.collectives import Table
from ..planner.prices import OpRow, Prices, Rate
from .ledger import Entry, device_key
from .store import Figure, Store

KIND = "calibration"
LEAST_RUNS = 3
"""With fewer runs a median says little."""
LEAST_PLANS = 5
"""With fewer plans the interval of the device stays: runs of one plan do not say how far off another one is."""
LEAST_SPREAD = 0.03
"""Standard deviation between plans (of log ratios) that is assumed at least: plans one runs resemble each other."""
DEVICE_SECONDS = ("kernel_overhead_seconds", "issue_seconds")
LEVEL_SECONDS = ("latency_seconds", "launch_seconds")
HOST_SECONDS = ("copy_latency_seconds", "host_update_seconds_per_element")
HOST_RATES = (
    "copy_bytes_per_second", "host_memory_bytes_per_second", "disk_read_bytes_per_second", "disk_write_bytes_per_second"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Calibration:
    """Median of measured over uncalibrated predicted seconds of `runs` runs; `spread` is the relative deviation around it.

    The deviation is 1.4826 times the median absolute one: the standard deviation where errors are normal. Nine of ten steps of
    further plans are expected between `low` and `high` times the calibrated prediction; None where too few plans ran to say.
    """

    factor: float
    runs: int
    spread: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """`low` and `high`, None without them."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def text(self) -> str:
        """What plans say of it."""
        return f"calibrated x{self.factor:.4g} by {self.runs} runs of the ledger, spread {100 * self.spread:.0f} %"


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one device, library versions and stack: how many may calibrate, and what they say where they are enough."""

    device: str
    versions: str
    stack: str
    runs: int
    left_out: int
    found: Calibration | None


def recalibrate(entries: Iterable[Entry]) -> tuple[Group, ...]:
    """Calibrations from ledger rows, by device, versions and stack. Rows that are not `usable` are left out.

    Predictions are taken back to what they were without a calibration, so nothing adds up when this is done twice.
    """
    rows: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        rows.setdefault((entry.device, release(entry.versions), entry.stack), []).append(entry)
    groups = []
    for place, found in sorted(rows.items()):
        usable = [(entry.plan, entry.ratio * (entry.calibration or 1.0)) for entry in found if entry.usable]
        made = _calibration(usable) if len(usable) >= LEAST_RUNS else None
        groups.append(Group(*place, len(usable), len(found) - len(usable), made))
    return tuple(groups)


def keep(store: Store, groups: Iterable[Group]) -> None:
    """Write the calibrations of `groups` into the store, in place of those it has of the same device, versions and stack."""
    store.add([Figure(g.device, g.versions, KIND, g.stack, asdict(g.found)) for g in groups if g.found is not None])


def stored(store: Store, device: str, versions: str) -> dict[str, Calibration]:
    """Calibrations of a device by stack."""
    return {stack: Calibration(**value) for stack, value in store.read(device, release(versions), KIND).items()}


def with_stored(cluster: Cluster, stack: str, versions: str, store: Store) -> Cluster:
    """`cluster` under the store's calibration for its devices and this stack; unchanged where there is none, or one is in it.

    Unlike devices get each their own; the links between the pools keep their figures.
    """
    old = cluster.pool_list()
    pools = [_pool(cluster.sub(pool), pool, stack, versions, store) for pool in old]
    if all(after is before for after, before in zip(pools, old, strict=True)):
        return cluster
    if cluster.pools:
        joined = join_pools(cluster.name, pools, cluster.levels[-1], cluster.spec)
        return replace(joined, limit_bytes=cluster.limit_bytes)
    return replace(cluster, device=pools[0].device, levels=pools[0].levels, host=pools[0].host)


def calibrated(
    cluster: Cluster, factor: float, source: str, interval: tuple[float, float] | None = None
) -> Cluster:  # fmt: skip
    """`cluster` of equal devices with every figure in seconds times `factor`; `source` says where that comes from.

    `interval` replaces that of the device (`accuracy_low`, `accuracy_high`) where there is one.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"a calibration is a factor above zero, not {factor}")
    return replace(
        cluster,
        device=_device(cluster.device, factor, source, interval),
        levels=tuple(_level(level, factor, source) for level in cluster.levels),
        host=_host(cluster.host, factor, source) if cluster.host is not None else None,
    )


def bare(cluster: Cluster) -> Cluster:
    """A cluster of equal devices without its calibration (to the last few digits)."""
    factor = cluster.device.calibration
    return cluster if factor == 1.0 else calibrated(cluster, 1.0 / factor, "")


def scaled(prices: Prices, factor: float) -> Prices:
    """`prices` with every row and rate as if all had taken `factor` times as long; the cluster is left to the caller."""
    return replace(
        prices,
        ops={key: OpRow(row.forward * factor, row.backward * factor, row.error) for key, row in prices.ops.items()},
        rates={name: _rate(rate, factor) for name, rate in prices.rates.items()},
        collectives=_table(prices.collectives, factor),
        optimizer_rates={name: rate / factor for name, rate in prices.optimizer_rates.items()},
        copy_rate=prices.copy_rate / factor,
    )


def release(versions: str) -> str:
    """Library versions without what follows a plus: a build for another platform predicts for the same release."""
    return versions.partition("+")[0]


def _calibration(found: Sequence[tuple[str, float]]) -> Calibration:
    """From (plan, measured over predicted) of every run."""
    ratios = [ratio for _, ratio in found]
    middle = float(f"{statistics.median(ratios):.4g}")
    apart = statistics.median(abs(ratio - middle) for ratio in ratios)
    plans = {plan: [ratio for other, ratio in found if other == plan] for plan, _ in found}
    between = [math.log(statistics.median(each) / middle) for each in plans.values()]
    low, high = _interval(between) if len(between) >= LEAST_PLANS else (None, None)
    return Calibration(middle, len(ratios), round(1.4826 * apart / middle, 4), low, high)


def _interval(logs: Sequence[float]) -> tuple[float, float]:
    """Where nine of ten further plans fall: Student's prediction interval in log ratios around the factor.

    The quantile is Hill's series in the normal one (Communications of the ACM 13, 1970, algorithm 396), good to 1 % from four
    degrees of freedom on.
    """
    free = len(logs) - 1
    deviation = max(LEAST_SPREAD, math.sqrt(sum(log * log for log in logs) / free))
    z = statistics.NormalDist().inv_cdf(0.95)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    reach = t * deviation * math.sqrt(1 + 1 / len(logs))
    return float(f"{math.exp(-reach):.4g}"), float(f"{math.exp(reach):.4g}")


def _pool(alone: Cluster, pool: Pool, stack: str, versions: str, store: Store) -> Pool:
    if pool.device.calibration != 1.0:
        return pool
    found = stored(store, device_key(alone), versions).get(stack)
    if found is None:
        return pool
    made = calibrated(alone, found.factor, found.text, found.interval)
    return replace(pool, device=made.device, levels=made.levels, host=made.host)


def _device(device: Device, factor: float, source: str, interval: tuple[float, float] | None) -> Device:
    low, high = interval or (device.accuracy_low, device.accuracy_high)
    efficiencies = {"default": device.efficiency("default"), **device.efficiencies}
    touched = (*DEVICE_SECONDS, "efficiencies")
    return replace(
        device,
        efficiencies={kind: value / factor for kind, value in efficiencies.items()},
        **_times(device, DEVICE_SECONDS, factor),
        calibration=device.calibration * factor,
        accuracy_low=low,
        accuracy_high=high,
        sources={
            **_noted(device.sources, touched, source),
            "calibration": source,
            **(dict.fromkeys(("accuracy_low", "accuracy_high"), source) if interval is not None else {}),
        },
    )


def _level(level: Level, factor: float, source: str) -> Level:
    told = f"{level.source}, {source}" if level.source else source
    return replace(level, efficiency=level.efficiency / factor, **_times(level, LEVEL_SECONDS, factor), source=told)


def _host(host: Host, factor: float, source: str) -> Host:
    seconds, rates = _times(host, HOST_SECONDS, factor), _times(host, HOST_RATES, 1.0 / factor)
    return replace(host, **seconds, **rates, sources=_noted(host.sources, (*HOST_SECONDS, *HOST_RATES), source))


def _times(part: Device | Level | Host, names: Iterable[str], factor: float) -> dict[str, Any]:
    return {name: getattr(part, name) * factor for name in names}


def _noted(sources: Mapping[str, str], touched: Iterable[str], source: str) -> dict[str, str]:
    """`sources` with `source` after those of the figures that were touched."""
    names = frozenset(touched)
    return {k: f"{told}, {source}" if k.partition(".")[0] in names else told for k, told in sources.items()}


def _rate(rate: Rate, factor: float) -> Rate:
    return replace(
        rate, forward=rate.forward / factor, backward=rate.backward / factor, overhead=rate.overhead * factor
    )


def _table(table: Table, factor: float) -> Table:
    return {key: tuple((size, seconds * factor) for size, seconds in rows) for key, rows in table.items()}
