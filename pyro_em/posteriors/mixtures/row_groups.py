"""Rows that read elements of parameters by a known group: which group each row is of, and its cells.

In ``z ~ Categorical(p[g])`` and ``x ~ Normal(mu[g, z], s)`` the group g_n of a row is known. Rows of
one group read the same, so that all rows together read a table over groups and values of the latent,

    ℓ_n(k) = ℓ(x_n; cell (g_n, k)),

and a group of factors that depends on g gets a dimension for it, in front of the latent's. What does
not depend on it is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.expanded import once_each
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group, Latent
from pyro_em.posteriors.mixtures.equal_rows import numbered
from pyro_em.posteriors.mixtures.product_states import flattened
from pyro_em.posteriors.mixtures.rows import RowShape, why_not_constant
from pyro_em.tracing.parameters import values_of

_MOST_CELLS = 2**24  # of what is laid out for all groups


@dataclass(frozen=True, eq=False)
class RowGroups:
    """The groups of rows, and the graph in which they are a dimension like a latent's.

    Attributes:
        graph: The collapsed graph; what depends on the group reads cells of groups and latents, the
            latter fastest, in one dimension.
        shape: Its groups of factors, by what they read; number 0 is the group of the row.
        codes: The group of each row. # (N,)
    """

    graph: FactorGraph
    shape: RowShape
    codes: Tensor


def reads_by_rows(group: Group) -> bool:
    """Whether the elements of parameters that it selects differ between rows."""
    return any(_differs(part) for b in group.bindings.values() for part in _indices(b))


def row_groups(graph: FactorGraph, shape: RowShape) -> RowGroups | Finding:
    """The groups of the rows of a graph, or why there are none.

    Args:
        graph: A collapsed graph of latents of the rows of a plate.
        shape: Its groups of factors.
    """
    own = [g for g in shape.rowwise if reads_by_rows(graph.groups[g])]
    for g in own:
        if not _is_by_group(graph.groups[g]):
            return why_not_constant(graph.groups[g])
    codes, first = _codes([graph.groups[g] for g in own])
    groups = list(graph.groups)
    name = f"group of {shape.plate}"
    count = len(first)
    for g in own:
        if count * _cells(groups[g]) > _MOST_CELLS:
            site = f"site '{groups[g].members[0]}'"
            return Finding(site, f"rows read {count:,} different parameters of {site}: no kernel")
        groups[g] = _by_group(groups[g], graph, first, name, count)
    (plate,) = {v.plates for v in graph.latents.values()}
    latent = Latent(name, plate, torch.arange(count, device=codes.device), ())
    reads = tuple(
        (0, *(1 + i for i in r)) if g in own else tuple(1 + i for i in r)
        for g, r in enumerate(shape.reads)
    )
    tables = [g for g in own if _is_table(groups[g])]
    whole = RowShape(
        shape.plate,
        (count, *shape.sizes),
        reads,
        tuple(g for g in shape.rowwise if g not in tables),
        (*shape.tables, *tables),
        shape.free,
    )
    found = replace(graph, latents={name: latent, **graph.latents}, groups=tuple(groups))
    return RowGroups(flattened(found), whole, codes)


def _indices(binding: Binding) -> list[Tensor]:
    return [part for s in binding.selections for part in s.parts]


def _differs(t: Tensor) -> bool:
    return t.shape[1] > 1 and t.stride(1) != 0


def _is_by_group(group: Group) -> bool:
    """Whether all that differs between rows are the elements that it selects, all of them."""
    if len(group.members) > 1:
        return False
    for name, binding in group.bindings.items():
        if binding.how == "constant" and group.outlines[name].shape[1] == 1:
            continue
        if binding.how != "selection" or not all(s.is_whole for s in binding.selections):
            return False
        if any(s.factor is not None and _differs(s.factor) for s in binding.selections):
            return False
    return True


def _is_table(group: Group) -> bool:
    """Whether it reads latents and no data of a row."""
    is_fixed = group.value.shape[1] == 1 and group.mask is None and len(group.members) == 1
    return is_fixed and not group.observed


def _cells(group: Group) -> int:
    """Numbers of the largest argument, for one group of rows."""
    rest = 1
    for size in group.sizes[group.n_plates :]:
        rest *= size
    events = max(t.shape[1 + len(group.sizes) :].numel() for t in group.outlines.values())
    return rest * max(events, 1)


def _codes(groups: list[Group]) -> tuple[Tensor, Tensor]:
    """The group of each row, and the first row of each group. # (N,), (groups,)"""
    codes: Tensor | None = None
    first = torch.zeros(1, dtype=torch.int64, device=groups[0].value.device)
    for group in groups:
        for binding in group.bindings.values():
            for part in _indices(binding):
                if not _differs(part):
                    continue
                columns = once_each(part)[0].flatten(1) if part.dim() > 2 else part[0].unsqueeze(1)
                for column in columns.T:
                    if codes is None:
                        codes = torch.zeros_like(column)
                    elif torch.equal(column[first][codes], column):
                        continue
                    low = int(column.min())
                    width = int(column.max()) - low + 1
                    codes, counts = numbered(codes * width + (column - low), len(first) * width)
                    rows = torch.arange(len(codes), device=codes.device)
                    first = torch.full_like(counts, len(codes))
                    first = first.scatter_reduce(0, codes, rows, "amin")
    assert codes is not None
    return codes, first


def _by_group(group: Group, graph: FactorGraph, first: Tensor, name: str, count: int) -> Group:
    """A group of factors with a dimension for the groups of rows, before those of latents."""

    def cell(t: Tensor) -> Tensor:
        """What differs between rows, of the first row of each group."""
        if _differs(t):
            few = once_each(t).index_select(1, first)
            return few.expand(t.shape[0], count, *t.shape[2:]).unsqueeze(1)
        return t[:, :1].unsqueeze(2)

    def datum(t: Tensor) -> Tensor:
        return t.unsqueeze(2)

    bindings = {n: b.mapped(cell) for n, b in group.bindings.items()}
    values = values_of(graph.parameters)
    outlines = group.outlines
    arguments = {
        n: b.evaluate(values).to(outlines[n].dtype)
        if b.how == "selection"
        else cell(group.arguments[n])
        for n, b in bindings.items()
    }
    at = group.n_plates
    return replace(
        group,
        dims=tuple((*d[:at], name, *d[at:]) for d in group.dims),
        sizes=(*group.sizes[:at], count, *group.sizes[at:]),
        arguments=arguments,
        bindings=bindings,
        value=datum(group.value),
        mask=None if group.mask is None else datum(group.mask),
        elements=None if group.elements is None else datum(group.elements),
        scale=tuple(s.unsqueeze(at) if isinstance(s, Tensor) else s for s in group.scale),
        raw=None,
    )
