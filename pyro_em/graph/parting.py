"""Parts of a factor graph: the factors that read some of its latents, without all others.

Factors of equal form are stacked, whichever latents they read: two chains side by side share one group
of transitions. A part holds the members that are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.graph.binding import Binding, Selection
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role


@dataclass(frozen=True, eq=False)
class GraphPart:
    """Some factors of a graph.

    Attributes:
        graph: The graph of these factors, and of the latents that they read.
        origin: For each of its groups the group of the whole that it was taken from.
    """

    graph: FactorGraph
    origin: tuple[int, ...]


def part_of(graph: FactorGraph, latents: Sequence[str], *, known: bool = False) -> GraphPart:
    """The factors that read some latents, all of whose neighbours are among them.

    Args:
        graph: The whole, traced or collapsed.
        latents: The latents.
        known: Whether factors that read no latent at all belong to it too; priors on point estimates
            never do.
    """
    wanted = set(latents)

    def belongs(group: Group, dims: Sequence[str]) -> bool:
        read = [d for d in dims if d in graph.latents]
        if not read:
            return known and group.role is not Role.POINT
        return read[0] in wanted

    return _taken(graph, belongs, latents)


def priors_of(graph: FactorGraph) -> GraphPart:
    """The priors on point estimates."""
    return _taken(graph, lambda group, dims: group.role is Role.POINT, ())


def _taken(
    graph: FactorGraph, belongs: Callable[[Group, Sequence[str]], bool], latents: Sequence[str]
) -> GraphPart:
    groups, origin = [], []
    for g, group in enumerate(graph.groups):
        own = [i for i, dims in enumerate(group.dims) if belongs(group, dims)]
        if own:
            groups.append(group if len(own) == len(group.members) else _of_members(group, own))
            origin.append(g)
    kept = {name: graph.latents[name] for name in graph.latents if name in latents}
    return GraphPart(replace(graph, latents=kept, groups=tuple(groups)), tuple(origin))


def _of_members(group: Group, members: Sequence[int]) -> Group:
    """A group without some of its members; what is the same for all of them is held once."""
    index = torch.tensor(members, device=group.value.device)

    def cut(t: Tensor) -> Tensor:
        return t if t.shape[0] == 1 else t.index_select(0, index)

    def maybe(t: Tensor | None) -> Tensor | None:
        return None if t is None else cut(t)

    def bound(binding: Binding) -> Binding:
        selections = tuple(
            Selection(s.param, cut(s.index), s.maps, maybe(s.factor)) for s in binding.selections
        )
        jacobians = binding.jacobians
        if jacobians is not None:
            jacobians = {name: cut(j) for name, j in jacobians.items()}
        return replace(
            binding, constant=cut(binding.constant), selections=selections, jacobians=jacobians
        )

    value = group.value_binding
    return replace(
        group,
        members=tuple(group.members[i] for i in members),
        dims=tuple(group.dims[i] for i in members),
        arguments={name: cut(a) for name, a in group.arguments.items()},
        bindings={name: bound(b) for name, b in group.bindings.items()},
        value=cut(group.value),
        mask=maybe(group.mask),
        scale=tuple(group.scale[i] for i in members),
        raw=maybe(group.raw),
        value_binding=None if value is None else bound(value),
        elements=maybe(group.elements),
    )
