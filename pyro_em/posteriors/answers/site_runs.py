"""Gaussian latents of many steps as few sites, so that one question to a solution answers for all.

Steps whose numbers lie beside each other become one site with the steps as its first batch dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, cat

from pyro_em.globs import require_alike
from pyro_em.posteriors.answers.gaussian_faces import GaussianFaces
from pyro_em.posteriors.answers.gaussian_site import GaussianSite, covariance


def runs_of(
    faces: GaussianFaces, where: str, columns: Sequence[Sequence[str]]
) -> list[tuple[GaussianSite, ...]]:
    """Runs of steps, for one series or for several that go together.

    Args:
        faces: The Gaussian latents.
        where: The method that was called.
        columns: The names of each series, equally many.

    Returns:
        For each run one site of each series. # batch (steps, *plates), of as many dimensions each

    Raises:
        UsageError: If there is no such latent.
    """
    places = members_of(faces)
    out = []
    begin, T = 0, len(columns[0])
    while begin < T:
        end = begin + 1
        while end < T and all(_follows(places, c[end - 1], c[end]) for c in columns):
            end += 1
        sites = [faces.site(where, c[begin]) for c in columns]
        dims = max(len(s.batch) for s in sites)
        out.append(tuple(_stepped(faces, s, end - begin, dims) for s in sites))
        begin = end
    return out


def joined(where: str, sites: Sequence[GaussianSite], answers: Sequence[Tensor]) -> Tensor:
    """Answers for runs of steps as one. # (T, *shape)

    Args:
        where: What was asked for.
        sites: The first site of each run.
        answers: Of each run. # (steps, *shape)

    Raises:
        UsageError: If they differ in shape; names the first that differs.
    """
    require_alike(where, [(s.name, a.shape[1:]) for s, a in zip(sites, answers, strict=True)])
    return cat(list(answers))


def means(faces: GaussianFaces, names: Sequence[str]) -> Tensor:
    """The means of several latents. # (T, *plates, *event)"""
    sites = [s for (s,) in runs_of(faces, "mean", [names])]
    return joined("mean", sites, [s.mean() for s in sites])


def covariances_of_pairs(faces: GaussianFaces, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """The covariance of each of several pairs. # (pairs, *plates of both, …)"""
    columns = [[a for a, _ in pairs], [b for _, b in pairs]]
    runs = runs_of(faces, "covariance", columns)
    return joined("covariance", [a for a, _ in runs], [covariance(a, b) for a, b in runs])


def members_of(faces: GaussianFaces) -> dict[str, tuple[int, int, int]]:
    """For each latent the numbers of its group and of its site there, and its place in that.

    Args:
        faces: The Gaussian latents.
    """
    out = {}
    for g in faces.solved:
        block = faces.graph.groups[g].nested
        assert block is not None
        for i, group in enumerate(block.groups):
            out.update({name: (g, i, m) for m, name in enumerate(group.members)})
    return out


def _follows(places: dict[str, tuple[int, int, int]], before: str, name: str) -> bool:
    if before not in places or name not in places:
        return False
    g, i, m = places[before]
    return places[name] == (g, i, m + 1)


def _stepped(faces: GaussianFaces, site: GaussianSite, steps: int, dims: int) -> GaussianSite:
    """A site and those that follow it. # batch (steps, *1s, *plates)"""
    more = dims - len(site.batch)
    weights = faces.weights(site.place, site.number)
    if weights is not None:
        count = steps * math.prod(site.batch)
        weights = weights[:, site.first : site.first + count]
    return replace(
        site,
        batch=(steps, *(1,) * more, *site.batch),
        plates=(None, *(None,) * more, *site.plates),
        weights=weights,
    )
