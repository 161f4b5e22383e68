"""The few physical parameters that fit_prices.py fits: which figures of which devices and links each one multiplies.

Each has a prior: the figure in profiles/data with the standard deviation of its logarithm, wide where it was assumed and narrow
where somebody measured it. None belongs to a model, a source or a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from shardwright.planner.cluster import Cluster, Device, Level

STREAMED = (
    "memory",
    "elementwise",
    "copy",
    "fill",
    "norm",
    "reduction",
    "loss",
    "embedding",
    "random",
    "optimizer",
    "default",
)
"""Kinds whose efficiency is a share of memory bandwidth: one factor for all of them."""


@dataclass(frozen=True)
class Parameter:
    """`figures` of devices whose name starts with one of `devices`, or of links whose name does with one of `links`.

    A figure is a field, or "efficiencies.KIND". `spread` is the prior's, of the logarithm of the factor.
    """

    name: str
    figures: tuple[str, ...]
    spread: float
    devices: tuple[str, ...] = ()
    links: tuple[str, ...] = ()

    def concerns(self, cluster: Cluster) -> bool:
        """Whether it changes anything of a cluster."""
        links = any(level.name.startswith(self.links) for level in cluster.levels) if self.links else False
        return links or (bool(self.devices) and cluster.device.name.startswith(self.devices))


def _kinds(*names: str) -> tuple[str, ...]:
    return tuple(f"efficiencies.{name}" for name in names)


GPUS = ("a100", "h100", "h200", "v100", "b200", "gb200", "t4", "l4", "a10g", "rtx", "mi")

PARAMETERS: tuple[Parameter, ...] = (
    *(Parameter(f"{d} matmul", _kinds("matmul"), 0.10, devices=(d,)) for d in ("a100", "h100", "v100")),
    Parameter("h100 matmul in 8 bits", _kinds("matmul_float8_e4m3fn"), 0.15, devices=("h100",)),
    *(
        Parameter(f"{d} streaming", _kinds(*STREAMED), 0.15, devices=(d,)) for d in ("a100", "h100", "v100")
    ),
    Parameter("attention_math", _kinds("attention_math", "attention_math_backward"), 0.25, devices=GPUS),
    *(
        Parameter(f"{d} attention_flash1", _kinds("attention_flash1", "attention_flash1_backward"), 0.20, devices=(d,))
        for d in ("a100", "h100")
    ),
    Parameter("h100 attention_flash3", _kinds("attention_flash3", "attention_flash3_backward"), 0.15, devices=("h100",)),
    Parameter("issue", ("issue_seconds",), 0.5, devices=GPUS),
    Parameter("kernel overhead", ("kernel_overhead_seconds",), 0.3, devices=GPUS),
    Parameter("overlap", ("overlap_slowdown",), 0.10, devices=GPUS),
    Parameter("nvlink", ("efficiency",), 0.15, links=("nvlink",)),
    Parameter("network", ("efficiency",), 0.15, links=("infiniband", "network", "ethernet")),
    Parameter("collective launch", ("launch_seconds",), 0.4, links=("nvlink", "infiniband", "network")),
)  # fmt: skip


def adjusted(cluster: Cluster, factors: Mapping[str, float], parameters: Sequence[Parameter] = PARAMETERS) -> Cluster:
    """A cluster with every parameter's figures multiplied by its factor (1 where none is given)."""
    device, levels = cluster.device, list(cluster.levels)
    for parameter in parameters:
        factor = factors.get(parameter.name, 1.0)
        if factor == 1.0 or not parameter.concerns(cluster):
            continue
        if parameter.links:
            levels = [_level(v, parameter, factor) if v.name.startswith(parameter.links) else v for v in levels]
        else:
            device = _device(device, parameter, factor)
    return replace(cluster, device=device, levels=tuple(levels))


def _device(device: Device, parameter: Parameter, factor: float) -> Device:
    for figure in parameter.figures:
        head, _, kind = figure.partition(".")
        if kind:
            device = replace(device, efficiencies={**device.efficiencies, kind: device.efficiency(kind) * factor})
        else:
            device = replace(device, **{head: getattr(device, head) * factor})
    return device


def _level(level: Level, parameter: Parameter, factor: float) -> Level:
    change: Callable[[str], float] = lambda name: getattr(level, name) * factor  # noqa: E731
    return replace(level, **{name: change(name) for name in parameter.figures})
