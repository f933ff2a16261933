"""Gaussian latents inside a factor graph: integrated for the contraction, moments for the M-step.

A component is all sites that Gaussian latents connect. Its log evidence at parameters takes the place
of their factors: one group of the graph, whose arguments are those of all sites, each bound to the
parameters as ever. In the M-step the sites stand for themselves, with posterior moments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, message
from pyro_em.graph.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.lines import Line
from pyro_em.posteriors.gaussian_layout import BlockLayout, SiteForm, Term
from pyro_em.posteriors.linear_gaussian import GaussianSolution, SiteNumbers, solve
from pyro_em.tracing.sites import Role
from pyro_em.updates.beliefs import Moments
from pyro_em.updates.gaussian_rows import (
    coefficient_rows,
    event_shape,
    is_matrix,
    rows_of,
    tril_rows,
)

Arguments = Mapping[str, Tensor]

# The posterior of the latents that each group of some number integrates.
Solved = Mapping[int, GaussianSolution]

Densities = Callable[[Mapping[str, Tensor], Sequence[int]], dict[int, Tensor]]


@dataclass(frozen=True, eq=False)
class GaussianBlock:
    """Gaussian latents and all sites that read them.

    Attributes:
        groups: The sites in model order, one group each; a latent's value is zero.
        lines: What the mean of each reads.
        plate: The data plate that no block of unknowns crosses, or None.
        size: Its size.
    """

    groups: tuple[Group, ...]
    lines: tuple[Line, ...]
    plate: str | None = None
    size: int = 1

    @cached_property
    def places(self) -> dict[str, int]:
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
            terms = tuple(Term(self.places[r.latent], r.elements) for r in line.reads)
            rows = torch.Size(group.sizes).numel()
            width = event_shape(group).numel()
            forms.append(SiteForm(line.site, rows, width, group.role is Role.GAUSSIAN, terms))
        return BlockLayout.of(forms, self.groups[0].value.device)

    def of_site(self, i: int, arguments: Arguments) -> dict[str, Tensor]:
        """The arguments of one site among those of all."""
        group = self.groups[i]
        return {a: arguments[piece(group.members[0], a)] for a in group.arguments}

    def solve(self, arguments: Arguments) -> GaussianSolution:
        """The posterior of the latents.

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
            spread = (
                tril_rows(group, own).diagonal(dim1=-2, dim2=-1)
                if is_matrix(group)
                else own["scale"]
            )
            if bool((spread == 0).any()):
                sites.append(group.members[0])
        where = f"site '{sites[0]}'" if sites else "model"
        return message(
            where,
            "its observation noise is exactly zero.",
            "the evidence is infinite, or zero, where data below a Gaussian latent have no noise",
            [
                "let the scale be positive",
                "give it a floor: ClosedForm(floor=1e-6)",
            ],
        )

    def table(self, solution: GaussianSolution) -> Tensor:
        """The log evidence in nats, per element of the plate. # (1, size) or (1,)"""
        evidence, constant = solution.log_evidence[0], solution.constant[0]
        if self.plate is None:
            return (evidence.sum() + constant).reshape(1)
        out = evidence.new_zeros(self.size).index_add(0, self._element_of_block, evidence)
        for i, group in enumerate(self.groups):
            if group.role is not Role.GAUSSIAN:
                rows = solution.constant_rows(i)[0]
                out = out.index_add(0, _plate_index(group, self.plate).to(out.device), rows)
        return out.unsqueeze(0)

    @cached_property
    def _element_of_block(self) -> Tensor:
        assert self.plate is not None
        return blocks_in_plate(self, self.plate)[0]

    def log_evidence(self, arguments: Arguments) -> Tensor:
        """See `pyro_em.graph.factors.Nested`."""
        return self.table(self.solve(arguments))

    def believed(self, solution: GaussianSolution, arguments: Arguments) -> list[Group]:
        """The sites with the posterior moments of what they read."""
        out = []
        for i, group in enumerate(self.groups):
            own = self.of_site(i, arguments)
            moments = solution.linear_moments(i, diagonal=not is_matrix(group))
            belief = Moments(moments, coefficient_rows(group, own), _weights(group))
            out.append(replace(group, arguments=own, belief=belief))
        return out


def piece(site: str, argument: str) -> str:
    """What an argument of a site is called among those of all sites."""
    return f"{argument} of '{site}'"


def _numbers(group: Group, arguments: Arguments) -> SiteNumbers:
    matrix = is_matrix(group)
    spread = tril_rows(group, arguments) if matrix else rows_of(group, arguments["scale"])
    offset = rows_of(group, arguments["loc"])
    coefficients = tuple(
        rows_of(group, arguments[a], 1).unsqueeze(0) for a in group.lines if a != "loc"
    )
    latent = group.role is Role.GAUSSIAN
    weight = None
    if not latent and (
        group.mask is not None or group.elements is not None or not group.is_unscaled
    ):
        own = _weights(group)
        weight = own.unsqueeze(-1) if own.dim() == 1 else own
    return SiteNumbers(
        None if latent else rows_of(group, group.value),
        offset.unsqueeze(0),
        spread.unsqueeze(0),
        coefficients,
        matrix,
        weight,
    )


def _weights(group: Group) -> Tensor:
    """How much each row, or each of its entries, counts. # (rows,) or (rows, D)"""
    weights = group.weights().detach()
    rows = torch.Size(group.sizes).numel()
    if group.elements is not None:
        whole = weights.expand(1, *group.sizes, *event_shape(group))
        return whole.reshape(rows, -1).to(torch.float64)
    return weights.expand(1, *group.sizes).reshape(rows).to(torch.float64)


def _plate_index(group: Group, plate: str) -> Tensor:
    """For each row of a site its element of a plate. # (rows,)"""
    names = group.dims[0][: group.n_plates]
    at = names.index(plate)
    index = torch.arange(group.sizes[at]).reshape(-1, *(1,) * (len(group.sizes) - at - 1))
    return index.expand(group.sizes).reshape(-1)


def blocks_in_plate(block: GaussianBlock, plate: str) -> tuple[Tensor, bool]:
    """For each block of unknowns its element of a plate, and whether none crosses two."""
    layout = block.layout
    device = block.groups[0].value.device
    low = torch.full((layout.blocks,), torch.iinfo(torch.long).max, device=device)
    high = torch.full((layout.blocks,), -1, device=device)
    for i in block.latents.values():
        group = block.groups[i]
        if plate not in group.dims[0][: group.n_plates]:
            return low, False
        index = _plate_index(group, plate).to(device)
        at = layout.block_of_element(i).to(device)
        low = low.scatter_reduce(0, at, index, "amin")
        high = high.scatter_reduce(0, at, index, "amax")
    for group in block.groups:
        if plate not in group.dims[0][: group.n_plates]:
            return low, False
    return low, bool((low == high).all())


def integrated(graph: FactorGraph, lines: Mapping[str, Line]) -> FactorGraph:
    """The graph in which one group stands for all sites that Gaussian latents connect.

    Args:
        graph: As traced with Gaussian latents at zero.
        lines: What the mean of each of these sites reads.
    """
    if not lines:
        return graph
    values = {name: p.value() for name, p in graph.parameters.items()}
    sites = tuple(_site(graph, line, values) for line in lines.values())
    block = GaussianBlock(sites, tuple(lines.values()))
    plate = graph.structure.data_plate
    if plate is not None and blocks_in_plate(block, plate)[1]:
        block = replace(block, plate=plate, size=graph.structure.plates[plate].size)
    rest: list[Group] = []
    for group in graph.groups:
        members = [i for i, name in enumerate(group.members) if name not in lines]
        if len(members) == len(group.members):
            rest.append(group)
        elif members:
            rest.append(taken(group, members))
    return replace(graph, groups=(*rest, _group(block)))


def _site(graph: FactorGraph, line: Line, values: Mapping[str, Tensor]) -> Group:
    """The group of one site, its mean in parts."""
    group, i = graph.group_of(line.site)
    group = taken(group, [i])
    parts: dict[str, Binding] = {"loc": line.offset}
    for k, read in enumerate(line.reads):
        parts[f"coefficient {k + 1}, of '{read.latent}'"] = read.coefficient
    with torch.no_grad():
        held = {
            a: (b.evaluate(values) if b.is_static else b.constant).to(group.arguments["loc"].dtype)
            for a, b in parts.items()
        }
    return replace(
        group,
        arguments={**group.arguments, **held},
        bindings={**group.bindings, **parts},
        lines=tuple(parts),
    )


def taken(group: Group, members: Sequence[int]) -> Group:
    """A group with some of its members."""
    if len(members) == len(group.members):
        return group
    at = list(members)

    def rows(t: Tensor) -> Tensor:
        return t[at] if t.shape[0] > 1 or t.stride(0) else t[:1].expand(len(at), *t.shape[1:])

    def bound(b: Binding) -> Binding:
        return replace(
            b,
            constant=rows(b.constant),
            selections=tuple(
                replace(s, index=rows(s.index), factor=None if s.factor is None else rows(s.factor))
                for s in b.selections
            ),
            jacobians=None if b.jacobians is None else {n: rows(j) for n, j in b.jacobians.items()},
        )

    return replace(
        group,
        members=tuple(group.members[i] for i in at),
        dims=tuple(group.dims[i] for i in at),
        arguments={a: rows(t) for a, t in group.arguments.items()},
        bindings={a: bound(b) for a, b in group.bindings.items()},
        value=rows(group.value),
        mask=None if group.mask is None else rows(group.mask),
        scale=tuple(group.scale[i] for i in at),
        value_binding=None if group.value_binding is None else bound(group.value_binding),
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
        ((block.plate,) if block.plate is not None else (),),
        1 if block.plate is not None else 0,
        (block.size,) if block.plate is not None else (),
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
        for site in block.believed(solution, arguments[g]):
            groups.append(site)
            weights = site.weights() if site.elements is None else _counted(site)
            all_counts.append(weights.detach().expand(1, *site.sizes).to(torch.float64))
            all_arguments.append(dict(site.arguments))
    return replace(graph, groups=tuple(groups)), all_counts, all_arguments


def _counted(group: Group) -> Tensor:
    """The weights of a site's cells, apart from which of their elements count. # (1, *sizes or 1s)"""
    return replace(group, elements=None).weights()


def at_zero(graph: FactorGraph) -> FactorGraph:
    """The graph as a run with all Gaussian latents at zero shows it."""
    groups: list[Group] = []
    for group in graph.groups:
        for site in group.nested.groups if group.nested is not None else (group,):
            kept = [a for a in site.arguments if a == "loc" or a not in site.lines]
            groups.append(
                replace(
                    site,
                    arguments={a: site.arguments[a] for a in kept},
                    bindings={a: site.bindings[a] for a in kept},
                    lines=(),
                )
            )
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
