"""`shardwright clusters [NAME]`: the known devices, or everything assumed of one with its sources."""

from __future__ import annotations

import click

from .options import json_option


@click.command("clusters")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """Show the known devices, or all that is assumed of one.

    A cluster is written DEVICE:PERNODExNODES, such as h100-sxm:8x4, with @3200Gbps for another network.
    """
    from ..profiles.devices import describe, list_clusters
    from .listings import cluster_details, cluster_list
    from .tables import print_json, show

    if name is not None:
        described = describe(name)
        if as_json:
            print_json(described)
        else:
            show(cluster_details(described))
        return
    found = [describe(each) for each in list_clusters()]
    if as_json:
        print_json(found)
    else:
        show(cluster_list(found))
