"""Networks on images patch by patch: values, gradients, live memory and work as predicted, and what is left alone."""

from __future__ import annotations

import random

import pytest
import torch
from eager import check
from functorch.compile import aot_function, nop
from fusing import drawn_seeds
from jointplans import plan_with
from shardwright.passes.capture import capture
from shardwright.passes.checked import Verifying, difference, inputs_of, outcome
from shardwright.passes.experiment import flat, strip
from shardwright.passes.fuse.patch import PatchPrefix, Search, chains, patch, patching
from shardwright.passes.fuse.tiles import patched
from shardwright.passes.gain import Paying
from shardwright.passes.rewrite import rewritten
from shardwright.passes.roomier import Roomier
from shardwright.passes.steps import steps_of
from shardwright.passes.summarize import summarize
from shardwright.passes.verify import verify_rule
from shardwright.planner.prices import Prices
from shardwright.planner.rules import instantiate
from shardwright.profiles.devices import parse_cluster
from shardwright.runtime.monitor import Budget
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

F = nn.functional


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    """One random local step; the same channels and positions go on where it is a residual."""

    def __init__(self, draw: random.Random, channels: int) -> None:
        super().__init__()
        self.kind = draw.choice(("conv", "conv", "conv", "residual", "max", "average", "pad", "cat", "scale", "same"))
        self.act = draw.choice((F.relu, F.relu6, F.silu, F.gelu, F.hardswish, lambda x: x.clamp(-1, 2), torch.tanh))
        self.draw = {
            "stride": draw.choice((1, 1, 2)),
            "padding": draw.randint(0, 2),
            "dilation": draw.choice((1, 1, 2)),
        }
        self.ceil = draw.random() < 0.5
        self.pads = [draw.randint(-1, 2) for _ in range(4)]
        groups = draw.choice((1, 2, channels))
        kernel = draw.choice((1, 2, 3, (3, 1), (1, 5)))
        shape = {"max": 1, "average": 1, "residual": 3}.get(self.kind, kernel)
        own = {"padding": 1} if self.kind == "residual" else {"padding": "same"} if self.kind == "same" else self.draw
        self.conv = nn.Conv2d(channels, channels, shape, groups=groups, bias=draw.random() < 0.5, **own)
        self.norm = nn.BatchNorm2d(channels, affine=draw.random() < 0.7).eval()
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))
        if draw.random() < 0.3:
            self.conv.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "residual":
            return x + self.act(self.norm(self.conv(x)))
        if self.kind == "max":
            return F.max_pool2d(x, 3, self.draw["stride"], 1, self.draw["dilation"], ceil_mode=self.ceil)
        if self.kind == "average":
            return F.avg_pool2d(x, 2, self.draw["stride"], self.draw["padding"] % 2)
        if self.kind == "pad":
            return F.pad(x, self.pads, value=0.5)
        if self.kind == "cat":
            return torch.cat([x, self.act(x)], 1)[:, : x.shape[1]] if self.ceil else self.act(x) * 0.5 - x
        if self.kind == "scale":
            return self.scale * x + self.scale.sigmoid()
        return self.act(self.norm(self.conv(x)))


class Net(nn.Module):
    """Random steps on a small image with a global head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        draw = random.Random(seed)
        channels = draw.choice((4, 6))
        self.stem = nn.Conv2d(3, channels, 3, draw.choice((1, 2)), 1)
        self.blocks = nn.ModuleList(Block(draw, channels) for _ in range(draw.randint(2, 6)))
        self.head = nn.Linear(channels, 3)
        self.size = draw.randint(24, 37), draw.randint(24, 37)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3))).square().sum()

    def image(self, batch: int = 2) -> torch.Tensor:
        return torch.randn(batch, 3, *self.size)


def longest(graph: fx.Graph):
    return max(chains(graph), key=lambda c: len(c.nodes))


@pytest.mark.parametrize("seed", drawn_seeds(40))
def test_random_networks(seed):
    """Any chain on any grid: the same values and gradients; in inference the live memory and the work that are predicted."""
    model, draw = Net(seed).double(), random.Random(seed)
    image = model.image().double().requires_grad_()
    captured = capture(model, (image,))
    graph = captured.graph.graph
    before = outcome(graph, (values := dict(captured.constants) | inputs_of(graph, seed)))
    chain = draw.choice(list(chains(graph))[-3:])
    grid = draw.randint(1, 5), draw.randint(1, 5)
    patch(graph, chain, grid)
    assert difference(before, outcome(graph, values)) == ""
    free = capture(model, (image,), train=False)
    search, chain = Search(free.graph.graph, False), longest(free.graph.graph)
    was = measured(free, model, image)
    assert was[0] == search.steps.peak
    predicted = search.around(chain).peak(chain.tilings, grid)
    rest, times = search.rest(chain)
    work = rest + 2 * sum(times[i] * f for i, f in chain.tilings.line_flops(grid).items())
    patch(free.graph.graph, chain, grid)
    free.graph.recompile()
    assert steps_of(free.graph.graph).peak == predicted
    assert measured(free, model, image) == (predicted, work)


def measured(captured, model: nn.Module, image: torch.Tensor) -> tuple[int, float]:
    """Bytes alive at the fullest moment of inference, the image's included, and FLOPs of products."""
    named = captured.values(model) | captured.flatten((image,), {})
    values = [named[e.node].detach() for e in captured.entries]
    with torch.no_grad(), Budget(10**12) as budget, FlopCounterMode(display=False) as counter:
        fx.Interpreter(captured.graph).run(*values)
    return budget.peak + image.nbytes, float(counter.get_total_flops())


class Inverted(nn.Module):
    """An inverted residual (Sandler et al. 2018)."""

    def __init__(self, into: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = into * expand
        first = [nn.Conv2d(into, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(True)] if expand > 1 else []
        self.body = nn.Sequential(
            *first, nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(True),
            nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.residual = stride == 1 and into == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet() -> nn.Module:
    """MobileNetV2 at width 0.35."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(True)]
    into = 16
    for expand, out, count, stride in (
        (1, 8, 1, 1),
        (6, 8, 2, 2),
        (6, 16, 3, 2),
        (6, 24, 4, 2),
        (6, 32, 3, 1),
        (6, 56, 3, 2),
    ):
        for i in range(count):
            layers.append(Inverted(into, out, stride if i == 0 else 1, expand))
            into = out
    last = [nn.Conv2d(into, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6(True)]
    return nn.Sequential(*layers, *last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 10)).eval()


def test_a_quarter_of_the_memory_of_mobilenet():
    model, image = mobilenet(), torch.randn(1, 3, 160, 160)
    captured = capture(model, (image,), train=False)
    found = patching(captured.graph.graph)
    before, after = (
        measured(captured, model, image),
        measured(tiled := rewritten(captured, [PatchPrefix()]), model, image),
    )
    assert after[0] == found.peak
    assert after[1] / before[1] == pytest.approx(found.work, rel=1e-12)
    assert before[0] >= 4 * after[0]
    paying = Paying(Prices(parse_cluster("cpu:1"), "float32"))
    graphs = captured.graph.graph, tiled.graph.graph
    assert not paying(PatchPrefix(), *graphs).stays  # inference keeps nothing, and there are more kernels to start
    assert not Roomier(paying)(PatchPrefix(), *graphs).stays
    assert Roomier(paying, slower=10.0)(PatchPrefix(), *graphs).stays
    assert after[1] <= 1.25 * before[1]
    values = captured.values(model) | captured.flatten((image,), {})
    assert difference(*(outcome(c.graph.graph, values) for c in (captured, tiled))) == ""


def kept(graph: fx.Graph, captured, model: nn.Module, image: torch.Tensor) -> int:
    """Bytes that autograd keeps besides parameters and buffers, in storages of their own."""
    named = captured.values(model) | captured.flatten((image,), {})
    outside = {named[e.node].untyped_storage()._cdata for e in captured.entries if e.role != "input"}
    sizes: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage()._cdata not in outside and x.untyped_storage().nbytes() > 64:
            sizes[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            alive.append(x)
        return x

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = fx.GraphModule({}, graph)(*(named[e.node] for e in captured.entries))
    del out
    return sum(sizes.values())


def test_training_keeps_the_image_alone_and_computes_tiles_again():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1),
    ).double().eval()  # fmt: skip
    image = torch.randn(4, 3, 48, 40).double()
    captured = capture(model, (image,), loss_fn=torch.Tensor.sum)
    assert patching(captured.graph.graph, 0.25) is None  # nearly all of its work is in the prefix
    tiled = rewritten(captured, [PatchPrefix(budget=1.0)], weigh=Verifying(captured.constants))
    assert tiled.records[-1].verdict.stays
    found = patching(captured.graph.graph, 1.0)
    graphs = captured.graph.graph, tiled.graph.graph
    held = [kept(g, captured, model, image) for g in graphs]
    verdict = Paying(Prices(parse_cluster("a100-sxm-40gb:1"), "float64"))(PatchPrefix(), *graphs)
    assert verdict.saved_bytes == held[0] - held[1] > 0
    for graph, size in zip(graphs, held, strict=True):
        steps = steps_of(graph, training=True)
        made = {n: b for s in steps.steps for n, b in s.makes}
        own = frozenset().union(*steps.saves.values())
        assert sum(made.get(n, 0) for n in own) + image.nbytes == size
    work = []
    for graph in graphs:
        named = captured.values(model) | captured.flatten((image,), {})
        with FlopCounterMode(display=False) as counter:
            fx.GraphModule({}, graph)(*(named[e.node] for e in captured.entries))[0].backward()
        work.append(counter.get_total_flops())
    assert work[1] / work[0] == pytest.approx(found.work, rel=1e-12)


def test_what_is_held_in_the_backward_pass_is_no_more_than_predicted():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.SiLU()).double()
    image = torch.randn(1, 3, 64, 64).double().requires_grad_()
    captured = capture(model, (image,), loss_fn=torch.Tensor.sum)
    chain = longest(captured.graph.graph)
    given = [captured.values(model)[n.name] for n in chain.given]
    out = patched(image, given, chain.program, (4, 4))
    grad = torch.randn_like(out)
    with Budget(10**12) as budget:
        out.backward(grad)
    extra = image.nbytes + sum(p.nbytes for p in given) * 3
    assert budget.peak <= chain.tilings.held_backward((4, 4), 8) + extra
    assert budget.peak >= chain.tilings.held((4, 4), 8)


class Squeeze(nn.Module):
    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Twice(nn.Module):
    """A value inside goes out of the chain by another way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        inner = self.first(x)
        return self.second(inner).relu().mean((2, 3)) + inner.mean((2, 3))


class Returned(Twice):
    def forward(self, x):
        inner = self.first(x)
        return self.second(inner).relu(), inner


ENDS = {
    "training batch norm": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).train(), nn.ReLU()), ["conv2d"]),
    "squeeze and excite": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Squeeze(), nn.ReLU()), ["conv2d", "relu"]),
    "reflection": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3)), ["conv2d"]),
    "uneven means": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.ReLU()), ["conv2d"]),
    "softmax of positions": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax(-1), nn.ReLU()), ["conv2d"]),
    "dropout": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5).train(), nn.ReLU()), ["conv2d"]),
    "layer norm": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()), ["conv2d"]),
    "upsampling": (nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2), nn.ReLU()), ["relu"]),
    "a second user": (Twice(), ["conv2d"]),
    "an output": (Returned(), ["conv2d"]),
    "no image": (nn.Sequential(nn.Flatten(), nn.ReLU()), []),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_a_chain(name):
    model, ends = ENDS[name]
    captured = capture(model, (torch.randn(2, 3, 20, 20),), train=False)
    assert [c.nodes[-1].name for c in chains(captured.graph.graph)] == ends


def test_what_is_not_lowered_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 18 * 18, 2))
    for budget in (0.0, -1.0):
        captured = capture(model, (torch.randn(1, 3, 20, 20),), train=False)
        tiled = rewritten(captured, [PatchPrefix(budget=budget)])
        if budget < 0:
            assert [str(n) for n in tiled.graph.graph.nodes] == [str(n) for n in captured.graph.graph.nodes]
    tokens = capture(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), (torch.tensor([[1, 2]]),), train=False)
    assert len(rewritten(tokens, [PatchPrefix()]).graph.graph.nodes) == len(tokens.graph.graph.nodes)


def test_casts_and_layouts_come_before_the_image():
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, 2)
            self.register_buffer("mean", torch.rand(1, 3, 1, 1))

        def forward(self, x):
            x = x.permute(0, 3, 1, 2).float() / 255 - self.mean
            return self.conv(x).relu().mean((2, 3))

    model, image = Bytes(), torch.randint(0, 255, (2, 33, 35, 3), dtype=torch.uint8)
    captured = capture(model, (image,), train=False)
    assert [n.name for n in longest(captured.graph.graph).nodes] == ["div", "sub", "conv2d", "relu"]
    tiled = rewritten(captured, [PatchPrefix(budget=1.0)], weigh=Verifying(captured.constants))
    assert any("patched" in str(n.target) for n in tiled.graph.graph.nodes)


LINES = (
    '1|[["conv2d.default","%0","%1",null,[2,2],[1,1],[1,1],1],["relu.default","%2"],["add.Tensor","%3","%2",{"alpha":2}]]',
    '2|[["conv2d.padding","%0","%1","%2",[1,1],"same",[1,1],1],["max_pool2d.default","%3",[3,3],[2,2],[1,1],[1,1],true]]',
    '1|[["conv2d.default","%0","%1",null,[3,3],[4,4],[1,1],1],["constant_pad_nd.default","%2",[2,0,-1,3],1.5]]',
)


@pytest.mark.parametrize("line", LINES)
def test_the_rule_is_true(line):
    torch.manual_seed(0)
    kernel = (4, 3, 2, 3) if "same" in line else (4, 3, 3, 3)
    tensors = [torch.randn(kernel).double(), torch.randn(4).double()][: int(line[0])]
    args = torch.randn(4, 3, 9, 11).double(), tensors, line, [2, 3]
    found: list[torch.Tensor] = []
    bare = strip(args, found)
    results = flat(patched(*args))
    rule = instantiate("shardwright.patched", bare, {}, [x.shape for x in found], [r.shape for r in results])
    assert rule.free() == ("z",)
    assert verify_rule(patched, args, {}, rule) == []
    leaves = [x.requires_grad_() for x in found]
    with FlopCounterMode(display=False) as counter:
        out = patched(*args)
    assert counter.get_total_flops() == rule.flops
    with FlopCounterMode(display=False) as counter:
        out.backward(torch.ones_like(out))
    assert counter.get_total_flops() == rule.backward_flops
    assert all(x.grad is not None for x in leaves)


def test_it_survives_export_and_planning():
    model, image = Net(3), Net(3).image()
    captured = capture(model, (image,))
    patch(captured.graph.graph, longest(captured.graph.graph), (2, 2))
    captured.graph.recompile()
    op = next(o for o in summarize(captured).outline.ops if o.kind == "patches")
    assert [f.batch for f in op.factors if f.split == "free"] == [True]
    assert {(s.source, s.index) for s in op.saved} >= {("operand", 0)}
    assert all(s.source == "operand" for s in op.saved)
    named = captured.values(model) | captured.flatten((image,), {})
    values = tuple(named[e.node] for e in captured.entries)
    exported = torch.export.export(captured.graph, values, strict=False)
    assert sum(str(n.target) == "shardwright.patched.default" for n in exported.graph.nodes) == 1
    assert torch.equal(exported.module()(*values)[0], captured.graph(*values)[0])
    traced = aot_function(lambda *v: captured.graph(*v)[0], fw_compiler=nop)
    wanted = [v for v in values if v.requires_grad]
    pairs = zip(
        *(
            torch.autograd.grad(f(*values), wanted, allow_unused=True)
            for f in (traced, lambda *v: captured.graph(*v)[0])
        ),
        strict=True,
    )
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs if b is not None)
    plan = plan_with(summarize(captured).outline, "dp=2", spec="h100-sxm:2")
    assert plan.predicted.step_seconds > 0


def test_real_models():
    from transformers import (
        MobileNetV2Config,
        MobileNetV2ForImageClassification,
        ResNetConfig,
        ResNetForImageClassification,
    )

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5}
    models = (
        ResNetForImageClassification(ResNetConfig(**sizes)),
        MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, image_size=64, num_labels=5)),
    )
    for model in models:
        kwargs = {"pixel_values": torch.randn(2, 3, 45, 51), "labels": torch.tensor([1, 3])}
        captured = check(model.eval(), tolerance=1e-10, **kwargs)
        verify = Verifying(
            captured.constants, given=captured.values(model)
        )  # random numbers would blow up in its depth
        tiled = rewritten(captured, [PatchPrefix(budget=1.0)], weigh=verify)
        assert tiled.records[-1].verdict is not None
        assert tiled.records[-1].verdict.stays, tiled.records[-1].verdict.why
