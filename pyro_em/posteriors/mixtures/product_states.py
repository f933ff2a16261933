"""Several latents per row as one product state: a graph in which each factor reads cells of one table.

    p(x_n) = Σ_{z_1 … z_L} Π_f f(x_n, z_f),     z_f the latents that factor f reads

The latents that a factor reads become one dimension of its tensors, the last of them fastest. A factor
that reads some of a row's latents keeps a dimension of these alone: nothing is laid out for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pyro_em.densities.tying import collapsed
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.parting import of_members


@dataclass(frozen=True, eq=False)
class Alike:
    """A graph in which all members of a group read the same latents.

    Attributes:
        graph: The graph, collapsed.
        origin: For each of its groups the group of the other graph that it was taken from.
    """

    graph: FactorGraph
    origin: tuple[int, ...]


def alike(graph: FactorGraph) -> Alike:
    """A collapsed graph with those groups taken apart whose members read different latents."""
    groups: list[Group] = []
    origin: list[int] = []
    for g, group in enumerate(graph.groups):
        members: dict[tuple[str, ...], list[int]] = {}
        for i, dims in enumerate(group.dims):
            members.setdefault(tuple(dims), []).append(i)
        parts = members.values()
        groups += [group] if len(parts) == 1 else [of_members(group, own) for own in parts]
        origin += [g] * len(parts)
    return Alike(collapsed(replace(graph, groups=tuple(groups))), tuple(origin))


def flattened(graph: FactorGraph) -> FactorGraph:
    """The same with one dimension for all latents that a group reads.

    Args:
        graph: A graph whose groups read the same latents in all of their members, in model order.
    """
    return replace(graph, groups=tuple(_flat_group(group) for group in graph.groups))


def _flat_group(group: Group) -> Group:
    first, sizes = 1 + group.n_plates, group.sizes[group.n_plates :]
    if len(sizes) < 2:
        return group

    def flat(t: Tensor) -> Tensor:
        return _flat(t, first, sizes)

    def maybe(t: Tensor | None) -> Tensor | None:
        return None if t is None else flat(t)

    return replace(
        group,
        sizes=(*group.sizes[: group.n_plates], math.prod(sizes)),
        arguments={name: flat(a) for name, a in group.arguments.items()},
        bindings={name: b.mapped(flat) for name, b in group.bindings.items()},
        value=flat(group.value),
        mask=maybe(group.mask),
        scale=tuple(
            _flat(s, group.n_plates, sizes) if isinstance(s, Tensor) else s for s in group.scale
        ),
        raw=maybe(group.raw),
        value_binding=None if group.value_binding is None else group.value_binding.mapped(flat),
        elements=maybe(group.elements),
    )


def _flat(t: Tensor, first: int, sizes: Sequence[int]) -> Tensor:
    """A tensor with one dimension in place of some; of size one where it varies along none of them."""
    own = t.shape[first : first + len(sizes)]
    if own.numel() == 1:
        return t.flatten(first, first + len(sizes) - 1)
    if all(n == 1 or t.stride(first + i) == 0 for i, n in enumerate(own)):
        one = t
        for d in range(first, first + len(sizes)):
            one = one.narrow(d, 0, 1)
        one = one.flatten(first, first + len(sizes) - 1)
        return one.expand(*one.shape[:first], math.prod(sizes), *one.shape[first + 1 :])
    full = (*t.shape[:first], *sizes, *t.shape[first + len(sizes) :])
    return t.expand(full).flatten(first, first + len(sizes) - 1)


def summed(table: Tensor, sizes: Sequence[int], reads: Sequence[int]) -> Tensor:
    """A table over cells of all latents, summed to the cells of some. # (cells of some, …)

    Args:
        table: # (cells, …)
        sizes: How many values each latent has.
        reads: The latents that are kept, by number.
    """
    if len(reads) == len(sizes):
        return table
    rest = [i for i in range(len(sizes)) if i not in reads]
    kept = table.reshape(*sizes, *table.shape[1:]).sum(rest)
    return kept.reshape(-1, *table.shape[1:])


def spread(table: Tensor, sizes: Sequence[int], reads: Sequence[int]) -> Tensor:
    """A table over cells of some latents, such that it broadcasts over all. # (*sizes or 1s, …)"""
    own = [n if i in reads else 1 for i, n in enumerate(sizes)]
    return table.reshape(*own, *table.shape[1:])


def added(joint: Tensor, table: Tensor, sizes: Sequence[int], reads: Sequence[int]) -> Tensor:
    """The sum of a table over cells of all latents and one over cells of some. # (cells, …)"""
    if len(reads) == len(sizes):
        return joint + table
    whole = joint.reshape(*sizes, *joint.shape[1:]) + spread(table, sizes, reads)
    return whole.reshape(math.prod(sizes), *whole.shape[len(sizes) :])
