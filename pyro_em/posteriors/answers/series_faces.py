"""Series of latents as users ask for them: what was known at each step, and how steps depend.

A filter answers for each step from the data up to and including it,

    p(z_t | x_1, …, x_t),     p(h_t | x_1, …, x_t),

and the errors of its predictions are those of p(y_t | y_1, …, y_{t−1}).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.arguments import whole
from pyro_em.errors import UsageError, message
from pyro_em.globs import listed, meant, natural, require_alike
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.answers.data_steps import (
    DataSteps,
    stem_of,
    steps_of_data,
)
from pyro_em.posteriors.answers.gaussian_faces import GaussianFaces
from pyro_em.posteriors.answers.gaussian_site import covariance
from pyro_em.posteriors.answers.names import by_glob, latent_of, matched_pairs, names_of, own_name
from pyro_em.posteriors.answers.site_runs import covariances_of_pairs, runs_of
from pyro_em.posteriors.answers.so_far import given_steps
from pyro_em.posteriors.answers.stacks import batch_shape
from pyro_em.posteriors.answers.state_filter import filtered_solutions
from pyro_em.posteriors.continuous.gaussian_steps import gaussians_in
from pyro_em.posteriors.messages.product_steps import product_steps
from pyro_em.posteriors.messages.steps import forward_cells, steps_of

if TYPE_CHECKING:
    from pyro_em.posteriors.answers.posterior import Posterior


def stacked_marginals(
    where: str, names: Sequence[str], parts: Sequence[Any], are_runs: bool = False
) -> Any:
    """The distributions of several sites as one, with the sites as its first dimension.

    Args:
        where: What was asked for.
        names: The sites.
        parts: Their distributions: Normals, MultivariateNormals, or mixtures of these.
        are_runs: Whether each is of several steps, along its first dimension.

    Returns:
        A distribution of their kind. # batch (T, *plates)

    Raises:
        UsageError: If they differ in shape, or only some are mixtures.
    """
    put, lead = (torch.cat, 1) if are_runs else (torch.stack, 0)
    shapes = [(*p.batch_shape[lead:], *p.event_shape) for p in parts]
    require_alike(where, zip(names, shapes, strict=True))
    first = parts[0]
    if isinstance(first, torch.distributions.MixtureSameFamily):
        inner = [getattr(p, "component_distribution", p) for p in parts]
        states = [p.batch_shape[lead:] for p in inner]
        require_alike(where, zip(names, states, strict=True))
        weights = put([p.mixture_distribution.probs for p in parts])
        chosen = dist.Categorical(probs=weights, validate_args=False)
        return dist.MixtureSameFamily(
            chosen, stacked_marginals(where, names, inner, are_runs), validate_args=False
        )
    kinds = {type(p) for p in parts}
    if len(kinds) > 1:
        raise UsageError(
            message(
                where,
                f"the posteriors of {listed(names)} are of several kinds: "
                f"{', '.join(sorted(k.__name__ for k in kinds))}.",
                "what a glob stacks has one form",
                ["ask for each by its name", "ask for those of one form with a narrower glob"],
            )
        )
    loc = put([p.loc for p in parts])
    if isinstance(first, torch.distributions.MultivariateNormal):
        # The factor is kept as it is: that of a singular covariance cannot be had again.
        tril = put([p.scale_tril for p in parts])
        return dist.MultivariateNormal(loc, scale_tril=tril, validate_args=False)
    return dist.Normal(loc, put([p.scale for p in parts]), validate_args=False)


def covariances(faces: GaussianFaces, a: str, b: str | None, lag: int | None) -> Tensor:
    """See `Posterior.covariance`.

    Args:
        faces: The Gaussian latents.
        a: A name or a glob.
        b: Another, or None.
        lag: How many steps apart.
    """
    firsts = faces.names("covariance", a)
    if lag is not None:
        pairs = _lagged(a, firsts, b, whole("covariance", "lag", lag, None))
    elif b is None:
        pairs = [(n, n) for n in firsts or [a]]
    else:
        seconds = faces.names("covariance", b)
        pairs = list(matched_pairs("covariance", a, b, firsts, seconds))
        firsts = firsts or seconds
    if firsts is None:
        return covariance(*(faces.site("covariance", n) for n in pairs[0]))
    return covariances_of_pairs(faces, pairs)


def marginals(faces: GaussianFaces, where: str, names: Sequence[str]) -> Any:
    """The distribution of each of several latents. # batch (T, *plates)"""
    sites = [s for (s,) in runs_of(faces, where, [names])]
    return stacked_marginals(where, [s.name for s in sites], [s.marginal() for s in sites], True)


def _lagged(a: str, names: Sequence[str] | None, b: str | None, lag: int) -> list[tuple[str, str]]:
    where = f"covariance('{a}', lag={lag})"
    if names is None or b is not None:
        raise UsageError(
            message(
                where,
                "a lag is between the steps of one series, which a glob names.",
                fixes=["ask by glob: covariance('h_*', lag=1)", "name both: covariance(a, b)"],
            )
        )
    if not 0 <= lag < len(names):
        raise UsageError(
            message(
                where,
                f"the glob matches {len(names)} steps: {listed(names)}.",
                "no two of them lie so far apart",
                ["pass a whole number from 0, below the number of steps"],
            )
        )
    return list(zip(names, names[lag:], strict=False))


def filtered(q: Posterior, site: str, faces: GaussianFaces) -> Any:
    """See `Posterior.filtered`.

    Args:
        q: The posterior.
        site: A name or a glob.
        faces: The Gaussian latents that it may mean.
    """
    if not q.exact:
        raise UsageError(
            message(
                f"filtered('{site}')",
                "this q is not the posterior of the data.",
                "only of that it is known what each step adds",
                ["ask the exact posterior: em.posterior(x).filtered('z_*')"],
            )
        )
    if meant(site, names_of(q.graph)) or own_name(q.graph, site) in q.graph.latents:
        found = by_glob(q.graph, site)
        names = [site] if found is None else list(found)
        table = _forward(q, names)
        if table is None:
            table = torch.stack(_by_steps(q, "filtered", names, lambda p, n: p.probs(n)))
        return table[0] if found is None else table
    several = faces.names("filtered", site)
    names = [faces.site("filtered", site).name] if several is None else several
    known = _by_filter(q, names)
    if known is not None and several is None:
        return known.site("filtered", names[0]).marginal()
    if known is not None:
        return marginals(known, "filtered", names)
    parts = _by_steps(q, "filtered", names, lambda p, n: p.marginal(n))
    return parts[0] if several is None else stacked_marginals("filtered", names, parts)


def _forward(q: Posterior, names: Sequence[str]) -> Tensor | None:
    """The forward messages of a chain, where its factors come as its data do. # (T, *plates, K)"""
    graph = q.graph
    steps, latents = steps_of(graph), list(graph.latents)
    if any(n not in graph.latents for n in names):
        return None
    if steps is None:
        return _forward_of_products(q, names)
    chain = series_of(names[0], latents)
    if chain != latents:
        return None
    data = data_steps(q, chain)
    comes = dict(steps.single)
    comes |= {c.group: tuple(t + 1 for t in c.steps) for c in steps.couples}
    for (g, _), at in data.of_rows.items():
        if g in comes and at.tolist() != list(comes[g]):
            return None
    table = forward_cells(graph, q.tables)
    assert table is not None
    places = {name: t for t, name in enumerate(chain)}
    rows = table[torch.tensor([places[n] for n in names], device=table.device)]
    latent = latent_of(graph, names[0])
    return rows.reshape(len(names), *batch_shape(graph, latent), latent.size).to(graph.dtype)


def _forward_of_products(q: Posterior, names: Sequence[str]) -> Tensor | None:
    """The same of several latents per step, or of a longer history. # (T, *plates, K)"""
    graph = q.graph
    products = product_steps(graph)
    if products is None:
        return None
    chain = series_of(names[0], list(graph.latents))
    places = [products.of.names(name) for name in chain]
    if any(place is None or place[1] != t for t, place in enumerate(places)):
        return None
    comes = products.comes()
    for (g, _), at in data_steps(q, chain).of_rows.items():
        if any(comes.get((g, i), t) != t for i, t in enumerate(at.tolist())):
            return None
    found = products.forward(q.tables)
    latent = latent_of(graph, names[0])
    rows = torch.stack([found[name] for name in names])
    return rows.reshape(len(names), *batch_shape(graph, latent), latent.size).to(graph.dtype)


def _by_filter(q: Posterior, names: Sequence[str]) -> GaussianFaces | None:
    """Faces with the moments of the filter of a chain; None where it does not have them."""
    faces = gaussian_faces(q)
    chain = series_of(names[0], [*names_of(q.graph), *faces.places])
    if any(n not in chain for n in names):
        return None
    solved = filtered_solutions(faces, data_steps(q, chain), names)
    if solved is None:
        return None
    return replace(faces, solved=solved)


def _by_steps(
    q: Posterior, where: str, names: Sequence[str], answer: Callable[[Posterior, str], Any]
) -> list[Any]:
    """What each of some latents is, given the data up to and including its step."""
    unread = () if q.later is None else q.later.names
    everyone = [*names_of(q.graph), *gaussian_faces(q).places, *unread]
    known: dict[tuple[str, int], Posterior] = {}
    clocks: dict[str, tuple[list[str], DataSteps]] = {}
    out = []
    for name in names:
        stem = stem_of(name)
        if stem not in clocks:
            chain = series_of(name, everyone)
            clocks[stem] = chain, data_steps(q, chain)
        chain, data = clocks[stem]
        step = chain.index(name)
        if name in unread:
            _refuse_later_data(where, name, data, step)
            out.append(answer(q, name))
            continue
        if (stem, step) not in known:
            known[stem, step] = until(q, data, step)
        out.append(answer(known[stem, step], name))
    return out


def until(q: Posterior, data: DataSteps, last: int) -> Posterior:
    """The posterior given the data up to and including a step."""
    if last >= data.last:
        return q
    part = given_steps(q.graph, q.tables, q.cells, q.solved, data, last)
    return replace(q, tables=part.tables, cells=part.cells, solved=part.solved, later=None)


def _refuse_later_data(where: str, name: str, data: DataSteps, step: int) -> None:
    if data.last > step:
        raise UsageError(
            message(
                f"{where}('{name}')",
                "no observation depends on this latent, and data come after its step.",
                "what they say of it through others is not told apart from what came before",
                ["ask for its moments given all data: mean, covariance, marginal"],
            )
        )


def gaussian_faces(q: Posterior) -> GaussianFaces:
    """The Gaussian latents of a posterior."""
    return GaussianFaces(q.graph, gaussians_in(q.solved), q.cells)


def series_of(name: str, names: Sequence[str]) -> list[str]:
    """All steps of the series that a latent belongs to, in order of time."""
    stem = stem_of(name)
    return sorted({n for n in names if stem_of(n) == stem}, key=natural)


def data_steps(q: Posterior, chain: Sequence[str]) -> DataSteps:
    """When data come, along a series of these names."""
    known = q.graph.remembered
    key = "data steps", tuple(chain)
    if key not in known:
        known[key] = steps_of_data(q.graph, gaussian_faces(q), chain)
    steps: DataSteps = known[key]
    return steps


def batch_of(graph: FactorGraph, site: str) -> tuple[int, ...]:
    """The sizes of a site's batch dimensions.

    Args:
        graph: The factor graph.
        site: Its name there.
    """
    info = graph.structure.sites[site]
    own = {graph.structure.plates[p].dim: p for p in info.plates}
    sizes = (own.get(d) for d in range(-info.batch_dim, 0))
    return tuple(1 if p is None else graph.dim_size(p) for p in sizes)
