"""Heads with their losses in whole graphs: what is left alone, real models, saved bytes, prices and placements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager import family, run
from shardwright.passes.capture import Captured, capture
from shardwright.passes.fuse.head_loss import FuseHeadLoss
from shardwright.passes.gain import Paying
from shardwright.passes.lift import without_dropout
from shardwright.passes.rewrite import rewritten
from shardwright.passes.summarize import summarize
from shardwright.planner import rule_heads
from shardwright.planner.choices import choices, states
from shardwright.planner.inside import INSIDE
from shardwright.planner.placement import P, R, V, split
from shardwright.planner.prices import Prices
from shardwright.planner.scratch import inside_bytes
from shardwright.profiles.devices import parse_cluster
from test_fuse_head_loss import fused, heads
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, T5Config, T5ForConditionalGeneration

ROWS, WIDE, CLASSES = 24, 8, 32


class Net(nn.Module):
    """An embedding and a head; `body(net, logits, labels)` makes the outputs."""

    def __init__(self, body: Callable[..., Any], rows: int = ROWS, wide: int = WIDE, classes: int = CLASSES) -> None:
        super().__init__()
        self.table, self.head, self.body = nn.Embedding(classes, wide), nn.Linear(wide, classes, bias=False), body
        self.norm, self.temperature = nn.LayerNorm(wide), nn.Parameter(torch.ones(()))
        self.ids = torch.arange(rows) % classes

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        return self.body(self, self.head(self.norm(self.table(ids))), labels)


def captured_of(body: Callable[..., Any], **options: Any) -> Captured:
    net = Net(body)
    return capture(net, (net.ids, net.ids.flip(0)), **options)


def second_loss(net: Net, z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t) + 1e-4 * z.logsumexp(1).square().mean()


def accuracy(net: Net, z: Tensor, t: Tensor) -> dict[str, Tensor]:
    return {"loss": F.cross_entropy(z, t), "hits": (z.argmax(1) == t).float().mean()}


def probabilities(net: Net, z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.softmax(z.detach() * 0 + t[:, None], 1))


LEFT_ALONE: dict[str, Callable[..., Any]] = {
    "a second loss": second_loss,
    "an accuracy": accuracy,
    "class weights": lambda net, z, t: F.cross_entropy(z, t, torch.arange(1.0, CLASSES + 1)),
    "a loss per row": lambda net, z, t: F.cross_entropy(z, t, reduction="none").square().sum(),
    "a learned factor": lambda net, z, t: F.cross_entropy(z * net.temperature, t),
    "a bias per row": lambda net, z, t: F.cross_entropy(z + net.table.weight.sum(1)[:ROWS, None], t),
    "another function": lambda net, z, t: F.cross_entropy(z.relu(), t),
    "classes in groups": lambda net, z, t: F.cross_entropy(z.reshape(2 * ROWS, CLASSES // 2), t.repeat(2) % 16),
    "some classes": lambda net, z, t: F.cross_entropy(z[:, :-1], t.clamp(max=CLASSES - 2)),
    "rows as classes": lambda net, z, t: F.cross_entropy(z.t(), torch.arange(CLASSES) % ROWS),
    "probabilities": probabilities,
    "softmax of other dims": lambda net, z, t: F.nll_loss(z.log_softmax(0), t),
    "a trained nothing": lambda net, z, t: F.cross_entropy(z.detach(), t) + net.temperature,
    "no product": lambda net, z, t: F.cross_entropy(net.table.weight, net.ids.new_zeros(CLASSES)),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_left_alone(case: str) -> None:
    before = captured_of(LEFT_ALONE[case])
    after = rewritten(before, [FuseHeadLoss()])
    assert heads(after) == []
    assert [n.format_node() for n in after.graph.graph.nodes] == [n.format_node() for n in before.graph.graph.nodes]
    assert after.flat_outputs == before.flat_outputs


def test_inference_graphs_are_left_alone() -> None:
    assert heads(rewritten(captured_of(accuracy, train=False), [FuseHeadLoss()])) == []
    assert heads(rewritten(captured_of(lambda net, z, t: F.cross_entropy(z, t), train=False), [FuseHeadLoss()])) == []


def test_an_output_that_is_given_up_names_nothing() -> None:
    before = captured_of(
        lambda net, z, t: {"loss": F.cross_entropy(z, t), "logits": z, "mean": z.detach().mean() * 0 + t.sum()}
    )
    assert heads(rewritten(before, [FuseHeadLoss()])) == []  # the mean reads the logits
    before = captured_of(lambda net, z, t: {"loss": F.cross_entropy(z, t), "logits": z, "labels": t + 1})
    after = fused(before)
    assert len(before.outputs) == 3
    assert len(after.outputs) == 2
    assert after.unflatten(dict.fromkeys(after.outputs, 1.0)) == {"loss": 1.0, "logits": None, "labels": 1.0}


def more_families(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    ids = torch.randint(1, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :2] = -100
    torch.manual_seed(0)
    if name == "t5":
        shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
        return T5ForConditionalGeneration(T5Config(vocab_size=90, **shape)), {"input_ids": ids, "labels": ids}
    config = Gemma2Config(vocab_size=90, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1,
                          num_key_value_heads=2, head_dim=8)  # fmt: skip
    return Gemma2ForCausalLM(config), {"input_ids": ids, "labels": labels}


def any_family(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    return more_families(name) if name in ("t5", "gemma2") else family(name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "bert-classify", "t5", "gemma2"])
def test_real_models(name: str, dtype: torch.dtype) -> None:
    model, kwargs = any_family(name)
    model.to(dtype)
    with without_dropout():
        before = capture(model, (), kwargs, lift_float64=dtype == torch.float64)
    after = fused(before, chunk=5)
    assert len(heads(after)) == 1
    assert len(after.outputs) == len(before.outputs) - 1
    if dtype != torch.float64:
        return
    found = []
    for graph in (before, after):
        model.zero_grad()
        outputs = run(graph, model, (), kwargs)
        outputs[graph.loss].backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None] + [outputs[graph.loss].detach()])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(*found, strict=True))


# -- bytes and prices


def saved_bytes(captured: Captured, model: nn.Module, args: tuple[Any, ...]) -> int:
    """Bytes of what autograd keeps of a run, parameters left out."""
    values = captured.values(model) | captured.flatten(args)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().nbytes() > 64 and t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = fx.Interpreter(captured.graph).run(*[values[e.node] for e in captured.entries])
    assert outputs
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def prices(compute: str = "float32") -> Prices:
    return Prices(parse_cluster("h100-sxm:1x1"), compute)


@pytest.mark.parametrize("body", [
    lambda net, z, t: F.cross_entropy(z, t),
    lambda net, z, t: F.cross_entropy(5 * torch.tanh(z / 5), t, label_smoothing=0.1),
])  # fmt: skip
def test_saved_bytes_are_what_hooks_see(body: Callable[..., Any]) -> None:
    net = Net(body)
    args = net.ids, net.ids.flip(0)
    before = capture(net, args)
    after = rewritten(before, [FuseHeadLoss()])
    gain = Paying(prices())(FuseHeadLoss(), before.graph.graph, after.graph.graph)
    assert gain.saved_bytes == saved_bytes(before, net, args) - saved_bytes(after, net, args)


def plain_op(rows: int, wide: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(op, outline) of one head on meta tensors."""
    with torch.device("meta"):
        net = Net(lambda net, z, t: F.cross_entropy(z, t), rows, wide, classes).to(dtype)
    outline = summarize(rewritten(capture(net, (net.ids, net.ids)), [FuseHeadLoss()])).outline
    return next(o for o in outline.ops if o.kind == "head_loss"), outline


def test_an_op_is_priced_by_its_three_products() -> None:
    op, outline = plain_op(8192, 4096, 32000, torch.bfloat16)
    assert op.flops == 6 * 8192 * 4096 * 32000
    assert op.backward_flops == 0
    forward, backward = prices("bfloat16").op(op, tuple(f.size for f in op.factors), outline.tensors)
    with torch.device("meta"):
        net = Net(lambda net, z, t: F.cross_entropy(z, t), 8192, 4096, 32000).to(torch.bfloat16)
    plain = summarize(capture(net, (net.ids, net.ids))).outline
    product = next(o for o in plain.ops if o.kind == "matmul")
    apart = prices("bfloat16").op(product, tuple(f.size for f in product.factors), plain.tensors)
    three = sum(price.seconds for price in apart)
    assert three < forward.seconds < 1.4 * three
    assert 0 < backward.seconds < 0.1 * three
    x, weight = (math_bytes(op, outline, i) for i in (0, 1))
    assert [s.bytes for s in op.saved] == [x, weight]


def math_bytes(op: Any, outline: Any, index: int) -> int:
    return outline.tensors[op.operands[index].tensor].bytes


def test_saved_gradients_shrink_with_what_they_are_gradients_of() -> None:
    op, _ = plain_op(24, 6, 12)
    names = [[op.factors[f].name for f in s.factors] for s in op.saved]
    assert names == [["b", "k"], ["v", "k"]]
    op, _ = plain_op(12, 6, 12)  # rows and classes of one size
    assert [[op.factors[f].name for f in s.factors] for s in op.saved] == names


def test_what_pays_is_fused_and_what_does_not_is_not() -> None:
    with torch.device("meta"):
        large = Net(lambda net, z, t: F.cross_entropy(z.float(), t), 8192, 2048, 50304).to(torch.bfloat16)
        small = Net(lambda net, z, t: F.cross_entropy(z, t), 4, 2048, 4000)
    for net, pays in ((large, True), (small, False)):
        before = capture(net, (net.ids, net.ids))
        after = rewritten(before, [FuseHeadLoss()], weigh=Paying(prices("bfloat16")))
        assert bool(heads(after)) == pays, after.records[-1]


def test_placements() -> None:
    op, outline = plain_op(24, 6, 12)
    tensors = dict(outline.tensors)
    assert set(choices(op, tensors, 2)) == {"R", "V", "b", "v"}
    assert states(op, tensors, "b") == ((split(0), V, split(0)), (P,))
    assert states(op, tensors, "v") == ((V, split(0), R), (R,))


def test_collectives_and_bytes_inside() -> None:
    op, outline = plain_op(4096, 64, 32000)
    rows = rule_heads.chunk_rows(4096, 32000, 64, "float32")
    assert rows == 256
    assert inside_bytes(op, outline.tensors, ("R",), (1,), training=True, unfolds=False) == rows * 32000 * 8
    half = rule_heads.chunk_rows(4096, 16000, 64, "float32") * 16000 * 8
    assert inside_bytes(op, outline.tensors, ("v",), (2,), training=True, unfolds=False) == half
    sizes = tuple(f.size // (2 if f.name == "v" else 1) for f in op.factors)
    found = INSIDE["vocab_head"](op, outline.tensors, sizes, 2)
    assert len(found) == 2 * 4096 // rule_heads.chunk_rows(4096, 16000, 64, "float32")
    assert sum(c.bytes for c in found) == 3 * 4096 * 4


def test_chunks_are_even_and_few() -> None:
    for rows in (1, 255, 256, 257, 1000, 10**6):
        chunk = rule_heads.chunk_rows(rows, 50257, 768, "float32")
        assert -(-rows // chunk) <= rule_heads.MOST_CHUNKS
        assert chunk <= max(256, -(-rows // rule_heads.MOST_CHUNKS))
    assert rule_heads.chunk_rows(257, 50257, 768, "float32") == 129
    assert rule_heads.chunk_rows(4096, 100, 64, "bfloat16") == 4096
    assert rule_heads.chunk_rows(8192, 128256, 4096, "bfloat16") == 4096
    assert rule_heads.chunk_rows(0, 100, 64, "bfloat16") == 1
