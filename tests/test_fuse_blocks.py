"""All fusions on whole transformers: values stay, every op has a rule, and the gains are those of the prices."""

from __future__ import annotations

import blockmodels
import pytest
import torch
from functorch.compile import aot_function
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
    merged = verdicts.pop("merge_linears")
    assert not merged.stays  # the copies of weights are kept
    assert set(verdicts) == {"rms_norm", "rotary", "gated", "attention", "head_loss"}
    for name, verdict in verdicts.items():
        assert verdict.stays, (name, verdict)
        assert verdict.seconds > 0
        assert verdict.saved_bytes >= 0


CALLED = {
    "gated": lambda x, w: torch.ops.shardwright.gated(x, x + w, "silu"),
    "rms_norm": lambda x, w: torch.ops.shardwright.rms_norm(x, w, 1e-6, 1.0),
    "rotary": lambda x, w: torch.ops.shardwright.rotary(x, w.cos(), w.sin()),
}


@pytest.mark.parametrize("name", CALLED)
def test_compilers_see_through(name):
    """The joint graph of a compiled call holds plain ops alone, and makes the same gradients."""
    x, w = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (6, 1))
    seen: list[str] = []

    def look(module, inputs):
        seen.extend(str(n.target) for n in module.graph.nodes if n.op == "call_function")
        return module

    body = CALLED[name]
    found = aot_function(lambda x, w: body(x, w[0]), look, look)(x, w)
    way = torch.randn_like(found)
    ours = torch.autograd.grad(found, (x, w), way)
    plain = torch.autograd.grad(body(x, w[0]), (x, w), way)
    assert seen
    assert not [n for n in seen if "shardwright" in n]
    for a, b in zip(ours, plain, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
