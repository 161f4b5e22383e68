"""Factor maps of ops that only move, cut or repeat elements: which loops a dim is made of before and after.

Reshapes group dims by equal products and refine each group into common factors ("a (b c) -> (a b) c"); where a group has
no common refinement (6x4 seen as 8x3) its dims may not be split. Windows of a dim (slice, split, cat) are cut in blocks of
the greatest common divisor, so the *minor* factor of such a dim may be split: the three parts of [3 * h] are "(c! h) -> h, h, h".
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .rule_types import Call, Factors, Letters, Shape

MOST_BLOCKS = 64
"""A window is cut in at most this many blocks; beyond, its dim is not split (blocks of a few elements help nobody)."""


@dataclass(slots=True)
class Maker:
    """Hands out letters for one call."""

    sizes: dict[str, int] = field(default_factory=dict)
    never: set[str] = field(default_factory=set)

    def new(self, size: int, *, never: bool = False) -> tuple[str, ...]:
        """A fresh letter as the whole of a dim: () for size 1. An empty dim may not be split."""
        if size == 1:
            return ()
        name = letter_name(len(self.sizes))
        self.sizes[name] = size
        if never or size == 0:
            self.never.add(name)
        return (name,)

    def row(self, shape: Iterable[int], *, never: bool = False) -> list[tuple[str, ...]]:
        """One fresh letter per dim."""
        return [self.new(n, never=never) for n in shape]

    def done(
        self, operands: Sequence[Sequence[tuple[str, ...]]], results: Sequence[Sequence[tuple[str, ...]]]
    ) -> Factors:
        """The finished factors: only letters that stand in some dim, named in order of appearance."""
        names: dict[str, str] = {}
        for dims in (*operands, *results):
            for members in dims:
                for letter in members:
                    if letter not in names:
                        names[letter] = letter_name(len(names))
        fixed: list[Letters] = [tuple(tuple(names[c] for c in m) for m in dims) for dims in (*operands, *results)]
        sizes = {new: self.sizes[old] for old, new in names.items()}
        never = frozenset(names[c] for c in self.never if c in names)
        return Factors(tuple(fixed[: len(operands)]), tuple(fixed[len(operands) :]), sizes, never)


def letter_name(index: int) -> str:
    """a, b, ..., z, a1, ..."""
    cycle, place = divmod(index, 26)
    return string.ascii_lowercase[place] + (str(cycle) if cycle else "")


def _groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dims (of size > 1) of equal product, as dim indices of both sides, major to minor."""
    left = [d for d, n in enumerate(before) if n > 1]
    right = [d for d, n in enumerate(after) if n > 1]
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        mine, theirs = [left[i]], [right[j]]
        a, b = before[left[i]], after[right[j]]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a *= before[left[i]]
                mine.append(left[i])
                i += 1
            else:
                b *= after[right[j]]
                theirs.append(right[j])
                j += 1
        found.append((mine, theirs))
    return found


def _cuts(sizes: Sequence[int]) -> list[int]:
    """What lies inside each boundary: [12, 64] has the cuts 64 and 1."""
    found = [1]
    for n in reversed(sizes[1:]):
        found.append(found[-1] * n)
    return found


def factor_reshape(make: Maker, before: Shape, after: Shape) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Letters of both sides of a reshape."""
    left: list[tuple[str, ...]] = [()] * len(before)
    right: list[tuple[str, ...]] = [()] * len(after)
    if 0 in before:
        return make.row(before, never=True), make.row(after, never=True)
    for mine, theirs in _groups(before, after):
        a, b = [before[d] for d in mine], [after[d] for d in theirs]
        cuts = sorted({*_cuts(a), *_cuts(b)})
        if any(hi % lo for lo, hi in zip(cuts, [*cuts[1:], math.prod(a)], strict=True)):
            for d in mine:
                left[d] = make.new(before[d], never=True)
            for d in theirs:
                right[d] = make.new(after[d], never=True)
            continue
        bounds = [math.prod(a), *reversed(cuts)]
        letters = [(make.new(hi // lo)[0], lo) for hi, lo in pairwise(bounds)]
        _deal(letters, mine, before, left)
        _deal(letters, theirs, after, right)
    return left, right


def _deal(letters: Sequence[tuple[str, int]], dims: Sequence[int], shape: Shape, into: list[tuple[str, ...]]) -> None:
    """Hand the letters of a group, major to minor with their inner sizes, to the dims that hold them."""
    inner = math.prod(shape[d] for d in dims)
    for d in dims:
        outer, inner = inner, inner // shape[d]
        into[d] = tuple(c for c, low in letters if inner <= low < outer)


def reshape(call: Call) -> Factors | None:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze (and view_as, whose second operand is only a shape)."""
    if math.prod(call.operands[0]) != math.prod(call.results[0]):
        return None
    make = Maker()
    before, after = factor_reshape(make, call.operands[0], call.results[0])
    return make.done([before, *[after for _ in call.operands[1:]]], [after])


def permute(call: Call) -> Factors | None:
    """transpose, permute, t, movedim and their synonyms."""
    rank = call.rank
    order = list(range(rank))
    packet = call.name.split(".")[-1]
    if packet in ("transpose", "transpose_copy", "swapaxes", "swapdims"):
        i, j = call.arg(1, "dim0") % max(rank, 1), call.arg(2, "dim1") % max(rank, 1)
        order[i], order[j] = order[j], order[i]
    elif packet in ("permute", "permute_copy"):
        order = [d % rank for d in call.arg(1, "dims")]
    elif packet in ("movedim", "moveaxis"):
        order = _moved(rank, call.arg(1, "source"), call.arg(2, "destination"))
    elif packet in ("mT", "adjoint", "mH"):
        order[-2], order[-1] = order[-1], order[-2]
    else:
        order.reverse()
    make = Maker()
    before = make.row(call.operands[0])
    return make.done([before], [[before[d] for d in order]])


def _moved(rank: int, source: int | Sequence[int], target: int | Sequence[int]) -> list[int]:
    sources = [d % rank for d in ([source] if isinstance(source, int) else source)]
    targets = [d % rank for d in ([target] if isinstance(target, int) else target)]
    rest = iter(d for d in range(rank) if d not in sources)
    return [sources[targets.index(d)] if d in targets else next(rest) for d in range(rank)]


def expand(call: Call) -> Factors | None:
    """expand, broadcast_to, expand_as: a dim of size 1 (or none) becomes a loop of the result alone."""
    make = Maker()
    after = make.row(call.results[0])
    lead = len(after) - call.rank
    before = [
        after[lead + d] if n > 1 or n == call.results[0][lead + d] else () for d, n in enumerate(call.operands[0])
    ]
    return make.done([before, *[after for _ in call.operands[1:]]], [after])


def _windows(make: Maker, whole: int, offsets: Iterable[int], parts: Sequence[int]) -> list[tuple[str, ...]]:
    """Letters of a whole dim, then of each window of it; offsets and parts in elements, in blocks of their common divisor."""
    block = math.gcd(whole, *offsets, *parts)
    if block <= 1 or whole // block > MOST_BLOCKS:
        return [make.new(n, never=True) for n in (whole, *parts)]
    minor = make.new(block)
    return [make.new(n // block, never=True) + minor for n in (whole, *parts)]


def _place(dims: Sequence[tuple[str, ...]], dim: int, letters: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [*dims[:dim], letters, *dims[dim + 1 :]]


def _bounds(call: Call) -> tuple[int, int, int, int]:
    """(dim, start, stop, step) of slice, narrow and slice_scatter, normalised."""
    packet = call.name.split(".")[-1]
    at = 2 if packet == "slice_scatter" else 1
    dim = call.arg(at, "dim", 0) % call.rank
    size = call.operands[0][dim]
    if packet in ("narrow", "narrow_copy"):
        start = call.arg(2, "start")
        start += size if start < 0 else 0
        return dim, start, start + call.arg(3, "length"), 1
    start, stop, step = call.arg(at + 1, "start"), call.arg(at + 2, "end"), call.arg(at + 3, "step", 1)
    return dim, *slice(start, stop).indices(size)[:2], step


def slice_window(call: Call) -> Factors | None:
    """slice and narrow, and slice_scatter (whose second operand is the window)."""
    if call.name.split(".")[-1].startswith("narrow") and not isinstance(call.arg(2, "start"), int):
        return None
    dim, start, _, step = _bounds(call)
    make = Maker()
    whole = make.row(call.operands[0])
    scatter = len(call.operands) > 1
    part = (call.operands[1] if scatter else call.results[0])[dim]
    size = call.operands[0][dim]
    if part == size:
        window = whole
    elif step != 1:
        whole = _place(whole, dim, make.new(size, never=True))
        window = _place(whole, dim, make.new(part, never=True))
    else:
        major, minor = _windows(make, size, [start], [part])
        whole, window = _place(whole, dim, major), _place(whole, dim, minor)
    return make.done([whole, window], [whole]) if scatter else make.done([whole], [window])


def select(call: Call) -> Factors | None:
    """select one index of a dim; unbind, which takes all of them; select_scatter (the second operand is the slice)."""
    scatter = len(call.operands) > 1
    dim = call.arg(2 if scatter else 1, "dim", 0) % call.rank
    make = Maker()
    whole = make.row(call.operands[0])
    rest = [*whole[:dim], *whole[dim + 1 :]]
    whole = _place(whole, dim, make.new(call.operands[0][dim], never=True))
    return make.done([whole, rest], [whole]) if scatter else make.done([whole], [rest for _ in call.results])


def parts(call: Call) -> Factors | None:
    """split, split_with_sizes, chunk, tensor_split: windows that follow each other."""
    dim = call.arg(2, "dim", 0) % call.rank
    make = Maker()
    whole = make.row(call.operands[0])
    letters = _windows(make, call.operands[0][dim], (), [r[dim] for r in call.results])
    return make.done([_place(whole, dim, letters[0])], [_place(whole, dim, c) for c in letters[1:]])


def cat(call: Call) -> Factors | None:
    """cat: the inverse of split. Legacy empty operands (shape [0]) stand aside."""
    ranks = len(call.results[0])
    dim = call.arg(1, "dim", 0) % max(ranks, 1)
    make = Maker()
    whole = make.row(call.results[0])
    real = [s for s in call.operands if len(s) == ranks]
    letters = _windows(make, call.results[0][dim], (), [s[dim] for s in real])
    rest = iter(_place(whole, dim, c) for c in letters[1:])
    operands = [next(rest) if len(s) == ranks else make.row(s, never=True) for s in call.operands]
    return make.done(operands, [_place(whole, dim, letters[0])])


def stack(call: Call) -> Factors | None:
    """stack: the new dim may not be split."""
    make = Maker()
    whole = make.row(call.operands[0])
    dim = call.arg(1, "dim", 0) % (call.rank + 1)
    new = make.new(len(call.operands), never=True)
    return make.done([whole for _ in call.operands], [[*whole[:dim], new, *whole[dim:]]])


def repeat(call: Call) -> Factors | None:
    """repeat and tile: each result dim is (times old)."""
    make = Maker()
    before = make.row(call.operands[0])
    lead = len(call.results[0]) - call.rank
    if 0 in call.operands[0] or lead < 0:
        return None
    after = []
    for d, n in enumerate(call.results[0]):
        old = before[d - lead] if d >= lead else ()
        after.append(make.new(n // (call.operands[0][d - lead] if d >= lead else 1)) + old)
    return make.done([before], [after])


def repeat_interleave(call: Call) -> Factors | None:
    """repeat_interleave by a number along a dim: the result dim is (old times)."""
    if not isinstance(call.arg(1, "repeats"), int) or call.arg(2, "dim") is None:
        return None
    dim = call.arg(2, "dim") % call.rank
    make = Maker()
    before = make.row(call.operands[0])
    return make.done([before], [_place(before, dim, before[dim] + make.new(call.arg(1, "repeats")))])


def pad(call: Call) -> Factors | None:
    """constant_pad_nd, pad: padded dims may not be split."""
    make = Maker()
    before = make.row(call.operands[0])
    after = list(before)
    widths = call.arg(1, "pad")
    for i in range(len(widths) // 2):
        dim = call.rank - 1 - i
        if any(widths[2 * i : 2 * i + 2]):
            before[dim] = make.new(call.operands[0][dim], never=True)
            after[dim] = make.new(call.results[0][dim], never=True)
    return make.done([before], [after])


def unfold(call: Call) -> Factors | None:
    """Sliding windows along a dim, which may not be split."""
    dim = call.arg(1, "dimension") % call.rank
    make = Maker()
    before = make.row(call.operands[0])
    after = [
        *_place(before, dim, make.new(call.results[0][dim], never=True)),
        make.new(call.results[0][-1], never=True),
    ]
    return make.done([_place(before, dim, make.new(call.operands[0][dim], never=True))], [after])


def halves(call: Call) -> Factors | None:
    """glu: both halves of a dim, "(c! k) -> k"."""
    dim = call.arg(1, "dim", -1) % call.rank
    make = Maker()
    before = make.row(call.operands[0])
    whole, half = _windows(make, call.operands[0][dim], (), [call.results[0][dim]])
    return make.done([_place(before, dim, whole)], [_place(before, dim, half)])


def pixel_shuffle(call: Call) -> Factors | None:
    """pixel_shuffle "*b (c r! q!) h w -> *b c (h r) (w q)" and pixel_unshuffle, its inverse."""
    wide, tall = call.operands[0], call.results[0]
    inverse = call.name.endswith("unshuffle")
    if inverse:
        wide, tall = tall, wide
    make = Maker()
    lead = make.row(wide[:-3])
    c, h, w = (make.new(n) for n in (tall[-3], wide[-2], wide[-1]))
    r, q = make.new(tall[-2] // wide[-2], never=True), make.new(tall[-1] // wide[-1], never=True)
    sides = [[*lead, c + r + q, h, w]], [[*lead, c, h + r, w + q]]
    return make.done(sides[1], sides[0]) if inverse else make.done(*sides)


def fill(call: Call) -> Factors | None:
    """Factories that fill with one value; an operand (of new_zeros) only gives dtype and device, and stays whole."""
    make = Maker()
    return make.done([make.row(s, never=True) for s in call.operands], [make.row(r) for r in call.results])


def positions(call: Call) -> Factors | None:
    """Factories whose elements depend on their position: never split."""
    make = Maker()
    return make.done([make.row(s, never=True) for s in call.operands], [make.row(r, never=True) for r in call.results])


@dataclass(frozen=True, slots=True)
class View:
    """A factor map, and how a partial sum passes: "each" (the first operand), "joint" (all together) or "none"."""

    factors: Callable[[Call], Factors | None]
    linear: str = "each"
    kind: str = "view"


_NAMES: tuple[tuple[View, str], ...] = (
    (View(reshape), """view reshape _unsafe_view view_copy flatten unflatten squeeze unsqueeze squeeze_copy unsqueeze_copy
     view_as reshape_as ravel"""),
    (View(permute), """transpose permute t movedim moveaxis swapaxes swapdims numpy_T mT transpose_copy permute_copy t_copy"""),
    (View(expand), "expand broadcast_to expand_as expand_copy"),
    (View(slice_window), "slice narrow slice_copy narrow_copy"),
    (View(slice_window, "joint"), "slice_scatter"),
    (View(select), "select unbind select_copy unbind_copy"),
    (View(select, "joint"), "select_scatter"),
    (View(parts), """split split_with_sizes chunk tensor_split split_copy split_with_sizes_copy unsafe_split unsafe_chunk
     unsafe_split_with_sizes"""),
    (View(cat, "joint"), "cat concat concatenate"),
    (View(stack, "joint"), "stack"),
    (View(repeat), "repeat tile"),
    (View(repeat_interleave), "repeat_interleave"),
    (View(pad), "constant_pad_nd pad"),
    (View(unfold), "unfold"),
    (View(halves, "none", "elementwise"), "glu"),
    (View(pixel_shuffle), "pixel_shuffle pixel_unshuffle"),
    (View(fill, "none", "fill"), """zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor
     empty_permuted"""),
    (View(fill, "none", "random"), "rand randn"),
    (View(positions, "none", "fill"), "arange linspace logspace eye tril_indices triu_indices"),
    (View(positions, "none", "random"), "randint randperm"),
)  # fmt: skip
VIEWS: Mapping[str, View] = {f"aten.{name}": view for view, names in _NAMES for name in names.split()}
"""Factor maps by op."""
