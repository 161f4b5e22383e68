"""How a rule line depends on the flags of a call: each function here is the `adapt` of some rules in `rule_lines`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .rule_types import Call, Linear, Operand, Rule, Shape

Adapt = Callable[[Call, Rule], "Rule | None"]

_FLOATING = frozenset(
    """float64 float32 float16 bfloat16 double float half complex32 complex64 complex128 cfloat cdouble float8_e4m3fn
    float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz""".split()  # noqa: SIM905
)
_INTEGRAL = frozenset("int8 int16 int32 int64 uint8 uint16 uint32 uint64 short int long bool".split())  # noqa: SIM905


def dtype_name(value: Any) -> str | None:
    """The dtype an argument names ("float32"), or None; dtypes are recognised by their text, as this package has no torch."""
    text = str(value).removeprefix("torch.")
    return text if text in _FLOATING or text in _INTEGRAL else None


def cast(call: Call, rule: Rule) -> Rule | None:
    """Casts pass partial sums only to floating dtypes. A second operand (`to.other`, `type_as`) only gives its dtype."""
    if len(call.operands) > 1:
        return replace(rule, line="*b, *c! -> *b")
    names = [dtype_name(v) for v in (*call.args[1:], *call.kwargs.values())]
    linear: Linear = ((0,),) if all(n is None or n in _FLOATING for n in names) else ()
    return replace(rule, linear=linear)


def without_dtype(call: Call, rule: Rule) -> Rule:
    """Linear unless a dtype argument casts to integers or bool (sum, cumsum, mean)."""
    names = [dtype_name(v) for v in (*call.args[1:], *call.kwargs.values())]
    return replace(rule, linear=()) if any(n in _INTEGRAL for n in names) else rule


def add(call: Call, rule: Rule) -> Rule:
    """add, sub, rsub: jointly linear in two tensors; in one tensor only when the number is zero."""
    if len(call.operands) == 2:
        return replace(rule, linear=((0, 1),))
    return replace(rule, linear=((0,),) if call.arg(1, "other") == 0 else ())


def mul(call: Call, rule: Rule) -> Rule:
    """mul: linear in each factor."""
    return replace(rule, linear=((0,), (1,))[: len(call.operands)])


def div(call: Call, rule: Rule) -> Rule:
    """div: linear in the numerator, unless rounded."""
    numerator = call.has(0, "self") and call.arg(2, "rounding_mode") is None
    return replace(rule, linear=((0,),) if numerator else ())


def power(call: Call, rule: Rule) -> Rule:
    """pow: linear only with the exponent 1."""
    return replace(rule, linear=((0,),) if len(call.operands) == 1 and call.arg(1, "exponent") == 1 else ())


def where(call: Call, rule: Rule) -> Rule | None:
    """where: jointly linear in both branches; a number as a branch must be zero. One-argument `where` has no rule."""
    branches = [call.arg(1, "self"), call.arg(2, "other")]
    if branches == [None, None]:
        return None
    tensors = tuple(b.index for b in branches if isinstance(b, Operand))
    zeros = all(isinstance(b, Operand) or b == 0 for b in branches)
    return replace(rule, linear=(tensors,) if tensors and zeros else ())


def masked_fill(call: Call, rule: Rule) -> Rule:
    """masked_fill: with a tensor jointly linear in it and the input, with a number only when it is zero."""
    if len(call.operands) == 3:
        return replace(rule, linear=((0, 2),))
    return replace(rule, linear=((0,),) if call.arg(2, "value") == 0 else ())


def lerp(call: Call, rule: Rule) -> Rule:
    """lerp(a, b, w) = a + w (b - a)."""
    return replace(rule, linear=((0, 1),) if call.has(1, "end") else ())


def reduction(position: int) -> Adapt:
    """Losses with a `reduction` argument (0 none, 1 mean, 2 sum): a mean cannot be split, as its count would be local."""

    def adapt(call: Call, rule: Rule) -> Rule:
        mode = call.arg(position, "reduction", 1)
        return replace(rule, line={0: "*b, ... -> *b", 1: "*b!, ... -> ", 2: "*b, ... -> "}[mode])

    return adapt


def last_dims(call: Call, rule: Rule) -> Rule | None:
    """`@` stands for the trailing dims that the op's name counts ("max_pool2d")."""
    count = next((int(a) for a, b in zip(call.name, call.name[1:], strict=False) if b == "d" and a.isdigit()), None)
    if count is None or count > call.rank:
        return None
    return replace(rule, dims=tuple(range(call.rank - count, call.rank)))


def normalized(call: Call, rule: Rule) -> Rule:
    """`@` stands for as many trailing dims as `normalized_shape` has."""
    shape = call.arg(1, "normalized_shape")
    count = 1 if isinstance(shape, int) else len(shape)
    return replace(rule, dims=tuple(range(call.rank - count, call.rank)))


def group_norm(call: Call, rule: Rule) -> Rule:
    """Groups are whole: only the group factor of the channels may be split."""
    position = 6 if "native" in call.name else 1
    return replace(rule, sizes={"g": call.arg(position, "group" if position == 6 else "num_groups")})


def embedding(call: Call, rule: Rule) -> Rule:
    """Gradients scaled by how often an id occurs couple all ids."""
    if call.arg(3, "scale_grad_by_freq", False):
        return replace(rule, line="v! h, *b! -> *b h", implementation={})
    return rule


def linear(call: Call, rule: Rule) -> Rule:
    """linear; a bias is added once, so with one the contracted factor may not be split."""
    if len(call.operands) == 3:
        return replace(rule, line="*b k!, n k, n -> *b n", linear=((0, 2), (1, 2)))
    if len(call.operands[1]) == 1:
        return replace(rule, line="*b k, k -> *b")
    return rule


def bilinear(call: Call, rule: Rule) -> Rule:
    """bilinear; a bias is added once, so with one nothing contracted may be split."""
    if len(call.operands) == 4:
        return replace(rule, line="*b i!, *b j!, o i j, o -> *b o", linear=((0, 3), (1, 3), (2, 3)))
    return rule


def matmul(call: Call, rule: Rule) -> Rule:
    """matmul of every pair of ranks."""
    one, two = (len(s) == 1 for s in call.operands)
    if one and two:
        return replace(rule, line="k, k -> ")
    if two:
        return replace(rule, line="*b m k, k -> *b m")
    return replace(rule, line="k, *b k n -> *b n") if one else rule


def added_matmul(call: Call, rule: Rule) -> Rule:
    """addmm, addmv, baddbmm: the added tensor broadcasts, and is added once."""
    left, right = rule.line.split(",", 1)
    dims = left.split()
    rank = call.rank
    return replace(rule, line=f"{' '.join(dims[len(dims) - rank :])},{right}" if rank < len(dims) else rule.line)


def einsum(call: Call, rule: Rule) -> Rule | None:
    """einsum: its own equation is the rule; a letter twice in one operand has none."""
    equation = str(call.arg(0, "equation")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    operands = left.split(",")
    if any(len(set(o.replace(".", ""))) != len(o.replace(".", "")) for o in operands):
        return None
    if not arrow:
        counts = {c: left.count(c) for c in left if c.isalpha()}
        right = ("..." if "..." in left else "") + "".join(sorted(c for c, n in counts.items() if n == 1))
    spread = [" ".join("*E" if c == "." else c for c in o.replace("...", ".")) for o in (*operands, right)]
    each: Linear = tuple((i,) for i in range(len(operands)))
    return replace(rule, line=f"{', '.join(spread[:-1])} -> {spread[-1]}", linear=each)


def attention(call: Call, rule: Rule) -> Rule:
    """scaled_dot_product_attention: a mask is an operand; causal forbids the query letter; grouped heads are (kv g).

    Keys and the head dim are summed inside a softmax: splitting them needs an implementation. `t` may be split by none. Fused
    kernels take values as wide as queries: split, they would run as separate kernels.
    """
    query = "s!" if call.arg(5, "is_causal", False) else "s"
    grouped = call.arg(7, "enable_gqa", False) and call.rank >= 3
    head, kv = ("(u g) ", "u ") if grouped else ("", "")
    line = f"*b {head}{query} k!, *b {kv}t! k!, *b {kv}t! e!"
    if len(call.operands) > 3:
        line += f", {_mask(call.operands[3], call.operands[0], grouped)}"
    return replace(rule, line=f"{line} -> *b {head}{query} e!")


def _mask(mask: Shape, query: Shape, grouped: bool) -> str:
    if not grouped:
        return "*b s t" if len(mask) >= 2 else "t"
    head = "" if len(mask) < 3 else "1 " if mask[-3] == 1 and query[-3] != 1 else "(u g) "
    return f"{'*b ' if len(mask) > 3 else ''}{head}s t"


def conv(call: Call, rule: Rule) -> Rule | None:
    """Convolutions of every rank, transposed or not: batch, groups and channels may be split, space may not."""
    generic = "convolution" in call.name
    groups = call.arg(8 if generic else 6, "groups", 1)
    transposed = bool(call.arg(6, "transposed", False)) if generic else "transpose" in call.name
    bias = len(call.operands) == 3
    batch = "z " if call.rank == len(call.operands[1]) else ""
    inside = "i!" if bias else "i"
    weight = f"(g {inside}) o *k!" if transposed else f"(g o) {inside} *k!"
    line = f"{batch}(g {inside}) *s!, {weight}{', (g o)' if bias else ''} -> {batch}(g o) *t!"
    joint: Linear = ((0, 2), (1, 2)) if bias else ((0,), (1,))
    flops = "conv_transpose" if transposed else "conv"
    return replace(rule, line=line, linear=joint, sizes={"g": groups}, flops=flops)


def batch_norm(call: Call, rule: Rule) -> Rule:
    """With running statistics everything may be split; with those of the batch (training) channels, and samples where there is
    an implementation that sums over the ranks."""
    if not call.arg(5, "training", False):
        return replace(rule, implementation={})
    samples = "z" if rule.implementation else "z!"
    return replace(rule, line=rule.line.replace("z c *s,", f"{samples} c *s!,", 1))


def instance_norm(call: Call, rule: Rule) -> Rule:
    """Statistics per sample and channel; running statistics couple the samples."""
    running = call.has(3, "running_mean")
    return replace(rule, line=rule.line.replace("z c", "z! c", 1)) if running else rule


def cross_entropy(call: Call, rule: Rule) -> Rule:
    """cross_entropy_loss(logits, target, weight, reduction, ignore_index, label_smoothing).

    Class ids or class probabilities; rows are contracted by a sum and whole under a mean. The class letter has an
    implementation for plain sums over ids, [rows, classes] logits, without class weights or smoothing.
    """
    mode = call.arg(3, "reduction", 1)
    weighted, smoothed = call.has(2, "weight"), call.arg(5, "label_smoothing", 0.0) != 0.0
    dims = (0,) if call.rank == 1 else (1,)
    ids = len(call.operands[1]) != call.rank
    run = "*b!" if mode == 1 else "*b"
    target = "*b" if ids else "*b @v"
    result = "*b" if mode == 0 else ""
    plain = ids and mode == 2 and call.rank == 2 and not weighted and not smoothed
    line = f"{run} @v{'' if plain else '!'}, {target}{', @v' if weighted else ''} -> {result}"
    return replace(rule, line=line, dims=dims, implementation=rule.implementation if plain else {})


def nll(call: Call, rule: Rule) -> Rule:
    """nll_loss(log_probabilities, target, weight, reduction, ignore_index): the class dim stays whole."""
    mode = call.arg(3, "reduction", 1)
    weighted = call.has(2, "weight")
    dims = (0,) if call.rank == 1 else (1,)
    result = "*b" if mode == 0 else ""
    line = f"*b{'!' if mode == 1 else ''} @v!, *b{', @v' if weighted else ''} -> {result}"
    extra = ", " if "forward" in call.name else ""
    if extra and mode != 2:
        line = line.replace("*b", "*b!", 1)
    return replace(rule, line=line + extra, dims=dims, linear=() if extra else ((0,),))


def histogram(call: Call, rule: Rule) -> Rule:
    """histc: counts of elements sum, where the bins do not depend on the values."""
    fixed = call.arg(2, "min", 0) != call.arg(3, "max", 0)
    return replace(rule, line="*b -> n!") if fixed else rule


def extremum(call: Call, rule: Rule) -> Rule:
    """max and min: of two tensors element by element, else along a dim or over everything."""
    if len(call.operands) == 2:
        return replace(rule, line="*b, *b -> *b", kind="elementwise", flops="elements", dims=())
    return rule


def gather(call: Call, rule: Rule) -> Rule:
    """gather: the index may be shorter than the input in other dims; those stay whole on both sides."""
    dim = call.arg(1, "dim") % max(call.rank, 1)
    source, index = call.operands[0], call.operands[1]
    names = [f"b{d}" for d in range(call.rank)]
    left = ["d!" if d == dim else n if source[d] == index[d] else f"{n}x!" for d, n in enumerate(names)]
    right = ["e" if d == dim else n if source[d] == index[d] else f"{n}y!" for d, n in enumerate(names)]
    return replace(rule, line=f"{' '.join(left)}, {' '.join(right)} -> {' '.join(right)}")


def scatter(call: Call, rule: Rule) -> Rule | None:
    """scatter, scatter_add, scatter_reduce: the index's own dim stays whole, and dims where it is shorter."""
    dim = call.arg(1, "dim") % max(call.rank, 1)
    source, index = call.operands[0], call.operands[1]
    values = call.operands[2] if len(call.operands) > 2 else index
    names = [f"b{d}" for d in range(call.rank)]
    sides: list[list[str]] = [[], [], []]
    for d, n in enumerate(names):
        same = d != dim and source[d] == index[d] == values[d]
        for side, mark in zip(sides, ("x!", "y!", "w!"), strict=True):
            side.append(n if same else n + mark)
    rows = [" ".join(side) for side in sides]
    reduced = call.arg(4, "reduce") is not None
    joint: Linear = (
        () if reduced else ((0, 2),) if len(call.operands) > 2 else ((0,),) if call.arg(3, "value") == 0 else ()
    )
    return replace(rule, line=f"{', '.join(rows[: len(call.operands)])} -> {rows[0]}", linear=joint)


def index(call: Call, rule: Rule) -> Rule | None:
    """x[..., ids, ...]: indexed dims stay whole; the dims of the (broadcast) index tensors may be split."""
    rows = _index_rows(call, call.results[0])
    if rows is None:
        return None
    before, ids, after = rows
    return replace(rule, line=", ".join([before, *ids]) + f" -> {after}")


def index_put(call: Call, rule: Rule) -> Rule | None:
    """x with values put at x[..., ids, ...]: what the ids range over stays whole; jointly linear in x and the values."""
    indices = call.arg(1, "indices")
    count = sum(isinstance(i, Operand) for i in indices)
    rows = _index_rows(call, None)
    if rows is None or not isinstance(call.arg(2, "values"), Operand):
        return None
    before, ids, after = rows
    dims = after.split()
    values = call.operands[-1]
    if len(values) > len(dims):
        return None
    names = " ".join(dims[len(dims) - len(values) :])
    marked = [" ".join(f"{i}!" for i in row.split()) for row in ids]
    return replace(rule, line=", ".join([before, *marked, names]) + f" -> {before}", linear=((0, count + 1),))


def _index_rows(call: Call, result: Shape | None) -> tuple[str, list[str], str] | None:
    """(dims of x, dims of each index tensor, dims of the selection) in letters; None for masks and other forms."""
    indices = list(call.arg(1, "indices"))
    held = [d for d, i in enumerate(indices) if isinstance(i, Operand)]
    shapes = [call.operands[i.index] for i in indices if isinstance(i, Operand)]
    if not held:
        return None
    width = max(len(s) for s in shapes)
    letters = [f"i{k}" for k in range(width)]
    before = [f"x{d}!" if d in held else f"b{d}" for d in range(call.rank)]
    ids = [" ".join(letters[width - len(s) :]) for s in shapes]
    adjacent = held == list(range(held[0], held[-1] + 1))
    kept = [f"b{d}" for d in range(call.rank) if d not in held]
    lead = held[0] if adjacent else 0
    after = [*kept[:lead], *letters, *kept[lead:]]
    expected = _broadcast(shapes)
    if expected is None or (result is not None and len(result) != len(after)):
        return None
    if result is not None and tuple(result[lead : lead + width]) != expected:
        return None
    return " ".join(before), ids, " ".join(after)


def _broadcast(shapes: Sequence[Shape]) -> Shape | None:
    width = max(len(s) for s in shapes)
    found: list[int] = []
    for k in range(width):
        sizes = {s[k - width + len(s)] for s in shapes if k - width + len(s) >= 0} - {1}
        if len(sizes) > 1:
            return None
        found.append(sizes.pop() if sizes else 1)
    return tuple(found)
