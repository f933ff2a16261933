"""The sites of Gaussian blocks as groups: some members of a traced group, their means in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.graph.stretches import Dims, Repeated
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock

V = TypeVar("V")


def dense_block(
    graph: FactorGraph,
    lines: Mapping[str, Line],
    scope: tuple[str, ...],
    states: tuple[int, ...],
    values: Mapping[str, Tensor],
    read: Mapping[str, Mapping[str, Tensor]],
) -> GaussianBlock:
    """The block of connected sites, one group each.

    Args:
        graph: As traced with Gaussian latents at zero.
        lines: What the mean of each site reads.
        scope: Discrete latents that any of them depends on.
        states: How many values each has.
        values: Constrained parameters by name.
        read: Per site what its mean is made of, where no binding gives it.
    """
    traced, sites = [], []
    for line in lines.values():
        group, i = graph.group_of(line.site)
        group = with_offset(taken(group, [i]), line.offset, values)
        traced.append(group)
        reads = tuple(r.latent for r in line.reads)
        own = read.get(line.site, {})
        sites.append(site_over(group, line.parts, reads, scope, states, values, own))
    return GaussianBlock(tuple(sites), tuple(lines.values()), scope, states, traced=tuple(traced))


def with_offset(group: Group, offset: Binding, values: Mapping[str, Tensor]) -> Group:
    """A site as a run with all Gaussian latents at zero shows it, its mean bound to parameters."""
    dtype = group.arguments["loc"].dtype
    if not offset.is_static:
        return group
    with torch.no_grad():
        loc = offset.evaluate(values)
    return replace(
        group,
        arguments={**group.arguments, "loc": loc.to(dtype)},
        bindings={**group.bindings, "loc": offset},
    )


def site_over(
    group: Group,
    parts: Mapping[str, Binding],
    reads: tuple[str, ...],
    scope: tuple[str, ...],
    states: tuple[int, ...],
    values: Mapping[str, Tensor],
    read: Mapping[str, Tensor],
) -> Group:
    """The group of a site, its mean in parts, over its plates and the whole scope.

    Args:
        group: As a run with all Gaussian latents at zero shows it.
        parts: What its mean is made of.
        reads: The latent of each part but the offset.
        scope: Discrete latents.
        states: How many values each has.
        values: Constrained parameters by name.
        read: Parts that no binding gives.
    """
    n, own = group.n_plates, group.dims[0][group.n_plates :]
    dtype = group.arguments["loc"].dtype
    bound = over_scope(replace(group, bindings={**group.bindings, **parts}), scope, states)
    with torch.no_grad():
        held = {a: bound.bindings[a].evaluate(values) for a in parts if bound.bindings[a].is_static}
    known = {a: t if own == scope else widened(t, own, scope, n) for a, t in read.items()}
    held = {a: (held[a] if a in held else known[a]).to(dtype) for a in parts}
    return replace(bound, arguments={**bound.arguments, **held}, lines=tuple(parts), reads=reads)


def widened(t: Tensor, own: tuple[str, ...], scope: tuple[str, ...], plates: int) -> Tensor:
    """A tensor over plates and some discrete latents, over a wider scope.

    Args:
        t: # (members, *plates, *own, ...)
        own: Its discrete latents.
        scope: The wider scope.
        plates: How many plates there are.
    """
    there = dict(zip(own, t.shape[1 + plates :], strict=False))
    sizes = (there.get(z, 1) for z in scope)
    return t.reshape(*t.shape[: 1 + plates], *sizes, *t.shape[1 + plates + len(own) :])


def over_scope(group: Group, scope: tuple[str, ...], states: tuple[int, ...]) -> Group:
    """A group over its plates and a whole scope, of which it may not read all.

    Args:
        group: As traced.
        scope: Discrete latents.
        states: How many values each has.
    """
    n, own = group.n_plates, group.dims[0][group.n_plates :]

    def wide(t: Tensor) -> Tensor:
        return t if own == scope else widened(t, own, scope, n)

    bindings = dict(group.bindings)
    if own != scope:
        bindings = {a: b.mapped(wide) for a, b in bindings.items()}
    return replace(
        group,
        dims=_over(group.dims, n, scope),
        sizes=(*group.sizes[:n], *states),
        arguments={a: wide(t) for a, t in group.arguments.items()},
        bindings=bindings,
        value=wide(group.value),
        mask=None if group.mask is None else wide(group.mask),
        scale=group.scale
        if not any(isinstance(x, Tensor) for x in group.scales)
        else tuple(
            wide(x.unsqueeze(0))[0] if isinstance(x, Tensor) and x.dim() else x for x in group.scale
        ),
        elements=None if group.elements is None else wide(group.elements),
    )


def _over(
    dims: Sequence[tuple[str, ...]], plates: int, scope: tuple[str, ...]
) -> Sequence[tuple[str, ...]]:
    """Plates and a scope, for each member."""
    if isinstance(dims, Dims):
        return Dims([replace(s, read=scope) for s in dims.stretches])
    return tuple((*d[:plates], *scope) for d in dims)


def taken(group: Group, members: Sequence[int]) -> Group:
    """A group with some of its members."""
    if len(members) == len(group.members):
        return group
    number = len(members)
    at: slice | list[int] = list(members)
    if isinstance(members, range) and members.step == 1:
        at = slice(members.start, members.stop)

    def rows(t: Tensor) -> Tensor:
        if t.shape[0] == 1 or t.stride(0) == 0:  # held once for all members
            return t[:1].expand(number, *t.shape[1:])
        return t[at]

    return replace(
        group,
        members=_those(group.members, at),
        dims=_those(group.dims, at),
        arguments={a: rows(t) for a, t in group.arguments.items()},
        bindings={a: b.mapped(rows) for a, b in group.bindings.items()},
        value=rows(group.value),
        mask=None if group.mask is None else rows(group.mask),
        scale=_scales(group.scale, members),
        value_binding=None if group.value_binding is None else group.value_binding.mapped(rows),
        elements=None if group.elements is None else rows(group.elements),
    )


def _those(of: Sequence[V], at: slice | list[int]) -> Sequence[V]:
    """Some elements, in the form in which all are held where they follow each other."""
    return of[at] if isinstance(at, slice) else tuple(of[i] for i in at)


def _scales(scale: Sequence[Tensor | float], members: Sequence[int]) -> Sequence[Tensor | float]:
    """Those of some members, held once where they are one number."""
    if isinstance(scale, Repeated):
        return Repeated(scale.value, len(members))
    found = tuple(scale[i] for i in members)
    first = found[0]
    alike = all(not isinstance(s, Tensor) and s == first for s in found)
    return Repeated(first, len(found)) if alike and len(found) > 1 else found
