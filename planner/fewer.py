"""Smaller clusters of one kind: a slice of one node, or some of its nodes, with the same links and the same share of the host."""

from __future__ import annotations

import re
from dataclasses import replace

from ..errors import PinError
from .cluster import Cluster, Level
from .costs import PriceBook
from .prices import Prices
from .shapes import divisors

ALL_NODES = 8
"""Up to so many nodes every number of them is a candidate; beyond, eight to each doubling."""


def device_counts(cluster: Cluster) -> tuple[int, ...]:
    """Numbers of devices to consider, ascending: divisors of a node, then whole nodes up to all of the cluster's.

    Every number of nodes up to 8; then 9, 10, ... 16, 18, 20, ... 32, 36, ...; and the cluster itself.
    """
    node = min(cluster.per_node, cluster.devices)
    found = {d for d in divisors(node) if d <= cluster.devices}
    nodes, step = 1, 1
    while nodes * node <= cluster.devices:
        found.add(nodes * node)
        nodes += step
        if nodes >= 2 * ALL_NODES * step:
            step *= 2
    return tuple(sorted({*found, cluster.devices}))


def sized(cluster: Cluster, devices: int) -> Cluster:
    """The first `devices` devices of a cluster: part of a node (a divisor of it), or whole nodes.

    One rank's share of links, host and disk stays what it is. Raises PinError for another number.
    """
    if devices == cluster.devices:
        return cluster
    node = cluster.per_node
    if devices < 1 or devices > cluster.devices or (node % devices if devices < node else devices % node):
        raise PinError(f"{devices} devices are neither a divisor of a node of {node} nor whole nodes of {cluster.name}")
    per_node = min(node, devices)
    host = None if cluster.host is None or per_node == node else cluster.host.scaled(per_node)
    return replace(
        cluster, devices=devices, per_node=per_node, levels=_levels(cluster, devices),
        spec=_spec(cluster, devices), host=host or cluster.host,
    )  # fmt: skip


def priced_on(prices: PriceBook, cluster: Cluster) -> PriceBook:
    """The same price list on another number of devices; one that knows no cluster stays as it is."""
    return replace(prices, cluster=cluster) if isinstance(prices, Prices) else prices


def _levels(cluster: Cluster, devices: int) -> tuple[Level, ...]:
    """Levels that so many devices still cross; one whose blocks no longer divide them joins whole nodes that do."""
    found: list[Level] = []
    for level in cluster.levels:
        if level.ranks >= devices:
            return (*found, replace(level, ranks=devices))
        ranks = level.ranks
        while devices % ranks:
            ranks -= min(cluster.per_node, ranks - 1)
        found.append(replace(level, ranks=ranks))
    return tuple(found)


def _spec(cluster: Cluster, devices: int) -> str:
    """The string of the smaller cluster, where the larger one came from a preset (`h100-sxm:8x4@3200Gbps`)."""
    match = re.fullmatch(r"(?P<name>[\w.-]+):(?P<node>\d+)(?:x(?P<nodes>\d+))?(?P<rate>@.*)?", cluster.spec)
    if match is None or cluster.pools:
        return ""
    node = cluster.per_node
    if devices <= node:
        return f"{match['name']}:{devices}"
    return f"{match['name']}:{node}x{devices // node}{match['rate'] or ''}"
