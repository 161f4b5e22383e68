"""`shardwright clusters [NAME]`: the known devices, or everything assumed of one, or of a cluster, with its sources."""

from __future__ import annotations

import click

from .options import json_option


@click.command("clusters")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """Show the known devices, or all that is assumed of one (h100-sxm) or of a cluster (h100-sxm:8x4, cluster.toml).

    A cluster is written DEVICE:PERNODExNODES, such as h100-sxm:8x4, with @3200Gbps for another network.
    """
    from ..profiles.devices import describe, describe_cluster, list_clusters, parse_cluster
    from .listings import cluster_details, cluster_list
    from .tables import print_json, show

    if name is not None:
        pools = describe_cluster(parse_cluster(name)) if {".", ":", "+"} & set(name) else [describe(name)]
        if as_json:
            print_json(pools[0] if len(pools) == 1 else pools)
            return
        for pool in pools:
            show(cluster_details(pool))
        return
    found = [describe(each) for each in list_clusters()]
    if as_json:
        print_json(found)
    else:
        show(cluster_list(found))
