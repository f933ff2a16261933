"""Parts of a factor graph: the factors that read some of its latents, without all others.

Factors of equal form are stacked, whichever latents they read: two chains side by side share one group
of transitions. A part holds the members that are its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding
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


Places = list[tuple[int, int]]  # group, and member of the group


class Parting:
    """A graph that is taken apart.

    Attributes:
        graph: The whole, traced or collapsed.
        known: Factors that read no latent and are no priors on point estimates.
        priors: Priors on point estimates that read no latent.
    """

    def __init__(self, graph: FactorGraph) -> None:
        self.graph = graph
        self.known: Places = []
        self.priors: Places = []
        self._by_latent: dict[str, Places] = {name: [] for name in graph.latents}
        for g, group in enumerate(graph.groups):
            rest = self.priors if group.role is Role.POINT else self.known
            for i, dims in enumerate(group.dims):
                first = next((d for d in dims if d in graph.latents), None)
                (rest if first is None else self._by_latent[first]).append((g, i))

    def part_of(self, latents: Sequence[str], others: Places | None = None) -> GraphPart:
        """The factors that read some latents, all of whose neighbours are among them.

        Args:
            latents: The latents.
            others: Further factors, which read no latent.
        """
        places = [place for name in latents for place in self._by_latent[name]]
        members: dict[int, list[int]] = {}
        for g, i in sorted([*places, *(others or [])]):
            members.setdefault(g, []).append(i)
        groups = [self.graph.groups[g] for g in members]
        taken = [
            group if len(own) == len(group.members) else of_members(group, own)
            for group, own in zip(groups, members.values(), strict=True)
        ]
        kept = {name: self.graph.latents[name] for name in latents}
        graph = replace(self.graph, latents=kept, groups=tuple(taken))
        return GraphPart(graph, tuple(members))


def of_members(group: Group, members: Sequence[int]) -> Group:
    """A group without some of its members; what is the same for all of them is held once."""
    index = torch.tensor(members, device=group.value.device)

    def cut(t: Tensor) -> Tensor:
        return t if t.shape[0] == 1 else t.index_select(0, index)

    def maybe(t: Tensor | None) -> Tensor | None:
        return None if t is None else cut(t)

    def bound(binding: Binding) -> Binding:
        return _without_others(binding.mapped(cut))

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


def _without_others(binding: Binding) -> Binding:
    """A binding without the parameters that reach other members alone."""
    if binding.how not in ("selection", "affine") or len(binding.params) < 2:
        return binding
    jacobians = dict(binding.jacobians or {})
    jacobians = {name: j for name, j in jacobians.items() if bool(j.reached().any())}
    selections = tuple(s for s in binding.selections if bool((s.index >= 0).any()))
    reached = {*jacobians, *(s.param for s in selections)}
    params = tuple(p for p in binding.params if p in reached)
    if not params or len(params) == len(binding.params):
        return binding
    return replace(
        binding,
        params=params,
        selections=selections,
        jacobians=None if binding.jacobians is None else jacobians,
    )
