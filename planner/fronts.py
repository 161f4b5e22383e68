"""Designs of every region on every model axis: the fronts that the stage solve chooses from, made when first asked for.

A *style* says how weights and positions may be split on the model axis: Megatron's tensor parallelism with whole or with split
positions between layers, or anything (from which Ulysses follows). For each style the fastest sharding is found, then, with that
sharding, what to keep and what to run again at a geometric sequence of budgets, from keeping all to keeping least. The named
policies `none`, `selective` (attention runs again; Korthikanti et al. 2022) and `full` are always among them; with split positions
the first two both with the copies gathered for products kept, and with their shards kept (section 4.2.2 there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..errors import PinError
from .bench import Bench
from .context import ContextCut, context_choices
from .costs import Costs, PriceBook, Shape
from .front import Design, FrontProgram, Regathered, Way, crossing_state, ways_of
from .memory import Setting, buffer
from .numbers import Numbers
from .outline import Tensor
from .overlap import NONE, Overlap
from .part import Chain, Part
from .pins import Pins
from .placement import Placement, R, State
from .plan import MeshAxis
from .ring import repeated
from .saves import saves

BUDGETS = 4
"""Designs between keeping all and keeping least, per style."""

NODES = 200
"""Nodes spent on the sharding of one style (it closes at the root for all but odd graphs)."""

REFERENCE_TOKENS = 2048
"""Designs are made for the smallest microbatch of at least so many tokens, and priced at every other one."""


@dataclass(frozen=True, slots=True)
class Style:
    """What a style pins on the model axis, and the layout of the tensors between units."""

    name: str
    layout: str
    tensor_parallel: bool
    sequence_parallel: bool


STYLES = (
    Style("tensor", "R", True, False),
    Style("tensor+sequence", "S", True, True),
    Style("free", "S", False, False),
)


@dataclass(frozen=True, slots=True)
class Named:
    """A design with the recompute policy it stands for, "" for one of the front."""

    design: Design
    style: str
    policy: str


@dataclass(frozen=True, slots=True)
class Sharding:
    """The fastest design of a style, the bytes it keeps, and the program that says what else may be kept with it."""

    style: Style
    program: FrontProgram
    design: Design
    kept_bytes: float


class Fronts:
    """Designs and numbers of a chain's regions, remembered."""

    def __init__(
        self, chain: Chain, prices: PriceBook, pins: Pins, setting: Setting, residual: Mapping[str, frozenset[str]],
        tell: Callable[[str], None] = lambda text: None, overlap: Overlap = NONE,
    ) -> None:  # fmt: skip
        """`overlap` is what the device hides of a ring's sends (`Overlap.of(device)`)."""
        self.chain, self.prices, self.pins, self.setting, self.residual, self.tell = (
            chain, prices, pins, setting, residual, tell,
        )  # fmt: skip
        self.overlap = overlap
        self.trim: Callable[[Bench, Design], Design] = lambda bench, design: design
        """What is made of every design before it is offered (planner/trim.py)."""
        self._shardings: dict[tuple[int, int], tuple[Sharding, ...]] = {}
        self._designs: dict[tuple[int, int], tuple[Named, ...]] = {}
        self._benches: dict[tuple[int, int, int, int], Bench] = {}
        self._numbers: dict[tuple[int, int, int, int], tuple[tuple[Named, Numbers], ...]] = {}
        self._plain: dict[tuple[int, int, int, int], tuple[float, float] | None] = {}
        self._costs: dict[tuple[int, int], Costs] = {}
        self._cuts: dict[int, ContextCut] = {}

    def costs(self, ways: int, context: int = 1) -> Costs:
        """Prices on a model axis of so many ranks, inside a context axis where that has more than one."""
        key = (ways, context)
        if key not in self._costs:
            axes = (MeshAxis("cp", context, "context", ""), MeshAxis("tp", ways, "model", ""))
            shape, training = Shape(axes if context > 1 else axes[1:]), self.chain.outline.training
            grouped = repeated(self.chain.outline) if context > 1 else {}
            self._costs[key] = Costs(self.prices, shape, training, overlap=self.overlap, repeated=grouped, ahead=True)
        return self._costs[key]

    def context(self, ranks: int) -> ContextCut:
        """How positions are split over a context axis of so many ranks; `blockers` says why they cannot be."""
        if ranks not in self._cuts:
            self._cuts[ranks] = context_choices(self.chain.outline, ranks)
        return self._cuts[ranks]

    @property
    def reference(self) -> int:
        """Into how many pieces the batch is cut where designs are made."""
        outline = self.chain.outline
        each = max(outline.tokens // max(outline.batch, 1), 1)
        for samples in range(1, outline.batch + 1):
            if outline.batch % samples == 0 and samples * each >= REFERENCE_TOKENS:
                return outline.batch // samples
        return 1

    def numbers(self, region: int, ways: int, pieces: int, context: int = 1) -> tuple[tuple[Named, Numbers], ...]:
        """Every design of a region that is possible with the batch cut into `pieces` and positions over `context` ranks, with
        its numbers; none where positions cannot be split."""
        key = (region, ways, pieces, context)
        if key not in self._numbers:
            if context > 1 and self.context(context).blockers:
                return ()
            bench = self.bench(region, ways, pieces, context)
            measured = ((named, bench.measure(named.design)) for named in self.designs(region, ways))
            self._numbers[key] = tuple((named, found) for named, found in measured if found is not None)
        return self._numbers[key]

    def least(self, region: int, ways: int, pieces: int, context: int = 1) -> tuple[float, float] | None:
        """The least forward and the least backward seconds of any design: of those that run nothing again.

        None where no design is possible at these sizes.
        """
        key = (region, ways, pieces, context)
        if context > 1 and self.context(context).blockers:
            return None
        if key not in self._plain:
            bench = self.bench(region, ways, pieces, context)
            plain = dict.fromkeys(
                replace(s.design, again=frozenset(), regather=frozenset()) for s in self.shardings(region, ways)
            )
            found = [n for n in (bench.seconds(d) for d in plain) if n is not None]
            self._plain[key] = (min(f for f, _ in found), min(b for _, b in found)) if found else None
        return self._plain[key]

    def bench(self, region: int, ways: int, pieces: int, context: int = 1) -> Bench:
        """The bench of a region's part at these sizes."""
        key = (region, ways, pieces, context)
        if key not in self._benches:
            part = self.chain.at(region, pieces)
            layouts = {layout: self._border(part, layout, ways, context) for layout in ("R", "S")}
            if context == 1:
                self._benches[key] = Bench(part, self.costs(ways), self.setting, layouts)
            else:
                cut = self.context(context)
                side = {name: (cut.states[name], R) for name in (*part.side, *part.outline.inputs)}
                costs = self.costs(ways, context)
                self._benches[key] = Bench(part, costs, self.setting, layouts, cut.choice, side)
        return self._benches[key]

    def _border(self, part: Part, layout: str, ways: int, context: int = 1) -> dict[str, Placement]:
        places = self.chain.places
        found: dict[str, Placement] = {}
        for name in (*part.entry, *part.exit):
            tensor = part.outline.tensors[name]
            outer: Placement = ()
            if context > 1:
                state = self.context(context).states[name]
                tensor, outer = _local(tensor, state, context), (state,)
            found[name] = (*outer, crossing_state(tensor, layout, places.get(name, ()), ways))
        return found

    # -- designs

    def designs(self, region: int, ways: int) -> tuple[Named, ...]:
        """The designs of a region; raises PinError where the pins leave none."""
        key = (region, ways)
        if key not in self._designs:
            found: dict[Design, Named] = {}
            bench = self.bench(region, ways, self.reference)
            for sharding in self.shardings(region, ways):
                for named in self._styled(region, ways, sharding):
                    design = self.trim(bench, named.design)
                    found.setdefault(design, replace(named, design=design))
            if not found:
                raise self._none_left()
            self._designs[key] = tuple(found.values())
        return self._designs[key]

    def shardings(self, region: int, ways: int) -> tuple[Sharding, ...]:
        """The fastest sharding of a region in each style; raises PinError where the pins leave none."""
        key = (region, ways)
        if key not in self._shardings:
            self.tell(f"region {self.chain.outline.regions[region].name} on {ways} ranks")
            found: list[Sharding] = []
            refused: list[PinError] = []
            for style in self.styles(ways):
                try:
                    sharding = self._sharded(region, ways, style)
                except PinError as error:
                    refused.append(error)
                else:
                    found += [sharding] if sharding is not None else []
            if not found:
                raise refused[0] if refused else self._none_left()
            self._shardings[key] = tuple(found)
        return self._shardings[key]

    def _none_left(self) -> PinError:
        return PinError(f"the pins {', '.join(self.pins.texts)} leave no plan")

    def styles(self, ways: int) -> tuple[Style, ...]:
        """The styles that the pins leave on a model axis of so many ranks."""
        if ways == 1:
            return (Style("single", "R", False, False),)
        pins = self.pins
        on = pins.sequence_parallel is True or pins.forbids("sequence_parallel", False)
        off = pins.sequence_parallel is False or pins.forbids("sequence_parallel", True)
        if pins.tp is not None or on or off:
            return tuple(s for s in STYLES if s.tensor_parallel and s.sequence_parallel == on)
        return STYLES

    def _sharded(self, region: int, ways: int, style: Style) -> Sharding | None:
        part, costs = self.chain.at(region, self.reference), self.costs(ways)
        pins = replace(
            self.pins, tp=ways if style.tensor_parallel else None, dp=ways,
            sequence_parallel=style.sequence_parallel if style.tensor_parallel else None,
        )  # fmt: skip
        tensors = part.outline.tensors
        found: dict[str, list[Way]] = {
            op.name: ways_of(op, tensors, costs, pins, self.residual.get(op.name, frozenset()))
            for op in part.outline.ops
        }
        border = self._border(part, style.layout, ways)
        program = FrontProgram(
            part, found, costs, {n: border[n][0] for n in part.entry}, {n: border[n][0] for n in part.exit}
        )
        first = program.solve(nodes=NODES)
        if first is None:
            return None
        return Sharding(style, program, replace(first[0], entry=style.layout, exit=style.layout), first[1])

    def _styled(self, region: int, ways: int, sharding: Sharding) -> Iterator[Named]:
        """What may be kept and run again with a sharding."""
        bench, style, part = self.bench(region, ways, self.reference), sharding.style, sharding.program.part
        policies = list(self._policies(part, sharding, region))
        banned = {design for design, policy in policies if part.outline.training and self._bans(region, policy)}
        for design, policy in policies:
            if design in banned:
                continue
            named = Named(replace(design, entry=style.layout, exit=style.layout), style.name, policy)
            yield named
            if part.outline.training and style.sequence_parallel and policy in ("none", "selective"):
                regather = named.design.regather | copies(bench, named.design)
                yield replace(named, design=replace(named.design, regather=regather))

    def _policies(self, part: Part, sharding: Sharding, region: int) -> Iterator[tuple[Design, str]]:
        program, design, most = sharding.program, sharding.design, sharding.kept_bytes
        plain = replace(design, again=frozenset(), regather=frozenset())
        pinned = self._pinned(region)
        if not part.outline.training:
            yield plain, "none"
            return
        attention = frozenset(op.name for op in part.outline.ops if op.kind == "attention")
        if pinned in (None, "none"):
            yield plain, "none"
        if pinned in (None, "selective"):
            yield replace(plain, again=attention), "selective" if attention else "none"
        least = program.solve(least=True, like=design)
        assert least is not None
        if pinned in (None, "full"):
            yield least[0], "full"
        if pinned is None:
            yield design, ""
            for step in range(1, BUDGETS + 1):
                low = max(least[1], 1e-3 * most)
                budget = most * (low / most) ** (step / (BUDGETS + 1)) if most else 0.0
                if least[1] < budget < most:
                    between = program.solve(budget, like=design)
                    if between is not None:
                        yield between[0], ""

    def _pinned(self, region: int) -> str | None:
        """The recompute policy pinned for a region: layers where the model has them, else everything."""
        if self.pins.recompute is None or (not self._layer(region) and self.pins.recompute != "none"):
            return None
        return self.pins.recompute

    def _bans(self, region: int, policy: str) -> bool:
        """Whether the pins forbid a recompute policy for a region; to forbid "none" asks nothing of what is no layer."""
        return self.pins.forbids("recompute", policy) and (policy != "none" or self._layer(region))

    def _layer(self, region: int) -> bool:
        """Whether a region is one of the model's layers: where none is repeated, each is."""
        regions = self.chain.outline.regions
        return regions[region].repeats > 1 or all(r.repeats == 1 for r in regions)


def copies(bench: Bench, design: Design) -> frozenset[Regathered]:
    """Copies that transitions make and the backward pass needs: each may be made again from its shard."""
    found: set[Regathered] = set()
    made = dict(bench.layouts[design.entry])
    facts = bench.part.facts
    for index, (op, choice) in enumerate(zip(bench.part.outline.ops, design.choices, strict=True)):
        step = bench.step(index, op, choice)
        assert step is not None
        for item in saves(op, bench.full(op, choice), bench.tensors):
            name = op.operands[item.index].tensor if item.source == "operand" else ""
            root = facts.aliases[name].root if name else ""
            if root in made:
                wanted = buffer(facts, name, step.wanted[item.index])
                if wanted != buffer(facts, root, made[root]):
                    found.add((wanted[0], str(wanted[1][-1])))
        made |= {use.tensor: placement for use, placement in zip(op.results, step.made, strict=True)}
    return frozenset(found)


def _local(tensor: Tensor, state: State, ranks: int) -> Tensor:
    """`tensor` as each of so many ranks has it in this state."""
    if not state.is_split:
        return tensor
    dims = tuple(
        tuple(size // ranks if (d, i) == (state.dim, state.factor) else size for i, size in enumerate(members))
        for d, members in enumerate(tensor.dims)
    )
    return replace(tensor, dims=dims)
