"""From a traced graph to one whose Gaussian latents are integrated, block by block.

Sites that latents connect form a component. Its discrete scope is summed after the Gaussian latents,
which is exact where no unknown connects elements of the plates in which the scope lives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.graph.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.lines import Line
from pyro_em.posteriors.gaussian import GaussianBlock, elements_of_blocks, piece
from pyro_em.tracing.sites import Role


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
