"""From a traced graph to one whose Gaussian latents are integrated, block by block.

Sites that latents connect form a component. Its discrete scope is summed after the Gaussian latents,
which is exact where no unknown connects elements of the plates in which the scope lives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.graph.factors import FactorGraph, Group, Nested
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock, elements_of_blocks, piece
from pyro_em.posteriors.gaussians.gaussian_sites import dense_block, taken
from pyro_em.posteriors.scales.scaled_chain import may_have_scale
from pyro_em.posteriors.states.state_building import chain_block
from pyro_em.posteriors.states.state_series import aliases, series_chain
from pyro_em.tracing.sites import Role

_COMBINATIONS = 2**20  # of values of discrete latents for which Gaussian ones are integrated

_QUICK = 2**16  # combinations that take seconds

_BECAUSE = (
    "Gaussian latents are integrated for each combination of the discrete ones that touch them"
)


@dataclass(frozen=True)
class Alike:
    """Sites whose spreads are multiples of a conjugate latent, which is integrated next.

    Attributes:
        pairs: Pairs of sites that read one latent.
        dense: Sites that are solved as one dense block: their latent is more than a number.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    dense: frozenset[str] = frozenset()


_APART = Alike()  # sites that share no latent in their spreads


class NotSeparate(Exception):
    """Gaussian latents that cannot be integrated before the discrete ones; holds the finding."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


def integrated(
    graph: FactorGraph,
    lines: Mapping[str, Line],
    limit: int | None = None,
    read: Mapping[str, Mapping[str, Tensor]] | None = None,
    kept: frozenset[str] = frozenset(),
    alike: Alike = _APART,
) -> FactorGraph:
    """The graph in which groups stand for all sites that Gaussian latents connect.

    Args:
        graph: As traced with Gaussian latents at zero.
        lines: What the mean of each of these sites reads.
        limit: How many numbers the matrices of one E-step may have.
        read: Per site what its mean is made of, where no binding gives it.
        kept: Plates that a block's table has where all sites are in them and nothing connects their
            elements.
        alike: Sites whose spreads are multiples of one latent.

    Raises:
        NotSeparate: If discrete latents connect rows of Gaussian ones, or matrices are too large.
    """
    if not lines:
        return graph
    values = {name: p.value() for name, p in graph.parameters.items()}
    blocks = []
    series = graph.structure.series
    pairs = [] if series is None else aliases(lines, series)
    scaled = {name for pair in alike.pairs for name in pair}
    for names in components_of_lines(lines, [*pairs, *alike.pairs]):
        own = {n: lines[n] for n in names}
        may = None if scaled.isdisjoint(names) else alike.dense.isdisjoint(names)
        block = _block(graph, own, values, read or {}, kept, may)
        if limit is not None and block.cost > limit:
            raise NotSeparate(_too_dear(block, limit))
        blocks.append(block)
    integrated_sites = [group.members for block in blocks for group in block.groups]
    inside: set[str] | None = None
    rest: list[Group] = []
    for group in graph.groups:
        # Mostly all of its members are in blocks: of a long loop no name is made.
        if sum(len(m) for m in integrated_sites if m[0] in group.members) == len(group.members):
            continue
        inside = {name for m in integrated_sites for name in m} if inside is None else inside
        members = [i for i, name in enumerate(group.members) if name not in inside]
        if len(members) == len(group.members):
            rest.append(group)
        elif members:
            rest.append(taken(group, members))
    return replace(graph, groups=(*rest, *map(group_of_block, blocks)))


def components_of_lines(
    lines: Mapping[str, Line], pairs: Sequence[tuple[str, str]] = ()
) -> list[list[str]]:
    """Sites that Gaussian latents connect, each set in model order.

    Args:
        lines: What the mean of each site reads.
        pairs: Names that belong together.
    """
    root = {name: name for name in (*lines, *(name for pair in pairs for name in pair))}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    for name, line in lines.items():
        for read in line.reads:
            root[find(name)] = find(read.latent)
    for a, b in pairs:
        root[find(a)] = find(b)
    found: dict[str, list[str]] = {}
    for name in lines:
        found.setdefault(find(name), []).append(name)
    return list(found.values())


def _block(
    graph: FactorGraph,
    lines: Mapping[str, Line],
    values: Mapping[str, Tensor],
    read: Mapping[str, Mapping[str, Tensor]],
    kept: frozenset[str],
    with_scale: bool | None,
) -> GaussianBlock:
    """The block of connected sites.

    Args:
        graph: As traced with Gaussian latents at zero.
        lines: What the mean of each site reads.
        values: Constrained parameters by name.
        read: Per site what its mean is made of, where no binding gives it.
        kept: Plates that the table may have.
        with_scale: Whether a chain may have the scale that all sites share; None where they share none.
    """
    in_scope = {z for line in lines.values() for z in line.scope}
    scope = tuple(z for z in graph.latents if z in in_scope)
    states = tuple(graph.latents[z].size for z in scope)
    if math.prod(states) > _COMBINATIONS:
        raise NotSeparate(_too_many(tuple(lines), scope, states))
    series = graph.structure.series
    given = graph, lines, scope, states, values, read
    block: GaussianBlock
    if series is not None and any(n in series.places for n in lines):
        block = series_chain(*given)
    else:
        chain = None if with_scale is False else chain_block(*given)
        if chain is not None and with_scale and not may_have_scale(chain):
            chain = None
        block = chain or dense_block(*given)
    for group in block.groups:
        if group.mask is not None and group.mask.shape[1 + group.n_plates :].numel() > 1:
            what = f"its mask depends on '{scope[0]}'."
            raise NotSeparate(_finding(block, f"site '{group.members[0]}'", what))
    return _with_plates(block, graph, kept)


def _with_plates(
    block: GaussianBlock, graph: FactorGraph, kept: frozenset[str] = frozenset()
) -> GaussianBlock:
    """The block with the plates of its table: the discrete latents' own, and the data's if they can."""
    scope, states = block.scope, block.states
    order = sorted(graph.structure.plates.values(), key=lambda p: p.dim)
    needed = {p for z in scope for p in graph.latents[z].plates}
    data = graph.structure.data_plate
    beside = set(kept).intersection(*(g.dims[0][: g.n_plates] for g in block.groups))
    outermost = set() if data is None else {data}
    for wanted in (needed | outermost | beside, needed | beside, needed | outermost, needed):
        plates = tuple(p.name for p in order if p.name in wanted)
        crossing = elements_of_blocks(block, plates)[1]
        if not crossing:
            sizes = tuple(graph.structure.plates[p].size for p in plates)
            return block.over(plates, sizes)
    inner = next(z for z in scope if graph.latents[z].plates)
    own = ", ".join(f"'{p}'" for p in graph.latents[inner].plates)
    raise NotSeparate(
        _finding(
            block,
            f"site '{inner}'",
            f"it lives in plate {own}, and Gaussian '{crossing}' connects elements of that plate: a "
            f"mixture of {states[scope.index(inner)]} to the power of the plate's size Gaussians.",
        )
    )


def _finding(block: GaussianBlock, where: str, what: str) -> Finding:
    return Finding(
        where,
        what,
        _BECAUSE,
        ("give a guide: ExactPosteriorEM(model, AutoNormal)",),
        latents=tuple(block.latents),
    )


def _too_many(sites: tuple[str, ...], scope: tuple[str, ...], states: tuple[int, ...]) -> Finding:
    shown = f"'{scope[0]} … {scope[-1]}'" if len(scope) > 2 else " and ".join(map(repr, scope))
    fewer = int(math.log(_QUICK, max(states)) + 1e-9)
    return Finding(
        f"site '{sites[0]}'",
        f"its distribution depends on discrete {shown}, and Gaussian latents connect them: a "
        f"mixture of {_combinations(states)} Gaussians, of which {_COMBINATIONS:,} at most are "
        "summed.",
        _BECAUSE,
        (
            f"use a shorter series: {fewer} discrete latents of {max(states)} values take seconds",
            "let one discrete latent decide for many steps: a class of each series, or a regime "
            "of a stretch of steps",
            "give a guide for the Gaussian latents: ExactPosteriorEM(model, AutoNormal); the "
            "discrete ones are summed under each draw",
        ),
        latents=sites,
    )


def _combinations(states: tuple[int, ...]) -> str:
    """How many combinations there are of the values of some discrete latents, in words."""
    cells = math.prod(states)
    size = f"{cells:,}" if cells < 10**12 else f"{cells:.3g}"
    return f"{states[0]}^{len(states)} = {size}" if len(set(states)) == 1 else size


def _too_dear(block: GaussianBlock, limit: int) -> Finding:
    matrices = f"its E-step has matrices of {block.cost:,} numbers"
    if block.scope:
        shown = _combinations(block.states)
        matrices += f", for each of {shown} combinations of discrete latents"
    return _finding(
        block,
        f"site '{next(iter(block.latents))}'",
        f"{matrices}, the largest of {block.core or block.largest} unknowns; the budget is "
        f"max_enumeration={limit:,}.",
    )


class Tabled(Nested, Protocol):
    """A block with a table of log evidence over plates and discrete latents."""

    @property
    def plates(self) -> tuple[str, ...]:
        """Plates of the table."""
        ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """Their sizes."""
        ...

    @property
    def scope(self) -> tuple[str, ...]:
        """Discrete latents of the table."""
        ...

    @property
    def states(self) -> tuple[int, ...]:
        """How many values each has."""
        ...


def group_of_block(block: Tabled) -> Group:
    """The group that stands for a block: its density is the evidence."""
    first = next((g for g in block.groups if g.role is Role.DATA), block.groups[0])
    names = [g.members[0] for g in block.groups]
    arguments = {
        piece(n, a): t
        for n, g in zip(names, block.groups, strict=True)
        for a, t in g.arguments.items()
    }
    bindings = {
        piece(n, a): b
        for n, g in zip(names, block.groups, strict=True)
        for a, b in g.bindings.items()
    }
    sizes = (*block.sizes, *block.states)
    # The block gives its density: what a traced one would be is not computed.
    raw = first.value.new_zeros(1, *(1,) * len(sizes), dtype=torch.float64)
    return Group(
        (first.members[0],),
        ((*block.plates, *block.scope),),
        len(block.plates),
        sizes,
        None,
        0,
        arguments,
        bindings,
        first.value,
        None,
        (1.0,),
        raw,
        tuple(dict.fromkeys(p for g in block.groups for p in g.params)),
        True,
        first.distribution,
        nested=block,
    )
