"""The tables of many sites at once: members of a group are stacked already.

What a glob asks for is found out once per graph; the sums go over all steps together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pyro_em.globs import require_alike
from pyro_em.graph.factors import FactorGraph, Latent
from pyro_em.graph.vectorised_loops.latent_series import chain_form, kinds_of
from pyro_em.posteriors.answers.names import latent_of


@dataclass(frozen=True)
class Place:
    """Where a wanted table lies.

    Attributes:
        group: Number of the group.
        member: Place among its members.
        axes: Dimensions of the member's table that are kept, in the order that is wanted.
    """

    group: int
    member: int
    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AlikeTables:
    """Wanted tables that lie alike in one group.

    Attributes:
        group: Number of the group.
        axes: Dimensions that are kept, in the order that is wanted.
        members: Their places among the group's members.
        rows: Their places in the stack that is wanted.
    """

    group: int
    axes: tuple[int, ...]
    members: slice | list[int]
    rows: slice | list[int]


def parts_of(places: Sequence[Place]) -> tuple[AlikeTables, ...]:
    """Places put together by what can be summed at once."""
    alike: dict[tuple[int, tuple[int, ...]], tuple[list[int], list[int]]] = {}
    for row, place in enumerate(places):
        members, rows = alike.setdefault((place.group, place.axes), ([], []))
        members.append(place.member)
        rows.append(row)
    return tuple(
        AlikeTables(group, axes, _run(members), _run(rows))
        for (group, axes), (members, rows) in alike.items()
    )


def stack_of(cells: Sequence[Tensor], parts: Sequence[AlikeTables]) -> Tensor:
    """The wanted tables, summed over what is not kept. # (T, *kept)

    Args:
        cells: Per group. # (members, *sizes)
        parts: From `parts_of`; the kept sizes of all are equal.
    """
    tables = [table_of(cells, part) for part in parts]
    if len(tables) == 1:
        return tables[0]
    out = tables[0].new_empty((sum(map(len, tables)), *tables[0].shape[1:]))
    for part, table in zip(parts, tables, strict=True):
        out[part.rows] = table
    return out


def table_of(cells: Sequence[Tensor], part: AlikeTables) -> Tensor:
    """The tables of one part, summed over what is not kept. # (rows of the part, *kept)"""
    table = cells[part.group][part.members]
    beyond = [1 + d for d in range(table.dim() - 1) if d not in part.axes]
    kept = sorted(part.axes)
    table = table.sum(beyond) if beyond else table
    return table.permute(0, *(1 + kept.index(d) for d in part.axes))


def _run(numbers: list[int]) -> slice | list[int]:
    """Consecutive numbers as a slice: no copy is made."""
    first, last = numbers[0], numbers[-1]
    return slice(first, last + 1) if numbers == list(range(first, last + 1)) else numbers


def parts_of_marginals(graph: FactorGraph, names: tuple[str, ...]) -> tuple[AlikeTables, ...]:
    """Where the marginals of latents lie: over their plates, then their values.

    Raises:
        UsageError: If there is no such latent, or two differ in shape; names the first.
    """
    key = "marginals", names
    if key not in graph.remembered:
        parts = _marginals_by_form(graph, names)
        if parts is None:
            latents = [latent_of(graph, n) for n in names]
            require_alike("probs", ((z.name, (*batch_shape(graph, z), z.size)) for z in latents))
            parts = parts_of(places_of(graph, latents))
        graph.remembered[key] = parts
    kept: tuple[AlikeTables, ...] = graph.remembered[key]
    return kept


def _marginals_by_form(graph: FactorGraph, names: Sequence[str]) -> tuple[AlikeTables, ...] | None:
    """The marginals of all steps of a loop, by their pattern; None where it takes a look at each."""
    form = chain_form(graph)
    if form is None or not are_alike(graph) or tuple(form.names) != tuple(names):
        return None
    parts = []
    for g, group in enumerate(graph.groups):
        if group.observed or g in form.free:
            continue
        first = 0
        for stretch in getattr(group.members, "stretches", ()):
            name, dims = stretch.name_of(0), stretch.dims_of(0)
            row = form.names.index(name)
            axes = [d for d, dim in enumerate(dims) if dim in graph.latents[name].plates]
            members = slice(first, first + len(stretch))
            rows = slice(row, row + len(stretch))
            parts.append(AlikeTables(g, (*axes, dims.index(name)), members, rows))
            first += len(stretch)
    return tuple(parts)


def _joints_by_form(
    graph: FactorGraph, pairs: Sequence[tuple[str, str]]
) -> tuple[AlikeTables, ...] | None:
    """The tables of all neighbours along a loop, by their pattern; None where it takes a look."""
    form = chain_form(graph)
    if form is None or not are_alike(graph) or len(pairs) != len(form.names) - 1:
        return None
    if tuple(pairs) != tuple(itertools.pairwise(form.names)):
        return None
    a, b = pairs[0]
    dims = graph.groups[form.couples].dims[0]
    plates = plates_of(graph, graph.latents[a])
    axes = tuple(dims.index(d) for d in (*plates, a, b))
    return (AlikeTables(form.couples, axes, slice(0, len(pairs)), slice(0, len(pairs))),)


def are_alike(graph: FactorGraph) -> bool:
    """Whether all latents have one batch shape and one support."""
    first, *others = kinds_of(graph.latents)
    return all(
        z.size == first.size and batch_shape(graph, z) == batch_shape(graph, first) for z in others
    )


def parts_of_joints(
    graph: FactorGraph, pairs: tuple[tuple[str, str], ...]
) -> tuple[AlikeTables, ...] | None:
    """Where the tables of pairs lie, over the plates of both; None if a pair has no factor.

    Raises:
        UsageError: If two differ in shape; names the first that differs.
    """
    key = "joints", pairs
    if key not in graph.remembered:
        by_form = _joints_by_form(graph, pairs)
        together = factors_of_pairs(graph) if by_form is None else {}
        if by_form is not None:
            graph.remembered[key] = by_form
        elif any(pair not in together for pair in pairs):
            graph.remembered[key] = None
        else:
            graph.remembered[key] = _parts_of_joints(graph, pairs, together)
    parts: tuple[AlikeTables, ...] | None = graph.remembered[key]
    return parts


def _parts_of_joints(
    graph: FactorGraph,
    pairs: tuple[tuple[str, str], ...],
    together: Mapping[tuple[str, str], tuple[int, int]],
) -> tuple[AlikeTables, ...]:
    latents = {name: graph.latents[name] for pair in pairs for name in pair}
    places, shapes = [], []
    for a, b in pairs:
        plates = plates_of(graph, latents[a], latents[b])
        g, i = together[a, b]
        dims = graph.groups[g].dims[i]
        places.append(Place(g, i, tuple(dims.index(d) for d in (*plates, a, b))))
        sizes = [graph.structure.plates[p].size for p in plates]
        shapes.append((f"{a}, {b}", [*sizes, latents[a].size, latents[b].size]))
    require_alike("joint", shapes)
    return parts_of(places)


def places_of(graph: FactorGraph, latents: Iterable[Latent]) -> list[Place]:
    """Where the tables of latents lie, over their plates and their values."""
    numbers = {id(group): g for g, group in enumerate(graph.groups)}
    nested = {id(s): g for g, o in enumerate(graph.groups) if o.nested for s in o.nested.groups}
    places = []
    for latent in latents:
        group, i = graph.group_of(latent.name)
        if id(group) in nested:  # the block's own group has its table
            g = nested[id(group)]
            i = i if len(graph.groups[g].members) > 1 else 0
        else:
            g = numbers[id(group)]
        dims = graph.groups[g].dims[i]
        axes = [d for d, dim in enumerate(dims) if dim in latent.plates]
        places.append(Place(g, i, (*axes, dims.index(latent.name))))
    return places


def factors_of_pairs(graph: FactorGraph) -> dict[tuple[str, str], tuple[int, int]]:
    """For every two latents that a factor reads together the first such factor: group, member."""
    if "factors of pairs" not in graph.remembered:
        first: dict[tuple[str, str], tuple[int, int]] = {}
        for g, group in enumerate(graph.groups):
            for i, dims in enumerate(group.dims):
                for a, b in itertools.permutations(dims[group.n_plates :], 2):
                    first.setdefault((a, b), (g, i))
        graph.remembered["factors of pairs"] = first
    pairs: dict[tuple[str, str], tuple[int, int]] = graph.remembered["factors of pairs"]
    return pairs


def batch_shape(graph: FactorGraph, latent: Latent) -> tuple[int, ...]:
    """The batch shape of a latent's site, size-one dimensions kept."""
    sizes = graph.structure.plates
    return tuple(1 if d is None else sizes[d].size for d in latent.batch_dims)


def plates_of(graph: FactorGraph, *latents: Latent) -> list[str]:
    """The plates of several latents, left to right."""
    plates = {p for latent in latents for p in latent.plates}
    return sorted(plates, key=lambda p: graph.structure.plates[p].dim)
