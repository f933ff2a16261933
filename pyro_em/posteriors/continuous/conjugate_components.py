"""From a traced graph to one whose conjugate latents are integrated, each with the sites that read it.

The discrete scope is summed after the latent, which is exact where no element of the latent is read
by several elements of the plates in which the scope lives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.graph.conjugate_children.conjugate_record import ConjugateRead
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.conjugates.conjugate import ConjugateBlock
from pyro_em.posteriors.conjugates.conjugate_elements import elements_of_latent
from pyro_em.posteriors.conjugates.stacked_conjugates import (
    StackedConjugates,
    group_of_stack,
    stacked,
)
from pyro_em.posteriors.continuous.gaussian_components import NotSeparate, group_of_block
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock, elements_of_blocks
from pyro_em.posteriors.gaussians.gaussian_sites import over_scope, taken
from pyro_em.posteriors.scales.scaled import ScaledBlock
from pyro_em.posteriors.scales.scaled_chain import scaled_chain
from pyro_em.posteriors.scales.scaled_components import block_of_scale, with_scale
from pyro_em.posteriors.states.gaussian_chain import GaussianChain
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.conjugate_beliefs import is_plugged, with_factor

Block = ConjugateBlock | StackedConjugates | ScaledBlock


def conjugated(
    graph: FactorGraph,
    reads: Mapping[str, ConjugateRead],
    kernels: Mapping[str, PriorKernel],
    limit: int | None = None,
) -> FactorGraph:
    """The graph in which groups stand for conjugate latents with the sites that read them.

    Args:
        graph: As traced with these latents at their units.
        reads: What sites read, by site.
        kernels: The kernel of each latent's prior.
        limit: How many cells a table may have.

    Raises:
        NotSeparate: If discrete latents connect elements of a latent.
        NotConjugate: If the spread of Gaussian latents is not that of all sites that they connect.
    """
    by_latent: dict[str, list[ConjugateRead]] = {latent: [] for latent in kernels}
    for read in reads.values():
        by_latent[read.latent].append(read)
    scaled = {n: block_of_scale(graph, n, reads) for n in kernels}
    blocks: list[Block] = []
    for names in _alike(graph, kernels, by_latent, scaled):
        first = names[0]
        own, kernel = tuple(by_latent[first]), kernels[first]
        block = _block(graph, first, own, kernel, limit, scaled[first])
        stack = None
        if len(names) > 1 and isinstance(block, ConjugateBlock):
            stack = _stack(graph, names, by_latent, block)
        if stack is not None:
            blocks.append(stack)
            continue
        blocks.append(block)
        for latent in names[1:]:
            own = tuple(by_latent[latent])
            blocks.append(_block(graph, latent, own, kernel, limit, scaled[latent]))
    inside = {name for block in blocks for group in block.groups for name in group.members}
    rest: list[Group] = []
    for group in graph.groups:
        members = [i for i, name in enumerate(group.members) if name not in inside]
        if len(members) == len(group.members):
            rest.append(group)
        elif members:
            rest.append(taken(group, members))
    return replace(graph, groups=(*rest, *map(_group, blocks)))


def _alike(
    graph: FactorGraph,
    kernels: Mapping[str, PriorKernel],
    reads: Mapping[str, list[ConjugateRead]],
    scaled: Mapping[str, GaussianBlock | None],
) -> list[list[str]]:
    """Latents whose sites are members of the same groups and read them alike, in model order."""
    numbers = {id(group): g for g, group in enumerate(graph.groups)}
    found: dict[Any, list[str]] = {}
    for latent, kernel in kernels.items():
        key: Any = latent
        if scaled[latent] is None:
            places = [graph.group_of(n)[0] for n in (latent, *(r.site for r in reads[latent]))]
            if all(g.is_unscaled and id(g) in numbers for g in places):
                how = [(id(r.pair), r.power, tuple(r.elements.shape)) for r in reads[latent]]
                key = id(kernel), tuple(numbers[id(g)] for g in places), tuple(how)
        found.setdefault(key, []).append(latent)
    out = []
    for names in found.values():
        first = reads[names[0]]
        same = all(
            torch.equal(a.elements, b.elements) and a.order is None and b.order is None
            for n in names[1:]
            for a, b in zip(first, reads[n], strict=True)
        )
        out += [names] if same else [[n] for n in names]
    return out


def _stack(
    graph: FactorGraph,
    names: list[str],
    reads: Mapping[str, list[ConjugateRead]],
    first: ConjugateBlock,
) -> StackedConjugates | None:
    """Latents that are alike as one block; None where their discrete latents stand otherwise."""
    traced = []
    for sites in zip(*((n, *(r.site for r in reads[n])) for n in names), strict=True):
        group = graph.group_of(sites[0])[0]
        places = {name: i for i, name in enumerate(group.members)}
        traced.append(taken(group, [places[n] for n in sites]))
    wide = [over_scope(g, first.scope, first.states) for g in traced]
    pairs = zip(wide[1:], first.reads, strict=True)
    prepared = [_prepared(g, r, first.kernel) for g, r in pairs]
    return stacked(first, (wide[0], *prepared), traced)


def _group(block: Block) -> Group:
    """The group that stands for a block, with the weights of its rows."""
    if isinstance(block, StackedConjugates):
        return group_of_stack(block)
    group = group_of_block(block)
    often = block.conjugate.weight if isinstance(block, ScaledBlock) else block.weight
    if often is None:
        return group
    weight = often.reshape(often.shape + (1,) * len(block.states))
    return replace(group, scale=(float(weight) if not often.dim() else weight,))


def _block(
    graph: FactorGraph,
    latent: str,
    reads: tuple[ConjugateRead, ...],
    kernel: PriorKernel,
    limit: int | None,
    gaussian: GaussianBlock | None,
) -> ConjugateBlock | ScaledBlock:
    if isinstance(gaussian, GaussianChain):
        within = {name for g in gaussian.groups for name in g.members}
        rest = tuple(r for r in reads if r.site not in within)
        alone = _block(graph, latent, rest, kernel, limit, None)
        assert isinstance(alone, ConjugateBlock)
        return scaled_chain(gaussian, replace(alone, plates=(), sizes=()))
    inside = {} if gaussian is None else gaussian.numbers_of_sites
    by_site = {r.site: r for r in reads}
    reads = (*(by_site[n] for n in inside), *(r for r in reads if r.site not in inside))
    traced = []
    for name in (latent, *(r.site for r in reads)):
        if gaussian is not None and name in inside:
            traced.append(gaussian.traced[inside[name]])
            continue
        group, i = graph.group_of(name)
        traced.append(taken(group, [i]))
    in_scope = {z for g in traced for z in g.dims[0][g.n_plates :]}
    scope = tuple(z for z in graph.latents if z in in_scope)
    states = tuple(graph.latents[z].size for z in scope)
    groups = [over_scope(g, scope, states) for g in traced]
    wide = tuple(
        replace(
            r,
            elements=_over(r.elements, old, scope),
            order=None if r.order is None else _over(r.order, old, scope),
        )
        for r, old in zip(reads, traced[1:], strict=True)
    )
    weight = _weight(latent, groups)
    pairs = zip(groups[1:], wide, strict=True)
    children = tuple(g if r.site in inside else _prepared(g, r, kernel) for g, r in pairs)
    block = ConjugateBlock(
        (groups[0], *children),
        wide,
        kernel,
        scope,
        states,
        traced=tuple(traced),
        apart=len(inside),
    )
    cells = math.prod(states) * block.count
    if limit is not None and cells > limit:
        what = (
            f"it has {cells:,} cells, for all states of what it depends on; the budget is "
            f"max_enumeration={limit:,}."
        )
        raise NotSeparate(_finding(latent, f"site '{latent}'", what))
    if gaussian is None:
        return _with_plates(block, graph, weight)
    gaussian = with_scale(gaussian, block)
    block = _with_plates(block, graph, weight, gaussian)
    return ScaledBlock(gaussian.over(block.plates, block.sizes), block)


def _prepared(group: Group, read: ConjugateRead, kernel: PriorKernel) -> Group:
    """A site with what its updates have to know: a factor, or that only a gradient serves."""
    if not group.params:
        return group
    if not is_plugged(group, read, kernel):
        return replace(group, raw_params=group.params)
    name = read.pair.argument
    one = torch.ones((), dtype=group.arguments[name].dtype, device=group.value.device)
    binding = with_factor(group.bindings[name], one)
    assert binding is not None
    return replace(group, bindings={**group.bindings, name: binding})


def _over(elements: Tensor, old: Group, scope: tuple[str, ...]) -> Tensor:
    """Numbers of cells over plates and a wider scope. # (1, *plates or 1s, *states or 1s, …)"""
    n, own = old.n_plates, old.dims[0][old.n_plates :]
    shape = elements.shape
    there = dict(zip(own, shape[n : n + len(own)], strict=True))
    wide = (1, *shape[:n], *(there.get(z, 1) for z in scope), *shape[n + len(own) :])
    return elements.reshape(wide)


def _weight(latent: str, groups: list[Group]) -> Tensor | None:
    """The weight of a latent's rows, which its sites share: as if each row were there so often.

    Returns:
        # (*plates of the latent or 1s); None where they count once

    Raises:
        NotSeparate: If sites below the latent have other weights.
    """
    first = groups[0]
    if first.is_unscaled:
        for group in groups[1:]:
            if group.role is Role.GAUSSIAN and not group.is_unscaled:
                raise NotSeparate(_weighed(latent, group))
        return None
    weight = replace(first, mask=None, elements=None).weights()[0].detach()
    weight = weight.reshape(weight.shape + (1,) * (len(first.sizes) - weight.dim()))
    if weight.shape[first.n_plates :].numel() > 1:
        raise NotSeparate(_weighed(latent, first))
    own = first.dims[0][: first.n_plates]
    weight = weight.reshape(weight.shape[: first.n_plates])
    for group in groups[1:]:
        plates = group.dims[0][: group.n_plates]
        sizes = dict(zip(own, weight.shape, strict=True))
        laid = weight.reshape(
            [sizes.get(p, 1) for p in plates] + [1] * (len(group.sizes) - len(plates))
        )
        there = replace(group, mask=None, elements=None).weights()[0].detach()
        if not set(own) <= set(plates) or not bool((there == laid).all()):
            raise NotSeparate(_weighed(latent, group))
    return weight


def _weighed(latent: str, group: Group) -> Finding:
    what = f"poutine.scale weighs it otherwise than '{latent}'."
    if group.members[0] == latent:
        what = "its weight depends on a discrete latent."
    return _finding(latent, f"site '{group.members[0]}'", what)


def _with_plates(
    block: ConjugateBlock,
    graph: FactorGraph,
    weight: Tensor | None,
    gaussian: GaussianBlock | None = None,
) -> ConjugateBlock:
    """The block with the plates of its table: those of the scope, and the data's if they can."""

    def crosses(plates: tuple[str, ...]) -> bool:
        if elements_of_latent(block.groups, block.readings, block.count, plates)[1]:
            return True
        return gaussian is not None and bool(elements_of_blocks(gaussian, plates)[1])

    order = sorted(graph.structure.plates.values(), key=lambda p: p.dim)
    needed = {p for z in block.scope for p in graph.latents[z].plates}
    first = block.groups[0]
    own = first.dims[0][: first.n_plates]
    if weight is not None:
        needed |= {p for p, size in zip(own, weight.shape, strict=True) if size > 1}
    data = graph.structure.data_plate
    outermost = set() if data is None else {data}
    for wanted in (needed | outermost, needed):
        plates = tuple(p.name for p in order if p.name in wanted)
        if not crosses(plates):
            sizes = tuple(graph.structure.plates[p].size for p in plates)
            return replace(block, plates=plates, sizes=sizes, weight=_laid(weight, own, plates))
    if not block.scope:
        raise NotSeparate(_weighed(block.latent, block.groups[1]))
    inner = next(z for z in block.scope if graph.latents[z].plates)
    shown = ", ".join(f"'{p}'" for p in graph.latents[inner].plates)
    what = (
        f"it lives in plate {shown}, and '{block.latent}' connects elements of that plate: a mixture "
        f"of {block.states[block.scope.index(inner)]} to the power of the plate's size posteriors."
    )
    raise NotSeparate(_finding(block.latent, f"site '{inner}'", what))


def _laid(weight: Tensor | None, own: tuple[str, ...], plates: tuple[str, ...]) -> Tensor | None:
    """A weight over some plates, over those of a table. # (*plates or 1s)"""
    if weight is None:
        return None
    sizes = dict(zip(own, weight.shape, strict=True))
    return weight.reshape([sizes.get(p, 1) for p in plates])


def _finding(latent: str, where: str, what: str) -> Finding:
    return Finding(
        where,
        what,
        "a conjugate latent is integrated for each state of the discrete latents that touch it",
        (
            "give a guide: ExactPosteriorEM(model, AutoNormal)",
            f"take a point estimate of '{latent}' under its prior: guide='map'",
            "make it a parameter: pyro.param instead of pyro.sample",
        ),
        latents=(latent,),
    )
