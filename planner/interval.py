"""The interval a predicted step time comes with.

Predictions are wrong by a factor, so the interval is one too: nine of ten steps measured lie between `accuracy_low` and
`accuracy_high` times the prediction. Those two are data of a device: quantiles over published runs of sources that took no part in
the fit (benchmarks/fit_prices.py), or over a user's own runs once they calibrate (profiles/calibrate.py). Where a cluster has
several kinds of devices the widest of them holds.
"""

from __future__ import annotations

from .cluster import Cluster


def step_interval(cluster: Cluster, seconds: float) -> tuple[float, float]:
    """The 90 % interval of a step predicted to take `seconds` on `cluster`, in seconds."""
    devices = [pool.device for pool in cluster.pool_list()]
    return seconds * min(d.accuracy_low for d in devices), seconds * max(d.accuracy_high for d in devices)
