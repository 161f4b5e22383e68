"""Gates as one op: random networks, real models, bytes, and what must be left alone."""

from __future__ import annotations

import random

import blockmodels
import pytest
import torch
import torch.nn.functional as F
from fusing import calls, drawn_seeds, fuse, rule_problems
from shardwright.passes.fuse.gated import FuseGated
from shardwright.passes.fuse.gelu import FuseGelu
from shardwright.passes.fuse.ops.gated import ACTS, gated
from torch import nn

WRITTEN = {
    "silu": [F.silu, lambda x: x * torch.sigmoid(x), lambda x: torch.sigmoid(x) * x, lambda x: x / (1 + torch.exp(-x))],
    "gelu": [F.gelu],
    "gelu_tanh": [lambda x: F.gelu(x, approximate="tanh")],
    "quick_gelu": [lambda x: x * torch.sigmoid(1.702 * x), lambda x: torch.sigmoid(x * 1.702) * x],
    "relu": [F.relu],
    "sigmoid": [torch.sigmoid],
    "tanh": [torch.tanh],
}


class Gates(nn.Module):
    """Layers of random gates: separate or joint projections, either order, with or without biases."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.width, self.layers = draw.choice((4, 6, 10)), []
        for _ in range(draw.randint(1, 3)):
            inner, joint, bias = draw.choice((3, 8, 12)), draw.random() < 0.4, draw.random() < 0.5
            act = draw.choice(sorted(WRITTEN))
            first = nn.Linear(self.width, inner * (2 if joint else 1), bias)
            second = None if joint else nn.Linear(self.width, inner, bias)
            modules = nn.ModuleList([first, *([] if joint else [second]), nn.Linear(inner, self.width, bias)])
            self.add_module(f"layer{len(self.layers)}", modules)
            self.layers.append((act, draw.choice(WRITTEN[act]), joint, draw.random() < 0.5))

    def forward(self, x):
        for i, (_, act, joint, first) in enumerate(self.layers):
            parts = getattr(self, f"layer{i}")
            gate, up = parts[0](x).chunk(2, -1) if joint else (parts[0](x), parts[1](x))
            y = act(gate) * up if first else up * act(gate)
            x = x + parts[-1](y)
        return x.square().mean()


@pytest.mark.parametrize("seed", drawn_seeds(24))
def test_random_networks(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Gates(draw).double()
    shape = [draw.randint(4, 7) for _ in range(draw.randint(1, 3))]
    found = fuse(FuseGated(), model, torch.randn(*shape, model.width, dtype=torch.float64), seed=seed)
    assert found.count("shardwright.gated") == len(model.layers)
    assert found.predicted == found.measured
    assert found.nodes >= len(model.layers)


@pytest.mark.parametrize("frozen", ["gate", "up", "both"])
def test_frozen_branches(frozen):
    torch.manual_seed(0)
    gate, up = nn.Linear(8, 16), nn.Linear(8, 16)
    for part in (gate, up):
        part.requires_grad_(frozen not in ("both", "gate" if part is gate else "up"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = gate, up, nn.Linear(16, 1)

        def forward(self, x):
            return self.down(F.silu(self.gate(x)) * self.up(x)).sum()

    found = fuse(FuseGated(), Model().double(), torch.randn(4, 8, dtype=torch.float64))
    assert found.count("shardwright.gated") == 1
    assert found.predicted == found.measured


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gemma", "t5"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models(name, dtype):
    model, kwargs = blockmodels.model(name, dtype)
    found = fuse(FuseGated(), model, first=[FuseGelu()], **kwargs)
    assert found.count("shardwright.gated") == (4 if name == "t5" else 2)
    assert found.predicted == found.measured > 0


def _left(body):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(8, 16), nn.Linear(8, 16)

        def forward(self, x):
            return body(self.gate(x), self.up(x))

    return fuse(FuseGated(), Model().double(), torch.randn(4, 8, dtype=torch.float64))


LEFT = {
    "a second user": lambda g, u: ((a := F.silu(g)) * u).sum() + a.sum(),
    "an output": lambda g, u: (((a := F.silu(g)) * u).sum(), a),
    "broadcast": lambda g, u: (torch.sigmoid(g[:, :1]) * u).sum(),
    "another op": lambda g, u: (F.elu(g) * u).sum(),
    "a cast between": lambda g, u: (F.silu(g.to(torch.bfloat16)) * u).sum(),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    found = _left(LEFT[name])
    assert found.count("shardwright.gated") == 0
    assert found.nodes == 0


def test_silu_written_out_is_silu():
    found = _left(lambda g, u: (g * torch.sigmoid(g)).sum() + u.sum())
    assert calls(found.after, "aten.silu") == 1
    assert found.predicted == found.measured > 0


@pytest.mark.parametrize("act", ACTS)
def test_rule_and_gradients(act):
    gate, up = (torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert rule_problems(gated, gate.detach(), up.detach(), act) == []
    assert torch.autograd.gradcheck(lambda g, u: gated(g, u, act), (gate, up))
