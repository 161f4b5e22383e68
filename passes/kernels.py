"""What the planner needs to know of an op's arguments to say which kernel runs it."""

from __future__ import annotations

from collections.abc import Mapping

from .summarize import Call


def dropping_attention(calls: Mapping[str, Call]) -> frozenset[str]:
    """Names of the attention ops that drop probabilities (`dropout_p`, the fifth argument)."""
    found = set()
    for name, call in calls.items():
        if call.rule.kind == "attention":
            args = call.node.args
            if args[4] if len(args) > 4 else call.node.kwargs.get("dropout_p", 0.0):
                found.add(name)
    return frozenset(found)
