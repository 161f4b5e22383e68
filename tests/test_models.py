"""What MODEL may be, what it builds, and how a plan's source rebuilds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shardwright.errors import PlanMismatch, UsageError
from shardwright.passes.capture import capture
from shardwright.passes.models import load_model, rebuild, shipped
from shardwright.planner.plan import Source

PARAMETERS = {
    "gpt2": 124_439_808, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704, "bert-base": 109_514_298, "vit-base": 86_567_656,
}  # fmt: skip
"""Published sizes."""

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


def write(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return f"hf:{path}"


@pytest.mark.parametrize("name", PARAMETERS)
def test_shipped_configs_have_the_published_size(name: str) -> None:
    loaded = load_model(f"hf:{name}", batch=2)
    assert sum(p.numel() for p in loaded.model.parameters()) == PARAMETERS[name]
    assert all(p.device.type == "meta" and p.dtype is torch.float32 for p in loaded.model.parameters())
    assert loaded.model.training
    assert loaded.source.config["model_type"] == loaded.model.config.model_type
    assert loaded.batch == 2


def test_all_shipped_configs_are_tested() -> None:
    assert set(shipped()) == set(PARAMETERS)


def test_language_model_inputs() -> None:
    loaded = load_model("hf:gpt2", batch=3)
    assert (loaded.kind, loaded.seq) == ("language", 1024)
    assert {k: tuple(v.shape) for k, v in loaded.kwargs.items()} == {"input_ids": (3, 1024), "labels": (3, 1024)}
    assert load_model("hf:bert-base", batch=1).seq == 512
    assert load_model("hf:llama3-8b", batch=1, seq=16384).seq == 16384
    with pytest.raises(UsageError, match="1024 learned positions"):
        load_model("hf:gpt2", batch=1, seq=2048)


def test_image_inputs() -> None:
    loaded = load_model("hf:vit-base", batch=3)
    assert (loaded.kind, loaded.seq) == ("image", None)
    assert {k: tuple(v.shape) for k, v in loaded.kwargs.items()} == {"pixel_values": (3, 3, 224, 224), "labels": (3,)}
    with pytest.raises(UsageError, match="--seq does not apply"):
        load_model("hf:vit-base", batch=1, seq=16)


def test_encoder_decoder_inputs(tmp_path: Path) -> None:
    config = {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "d_model": 16,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 30,
    }
    loaded = load_model(write(tmp_path, config), batch=2, seq=8, device="cpu")
    assert loaded.kind == "encoder-decoder"
    assert loaded.kwargs["labels"].shape == (2, 8)
    assert capture(loaded.model, loaded.args, loaded.kwargs).loss


def test_class_is_the_architecture_or_causal(tmp_path: Path) -> None:
    assert type(load_model(write(tmp_path, TINY), batch=1).model).__name__ == "LlamaForCausalLM"
    named = TINY | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3, "pad_token_id": 0}
    loaded = load_model(write(tmp_path, named), batch=4, seq=8, device="cpu")
    assert loaded.kwargs["labels"].shape == (4,)
    base = TINY | {"architectures": ["LlamaModel"]}
    assert set(load_model(write(tmp_path, base), batch=1).kwargs) == {"input_ids"}


def test_stored_dtype_and_cache_do_not_count(tmp_path: Path) -> None:
    loaded = load_model(write(tmp_path, TINY | {"torch_dtype": "bfloat16", "use_cache": True}), batch=1)
    assert next(loaded.model.parameters()).dtype is torch.float32
    assert loaded.model.config.use_cache is False
    assert loaded.source.config["torch_dtype"] == "bfloat16"


def test_weights_and_inputs_follow_the_seed(tmp_path: Path) -> None:
    name = write(tmp_path, TINY)
    state = torch.get_rng_state()
    one, two, other = (load_model(name, batch=2, seq=4, device="cpu", seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.model.lm_head.weight, two.model.lm_head.weight)
    assert torch.equal(one.kwargs["input_ids"], two.kwargs["input_ids"])
    assert not torch.equal(one.model.lm_head.weight, other.model.lm_head.weight)
    again = rebuild(one.source)
    assert torch.equal(one.model.lm_head.weight, again.model.lm_head.weight)
    assert (again.batch, again.seq) == (2, 4)
    assert rebuild(one.source, batch=6, device="meta").kwargs["labels"].shape == (6, 4)


def test_experts_are_traceable(tmp_path: Path) -> None:
    config = TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_key_value_heads": 2}
    loaded = load_model(write(tmp_path, config), batch=2, seq=8)
    assert capture(loaded.model, loaded.args, loaded.kwargs).loss


FUNCTIONS = """
import torch
from torch import nn
import neighbour

def make(batch, seq=8):
    model = nn.Linear(seq, 3)
    return model, torch.ones(batch, seq)

def named(batch):
    return neighbour.Net(), {"x": torch.randn(batch, 4)}

def values(batch, seq):
    rates = [x.item() for x in torch.linspace(0, 1, 3)]
    return nn.Linear(4, len(rates)), (torch.ones(batch, 4),)

def broken(batch):
    raise ValueError("out of luck")

def wrong(batch):
    return 3

def more(batch, width):
    return nn.Linear(width, 3), torch.ones(batch, width)
"""
NEIGHBOUR = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
    def forward(self, x):
        return self.linear(x).sum()
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    path = tmp_path / "models.py"
    path.write_text(FUNCTIONS)
    return path


def test_functions(models: Path) -> None:
    loaded = load_model(f"{models}:make", batch=2)
    assert loaded.kind == "function"
    assert loaded.args[0].shape == (2, 8)
    assert next(loaded.model.parameters()).device.type == "meta"
    assert load_model(f"{models}:make", batch=2, seq=5).args[0].shape == (2, 5)
    named = load_model(f"{models}:named", batch=3, device="cpu")
    assert set(named.kwargs) == {"x"}
    assert capture(named.model, named.args, named.kwargs).loss
    values = load_model(f"{models}:values", batch=2)  # needs numbers while it is built: falls back to the CPU
    assert values.model.weight.shape == (3, 4)


def test_functions_are_rebuilt_if_unchanged(models: Path) -> None:
    source = load_model(f"{models}:named", batch=3).source
    assert rebuild(source, batch=5).kwargs["x"].shape == (5, 4)
    models.write_text(FUNCTIONS + "\n# edited\n")
    with pytest.raises(PlanMismatch, match="has changed"):
        rebuild(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}:broken", "out of luck at .*models.py:18: raise ValueError"),
        ("{}:wrong", "must return"),
        ("{}:more", "needs width"),
        ("{}:absent", "no function 'absent'; it has make, named"),
        ("{}x.py:make", "no such file"),
        ("{}", "is not a model"),
        ("nonsense", "is not a model"),
        ("hf:nonsense", "no shipped config"),
        ("hf:nonsense.json", "no such file"),
    ],
)
def test_bad_models(models: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(name.format(models), batch=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 3}, 'has no "model_type"'),
        ({"model_type": "nonsense"}, "knows no model_type 'nonsense'"),
        (TINY | {"architectures": ["LlamaForNothing"]}, "has no class LlamaForNothing"),
        ({"model_type": "vit"}, "has no causal language model"),
        (TINY | {"hidden_size": "many"}, "failed"),
        ({"model_type": "bert", "architectures": ["BertForMultipleChoice"]}, "example inputs of BertForMultipleChoice"),
        ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]}, "reads input_values"),
    ],
)
def test_bad_configs(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(write(tmp_path, config), batch=2)


def test_other_bad_arguments(models: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        load_model(f"hf:{tmp_path / 'config.json'}", batch=1)
    with pytest.raises(UsageError, match="must be positive"):
        load_model("hf:gpt2", batch=0)
    with pytest.raises(UsageError, match="takes no seq"):
        load_model(f"{models}:named", batch=1, seq=4)
    with pytest.raises(UsageError, match="live module"):
        rebuild(Source("module", "Net", 4))
