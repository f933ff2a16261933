"""Series of latents as users ask for them: what was known at each step, and how steps depend.

A filter answers for each step from the data up to and including it,

    p(z_t | x_1, …, x_t),     p(h_t | x_1, …, x_t),

and the errors of its predictions are those of p(y_t | y_1, …, y_{t−1}).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.arguments import whole
from pyro_em.errors import UsageError, message
from pyro_em.globs import listed, meant, natural, require_alike, unknown
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.data_steps import (
    DataSteps,
    ObservedSite,
    number_of,
    observed_sites,
    stem_of,
    steps_of_data,
)
from pyro_em.posteriors.gaussian_faces import GaussianFaces
from pyro_em.posteriors.gaussian_predictions import known_data, predicted, value_rows
from pyro_em.posteriors.gaussian_site import covariance
from pyro_em.posteriors.gaussian_steps import gaussians_in
from pyro_em.posteriors.names import by_glob, latent_of, matched_pairs, names_of, own_name
from pyro_em.posteriors.normal_mixtures import NormalRows
from pyro_em.posteriors.product_steps import product_steps
from pyro_em.posteriors.site_runs import covariances_of_pairs, runs_of
from pyro_em.posteriors.so_far import given_steps
from pyro_em.posteriors.stacks import batch_shape
from pyro_em.posteriors.state_filter import filtered_solutions, predicted_solution
from pyro_em.posteriors.steps import forward_cells, steps_of
from pyro_em.updates.gaussian_rows import event_shape

if TYPE_CHECKING:
    from pyro_em.posteriors.posterior import Posterior


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
    chain = _series(names[0], latents)
    if chain != latents:
        return None
    data = _data_steps(q, chain)
    comes = dict(steps.single)
    comes |= {c.group: tuple(t + 1 for t in c.steps) for c in steps.couples}
    for (g, _), at in data.of_rows.items():
        if g in comes and at.tolist() != list(comes[g]):
            return None
    table = forward_cells(graph, q.tables)
    assert table is not None
    rows = table[[chain.index(n) for n in names]]
    latent = latent_of(graph, names[0])
    return rows.reshape(len(names), *batch_shape(graph, latent), latent.size).to(graph.dtype)


def _forward_of_products(q: Posterior, names: Sequence[str]) -> Tensor | None:
    """The same of several latents per step, or of a longer history. # (T, *plates, K)"""
    graph = q.graph
    products = product_steps(graph)
    if products is None:
        return None
    chain = _series(names[0], list(graph.latents))
    places = [products.of.names(name) for name in chain]
    if any(place is None or place[1] != t for t, place in enumerate(places)):
        return None
    comes = products.comes()
    for (g, _), at in _data_steps(q, chain).of_rows.items():
        if any(comes.get((g, i), t) != t for i, t in enumerate(at.tolist())):
            return None
    found = products.forward(q.tables)
    latent = latent_of(graph, names[0])
    rows = torch.stack([found[name] for name in names])
    return rows.reshape(len(names), *batch_shape(graph, latent), latent.size).to(graph.dtype)


def _by_filter(q: Posterior, names: Sequence[str]) -> GaussianFaces | None:
    """Faces with the moments of the filter of a chain; None where it does not have them."""
    faces = _gaussian(q)
    chain = _series(names[0], [*names_of(q.graph), *faces.places])
    if any(n not in chain for n in names):
        return None
    solved = filtered_solutions(faces, _data_steps(q, chain), names)
    if solved is None:
        return None
    return replace(faces, solved=solved)


def _by_steps(
    q: Posterior, where: str, names: Sequence[str], answer: Callable[[Posterior, str], Any]
) -> list[Any]:
    """What each of some latents is, given the data up to and including its step."""
    unread = () if q.later is None else q.later.names
    everyone = [*names_of(q.graph), *_gaussian(q).places, *unread]
    known: dict[tuple[str, int], Posterior] = {}
    clocks: dict[str, tuple[list[str], DataSteps]] = {}
    out = []
    for name in names:
        stem = stem_of(name)
        if stem not in clocks:
            chain = _series(name, everyone)
            clocks[stem] = chain, _data_steps(q, chain)
        chain, data = clocks[stem]
        step = chain.index(name)
        if name in unread:
            _refuse_later_data(where, name, data, step)
            out.append(answer(q, name))
            continue
        if (stem, step) not in known:
            known[stem, step] = _until(q, data, step)
        out.append(answer(known[stem, step], name))
    return out


def _until(q: Posterior, data: DataSteps, last: int) -> Posterior:
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


def _gaussian(q: Posterior) -> GaussianFaces:
    return GaussianFaces(q.graph, gaussians_in(q.solved), q.cells)


def _series(name: str, names: Sequence[str]) -> list[str]:
    """All steps of the series that a latent belongs to, in order of time."""
    stem = stem_of(name)
    return sorted({n for n in names if stem_of(n) == stem}, key=natural)


def _data_steps(q: Posterior, chain: Sequence[str]) -> DataSteps:
    known = q.graph.remembered
    key = "data steps", tuple(chain)
    if key not in known:
        known[key] = steps_of_data(q.graph, _gaussian(q), chain)
    steps: DataSteps = known[key]
    return steps


@torch.no_grad()
def prediction_errors(q: Posterior, site: str) -> Tensor:
    """See `Posterior.prediction_errors`."""
    every = {s.name: s for s in observed_sites(q.graph)}
    names = _observed(site, every)
    data = _data_steps(q, _clock_of(q, [every[n] for n in names], list(every)))
    rows = _Errors(q, data)
    out = []
    for name in names:
        own = every[name]
        shape = (*batch_of(q.graph, own.own), *event_shape(own.of))
        out.append(rows.of_site(own).reshape(shape).to(own.of.value.dtype))
    if names == [site]:
        return out[0]
    require_alike("prediction_errors", [(n, e.shape) for n, e in zip(names, out, strict=True)])
    return torch.stack(out)


class _Errors:
    """Standardised errors, those of all sites of a group together."""

    def __init__(self, q: Posterior, data: DataSteps) -> None:
        self.q, self.data = q, data
        self._until: dict[int, Posterior] = {}
        self._known: dict[tuple[int, int], Tensor] = {}

    def of_site(self, site: ObservedSite) -> Tensor:
        """# (rows, D)"""
        assert site.number is not None
        key = site.group, site.number
        if key not in self._known:
            self._known[key] = self._of_group(*key, site.of)
        return self._known[key][site.rows]

    def _of_group(self, g: int, i: int, group: Group) -> Tensor:
        solved = gaussians_in(self.q.solved)
        value, noise = value_rows(group), known_data(solved[g]).noise(i)
        steps = {j: at for (h, j), at in self.data.of_rows.items() if h == g and j is not None}
        own = predicted_solution(solved[g], steps)
        if own is not None:
            faces = replace(_gaussian(self.q), solved={**solved, g: own})
            return _standardised(value, predicted(faces, g, i, noise))
        out = value.clone()
        for step in sorted(set(steps[i].tolist())):
            if step not in self._until:
                self._until[step] = _until(self.q, self.data, step - 1)
            here = (steps[i] == step).to(value.device)
            rows = predicted(_gaussian(self._until[step]), g, i, noise)
            out[here] = _standardised(value, rows)[here]
        return out


def _standardised(value: Tensor, rows: NormalRows) -> Tensor:
    mean, variance = rows.moments()
    return (value - mean) / variance.sqrt()


def _observed(site: str, every: Mapping[str, ObservedSite]) -> list[str]:
    """The observed sites below Gaussian latents that a name or a glob means."""
    below = [name for name, s in every.items() if s.number is not None]
    names = meant(site, below)
    if names:
        return names
    if meant(site, every):
        raise UsageError(
            message(
                f"prediction_errors('{site}')",
                "no Gaussian latent enters the mean of these data.",
                "errors over their standard deviation are those of Gaussian predictions",
                ["compare the data with em.forecast(x), of a series whose later steps are NaN"],
            )
        )
    raise unknown(site, below, "observed sites that read Gaussian latents")


def _clock_of(q: Posterior, sites: Sequence[ObservedSite], observed: Sequence[str]) -> list[str]:
    """The longest series of latents, or the data themselves where no latents are one."""
    chains = {stem_of(n): n for n in _gaussian(q).places if number_of(n) is not None}
    series = [_series(n, list(_gaussian(q).places)) for n in chains.values()]
    longest = max(series, key=len, default=[])
    return longest if len(longest) > 1 else _series(sites[0].name, observed)


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
