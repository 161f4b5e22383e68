"""The language of rule lines, and matching a line against the shapes of one call.

    "*b k, n k -> *b n"        operands, then results; each is a row of dims
    k                          a letter: one factor (loop) of the op
    k!                         a factor that may not be split (one mark anywhere in the line is enough)
    (g c)                      a dim that merges two factors, major to minor
    1                          a dim of size 1
    *b                         any number of dims, aligned from the right (broadcasting drops a letter where the size is 1)
    @d                         the dims that the op's `dim` argument names (`Rule.dims`); `*b` are then the others, in place
    "*b, ..."                  the last operand's form repeats

In a line with `@`, a tensor that has only `*b` either lost the named dims or keeps them with size 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .rule_types import Factors, Letters, Shape


class Mismatch(Exception):
    """The shapes of a call do not fit the line."""


@dataclass(frozen=True, slots=True)
class Token:
    """One dim of a pattern: kind "letter", "run" (*b), "named" (@d), "merge" or "one"."""

    kind: str
    names: tuple[str, ...] = ()


Pattern = tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A parsed line. `never` are base names: those of runs stand for every letter of the run."""

    operands: tuple[Pattern, ...]
    results: tuple[Pattern, ...]
    never: frozenset[str]
    repeats: bool
    named: bool


@functools.lru_cache(maxsize=4096)
def parse(line: str) -> Line:
    """Parse one rule line; raises ValueError where it is malformed."""
    left, arrow, right = line.partition("->")
    if not arrow:
        raise ValueError(f"rule line {line!r} has no '->'")
    never: set[str] = set()
    operands = [p.strip() for p in left.split(",")] if left.strip() else []
    repeats = bool(operands) and operands[-1] == "..."
    if repeats:
        operands.pop()
    results = [p.strip() for p in right.split(",")]
    return Line(
        tuple(_pattern(p, never) for p in operands), tuple(_pattern(p, never) for p in results),
        frozenset(never), repeats, "@" in line,
    )  # fmt: skip


def _pattern(text: str, never: set[str]) -> Pattern:
    tokens: list[Token] = []
    merge: list[str] | None = None
    for word in text.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            merge = []
        elif word == ")":
            tokens.append(Token("merge", tuple(merge or ())))
            merge = None
        else:
            name = word.rstrip("!").lstrip("*@")
            if word.endswith("!"):
                never.add(name)
            if merge is not None:
                merge.append(name)
            else:
                kind = {"*": "run", "@": "named", "1": "one"}.get(word[0], "letter")
                tokens.append(Token(kind, () if kind == "one" else (name,)))
    return tuple(tokens)


class _Match:
    """Letters and sizes found so far."""

    def __init__(self, line: Line, dims: tuple[int, ...], rank: int, sizes: Mapping[str, int]) -> None:
        self.line, self.dims, self.rank = line, dims, rank
        self.sizes = dict(sizes)
        self.order: dict[str, None] = {}
        self.never: set[str] = set()
        self.longest: dict[str, int] = {}

    def letter(self, base: str, index: int | None, size: int) -> tuple[str, ...]:
        """The letter of one dim, its size checked or recorded; () for size 1."""
        if size == 1:
            return ()
        name = base if index is None else f"{base}{index}"
        if self.sizes.setdefault(name, size) != size:
            raise Mismatch(f"{name} is {self.sizes[name]} and {size}")
        self.order[name] = None
        if base in self.line.never:
            self.never.add(name)
        return (name,)

    def measure(self, pattern: Pattern, shape: Shape) -> None:
        """Record how long each run can be, so that runs of different tensors align from the right."""
        for token in pattern:
            if token.kind == "run":
                length = len(shape) - len(pattern) + 1
                self.longest[token.names[0]] = max(self.longest.get(token.names[0], 0), length)

    def side(self, pattern: Pattern, shape: Shape) -> list[tuple[str, ...] | Token]:
        """Letters of each dim; merges stay tokens until every plain letter is known."""
        kinds = {t.kind for t in pattern}
        if self.line.named and ("named" in kinds or "run" in kinds):
            return self._named_side(pattern, shape, kinds)
        runs = sum(t.kind == "run" for t in pattern)
        length = len(shape) - (len(pattern) - runs)
        if runs > 1 or length < 0 or (runs == 0 and length):
            raise Mismatch(f"a tensor of {len(shape)} dims where the rule has {len(pattern)}")
        found: list[tuple[str, ...] | Token] = []
        for token in pattern:
            if token.kind == "run":
                offset = self.longest[token.names[0]] - length
                at = len(found)
                found += [self.letter(token.names[0], offset + i, shape[at + i]) for i in range(length)]
            elif token.kind == "merge":
                found.append(token)
            elif token.kind == "one":
                if shape[len(found)] != 1:
                    raise Mismatch("a dim of size 1 is expected")
                found.append(())
            else:
                found.append(self.letter(token.names[0], None, shape[len(found)]))
        return found

    def _named_side(self, pattern: Pattern, shape: Shape, kinds: set[str]) -> list[tuple[str, ...] | Token]:
        named = next((t.names[0] for t in pattern if t.kind == "named"), None)
        run = next((t.names[0] for t in pattern if t.kind == "run"), None)
        if not kinds <= {"named", "run"}:
            raise Mismatch("@ stands beside * only")
        if named is not None and run is None:
            if len(shape) != len(self.dims):
                raise Mismatch(f"{len(self.dims)} named dims, a tensor of {len(shape)}")
            return [self._at(named, d, n) for d, n in zip(self.dims, shape, strict=True)]
        if len(shape) == self.rank:
            found: list[tuple[str, ...] | Token] = []
            for d, size in enumerate(shape):
                if d in self.dims and named is None and size != 1:
                    raise Mismatch("a reduced dim keeps size 1")
                found.append(self._at(named, d, size) if d in self.dims else self.letter(run or "b", d, size))
            return found
        others = [d for d in range(self.rank) if d not in self.dims]
        if named is not None or len(shape) != len(others):
            raise Mismatch(f"a tensor of {len(shape)} dims where {self.rank} or {len(others)} are expected")
        return [self.letter(run or "b", d, n) for d, n in zip(others, shape, strict=True)]

    def _at(self, named: str | None, dim: int, size: int) -> tuple[str, ...]:
        if named is None:
            return ()
        return self.letter(named, None if len(self.dims) == 1 else dim, size)

    def resolve(self, token: Token, size: int) -> tuple[str, ...]:
        """The letters of a merged dim; at most one of them may still be unknown."""
        unknown = [n for n in token.names if n not in self.sizes]
        known = math.prod(self.sizes[n] for n in token.names if n in self.sizes)
        if len(unknown) > 1 or size % known or (not unknown and known != size):
            raise Mismatch(f"a dim of {size} is not ({' '.join(token.names)})")
        for name in unknown:
            self.sizes[name] = size // known
        for name in token.names:
            if self.sizes[name] > 1:
                self.order[name] = None
                if name in self.line.never:
                    self.never.add(name)
        return tuple(n for n in token.names if self.sizes[n] > 1)


def match(
    line: Line, operands: Sequence[Shape], results: Sequence[Shape], dims: tuple[int, ...], sizes: Mapping[str, int]
) -> Factors:
    """Match a line against shapes. `sizes` gives letters that no plain dim shows. Raises Mismatch."""
    forms = line.operands[: len(operands)]
    if len(forms) < len(operands) and forms and line.repeats:
        forms += (forms[-1],) * (len(operands) - len(forms))
    if len(forms) != len(operands) or len(line.results) < len(results):
        raise Mismatch(f"{len(operands)} tensors for {len(line.operands)} operands")
    work = _Match(line, dims, len(operands[0]) if operands else 0, sizes)
    pairs = [*zip(forms, operands, strict=True), *zip(line.results[: len(results)], results, strict=True)]
    for pattern, shape in pairs:
        work.measure(pattern, shape)
    drafts = [work.side(pattern, shape) for pattern, shape in pairs]
    final: list[Letters] = []
    for (_, shape), draft in zip(pairs, drafts, strict=True):
        final.append(
            tuple(work.resolve(x, n) if isinstance(x, Token) else x for x, n in zip(draft, shape, strict=True))
        )
    letters = {name: work.sizes[name] for name in work.order}
    return Factors(tuple(final[: len(operands)]), tuple(final[len(operands) :]), letters, frozenset(work.never))
