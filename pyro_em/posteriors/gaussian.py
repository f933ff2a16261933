"""Gaussian latents inside a factor graph: integrated for the contraction, moments for the M-step.

A component is all sites that Gaussian latents connect. Its log evidence at parameters takes the place
of their factors: one group of the graph, whose arguments are those of all sites, each bound to the
parameters as ever. In the M-step the sites stand for themselves, with posterior moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, Finding, message
from pyro_em.graph.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.lines import Line
from pyro_em.posteriors.gaussian_layout import BlockLayout, SiteForm, Term
from pyro_em.posteriors.linear_gaussian import GaussianSolution, Integrated, SiteNumbers, solve
from pyro_em.tracing.sites import Role
from pyro_em.updates.beliefs import Moments
from pyro_em.updates.gaussian_rows import (
    event_shape,
    is_matrix,
    rows_of,
    tril_rows,
    weights_of,
)

Arguments = Mapping[str, Tensor]

# The posterior of the latents that each group of some number integrates.
Solved = Mapping[int, Integrated]

Densities = Callable[[Mapping[str, Tensor], Sequence[int]], dict[int, Tensor]]


class NotSeparate(Exception):
    """Gaussian latents that cannot be integrated before the discrete ones; holds the finding."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


@dataclass(frozen=True, eq=False)
class GaussianBlock:
    """Gaussian latents and all sites that read them.

    Attributes:
        groups: The sites in model order, one group each, over plates and the whole scope; a latent's
            value is zero.
        lines: What the mean of each reads.
        scope: Discrete latents that any of the sites depends on.
        states: How many values each of these has.
        plates: Plates whose elements no unknown connects: those of the table.
        sizes: Their sizes.
        traced: The sites as a run with all Gaussian latents at zero shows them.
    """

    groups: tuple[Group, ...]
    lines: tuple[Line, ...]
    scope: tuple[str, ...] = ()
    states: tuple[int, ...] = ()
    plates: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    traced: tuple[Group, ...] = ()

    @cached_property
    def numbers_of_sites(self) -> dict[str, int]:
        """The number of each site."""
        return {g.members[0]: i for i, g in enumerate(self.groups)}

    @cached_property
    def latents(self) -> dict[str, int]:
        """The number of each latent's site."""
        return {g.members[0]: i for i, g in enumerate(self.groups) if g.role is Role.GAUSSIAN}

    @cached_property
    def layout(self) -> BlockLayout:
        """Which unknowns belong together."""
        forms = []
        for group, line in zip(self.groups, self.lines, strict=True):
            terms = tuple(Term(self.numbers_of_sites[r.latent], r.elements) for r in line.reads)
            rows = torch.Size(line.sizes).numel()
            width = event_shape(group).numel()
            forms.append(SiteForm(line.site, rows, width, group.role is Role.GAUSSIAN, terms))
        return BlockLayout.of(forms, self.groups[0].value.device)

    @property
    def cost(self) -> int:
        """Numbers in the matrices of one E-step."""
        sizes = torch.as_tensor(self.layout.block_sizes, dtype=torch.float64)
        return math.prod(self.states) * int(sizes.square().sum())

    def of_site(self, i: int, arguments: Arguments) -> dict[str, Tensor]:
        """The arguments of one site among those of all."""
        group = self.groups[i]
        return {a: arguments[piece(group.members[0], a)] for a in group.arguments}

    def solve(self, arguments: Arguments) -> GaussianSolution:
        """The posterior of the latents, for each state of the scope.

        Raises:
            DegenerateError: If an observation has no noise.
        """
        numbers = [
            _numbers(group, self.of_site(i, arguments)) for i, group in enumerate(self.groups)
        ]
        found = solve(self.layout, numbers)
        if found.degenerate:
            raise DegenerateError(self._without_noise(arguments))
        return found

    def _without_noise(self, arguments: Arguments) -> str:
        sites = []
        for i, group in enumerate(self.groups):
            own = self.of_site(i, arguments)
            if group.role is Role.GAUSSIAN:
                continue
            matrix = is_matrix(group)
            spread = tril_rows(group, own).diagonal(dim1=-2, dim2=-1) if matrix else own["scale"]
            if bool((spread == 0).any()):
                sites.append(group.members[0])
        where = f"site '{sites[0]}'" if sites else "model"
        return message(
            where,
            "its observation noise is exactly zero.",
            "the evidence is infinite, or zero, where data below a Gaussian latent have no noise",
            ["let the scale be positive", "give it a floor: ClosedForm(floor=1e-6)"],
        )

    def table(self, solution: GaussianSolution) -> Tensor:
        """The log evidence in nats, per element of the plates and state of the scope.

        Returns:
            # (1, *sizes, *states)
        """
        evidence = solution.log_evidence
        out = evidence.new_zeros(len(evidence), math.prod(self.sizes))
        out = out.index_add(1, self._element_of_block.to(out.device), evidence)
        for i, group in enumerate(self.groups):
            if group.role is not Role.GAUSSIAN:
                rows = solution.constant_rows(i)
                out = out.index_add(1, self.element_of_row(i).to(out.device), rows)
        return out.transpose(0, 1).reshape(1, *self.sizes, *self.states)

    @cached_property
    def _element_of_block(self) -> Tensor:
        return elements_of_blocks(self, self.plates)[0]

    def element_of_row(self, i: int) -> Tensor:
        """For each row of a site the element of the table's plates to which it belongs. # (rows,)"""
        group = self.groups[i]
        if _is_within(group, self.plates):
            return _elements(group, self.plates)
        return self._element_of_block[self.layout.block_of_row[i]]

    def log_evidence(self, arguments: Arguments) -> Tensor:
        """See `pyro_em.graph.factors.Nested`."""
        return self.table(self.solve(arguments))

    def believed(
        self, solution: Integrated, arguments: Arguments, counts: Tensor
    ) -> list[tuple[Group, Tensor]]:
        """The sites with the posterior moments of what they read, and how often each cell counts.

        Args:
            solution: The posterior of the latents.
            arguments: At which it was computed.
            counts: The posterior of the scope. # (1, *sizes, *states)
        """
        out = []
        for i, group in enumerate(self.groups):
            own = self.of_site(i, arguments)
            of_rows = counts.reshape(-1, *self.states)[self.element_of_row(i).to(counts.device)]
            cells = of_rows.reshape(1, *group.sizes).to(torch.float64)
            moments = solution.linear_moments(i, diagonal=not is_matrix(group))
            belief = Moments(moments, solution.coefficients(i), weights_of(group, cells))
            weights = cells * replace(group, elements=None).weights().detach()
            out.append(
                (replace(group, arguments=own, belief=belief), weights.expand(1, *group.sizes))
            )
        return out


def piece(site: str, argument: str) -> str:
    """What an argument of a site is called among those of all sites."""
    return f"{argument} of '{site}'"


def _numbers(group: Group, arguments: Arguments) -> SiteNumbers:
    matrix = is_matrix(group)
    spread = tril_rows(group, arguments) if matrix else rows_of(group, arguments["scale"])
    coefficients = tuple(rows_of(group, arguments[a], 1) for a in group.lines if a != "loc")
    latent = group.role is Role.GAUSSIAN
    weight = None
    if not latent and not _counts_once(group):
        own = weights_of(group)[0]
        weight = own.unsqueeze(-1) if own.dim() == 1 else own
    return SiteNumbers(
        None if latent else rows_of(group, group.value)[0],
        rows_of(group, arguments["loc"]),
        spread,
        coefficients,
        matrix,
        weight,
    )


def _counts_once(group: Group) -> bool:
    return group.mask is None and group.elements is None and group.is_unscaled


def _elements(group: Group, plates: Sequence[str]) -> Tensor:
    """For each row of a site its element of some plates, as a flat number. # (rows,)"""
    names, sizes = group.dims[0][: group.n_plates], group.sizes[: group.n_plates]
    out = torch.zeros((1,) * len(sizes), dtype=torch.long)
    for plate in plates:
        at = names.index(plate)
        index = torch.arange(sizes[at]).reshape(-1, *(1,) * (len(sizes) - at - 1))
        out = out * sizes[at] + index
    return out.expand(sizes).reshape(-1)


def _is_within(group: Group, plates: Sequence[str]) -> bool:
    return set(plates) <= set(group.dims[0][: group.n_plates])


def elements_of_blocks(block: GaussianBlock, plates: Sequence[str]) -> tuple[Tensor, str]:
    """For each block of unknowns its element of some plates, and a latent that crosses them.

    A row outside the plates, which reads latents by index, belongs where these do.
    """
    layout = block.layout
    device = block.groups[0].value.device
    low = torch.full((layout.blocks,), torch.iinfo(torch.long).max, device=device)
    high = torch.full((layout.blocks,), -1, device=device)
    for i, group in enumerate(block.groups):
        at = layout.block_of_row[i].to(device)
        if _is_within(group, plates):
            index, reading = _elements(group, plates).to(device), at >= 0
            low = low.scatter_reduce(0, at[reading], index[reading], "amin")
            high = high.scatter_reduce(0, at[reading], index[reading], "amax")
        elif bool((at < 0).any()):
            return low, next(iter(block.latents))
    for name, i in block.latents.items():
        if bool((low != high)[layout.block_of_element(i).to(device)].any()):
            return low, name
    return low, ""


def integrated(
    graph: FactorGraph,
    lines: Mapping[str, Line],
    limit: int | None = None,
    read: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> FactorGraph:
    """The graph in which groups stand for all sites that Gaussian latents connect.

    Args:
        graph: As traced with Gaussian latents at zero.
        lines: What the mean of each of these sites reads.
        limit: How many numbers the matrices of one E-step may have.
        read: Per site what its mean is made of, where no binding gives it.

    Raises:
        NotSeparate: If discrete latents connect rows of Gaussian ones, or matrices are too large.
    """
    if not lines:
        return graph
    values = {name: p.value() for name, p in graph.parameters.items()}
    blocks = []
    for names in components_of_lines(lines):
        own = {n: lines[n] for n in names}
        block = _block(graph, own, values, read or {})
        if limit is not None and block.cost > limit:
            raise NotSeparate(_too_dear(block, limit))
        blocks.append(block)
    rest: list[Group] = []
    for group in graph.groups:
        members = [i for i, name in enumerate(group.members) if name not in lines]
        if len(members) == len(group.members):
            rest.append(group)
        elif members:
            rest.append(taken(group, members))
    return replace(graph, groups=(*rest, *map(_group, blocks)))


def components_of_lines(lines: Mapping[str, Line]) -> list[list[str]]:
    """Sites that Gaussian latents connect, each set in model order."""
    root = {name: name for name in lines}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    for name, line in lines.items():
        for read in line.reads:
            root[find(name)] = find(read.latent)
    found: dict[str, list[str]] = {}
    for name in lines:
        found.setdefault(find(name), []).append(name)
    return list(found.values())


def _block(
    graph: FactorGraph,
    lines: Mapping[str, Line],
    values: Mapping[str, Tensor],
    read: Mapping[str, Mapping[str, Tensor]],
) -> GaussianBlock:
    """The block of connected sites."""
    in_scope = {z for line in lines.values() for z in line.scope}
    scope = tuple(z for z in graph.latents if z in in_scope)
    states = tuple(graph.latents[z].size for z in scope)
    if math.prod(states) > 2**20:
        raise NotSeparate(_too_many(tuple(lines), scope, states))
    traced = tuple(_traced(graph, line, values) for line in lines.values())
    sites = tuple(
        _site(group, line, scope, states, values, read.get(line.site, {}))
        for group, line in zip(traced, lines.values(), strict=True)
    )
    block = GaussianBlock(sites, tuple(lines.values()), scope, states, traced=traced)
    for group in sites:
        if group.mask is not None and group.mask.shape[1 + group.n_plates :].numel() > 1:
            what = f"its mask depends on '{scope[0]}'."
            raise NotSeparate(_finding(block, f"site '{group.members[0]}'", what))
    order = sorted(graph.structure.plates.values(), key=lambda p: p.dim)
    needed = {p for z in scope for p in graph.latents[z].plates}
    data = graph.structure.data_plate
    for wanted in ({*needed, data} if data is not None else needed, needed):
        plates = tuple(p.name for p in order if p.name in wanted)
        crossing = elements_of_blocks(block, plates)[1]
        if not crossing:
            sizes = tuple(graph.structure.plates[p].size for p in plates)
            return replace(block, plates=plates, sizes=sizes)
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
        "Gaussian latents are integrated for each state of the discrete latents that touch them",
        ("give a guide: ExactPosteriorEM(model, AutoNormal)",),
        latents=tuple(block.latents),
    )


def _too_many(sites: tuple[str, ...], scope: tuple[str, ...], states: tuple[int, ...]) -> Finding:
    shown = f"'{scope[0]} … {scope[-1]}'" if len(scope) > 2 else " and ".join(map(repr, scope))
    cells = math.prod(states)
    size = f"{cells:,}" if cells < 10**12 else f"{cells:.3g}"
    return Finding(
        f"site '{sites[0]}'",
        f"discrete {shown} and Gaussian latents form one component of {size} cells.",
        "Gaussian latents are integrated for each state of the discrete latents that touch them",
        ("use a shorter series", "give a guide: ExactPosteriorEM(model, AutoNormal)"),
        latents=sites,
    )


def _too_dear(block: GaussianBlock, limit: int) -> Finding:
    return _finding(
        block,
        f"site '{next(iter(block.latents))}'",
        f"its E-step has matrices of {block.cost:,} numbers, the largest of {block.layout.largest} "
        f"unknowns; the budget is max_enumeration={limit:,}.",
    )


def _traced(graph: FactorGraph, line: Line, values: Mapping[str, Tensor]) -> Group:
    """The group of one site, its mean bound to parameters."""
    group, i = graph.group_of(line.site)
    group = taken(group, [i])
    offset, dtype = line.offset, group.arguments["loc"].dtype
    if not offset.is_static:
        return group
    with torch.no_grad():
        loc = offset.evaluate(values)
    return replace(
        group,
        arguments={**group.arguments, "loc": loc.to(dtype)},
        bindings={**group.bindings, "loc": offset},
    )


def _site(
    group: Group,
    line: Line,
    scope: tuple[str, ...],
    states: tuple[int, ...],
    values: Mapping[str, Tensor],
    read: Mapping[str, Tensor],
) -> Group:
    """The group of one site, its mean in parts, over its plates and the whole scope."""
    n = group.n_plates
    own = group.dims[0][n:]

    def widened(t: Tensor) -> Tensor:
        there = dict(zip(own, t.shape[1 + n :], strict=False))
        return t.reshape(
            *t.shape[: 1 + n], *(there.get(z, 1) for z in scope), *t.shape[1 + n + len(own) :]
        )

    parts = line.parts
    bindings = {a: with_tensors(b, widened) for a, b in {**group.bindings, **parts}.items()}
    dtype = group.arguments["loc"].dtype
    with torch.no_grad():
        held = {a: bindings[a].evaluate(values) for a in parts if bindings[a].is_static}
    held = {a: (held[a] if a in held else widened(read[a])).to(dtype) for a in parts}
    return replace(
        group,
        dims=((*group.dims[0][:n], *scope),),
        sizes=(*group.sizes[:n], *states),
        arguments={**{a: widened(t) for a, t in group.arguments.items()}, **held},
        bindings=bindings,
        value=widened(group.value),
        mask=None if group.mask is None else widened(group.mask),
        scale=tuple(
            widened(s.unsqueeze(0))[0] if isinstance(s, Tensor) and s.dim() else s
            for s in group.scale
        ),
        elements=None if group.elements is None else widened(group.elements),
        lines=tuple(parts),
        reads=tuple(r.latent for r in line.reads),
    )


def _wide(scale: Tensor | float, widened: Callable[[Tensor], Tensor]) -> Tensor | float:
    if isinstance(scale, Tensor) and scale.dim():
        return widened(scale.unsqueeze(0))[0]
    return scale


def with_tensors(b: Binding, change: Callable[[Tensor], Tensor]) -> Binding:
    """A binding whose tensors, over an argument's cells, are laid out anew."""
    return replace(
        b,
        constant=change(b.constant),
        selections=tuple(
            replace(s, index=change(s.index), factor=None if s.factor is None else change(s.factor))
            for s in b.selections
        ),
        jacobians=None if b.jacobians is None else {n: change(j) for n, j in b.jacobians.items()},
    )


def taken(group: Group, members: Sequence[int]) -> Group:
    """A group with some of its members."""
    if len(members) == len(group.members):
        return group
    at = list(members)

    def rows(t: Tensor) -> Tensor:
        return t[at] if t.shape[0] > 1 or t.stride(0) else t[:1].expand(len(at), *t.shape[1:])

    return replace(
        group,
        members=tuple(group.members[i] for i in at),
        dims=tuple(group.dims[i] for i in at),
        arguments={a: rows(t) for a, t in group.arguments.items()},
        bindings={a: with_tensors(b, rows) for a, b in group.bindings.items()},
        value=rows(group.value),
        mask=None if group.mask is None else rows(group.mask),
        scale=tuple(group.scale[i] for i in at),
        value_binding=None
        if group.value_binding is None
        else with_tensors(group.value_binding, rows),
        elements=None if group.elements is None else rows(group.elements),
    )


def _group(block: GaussianBlock) -> Group:
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
    with torch.no_grad():
        raw = block.log_evidence(arguments)
    return Group(
        (first.members[0],),
        ((*block.plates, *block.scope),),
        len(block.plates),
        (*block.sizes, *block.states),
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


def for_updates(graph: FactorGraph) -> FactorGraph:
    """The graph of an M-step: the sites of each block stand for themselves, after all other groups.

    The group of a block stays where it is, and no parameter reaches it.
    """
    if not any(g.nested for g in graph.groups):
        return graph
    own = [n for g in graph.groups if g.nested is not None for n in g.nested.groups]
    return replace(graph, groups=(*map(_disarmed, graph.groups), *own))


def _disarmed(group: Group) -> Group:
    if group.nested is None:
        return group
    return replace(group, arguments={}, bindings={}, raw_params=(), nested=None)


def in_m_step(
    graph: FactorGraph,
    counts: Sequence[Tensor],
    arguments: Sequence[Mapping[str, Tensor]],
    solved: Solved,
) -> tuple[FactorGraph, list[Tensor], list[dict[str, Tensor]]]:
    """Graph, counts and arguments as an M-step sees them, the sites of blocks with their moments.

    Args:
        graph: That of the E-step.
        counts: Expected counts per group.
        arguments: Per group, at the E-step.
        solved: The posterior of the latents of each group that stands for a block.
    """
    groups = [_disarmed(g) for g in graph.groups]
    all_counts, all_arguments = list(counts), [dict(a) for a in arguments]
    for g, solution in solved.items():
        block = graph.groups[g].nested
        assert isinstance(block, GaussianBlock)
        for site, weights in block.believed(solution, arguments[g], counts[g]):
            groups.append(site)
            all_counts.append(weights)
            all_arguments.append(dict(site.arguments))
    return replace(graph, groups=tuple(groups)), all_counts, all_arguments


def at_zero(graph: FactorGraph) -> FactorGraph:
    """The graph as a run with all Gaussian latents at zero shows it."""
    groups: list[Group] = []
    for group in graph.groups:
        groups += group.nested.traced if isinstance(group.nested, GaussianBlock) else (group,)
    return replace(graph, groups=tuple(groups))


def tables_of(
    graph: FactorGraph, arguments: Sequence[Arguments], values: Sequence[Tensor]
) -> tuple[list[Tensor], Solved]:
    """The log densities of all groups, and the posteriors of the latents that some integrate.

    Args:
        graph: The graph of an E-step.
        arguments: Per group.
        values: Per group.
    """
    tables, solved = [], {}
    for g, (group, own, value) in enumerate(zip(graph.groups, arguments, values, strict=True)):
        if isinstance(group.nested, GaussianBlock):
            solved[g] = group.nested.solve(own)
            tables.append(group.nested.table(solved[g]))
        else:
            tables.append(group.log_density(own, value))
    return tables, solved


def expected_densities(
    graph: FactorGraph,
    values: Mapping[str, Tensor],
    groups: Sequence[int],
    densities: Densities,
    trace: Callable[..., FactorGraph],
) -> dict[int, Tensor]:
    """Log densities of groups at parameter values, expected ones where there is a belief.

    Args:
        graph: That of an M-step.
        values: Constrained values by name.
        groups: Their numbers.
        densities: Gives those of groups without a belief.
        trace: Runs the model at given values, for arguments that no binding gives.
    """
    ordinary = [g for g in groups if graph.groups[g].belief is None]
    out = densities(values, ordinary) if ordinary else {}
    fresh: FactorGraph | None = None
    for g in groups:
        site = graph.groups[g]
        if site.belief is None:
            continue
        arguments = site.evaluate_arguments(values)
        if not all(b.is_static for b in site.bindings.values()):
            fresh = trace(values=values, with_bindings=False) if fresh is None else fresh
            traced, _ = fresh.group_of(site.members[0])
            for name, binding in site.bindings.items():
                if not binding.is_static:
                    arguments[name] = traced.arguments[name]
        out[g] = site.log_density(arguments)
    return out
