"""Latents of the rows of a plate: whether a graph is that, what a row counts, and its distinct rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.errors import Finding, sites_in_words
from pyro_em.graph.factors import FactorGraph, Group, Latent, is_incomplete
from pyro_em.graph.vectorised_loops.latent_series import kinds_of, names_of
from pyro_em.posteriors.mixtures.equal_rows import equal_rows
from pyro_em.tracing.freed import return_freed_memory
from pyro_em.tracing.sites import Role

MOST_VALUES = 2**10  # of all latents of a row together, beyond which the contraction is quicker


def restricted(group: Group, rows: slice | Tensor) -> Group:
    """The group at some rows of its only plate."""
    size = rows.stop - rows.start if isinstance(rows, slice) else len(rows)

    def cut(t: Tensor) -> Tensor:
        return t[:, rows] if t.shape[1] > 1 else t

    return replace(
        group,
        sizes=(size, *group.sizes[1:]),
        value=cut(group.value),
        mask=None if group.mask is None else cut(group.mask),
        elements=None if group.elements is None else cut(group.elements),
    )


@dataclass(frozen=True)
class RowShape:
    """The groups of a mixture over rows, by what they read.

    Attributes:
        plate: The plate of the rows.
        sizes: How many values each latent of a row has.
        reads: For each group the latents that it reads, by number; empty where it reads none.
        rowwise: Groups that read latents and rows.
        tables: Groups that read latents and no row.
        free: Groups that read no latent.
    """

    plate: str
    sizes: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]
    rowwise: tuple[int, ...]
    tables: tuple[int, ...]
    free: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many values all latents of a row have together."""
        return math.prod(self.sizes)

    def size_of(self, g: int) -> int:
        """How many values the latents that a group reads have together."""
        return math.prod(self.sizes[i] for i in self.reads[g])

    def eligible(self, graph: FactorGraph) -> list[int]:
        """Groups whose linear form the kernel can use: not a latent's own that rows mask."""
        rest = [g for g in self.rowwise if graph.groups[g].value.shape[2] == 1]
        return [*rest, *self.tables, *self.free]


def why_no_rows(latents: Mapping[str, Latent]) -> Finding | None:
    """Why a latent is not one per row of a plate, whatever its factors."""
    if len(latents) != 1:
        return why_no_product(latents) or Finding(
            sites_in_words(names_of(latents)), f"{_counted(latents)} latents per row: no kernel"
        )
    ((name, latent),) = latents.items()
    where = f"site '{name}'"
    if len(latent.plates) != 1:
        depth = "in no plate" if not latent.plates else "in nested plates"
        return Finding(where, f"'{name}' is {depth}: no kernel")
    return Finding(where, f"'{name}' has one value") if latent.size < 2 else None


def why_no_product(latents: Mapping[str, Latent]) -> Finding | None:
    """Why several latents that share factors are no product state of a row, whatever the factors."""
    names, plates = names_of(latents), {v.plates for v in kinds_of(latents)}
    if not names:
        return Finding("model", "no latent is summed")
    words, where = _counted(latents), sites_in_words(names)
    if len(plates) != 1 or len(next(iter(plates))) != 1:
        return Finding(where, f"{words} latents that share factors: no kernel")
    if min(v.size for v in kinds_of(latents)) < 2 or len(names) > MOST_VALUES.bit_length():
        return Finding(where, f"{words} latents per row: no kernel")
    size = math.prod(v.size for v in latents.values())
    if size > MOST_VALUES:
        return Finding(where, f"{words} latents per row have {size:,} values together: no kernel")
    return None


def _counted(latents: Mapping[str, Latent]) -> str:
    return {2: "two", 3: "three", 4: "four"}.get(len(latents), str(len(latents)))


def shape_of_rows(graph: FactorGraph) -> RowShape | Finding:
    """The groups of latents of the rows of a plate, or why a graph is none; by looking.

    Args:
        graph: A collapsed graph, the members of a group all of the same latents; see
            `pyro_em.posteriors.mixtures.product_states`.
    """
    several = len(graph.latents) > 1
    finding = why_no_product(graph.latents) if several else why_no_rows(graph.latents)
    if finding is not None:
        return finding
    names = tuple(graph.latents)
    (plate,) = graph.latents[names[0]].plates
    rowwise: list[int] = []
    tables: list[int] = []
    free: list[int] = []
    reads = [tuple(i for i, name in enumerate(names) if name in g.dims[0]) for g in graph.groups]
    for g, group in enumerate(graph.groups):
        dims = group.dims[0]
        if group.role is Role.POINT:
            continue
        site = group.members[0]
        if group.family is None:
            return Finding(f"site '{site}'", f"'{site}' ({group.distribution}) has no sums")
        if not reads[g]:
            free.append(g)
            continue
        if dims != (plate, *(names[i] for i in reads[g])):
            read = next(name for name in names if name in dims)
            return Finding(f"site '{site}'", f"'{site}' has plates of its own under '{read}'")
        fixed = group.value.shape[1] == 1 and len(group.members) == 1 and group.mask is None
        fixed = fixed and not varies(group)
        (tables if fixed and not group.observed else rowwise).append(g)
    if not rowwise:
        return Finding(f"site '{names[0]}'", f"no data read '{names[0]}'")
    sizes = tuple(latent.size for latent in graph.latents.values())
    return RowShape(plate, sizes, tuple(reads), tuple(rowwise), tuple(tables), tuple(free))


def varies(group: Group) -> bool:
    """Whether an argument differs between rows."""
    return any(a.shape[1] != 1 for a in group.outlines.values())


def why_not_constant(group: Group) -> Finding:
    """The finding for parameters that differ from row to row."""
    site = group.members[0]
    return Finding(
        f"site '{site}'", f"the parameters of '{site}' differ from row to row: no kernel"
    )


def row_weights(graph: FactorGraph, shape: RowShape) -> Tensor | Finding | None:
    """What one row counts, by the scale that all its sites share; None where they have none. # (N,)

    Returns:
        A finding where sites of one row differ, or what is outside the rows is scaled.
    """
    groups, N = graph.groups, graph.dim_size(shape.plate)
    device = groups[0].value.device

    def per_row(scale: Tensor | float) -> Tensor:
        return torch.as_tensor(scale, dtype=torch.float64, device=device).reshape(-1).expand(N)

    unlike = Finding("poutine.scale", "poutine.scale is not one weight per row: no kernel")
    if not all(groups[g].is_unscaled for g in shape.free):
        return unlike
    own = (*shape.rowwise, *shape.tables)
    if all(groups[g].is_unscaled for g in own):
        return None
    scales = [s for g in own for s in groups[g].scale]
    if any(isinstance(s, Tensor) and s.numel() != s.shape[0] for s in scales):
        return unlike  # a scale that reads the latent tempers
    found = per_row(scales[0])
    if any(not torch.equal(per_row(s), found) for s in scales[1:]) or not bool((found > 0).all()):
        return unlike
    return found.contiguous()


@dataclass(frozen=True, eq=False)
class DistinctRows:
    """The rows of a graph, those that are equal once where that saves work.

    Attributes:
        graph: With these rows.
        counts: What each of them counts; None where that is one. # (rows,)
        first: Which rows they are; None where they are all. # (rows,)
    """

    graph: FactorGraph
    counts: Tensor | None
    first: Tensor | None = None


def distinct(
    graph: FactorGraph, shape: RowShape, weight: Tensor | None, codes: Tensor | None = None
) -> DistinctRows:
    """The graph with each distinct row once, and what it counts, where that saves work.

    Args:
        graph: A collapsed graph.
        shape: Its shape.
        weight: What one row counts; None for one. # (N,)
        codes: What else tells rows apart. # (N,)
    """
    N = graph.dim_size(shape.plate)
    own = None if weight is None or bool((weight == 1).all()) else weight
    given: list[tuple[Tensor, bool]] = []  # and whether NaN stands for what is missing
    for g in shape.rowwise:
        group = graph.groups[g]
        if varies(group):
            return DistinctRows(graph, own)
        for t in (group.value, group.mask, group.elements):
            if t is not None and t.shape[1] > 1:
                incomplete = t is group.value and is_incomplete(group)
                given.append((t.transpose(0, 1).reshape(N, -1), incomplete))
    # A glance at few rows tells real numbers from counts.
    for c, incomplete in given:
        few = c[:: max(1, N // 64)]
        few = few.nan_to_num(0.0) if incomplete else few
        if few.is_floating_point() and any(v % 1 for row in few.tolist() for v in row):
            return DistinctRows(graph, own)
    if not given:
        return DistinctRows(graph, own)
    columns = [] if codes is None else [codes.to(torch.float64).unsqueeze(1)]
    for c, incomplete in given:
        columns.append((c.nan_to_num(0.0) if incomplete else c).to(torch.float64))
        if incomplete:
            columns.append(torch.isnan(c).to(torch.float64))
    rows = columns[0] if len(columns) == 1 else torch.cat(columns, 1)
    inverse, counts = equal_rows(rows)
    if 2 * len(counts) > N:
        return_freed_memory([rows])
        return DistinctRows(graph, own)
    first = torch.full_like(counts, N).scatter_reduce(
        0, inverse, torch.arange(N, device=counts.device), "amin"
    )
    total = counts.to(torch.float64)
    if own is not None:
        total = torch.zeros_like(total).index_add_(0, inverse, own)
    return DistinctRows(with_rows(graph, shape, first), total, first)


def with_rows(graph: FactorGraph, shape: RowShape, rows: Tensor) -> FactorGraph:
    """The graph with the data of some rows, in their order; its plate keeps its size."""
    kept = list(graph.groups)
    for g in shape.rowwise:
        kept[g] = restricted(kept[g], rows)
    return replace(graph, groups=tuple(kept))
