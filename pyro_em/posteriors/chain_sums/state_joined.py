"""Observed sites of Gaussian chains that have the same arguments at different steps, as one.

The first step of a loop is a stack of its own wherever its latents are. What is observed there has, as
a rule, the loadings and the noise of the steps that follow: then one sum serves all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pyro_em.graph.factors import Group
from pyro_em.posteriors.chain_sums.state_arguments import Linear, Numbers, Picked
from pyro_em.posteriors.chain_sums.state_sites import Site, along, data_of, indices
from pyro_em.posteriors.states.state_layout import StateLayout


def joined(sites: Sequence[Site]) -> list[tuple[Site, tuple[int, ...]]]:
    """The sites, those with the same arguments together.

    Args:
        sites: In the order of stacks.

    Returns:
        Each with the numbers of the stacks that it stands for.
    """
    found: list[list[int]] = []
    for i, site in enumerate(sites):
        same = next((f for f in found if _is_alike(sites[f[0]], site)), None)
        if same is None:
            found.append([i])
        else:
            same.append(i)
    return [(_together([sites[i] for i in f]), tuple(f)) for f in found]


def data_of_site(
    site: Site, stacks: Sequence[int], groups: Sequence[Group], layout: StateLayout
) -> Numbers:
    """The data of an observed site, zero where missing, as `joined` has them. # (chains, N, K, D)

    Args:
        site: The site.
        stacks: The stacks that it stands for.
        groups: The group of each stack.
        layout: Where all stacks lie.
    """
    chains = layout.form.chains
    values = []
    for i in stacks:
        value, _ = data_of(groups[i], layout.stacks[i], chains)
        values.append(value.reshape(*value.shape[:2], *site.own.shape))
    if len(values) == 1:
        return values[0]
    levels = np.concatenate([layout.stacks[i].levels.numpy() for i in stacks])
    return np.ascontiguousarray(np.concatenate(values, 1)[:, levels.argsort(kind="stable")])


def _is_alike(a: Site, b: Site) -> bool:
    """Whether two sites differ in nothing but their steps and their data."""
    if a.is_latent or b.is_latent or a.lead != b.lead:
        return False
    if not (_is_equal(a.own, b.own) and _is_equal(a.reads, b.reads)):
        return False
    if not _is_equal(a.there, b.there):
        return False
    if not _is_same(a.coefficients, b.coefficients) or not _has_same_spread(a, b):
        return False
    if a.offset.is_constant and b.offset.is_constant:
        return True
    return len(a.offset.constant) == 1 and _is_same(a.offset, b.offset)


def _has_same_spread(a: Site, b: Site) -> bool:
    one, two = a.spread, b.spread
    if one.argument != two.argument or len(one.picked) != len(two.picked):
        return False
    pairs = zip(one.picked, two.picked, strict=True)
    return _is_same(one.linear, two.linear) and all(_picks_same(x, y) for x, y in pairs)


def _picks_same(a: Picked, b: Picked) -> bool:
    maps = ([(m.name, m.exponent) for m in x.maps] for x in (a, b))
    first, second = maps
    return first == second and all(
        _is_equal(x, y) for x, y in ((a.row, b.row), (a.column, b.column), (a.factor, b.factor))
    )


def _is_same(a: Linear, b: Linear) -> bool:
    return all(_is_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def _is_equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)


def _together(sites: Sequence[Site]) -> Site:
    """Sites that are alike as one, whose members are in the order of steps."""
    if len(sites) == 1:
        return sites[0]
    first = sites[0]
    levels = np.concatenate([indices(s.levels) for s in sites])
    order = levels.argsort(kind="stable")
    by_entry = any(s.by_entry for s in sites)
    weight = None
    if any(s.weight is not None for s in sites):
        weight = np.concatenate([_weight(s, by_entry) for s in sites], 1)[:, order]
    count: Numbers = np.zeros(())
    for s in sites:
        count = count + (s.count[..., None] if by_entry and not s.by_entry else s.count)
    if by_entry:
        count = np.broadcast_to(count, (first.lead, first.ranks, first.width)).copy()
    offset = first.offset
    if offset.is_constant and any(not _is_same(s.offset, offset) for s in sites):
        chains = max(s.offset.constant.shape[1] for s in sites)
        parts = [
            np.broadcast_to(x, (s.steps, chains, *x.shape[2:]))
            for s, x in ((s, s.offset.constant) for s in sites)
        ]
        offset = replace(offset, constant=np.concatenate(parts)[order])
    values = [s.value for s in sites if s.value is not None]
    steps = along(levels[order])
    return replace(
        first,
        levels=steps,
        before=steps,
        steps=len(levels),
        offset=offset,
        value=np.ascontiguousarray(np.concatenate(values, 1)[:, order]),
        weight=weight,
        by_entry=by_entry,
        count=count,
    )


def _weight(site: Site, by_entry: bool) -> Numbers:
    """What of a site counts. # (chains, N, K), or (chains, N, K, D)"""
    assert site.value is not None
    shape = site.value.shape if by_entry else site.value.shape[:-1]
    if site.weight is None:
        return np.ones(shape)
    own = site.weight[..., None] if by_entry and not site.by_entry else site.weight
    return np.broadcast_to(own, shape).copy()
