"""Rules by experiment: what is found of ops without a line, what is refused and why, and the cache."""

from __future__ import annotations

import json

import pytest
import torch
from shardwright.errors import UnsupportedOp
from shardwright.passes import discover as module
from shardwright.passes.discover import discover, discover_node
from shardwright.passes.verify import verify_rule

A = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture(scope="module")
def ops():
    """Custom ops of a user, as torch.library makes them."""
    library = torch.library.Library("discovery_test", "DEF")

    def define(schema: str, function) -> None:
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, function, "CompositeImplicitAutograd")

    define("gated(Tensor x, Tensor w) -> Tensor", lambda x, w: torch.relu(x) * w)
    define("centered(Tensor x) -> Tensor", lambda x: x - x.clamp(max=0).sum(-1, keepdim=True))
    define("noisy(Tensor x) -> Tensor", lambda x: x + torch.randn_like(x))
    define("counted(Tensor x, Tensor y) -> Tensor", _counted)
    define("heads(Tensor x, int n) -> Tensor", _heads)
    define("two(Tensor x, Tensor y) -> (Tensor, Tensor)", lambda x, y: (x @ y, x.sum(-1)))
    library.define("only_single(Tensor x) -> Tensor")
    library.impl("only_single", _only_single, "CPU")
    library.impl("only_single", lambda x: torch.empty_like(x), "Meta")
    library.define("no_kernel(Tensor x) -> Tensor")
    library.impl("no_kernel", lambda x: torch.empty_like(x), "Meta")
    yield torch.ops.discovery_test
    library._destroy()


def _counted(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Without ignored labels this is a sum over rows; with them it is not."""
    kept = (y != -100).to(x.dtype)
    return (x.sum(-1) * kept).sum() / (1 + (1 - kept).sum())


def _heads(x: torch.Tensor, n: int) -> torch.Tensor:
    return x.unflatten(-1, (n, -1)).softmax(-1).flatten(-2)


def _only_single(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:
        raise RuntimeError("only float32 is supported")
    return x.abs()


# Ops that do have a line: discovery finds the same splits without it.
KNOWN = {
    "mul": ((A.mul.Tensor, meta(4, 128, 768), meta(768)), "a b c, c -> a b c", ((0,), (1,))),
    "add": ((A.add.Tensor, meta(4, 128, 768), meta(768)), "a b c, c -> a b c", ((0, 1),)),
    "linear": ((A.linear.default, meta(4, 128, 768), meta(2304, 768)), "a b c, d c -> a b d", ((0,), (1,))),
    "softmax": ((A.softmax.int, meta(4, 128, 768), -1), "a b c! -> a b d!", ()),
    "cumsum": ((A.cumsum.default, meta(4, 128), 1), "a b! -> a c!", ((0,),)),
    "mean": ((A.mean.dim, meta(4, 16), [1]), "a b! -> a", ((0,),)),
    "causal attention": (
        (A.scaled_dot_product_attention.default, *[meta(2, 12, 128, 64)] * 3, None, 0.0, True),
        "a b c! d!, a b e! f!, a b g! h -> a b i! h",
        ((2,),),
    ),
    "sum of losses": (
        (A.cross_entropy_loss.default, meta(512, 50257), meta(512, dtype=torch.int64), None, 2),
        "a b!, a -> ",
        (),
    ),
    "mean of losses": (
        (A.cross_entropy_loss.default, meta(512, 50257), meta(512, dtype=torch.int64)),
        "a! b!, c! -> ",
        (),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_discovery_agrees_with_the_table(name):
    (target, *args), line, linear = KNOWN[name]
    found = discover(target, tuple(args))
    assert (found.line, found.instance.linear) == (line, linear)


def test_a_custom_op(ops):
    found = discover(ops.gated.default, (meta(8, 512, 1024), meta(1024)))
    assert found.line == "a b c, c -> a b c"
    assert found.instance.sizes == {"a": 8, "b": 512, "c": 1024}
    assert found.instance.linear == ((1,),)
    assert found.failures == ()
    x, w = torch.randn(4, 6, 8), torch.randn(8)
    small = discover(ops.gated.default, (x, w))
    assert verify_rule(ops.gated.default, (x, w), {}, small.instance) == []


def test_a_node_of_a_captured_graph(ops):
    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.ops.discovery_test.only_single(x) * 2

    program = torch.export.export(Model(), (torch.zeros(8, 16, device="meta"),), strict=False)
    node = next(n for n in program.graph.nodes if "only_single" in str(n.target))
    assert discover_node(node).line == "a b -> a b"


def test_negative_values_matter(ops):
    """On positive values alone this op would seem to be elementwise."""
    assert discover(ops.centered.default, (meta(8, 16),)).line == "a b! -> a c!"


def test_ignored_labels_matter(ops):
    found = discover(ops.counted.default, (meta(64, 16), meta(64, dtype=torch.int64)))
    assert found.line == "a! b, c! -> "


def test_several_results(ops):
    found = discover(ops.two.default, (meta(8, 16), meta(16, 32)))
    assert found.instance.free() != ()
    x, y = torch.randn(4, 6), torch.randn(6, 8)
    assert verify_rule(ops.two.default, (x, y), {}, discover(ops.two.default, (x, y)).instance) == []


def test_integer_arguments_follow_the_sizes(ops):
    found = discover(ops.heads.default, (meta(8, 128, 768), 12))
    assert found.line == "a b c! -> a b d!"


def test_only_single_precision(ops):
    assert discover(ops.only_single.default, (meta(8, 16),)).line == "a b -> a b"


@pytest.mark.parametrize(("name", "reason"), [("noisy", "random"), ("no_kernel", "does not run on the CPU")])
def test_what_cannot_be_tried_is_whole_and_says_why(ops, name, reason):
    found = discover(getattr(ops, name).default, (meta(8, 16),))
    assert found.instance.free() == ()
    assert found.instance.linear == ()
    assert reason in found.failures[0]


def test_mutation_is_refused():
    assert "changes its arguments" in discover(A.add_.Tensor, (meta(4), meta(4))).failures[0]


def test_no_fake_is_an_error():
    def broken(x):
        raise ValueError("never runs")

    with pytest.raises(UnsupportedOp, match="register a fake"):
        discover(broken, (meta(4),))


def test_the_cache(ops, tmp_path, monkeypatch):
    path = tmp_path / "cache" / "rules.json"
    call = (ops.gated.default, (meta(8, 512, 1024), meta(1024)))
    first = discover(*call, cache=path)
    searches = []
    monkeypatch.setattr(module, "_search", lambda tried: searches.append(tried) or pytest.fail("searched again"))
    assert discover(*call, cache=path) == first
    assert [p.name for p in path.parent.iterdir()] == ["rules.json"]


def test_a_stale_entry_is_found_anew(ops, tmp_path):
    path = tmp_path / "rules.json"
    call = (ops.centered.default, (meta(8, 16),))
    first = discover(*call, cache=path)
    document = json.loads(path.read_text())
    (entry,) = document["entries"].values()
    entry["factors"].append({"operands": {"0": 1}, "results": [1]})
    path.write_text(json.dumps(document))
    assert discover(*call, cache=path) == first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}', '{"version": 1, "entries": []}'])
def test_a_damaged_cache_is_ignored(ops, tmp_path, text):
    path = tmp_path / "rules.json"
    path.write_text(text)
    assert discover(ops.centered.default, (meta(8, 16),), cache=path).line == "a b! -> a c!"
    assert json.loads(path.read_text())["version"] == 1
