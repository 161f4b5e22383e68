"""All fusions on whole transformers: values stay, every op has a rule, and the gains are those of the prices."""

from __future__ import annotations

import blockmodels
import pytest
import torch
from fusing import PRICES, saved_bytes
from shardwright.passes.capture import capture
from shardwright.passes.checked import Verifying, inputs_of
from shardwright.passes.fuse import PASSES
from shardwright.passes.gain import Paying
from shardwright.passes.rewrite import rewritten
from shardwright.passes.summarize import summarize
from shardwright.planner.prices import Prices
from shardwright.profiles.devices import parse_cluster

EAGER = {"attn_implementation": "eager"}
TRANSFORMERS = ("rms-norm", "rotary", "gated", "attention", "gelu")


@pytest.mark.parametrize("name", blockmodels.FAMILIES)
def test_all_passes_together(name):
    model, kwargs = blockmodels.model(name, seq=24, **({} if name == "gptj" else EAGER))
    before = capture(model, (), kwargs, lift_float64=True)
    values = {n: v.detach() for n, v in (before.values(model) | before.flatten((), kwargs)).items()}
    verify = Verifying(before.constants, given=values, also=Paying(PRICES))
    after = rewritten(before, PASSES.values(), weigh=verify)
    verdicts = {r.name: r.verdict for r in after.records[len(before.records) :] if r.verdict is not None}
    assert verdicts
    assert not [v.why for v in verdicts.values() if "changes" in v.why]
    gained = sum(v.saved_bytes for v in verdicts.values() if v.stays)
    values |= inputs_of(before.graph.graph, 0) | values
    assert gained == saved_bytes(before, values) - saved_bytes(after, values)
    outline = summarize(after).outline
    assert len(outline.ops) < len(summarize(before).outline.ops)


def test_what_pays_on_a_gpu():
    """In half precision and at length, one call for attention takes fewer seconds and bytes; so do norms and gates."""
    model, kwargs = blockmodels.model("llama", torch.bfloat16, seq=256, **EAGER)
    before = capture(model, (), kwargs)
    prices = Prices(parse_cluster("h100-sxm:8"), "bfloat16")
    after = rewritten(before, PASSES.values(), weigh=Paying(prices))
    verdicts = {r.name: r.verdict for r in after.records[len(before.records) :] if r.verdict is not None}
    assert set(verdicts) == {"rms-norm", "rotary", "gated", "attention"}
    for name, verdict in verdicts.items():
        assert verdict.stays, (name, verdict)
        assert verdict.seconds > 0
        assert verdict.saved_bytes >= 0
