"""The groups of a homogeneous first-order chain, by what they read; or why a graph is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pyro_em.errors import Finding, sites_in_words
from pyro_em.graph.factors import FactorGraph, Group, Latent
from pyro_em.graph.vectorised_loops.latent_series import chain_form, kinds_of, names_of, plates_of
from pyro_em.tracing.sites import Role


@dataclass(frozen=True)
class ChainShape:
    """The groups of a chain, by what they read."""

    couples: int
    unary: Mapping[int, Sequence[int] | Tensor]
    free: tuple[int, ...]

    def eligible(self, graph: FactorGraph) -> list[int]:
        """Groups whose arguments are the same at all steps and for all sequences."""

        def is_same(group: Group) -> bool:
            lead = 1 + group.n_plates
            return all(n == 1 for a in group.arguments.values() for n in a.shape[:lead])

        reading = [g for g in (self.couples, *self.unary) if is_same(graph.groups[g])]
        return sorted([*self.free, *reading])


def why_no_chain(latents: Mapping[str, Latent]) -> Finding | None:
    """Why latents that share factors are no chain, whatever the factors."""
    where = sites_in_words(names_of(latents))
    if len(latents) < 3:
        return Finding(where, "fewer than three latents are no chain")
    first, *others = kinds_of(latents)
    plates, size = first.plates, first.size
    if size < 2 or any(v.plates != plates or len(v.support) != size for v in others):
        return Finding(where, "latents of different plates or sizes: no kernel")
    return None


def shape_of_chain(graph: FactorGraph) -> ChainShape | Finding:
    """The groups of a homogeneous chain, or why a collapsed graph is none; by looking only."""
    shape = _shape_by_form(graph)
    if shape is not None:
        finding = _not_homogeneous(graph, shape.couples)
        return shape if finding is None else finding
    finding = why_no_chain(graph.latents)
    if finding is not None:
        return finding
    latents = list(graph.latents)
    first, where = graph.latents[latents[0]], sites_in_words(latents)
    if any(sum(d in graph.latents for d in dims) > 2 for g in graph.groups for dims in g.dims):
        return _no_first_order(latents)
    place = {name: t for t, name in enumerate(latents)}
    couples: int | None = None
    unary: dict[int, tuple[int, ...]] = {}
    free: list[int] = []
    for g, group in enumerate(graph.groups):
        if group.role is Role.POINT:
            continue
        read = [[d for d in dims if d in place] for dims in group.dims]
        degree = {len(r) for r in read}
        plates = group.dims[0][: group.n_plates]
        if degree == {0}:
            free.append(g)
            continue
        site = group.members[0]
        if plates not in ((), first.plates) or group.family is None:
            why = "has no sums" if group.family is None else "has plates of its own"
            return Finding(f"site '{site}'", f"'{site}' ({group.distribution}) {why}: no kernel")
        if degree == {1} and group.sizes[-1] == first.size:
            unary[g] = tuple(place[r[0]] for r in read)
        elif degree == {2} and couples is None and _steps(read, place):
            couples = g
        elif max(degree) == 2 and group.observed:
            return Finding(f"site '{site}'", f"'{site}' reads two latents: no kernel")
        elif max(degree) == 2 and _couples_neighbours(graph, place):
            return Finding(where, "transitions of several forms along the chain: no kernel")
        else:
            return _no_first_order(latents)
    if couples is None:
        return Finding(where, f"{len(latents)} latents that are no chain: no kernel")
    finding = _not_homogeneous(graph, couples)
    return ChainShape(couples, unary, tuple(free)) if finding is None else finding


def _shape_by_form(graph: FactorGraph) -> ChainShape | None:
    """The groups of a chain whose steps are known by their pattern; None where it takes a look."""
    form = chain_form(graph)
    if form is None:
        return None
    first = next(iter(graph.latents.values()))
    groups = graph.groups
    for g in (form.couples, *form.unary):
        if plates_of(groups[g]) not in ((), first.plates) or groups[g].family is None:
            return None
    if first.size < 2 or any(groups[g].sizes[-1] != first.size for g in form.unary):
        return None
    return ChainShape(form.couples, form.unary, form.free)


def _not_homogeneous(graph: FactorGraph, couples: int) -> Finding | None:
    """Why transitions are not the same at all steps and for all sequences, if they are not."""
    group = graph.groups[couples]
    mask_is_of_latents = group.mask is None or (group.mask.shape[-1] == group.mask.shape[-2] == 1)
    tensors = [group.value, *group.arguments.values()]
    repeated = all(n == 1 for t in tensors for n in t.shape[: 1 + group.n_plates])
    if repeated and mask_is_of_latents and not group.observed and not group.event_dims:
        return None
    where = sites_in_words(list(graph.latents))
    if not repeated:
        return Finding(where, "transitions change along the chain: no kernel")
    return Finding(where, "factors that couple the chain's steps beside transitions: no kernel")


def _no_first_order(latents: list[str]) -> Finding:
    what = f"{len(latents)} latents that are no first-order chain: no kernel"
    return Finding(sites_in_words(latents), what)


def _couples_neighbours(graph: FactorGraph, place: Mapping[str, int]) -> bool:
    """Whether every factor of two latents reads neighbours, as on a chain and not on a tree."""
    read = ([place[d] for d in dims if d in place] for g in graph.groups for dims in g.dims)
    return all(abs(r[0] - r[-1]) <= 1 for r in read if r)


def _steps(read: Sequence[Sequence[str]], place: Mapping[str, int]) -> bool:
    """Whether the pairs are (z_0, z_1), (z_1, z_2), … of all latents, in this order."""
    pairs = [(place[a], place[b]) for a, b in read]
    return pairs == [(t, t + 1) for t in range(len(place) - 1)]
