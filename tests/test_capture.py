"""Capture of unmodified models: the clean graph computes what the model does, and every problem is reported."""

from __future__ import annotations

import operator

import pytest
import torch
from eager import check, family, run, tokens
from shardwright.errors import CaptureError, UsageError
from shardwright.passes.capture import Captured, capture
from shardwright.passes.factories import on_device
from torch import fx, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
)

FAMILIES = ("gpt2", "llama", "bert", "bert-classify", "bert-padded", "vit")


def targets(captured: Captured) -> list[str]:
    return [str(n.target) for n in captured.graph.graph.nodes if n.op == "call_function"]


def flows(node: fx.Node) -> bool:
    flags = node.meta.get("differentiable", False)
    return any(flags) if isinstance(flags, tuple) else flags


@pytest.mark.parametrize("name", FAMILIES)
def test_families_equal_eager(name: str) -> None:
    model, kwargs = family(name)
    captured = check(model, **kwargs)
    assert captured.loss
    assert captured.train


@pytest.mark.parametrize("name", FAMILIES)
def test_meta_and_real_give_one_graph(name: str) -> None:
    model, kwargs = family(name)
    real = capture(model, (), kwargs)
    with torch.device("meta"):
        model, kwargs = family(name)
    meta = capture(model, (), kwargs)
    assert str(real.graph.graph) == str(meta.graph.graph)
    assert real.entries == meta.entries
    assert all(torch.equal(real.constants[k], meta.constants[k]) for k in real.constants)


@pytest.mark.parametrize("name", FAMILIES)
def test_graph_form(name: str) -> None:
    model, kwargs = family(name)
    captured = capture(model, (), kwargs)
    roles = [e.role for e in captured.entries]
    assert roles == sorted(roles, key=["parameter", "buffer", "constant", "input"].index)
    placeholders = [n.name for n in captured.graph.graph.nodes if n.op == "placeholder"]
    assert placeholders == [e.node for e in captured.entries]
    for node in captured.graph.graph.nodes:
        assert node.op in ("placeholder", "call_function", "output")
        if node.op == "call_function" and node.target is not operator.getitem:
            assert not node.target._schema.is_mutable
            assert not {"device", "layout", "pin_memory"} & set(node.kwargs)
        if node.op != "output":
            assert {"val", "source", "differentiable"} <= set(node.meta)
    unwanted = ("assert", "contiguous", "view.default", "alias", "clone", "detach", "addmm")
    assert not [t for t in targets(captured) if any(u in t for u in unwanted)]
    assert captured.outputs[0] == captured.loss


def test_nothing_of_the_model_changes() -> None:
    model, kwargs = family("llama")
    model.config.use_cache = True
    before = {n: (id(p), p.clone()) for n, p in [*model.named_parameters(), *model.named_buffers()]}
    capture(model, (), kwargs)
    assert model.config.use_cache is True
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert before[name][0] == id(tensor)
        assert torch.equal(before[name][1], tensor)


def test_model_is_restored_when_capture_fails() -> None:
    class Fails(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(-1, 7)

    model = Fails(4, 4)
    weight = model.weight
    with pytest.raises(CaptureError):
        capture(model, (torch.ones(2, 4),))
    assert model.weight is weight


def test_outputs_have_the_models_type() -> None:
    model, kwargs = family("gpt2")
    captured = capture(model.eval(), (), kwargs)
    out = captured.unflatten(run(captured, model, (), kwargs))
    expected = model(**kwargs)
    assert type(out) is type(expected)
    assert out.past_key_values is None
    assert torch.allclose(out.logits, expected.logits, atol=1e-5)


def test_source_names_module_and_line() -> None:
    model, kwargs = family("llama")
    captured = capture(model, (), kwargs)
    sources = [n.meta["source"] for n in captured.graph.graph.nodes if "silu" in str(n.target)]
    assert sources[1].startswith("model.layers.1.mlp.act_fn activations.py:")


def test_tied_and_frozen_parameters() -> None:
    model, kwargs = family("gpt2")
    model.transformer.wpe.weight.requires_grad_(False)
    entries = {e.fqn: e for e in check(model, **kwargs).entries}
    assert entries["transformer.wte.weight"].aliases == ("lm_head.weight",)
    assert "lm_head.weight" not in entries
    assert not entries["transformer.wpe.weight"].trainable


def test_non_persistent_buffers_are_named() -> None:
    model, kwargs = family("llama")
    entries = {e.fqn: e for e in capture(model, (), kwargs).entries}
    assert not entries["model.rotary_emb.inv_freq"].persistent


def test_one_tensor_as_two_inputs() -> None:
    model, kwargs = family("llama")
    ids = kwargs["input_ids"]
    captured = check(model, input_ids=ids, labels=ids)
    assert captured.inputs == ("input_ids", "labels")


def test_inference_graph() -> None:
    model, kwargs = family("bert")
    captured = capture(model.eval(), (), {"input_ids": kwargs["input_ids"]}, train=False)
    assert captured.loss == ""
    assert not any(flows(n) for n in captured.graph.graph.nodes)
    assert not any("dropout" in t for t in targets(captured))


def test_dropout_follows_the_models_mode() -> None:
    model, kwargs = family("gpt2")
    assert sum("dropout" in t for t in targets(capture(model.train(), (), kwargs))) == 5
    assert not any("dropout.default" in t for t in targets(capture(model.eval(), (), kwargs)))


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        y = self.linear(x) * scale
        return {"y": y, "sum": y.sum(), "loss": y.square().sum()}


def test_loss_is_found_by_name_and_by_shape() -> None:
    model = Sums()
    captured = check(model, torch.ones(2, 4), loss=lambda out: out["loss"])
    assert captured.flat_outputs[2] == captured.loss

    class First(Sums):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            y = self.linear(x)
            return y, y.sum()

    assert check(First(), torch.ones(2, 4), loss=lambda out: out[1]).flat_outputs[1] != ""


def test_loss_function() -> None:
    model, x = Sums(), torch.ones(2, 4)
    captured = capture(model, (x,), loss_fn=lambda out: out["y"].pow(2).mean())
    values = run(captured, model, (x,), {})
    assert torch.allclose(values[captured.loss], model(x)["y"].pow(2).mean())
    assert {e.fqn for e in captured.entries if e.role == "parameter"} == {"linear.weight", "linear.bias"}
    assert set(captured.unflatten(values)) == {"y", "sum", "loss"}
    model.linear.eval()
    capture(model, (x,), loss_fn=lambda out: out["loss"])
    assert model.training
    assert not model.linear.training
    with pytest.raises(CaptureError, match="0-dim"):
        capture(model, (x,), loss_fn=lambda out: out["y"])


def test_calls_that_differ_are_refused() -> None:
    model, x = Sums(), torch.ones(2, 4)
    captured = capture(model, (x,), {"scale": 2.0})
    assert list(captured.flatten((x,), {"scale": 2.0})) == ["x"]
    with pytest.raises(UsageError, match=r"constant 2\.0"):
        captured.flatten((x,), {"scale": 3.0})
    with pytest.raises(UsageError, match="structure"):
        captured.flatten((x, x), {"scale": 2.0})


def test_keyword_order_does_not_matter() -> None:
    model, kwargs = family("bert-padded")
    captured = capture(model, (), kwargs)
    turned = dict(reversed(kwargs.items()))
    assert captured.flatten((), turned).keys() == captured.flatten((), kwargs).keys()
    assert all(captured.flatten((), turned)[k] is kwargs[k] for k in kwargs)
    assert str(capture(model, (), turned).graph.graph.output_node().args) == str(
        captured.graph.graph.output_node().args
    )


def test_t5_equals_eager() -> None:
    torch.manual_seed(0)
    config = T5Config(
        num_layers=2, d_model=64, d_ff=128, num_heads=4, d_kv=16, vocab_size=100, decoder_start_token_id=0
    )
    check(T5ForConditionalGeneration(config), tolerance=1e-11, **tokens())


def test_sliding_window_equals_eager() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=100,
        sliding_window=5,
    )  # fmt: skip
    check(MistralForCausalLM(config), **tokens())


def test_frozen_batch_norm_equals_eager() -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
    model = ResNetForImageClassification(config)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    assert not check(model.eval(), pixel_values=images, labels=labels).writes


def test_batch_norm_in_training_equals_eager() -> None:
    """Running statistics and step counters become what eager's become."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
    model = ResNetForImageClassification(config)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    captured = check(model.train(), tolerance=1e-10, pixel_values=images, labels=labels)
    assert captured.writes.keys() == dict(model.named_buffers()).keys()


def test_batch_norm_without_running_statistics_equals_eager() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, affine=False, track_running_stats=False)
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.norm(self.linear(x)) * x).sum()

    torch.manual_seed(0)
    assert not check(Norm(), torch.randn(6, 4), loss=lambda out: out).writes


def test_buffers_that_a_call_changes_equal_eager() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
            self.register_buffer("average", torch.zeros(4))
            self.register_buffer("kept", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            self.seen[1:] += x.shape[0]
            with torch.no_grad():
                self.average.lerp_(y.mean(0), 0.1)
            return ((y - self.average) * self.kept).square().sum()

    torch.manual_seed(0)
    captured = check(Counts(), torch.randn(6, 4), loss=lambda out: out)
    assert captured.writes.keys() == {"seen", "average"}


def test_gradient_checkpointing_is_noted() -> None:
    model, kwargs = family("gpt2")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert any("gradient checkpointing" in note for note in capture(model, (), kwargs).notes)


def test_lstm_equals_eager() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0].square().sum()

    torch.manual_seed(0)
    check(Recurrent(), torch.randn(3, 2, 4), loss=lambda out: out)


class Bad(nn.Module):
    """Base of models that cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))


def problems(model: nn.Module) -> list[str]:
    with pytest.raises(CaptureError) as caught:
        capture(model, (torch.randn(4, 4),))
    assert type(model).__name__ in str(caught.value)
    return list(caught.value.problems)


def test_every_data_dependent_line_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    class Depends(Bad):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                x = x + 1
            x = x * x.max().item()
            x[x.nonzero()[0]] = 0
            return self.linear(x).sum()

    found = problems(Depends())
    assert [f.split(" ")[0] for f in found] == ["Tensor.__bool__", "Tensor.item", "Tensor.nonzero"]
    assert "if x.sum() > 0" in found[0]
    assert "x.max().item()" in found[1]
    out, err = capfd.readouterr()
    assert not out
    assert not err


def test_unknown_sizes_are_reported_once() -> None:
    class Selects(Bad):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x[x > 0].view(-1, 1) * torch.ones(4)).sum()

    (found,) = problems(Selects())
    assert "aten.index.Tensor" in found
    assert "x[x > 0]" in found


def test_exception_in_forward_names_the_users_line() -> None:
    class Raises(Bad):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.helper(x)

        def helper(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such thing")

    (found,) = problems(Raises())
    assert "ValueError: no such thing" in found
    assert 'raise ValueError("no such thing")' in found


def test_several_kinds_of_problem_together() -> None:
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.round()

        @staticmethod
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            return g

    class Several(Bad):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.linear.bias.add_(1)
            x.mul_(2)
            return Round.apply(self.linear(x)).sum()

    found = problems(Several())
    assert any("Round: its backward would be lost" in f for f in found)
    assert any("parameter linear.bias is changed in place" in f and "self.linear.bias.add_(1)" in f for f in found)
    assert any("input x is changed in place" in f for f in found)


def test_regions_that_cannot_be_kept() -> None:
    class Autocast(Bad):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.linear(x).float().sum()

    class Branch(Bad):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 2, lambda x: x + 1, lambda x: x * 2, (x,)).sum()

    class Reentrant(Bad):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.linear, self.linear(x), use_reentrant=True).sum()

    assert "autocast" in problems(Autocast())[0]
    assert "cond is not supported" in problems(Branch())[0]
    assert "use_reentrant=False" in problems(Reentrant())[0]


def test_no_output() -> None:
    class Silent(Bad):
        def forward(self, x: torch.Tensor) -> None:
            self.linear(x)

    assert problems(Silent()) == ["it returns no tensor"]


def test_unsupported_tensors() -> None:
    class Subclass(torch.Tensor):
        pass

    model = Bad()
    model.register_buffer("odd", torch.ones(2).as_subclass(Subclass))
    assert problems(model) == ["odd is a Subclass; only plain tensors are supported"]


def test_without_a_loss_it_is_an_inference_graph() -> None:
    model, kwargs = family("gpt2")
    captured = capture(model, (), {"input_ids": kwargs["input_ids"]})
    assert captured.loss == ""
    assert not captured.train
    assert any("no loss_fn is given" in note for note in captured.notes)
    assert not any(flows(n) for n in captured.graph.graph.nodes)


def test_factories_are_placed_by_whoever_runs() -> None:
    aten = torch.ops.aten
    meta = torch.device("meta")
    assert on_device(aten.full.default, {"dtype": torch.bool}, meta) == {"dtype": torch.bool, "device": meta}
    assert on_device(aten.arange.start, {}, meta) == {"device": meta}
    assert on_device(aten.rand_like.default, {}, meta) == {}
    assert on_device(aten.add.Tensor, {}, meta) == {}
    assert on_device(operator.getitem, {}, meta) == {}
