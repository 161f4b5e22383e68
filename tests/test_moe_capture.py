"""Mixture-of-experts modules lifted to one op at capture: the op, its gates, its splits, and models against their own loops."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from shardwright.passes.capture import capture
from shardwright.passes.experiment import flat, strip
from shardwright.passes.experts.gates import GateError, run_gate, trace_gate
from shardwright.passes.experts.interface import keeps_contract, lifted_experts, own_loops
from shardwright.passes.experts.op import experts, split_experts, split_width
from shardwright.passes.lift import lift_casts
from shardwright.passes.models import load_model
from shardwright.passes.observe import Observer
from shardwright.passes.summarize import summarize
from shardwright.passes.verify import verify_rule
from shardwright.planner.experts import expert_ops
from shardwright.planner.rules import instantiate
from torch import nn

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES = {
    "Mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 2),
    "Qwen2Moe": ({"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}, 2),
    "Qwen3Moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}, 2),
    "Olmoe": ({"num_experts": 4, "num_experts_per_tok": 2}, 2),
    "GptOss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, 2),
    "DeepseekV3": (
        {**LATENT, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24,
         "first_k_dense_replace": 1}, 1,
    ),
}  # fmt: skip
"""Config changes, and how many layers have experts."""


def model_of(family: str, **changes) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **FAMILIES[family][0], **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    with torch.no_grad():
        for p in model.parameters():  # no zero biases, no equal norms
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(rows=2, seq=8):
    ids = torch.randint(0, 64, (rows, seq), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def expert_nodes(captured):
    return [n for n in captured.graph.graph.nodes if n.target is experts]


# -- models


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_lifted_and_equal_their_own_loops(family):
    """Loss and every gradient in float64; the modules are as before."""
    model = model_of(family).double()
    before = {n: dict(vars(m)) for n, m in model.named_modules() if keeps_contract(m)}
    captured = capture(model, (), batch(), lift_float64=True)
    assert before == {n: dict(vars(m)) for n, m in model.named_modules() if keeps_contract(m)}
    assert len(expert_nodes(captured)) == FAMILIES[family][1]
    assert not any("group" in str(n.target) or "sort" in str(n.target) for n in captured.graph.graph.nodes)
    parameters = dict(model.named_parameters())
    values = captured.values(model) | captured.flatten((), batch())
    mine = captured.graph(*[values[e.node] for e in captured.entries])[0]
    found = torch.autograd.grad(mine, list(parameters.values()), allow_unused=True)
    with own_loops(model), lift_casts():
        theirs = model(**batch()).loss
    wanted = torch.autograd.grad(theirs, list(parameters.values()), allow_unused=True)
    assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)
    for name, a, b in zip(parameters, found, wanted, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.allclose(a, b, rtol=0, atol=1e-12), name
    outline = summarize(captured).outline
    assert [f.op for f in expert_ops(outline)] == [n.name for n in expert_nodes(captured)]
    assert outline.microbatch_blockers == ()


def test_graph_does_not_depend_on_the_implementation_asked_for():
    prints = set()
    for name in ("eager", "grouped_mm", "batched_mm"):
        model = model_of("Mixtral")
        model.set_experts_implementation(name)
        prints.add(summarize(capture(model, (), batch())).outline.fingerprint)
        assert model.config._experts_implementation == name
    assert len(prints) == 1


def test_modules_are_restored_where_capture_fails():
    model = model_of("Mixtral")

    def refuse(*_):
        raise ValueError("no")

    model.model.norm.forward = refuse
    with pytest.raises(Exception, match="cannot be captured"):
        capture(model, (), batch())
    assert not any("forward" in vars(m) for m in model.modules() if keeps_contract(m))


def test_router_loss_couples_the_batch_and_is_named():
    outline = summarize(capture(model_of("Mixtral", output_router_logits=True), (), batch())).outline
    assert any("load_balancing_loss_func" in b or "aux_loss" in b for b in outline.microbatch_blockers)
    assert len(expert_ops(outline)) == 2


def test_layers_with_buffers_of_their_own_are_one_region():
    """DeepSeek's routers each have a bias that is no parameter."""
    outline = summarize(capture(model_of("DeepseekV3", num_hidden_layers=4), (), batch())).outline
    assert [r.repeats for r in outline.regions if any("experts" in op for op in r.instances[0])] == [3]


def test_low_precision_weights():
    model = model_of("Mixtral").to(torch.bfloat16)
    captured = capture(model, (), batch())
    values = captured.values(model) | captured.flatten((), batch())
    mine = captured.graph(*[values[e.node] for e in captured.entries])[0]
    with own_loops(model):
        theirs = model(**batch()).loss
    assert torch.allclose(mine.float(), theirs.float(), rtol=2e-2)
    assert {expert_nodes(captured)[0].meta["val"].dtype} == {torch.bfloat16}


def test_layers_of_the_shipped_mixtral_have_the_right_work():
    loaded = load_model("hf:mixtral-8x7b", batch=4, seq=64)
    loaded.model.model.layers = loaded.model.model.layers[:2]
    outline = summarize(capture(loaded.model, (), loaded.kwargs)).outline
    first, second = expert_ops(outline)
    assert (first.experts, first.top_k, first.hidden, first.inner, first.tokens) == (8, 2, 4096, 14336, 256)
    assert first.flops == 256 * 2 * 3 * 4096 * 14336 * 2
    assert first.parameter_elements == 8 * 3 * 4096 * 14336
    assert set(first.parameters).isdisjoint(second.parameters)
    op = outline.op(first.op)
    assert op.projection
    saved = sum(s.bytes for s in op.saved if s.source == "new")
    assert saved == 256 * 2 * (2 * 14336 * 4 + 8)  # gate inputs in float32 and the order of the slots


# -- what cannot be lifted


class Stacked(nn.Module):
    """Keeps the contract by hand; its own forward is a dense loop."""

    def __init__(self, gate=None, norm=False, dtype=torch.float32) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 6, dtype=dtype))
        self.down_proj = nn.Parameter(torch.randn(4, 6, 8, dtype=dtype))
        self.has_gate, self.has_bias, self.is_transposed, self.has_post_expert_norm = True, False, False, norm
        self.gate = gate

    def _apply_gate(self, x):
        return self.gate(x) if self.gate is not None else F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]

    def forward(self, x, index, scale):
        every = [
            F.linear(self._apply_gate(F.linear(x, u)), d)
            for u, d in zip(self.gate_up_proj, self.down_proj, strict=True)
        ]
        stacked = torch.stack(every, 1)
        chosen = stacked.gather(1, index.unsqueeze(-1).expand(-1, -1, stacked.shape[-1]))
        return (chosen * scale.unsqueeze(-1)).sum(1)


class Routed(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(6, 4), Stacked(**options)

    def forward(self, x):
        scale, index = self.router(x).softmax(-1).topk(2)
        return self.experts(x, index, scale).square().sum()


class Scaled(nn.Module):
    """A gate with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x.chunk(2, -1)[0] * self.weight


def test_a_module_of_nobodys_library_that_keeps_the_contract_is_lifted():
    model, x = Routed(), torch.randn(5, 6)
    captured = capture(model, (x,))
    values = captured.values(model) | captured.flatten((x,))
    assert len(expert_nodes(captured)) == 1
    found = captured.graph(*[values[e.node] for e in captured.entries])[0]
    assert torch.allclose(found, model(x), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"norm": True}, "a norm stands between"), ({"gate": Scaled()}, "not elementwise|tensor of its own"),
     ({"gate": lambda x: x.chunk(2, -1)[0].softmax(-1)}, "not elementwise"),
     ({"gate": lambda x: x[:, :8] + x[:, 8:].flip(1)}, "not elementwise")],
)  # fmt: skip
def test_others_stay_as_they_are_and_are_named(options, why):
    captured = capture(Routed(**options), (torch.randn(5, 6),))
    assert expert_nodes(captured) == []
    (note,) = captured.notes
    assert "experts are not lifted" in note
    assert re.search(why, note)


def test_lifting_is_undone_on_the_way_out():
    model = Routed()
    with lifted_experts(model) as notes:
        assert notes == []
        assert "forward" in vars(model.experts)
    assert "forward" not in vars(model.experts)


# -- gates


def gates():
    yield "c f", lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    yield (
        "c f",
        lambda x: F.gelu(x[..., :16], approximate="tanh") * x[..., 16:].clamp(-1, 1) if x.shape[-1] == 32 else x,
    )
    yield "f c", lambda x: x[..., ::2].clamp(max=7) * torch.sigmoid(1.7 * x[..., ::2]) * (x[..., 1::2] + 1)
    yield "c f", lambda x: (F.silu(x.chunk(2, -1)[0].float()) * x.chunk(2, -1)[1].float()).to(x.dtype)
    yield "f", lambda x: F.relu(x).square()


@pytest.mark.parametrize("number", [0, 2, 3, 4])
def test_gates_are_programs(number):
    layout, gate = list(gates())[number]
    text = trace_gate(gate, 32, torch.float32)
    assert text.startswith(f"{layout}|")
    for width in (32, 8):
        x = torch.randn(3, width)
        assert torch.equal(run_gate(text, x), gate(x))


def test_gates_that_name_sizes_are_refused():
    with pytest.raises(GateError, match="mixes columns"):
        trace_gate(list(gates())[1][1], 32, torch.float32)


# -- the op


GATES = {name: trace_gate(gate, 8, torch.float64) for name, gate in [
    ("c f", lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]),
    ("f c", lambda x: x[..., ::2].sigmoid() * (x[..., 1::2] + 1)), ("f", lambda x: F.gelu(x)),
]}  # fmt: skip


def arguments(layout="c f", transposed=False, biased=True, tokens=6, count=4):
    """Random arguments of the op in float64, differentiable."""
    draw = torch.Generator().manual_seed(3)

    def x(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    wide = 4 if layout == "f" else 8
    up, down = ((count, 6, wide), (count, 4, 6)) if transposed else ((count, wide, 6), (count, 6, 4))
    index = torch.randint(0, count, (tokens, 2), generator=draw)
    biases = (x(count, wide), x(count, 6)) if biased else (None, None)
    return x(tokens, 6), index, x(tokens, 2), x(*up), x(*down), *biases, GATES[layout], transposed


def dense(x, index, scale, up, down, up_bias, down_bias, gate, transposed):
    """The formula, one token and slot after the other."""
    rows = []
    for t, j in itertools.product(range(index.shape[0]), range(index.shape[1])):
        e = int(index[t, j])
        if not 0 <= e < up.shape[0]:
            rows.append(torch.zeros_like(x[t]))
            continue
        inner = x[t] @ (up[e] if transposed else up[e].t())
        inner = inner if up_bias is None else inner + up_bias[e]
        outer = run_gate(gate, inner.unsqueeze(0))[0] @ (down[e] if transposed else down[e].t())
        rows.append(scale[t, j] * (outer if down_bias is None else outer + down_bias[e]))
    return torch.stack(rows).view(*index.shape, -1).sum(1)


def close(found, wanted):
    assert (found is None) == (wanted is None)
    assert found is None or torch.allclose(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", GATES)
def test_op_is_its_formula(layout, transposed, biased):
    """Values and gradients, with experts nobody asks for and slots of no expert."""
    given = arguments(layout, transposed, biased)
    given[1].copy_(torch.tensor([[0, 1], [3, 3], [1, 0], [4, 0], [-1, 3], [1, 1]]))
    leaves = [a for a in given if isinstance(a, torch.Tensor) and a.requires_grad]
    mine, wanted = experts(*given), dense(*given)
    weights = torch.randn_like(mine)
    close(mine, wanted)
    for a, b in zip(
        torch.autograd.grad((mine * weights).sum(), leaves),
        torch.autograd.grad((wanted * weights).sum(), leaves),
        strict=True,
    ):
        close(a, b)  # fmt: skip


def test_frozen_stacks_take_no_gradient():
    given = arguments()
    up, down = given[3].detach(), given[4].detach()
    out = experts(*given[:3], up, down, *given[5:])
    (grad,) = torch.autograd.grad(out.sum(), given[0])
    assert grad.shape == given[0].shape


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", GATES)
def test_rule_is_true_of_the_op(layout, biased):
    """Every free split, entry of `linear` and V, by the machinery all rules are verified with."""
    given = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments(layout, biased=biased)]
    found: list[torch.Tensor] = []
    bare = strip(tuple(given), found)
    rule = instantiate(
        "shardwright.experts", bare, {}, [f.shape for f in found], [r.shape for r in flat(experts(*given))]
    )
    assert rule.free() == (("t",) if biased else ("t", "f"))
    assert verify_rule(experts, tuple(given), {}, rule) == []


def parts_of(form_of, given, cut, ways):
    """Sum of the results and per rank the gradients, each rank on its part of the stacks."""
    total, gradients = 0, []
    for rank in range(ways):
        local = cut(given, rank)
        leaves = [
            a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in local
        ]
        target, args, kwargs = form_of((experts, tuple(leaves), {}), rank)
        out = target(*args, **kwargs)
        out.sum().backward()
        total = total + out.detach()
        gradients.append([a.grad if isinstance(a, torch.Tensor) and a.is_floating_point() else None for a in leaves])
    return total, gradients


def test_experts_split_over_ranks_sum_to_the_whole():
    given = arguments()
    whole = experts(*given)
    wanted = torch.autograd.grad(whole.sum(), [given[i] for i in (0, 2, 3, 4, 5, 6)])

    def cut(args, rank):
        return [a.chunk(4)[rank] if i in (3, 4, 5, 6) else a for i, a in enumerate(args)]

    def form(call, rank):  # two axes of two, the major one first
        return split_experts(split_experts(call, "", rank // 2, 2), "", rank % 2, 2)

    total, gradients = parts_of(form, given, cut, 4)
    close(total, whole.detach())
    close(sum(g[0] for g in gradients), wanted[0])
    close(sum(g[2] for g in gradients), wanted[1])
    for at, i in enumerate((3, 4, 5, 6), start=2):
        close(torch.cat([g[i] for g in gradients]), wanted[at])


def test_width_split_over_ranks_adds_the_bias_once():
    given = arguments("f")
    whole = experts(*given)
    wanted = torch.autograd.grad(whole.sum(), [given[i] for i in (0, 2, 3, 4, 5, 6)])

    def cut(args, rank):
        dims = {3: 1, 4: 2, 5: 1}
        return [a.chunk(2, dims[i])[rank] if i in dims else a for i, a in enumerate(args)]

    total, gradients = parts_of(lambda call, rank: split_width(call, "", rank, 2), given, cut, 2)
    close(total, whole.detach())
    for i, at in ((0, 0), (2, 1), (6, 5)):
        close(sum(g[i] for g in gradients), wanted[at])
    close(torch.cat([g[3] for g in gradients], 1), wanted[2])
    close(torch.cat([g[4] for g in gradients], 2), wanted[3])


def test_op_keeps_its_operands_gate_inputs_and_order_only():
    captured = capture(Routed(), (torch.randn(5, 6),))
    seen = Observer().observe(expert_nodes(captured)[0])
    assert seen.operands == (0, 1, 2, 3, 4)
    assert sorted(shape for shape, _ in seen.new) == [(10,), (10, 16)]


def test_compiled_graph_gives_the_same():
    model, x = Routed(), torch.randn(5, 6)
    captured = capture(model, (x,))
    values = captured.values(model) | captured.flatten((x,))
    leaves = [values[e.node] for e in captured.entries]
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(captured.graph(*leaves)[0], parameters)
    compiled = torch.compile(captured.graph, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves)[0], parameters), wanted, strict=True):
        close(a, b)


@pytest.mark.gpu
def test_grouped_kernel_is_the_loop():
    """bfloat16 on a GPU takes torch's grouped kernel; experts without tokens and slots of no expert included."""
    draw = torch.Generator().manual_seed(0)
    index = torch.tensor([[0, 1], [3, 3], [1, 0], [4, 0], [-1, 3], [1, 1]])
    sides = [torch.randn(shape, generator=draw) for shape in ((6, 32), (6, 2), (4, 32, 32), (4, 32, 16))]
    outcomes = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        x, scale, up, down = (s.to(torch.bfloat16).to(device, dtype).requires_grad_() for s in sides)
        out = experts(x, index.to(device), scale, up, down, None, None, GATES["c f"], False)
        outcomes.append([out, *torch.autograd.grad(out.sum(), (x, scale, up, down))])
    for found, wanted in zip(*outcomes, strict=True):
        assert torch.allclose(found.cpu().double(), wanted, rtol=5e-2, atol=5e-2 * wanted.abs().max().item())
