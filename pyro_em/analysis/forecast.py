"""Forecasts: what is predicted of the entries of a series that are missing, given all that are seen.

    p(y_{T+1}, …, y_{T+H} | y_1, …, y_T)

The E-step of the longer series has the posterior of all its latents, those of the steps to predict
included. Means are exact, intervals where an entry is normal or a mixture of normals over discrete
latents; draws are joint over all steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.analysis.predictive import predictive_draws
from pyro_em.errors import UsageError, message
from pyro_em.globs import Values, listed
from pyro_em.graph.factors import FactorGraph
from pyro_em.plan.program import Program
from pyro_em.posteriors.answers.data_steps import ObservedSite, observed_sites
from pyro_em.posteriors.answers.gaussian_faces import GaussianFaces
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.answers.predicted_sites import (
    Draws,
    OtherSite,
    PredictedSite,
    predicted_site,
)
from pyro_em.posteriors.answers.series_faces import batch_of
from pyro_em.posteriors.continuous.gaussian_steps import gaussians_in
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.posteriors.sampling import AT_ONCE, codes_of
from pyro_em.tracing.given import without_values
from pyro_em.tracing.missing import missing_in
from pyro_em.tracing.randomness import seeded
from pyro_em.updates.expectations.gaussian_rows import event_shape
from pyro_em.variational.bound import Variational
from pyro_em.variational.drawn import DrawnPosterior

_SHOWN = 6  # sites that a repr lists


@dataclass(frozen=True, eq=False)
class Forecast:
    """What is predicted of observed sites with missing entries; seen entries are themselves.

    Each is a dict by site, of which a glob takes all steps that are predicted, in order of time and
    with time first: ``forecast.means["y_*"]`` # (H, *plates, *event)

    Attributes:
        means: E[y | what is seen]; of a Categorical there is none. # (*plates, *event)
        lower: What an entry stays below with probability (1 − level) / 2. # (*plates, *event)
        upper: What it exceeds with that probability. # (*plates, *event)
        draws: Joint draws of all entries. # (n, *plates, *event), of a glob (H, n, *plates, *event)
        probs: Of a Categorical the probabilities of its codes. # (*plates, K)
        level: The probability that an interval holds.
        from_draws: Sites whose intervals are quantiles of the draws.
        means_from_draws: Those of them whose means are averages of draws, too.
    """

    means: Values
    lower: Values
    upper: Values
    draws: Values
    probs: Values
    level: float
    from_draws: tuple[str, ...] = ()
    means_from_draws: tuple[str, ...] = ()

    @property
    def intervals(self) -> Values:
        """Lower and upper ends. # (2, *plates, *event), of a glob (H, 2, *plates, *event)"""
        return Values({n: torch.stack([self.lower[n], self.upper[n]]) for n in self.lower})

    def __repr__(self) -> str:
        n = len(next(iter(self.draws.values()))) if self.draws else 0
        return f"Forecast({listed(list(self.draws))}, level={self.level:g}, {n} draws)"

    def __str__(self) -> str:
        """A table of the first sites."""
        lines = [f"{'site':<12} {'mean':>10}  {self.level:.0%} interval"]
        for name in list(self.means)[:_SHOWN]:
            parts = (self.means[name], self.lower[name], self.upper[name])
            if parts[0].numel() == 1:
                mean, low, high = (float(p) for p in parts)
                lines.append(f"{name:<12} {mean:>10.5g}  {low:.5g} … {high:.5g}")
            else:
                lines.append(f"{name:<12} {tuple(parts[0].shape)!s:>10}")
        if len(self.draws) > len(lines) - 1:
            lines.append(f"… {len(self.draws)} sites: {listed(list(self.draws))}")
        return "\n".join(lines)


@torch.no_grad()
def forecast(
    found: Program | Variational,
    args: tuple,
    kwargs: dict[str, Any],
    level: float,
    num_samples: int,
    seed: int | None,
) -> Forecast:
    """See `ExactPosteriorEM.forecast`.

    Args:
        found: The model read on the longer series, in which NaN means missing.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        level: The probability that an interval holds.
        num_samples: Number of draws.
        seed: Their seed.
    """
    model = without_values(found.model)
    names = _to_predict(found, model, args, kwargs)
    if isinstance(found, Variational):
        q = DrawnPosterior(found, args, kwargs)
        every = predictive_draws(model, q, args, kwargs, num_samples, seed, True)
        return _summary(names, {}, {}, every, level)
    evaluation = found.evaluate()
    posterior = found.posterior(evaluation)
    faces = GaussianFaces(posterior.graph, gaussians_in(posterior.solved), posterior.cells)
    known: dict[str, PredictedSite] = {}
    sites: dict[str, ObservedSite] = {}
    enumerated = _enumerated(posterior)
    for site in observed_sites(posterior.graph):
        if site.name in names and site.name not in enumerated:
            arguments = evaluation.arguments[site.group]
            if site.number is not None:
                block = posterior.graph.groups[site.group].nested
                if not isinstance(block, GaussianBlock):
                    continue  # draws answer
                arguments = block.of_site(site.number, arguments)
            found_site = predicted_site(faces, site, arguments)
            if found_site is not None:
                known[site.name], sites[site.name] = found_site, site
    with seeded(seed):
        codes, latents = _discrete_draws(posterior, num_samples)
        parts: dict[str, list[Tensor]] = {n: [] for n in known}
        for draws in _portions(posterior, num_samples, codes):
            for n, own in known.items():
                parts[n].append(_laid_out(posterior.graph, sites[n], own.draw(draws)))
        drawn = {n: torch.cat(own) for n, own in parts.items()}
        drawn |= {n: latents[n] for n in names if n in enumerated}
    if any(n not in drawn for n in names):
        every = predictive_draws(model, posterior, args, kwargs, num_samples, seed, True)
        # All from the same run: what is drawn together belongs together.
        drawn = {n: every[n] for n in names}
    return _summary(names, known, sites, drawn, level, posterior)


def _to_predict(
    found: Program | Variational, model: Any, args: tuple, kwargs: dict[str, Any]
) -> list[str]:
    """The observed sites that have missing entries, in model order."""
    structure = found.structure if isinstance(found, Program) else found.bare
    names = [m.site for m in missing_in(model, args, kwargs)]
    masks = structure.masked_pairs
    names += [n for n, mask in masks.items() if not bool(mask.all()) and n not in names]
    order = {n.removesuffix("_observed"): i for i, n in enumerate(structure.sites)}
    names.sort(key=lambda n: order.get(n, len(order)))
    if not names:
        raise UsageError(
            message(
                "forecast",
                "no entry of an observed site is missing: there is nothing to predict.",
                "it takes the data of the longer series, in which steps to predict are missing",
                [
                    "append NaN for each step to predict: torch.cat([y, y.new_full((12,), torch.nan)])",
                    "or observe with obs_mask=, False at these steps",
                ],
            )
        )
    return names


def _enumerated(q: Posterior) -> tuple[str, ...]:
    """Sites with ``obs_mask`` whose unobserved part is summed."""
    pairs = q.graph.structure.masked_pairs
    return tuple(n for n in pairs if f"{n}_unobserved" in q.graph.latents)


def _discrete_draws(q: Posterior, n: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws of discrete latents: their places in the supports, and values by the names of users."""
    if not q.graph.latents:
        return {}, {}
    values = dict(replace(q, solved={}).sample(n))
    pairs = q.graph.structure.masked_pairs
    own = {f"{k}_unobserved": v for k, v in values.items() if k in pairs}
    return codes_of(q.graph, {**values, **own}), values


def _portions(q: Posterior, n: int, codes: Mapping[str, Tensor]) -> Iterator[Draws]:
    """Draws of all latents, as many at once as memory should hold."""
    solved = gaussians_in(q.solved)
    size = max((s.cells * s.layout.vector_size for s in solved.values()), default=1)
    portion = max(1, AT_ONCE // max(size, 1))
    for begin in range(0, n, portion):
        end = min(begin + portion, n)
        own = {z: c[begin:end] for z, c in codes.items()}
        yield Draws(end - begin, own, {g: s.sample(end - begin) for g, s in solved.items()})


def _laid_out(graph: FactorGraph, site: ObservedSite, rows: Tensor) -> Tensor:
    """Rows as the site's values. # (*leading, *batch, *event)

    Args:
        graph: The factor graph.
        site: The site.
        rows: # (*leading, rows, D)
    """
    shape = (*batch_of(graph, site.own), *event_shape(site.of))
    dtype = site.of.value.dtype
    dtype = dtype if dtype.is_floating_point else graph.dtype
    return rows.reshape((*rows.shape[:-2], *shape)).to(dtype)


def _summary(
    names: list[str],
    known: Mapping[str, PredictedSite],
    sites: Mapping[str, ObservedSite],
    drawn: Mapping[str, Tensor],
    level: float,
    q: Posterior | None = None,
) -> Forecast:
    means, lower, upper, probs = {}, {}, {}, {}
    from_draws, means_from_draws = [], []
    tail = (1 - level) / 2
    for name in names:
        own = known.get(name)
        table = None
        if own is not None and q is not None:
            graph, site = q.graph, sites[name]
            if isinstance(own, OtherSite) and (table := own.probs()) is not None:
                shape = (*batch_of(graph, site.own), *event_shape(site.of), table.shape[-1])
                probs[name] = table.reshape(shape).to(graph.dtype)
                continue
            means[name] = _laid_out(graph, site, own.mean())
            if own.is_normal:
                lower[name] = _laid_out(graph, site, own.quantile(tail))
                upper[name] = _laid_out(graph, site, own.quantile(1 - tail))
                continue
        elif q is not None and f"{name}_unobserved" in q.graph.latents:
            latent = q.graph.latents[f"{name}_unobserved"]
            table = q.probs(name)
            if q.graph.group_of(latent.name)[0].distribution == "Categorical":
                probs[name] = table
                continue
            means[name] = torch.tensordot(table, latent.support.to(table.dtype), 1)
        else:
            means[name] = drawn[name].to(torch.float64).mean(0).to(_floating(drawn[name]))
            means_from_draws.append(name)
        from_draws.append(name)
        sample = drawn[name].to(torch.float64)
        for end, p in ((lower, tail), (upper, 1 - tail)):
            end[name] = sample.quantile(p, 0, interpolation="nearest").to(_floating(drawn[name]))
    return Forecast(
        Values(means),
        Values(lower),
        Values(upper),
        Values({n: drawn[n] for n in names}),
        Values(probs),
        level,
        tuple(from_draws),
        tuple(means_from_draws),
    )


def _floating(t: Tensor) -> torch.dtype:
    return t.dtype if t.is_floating_point() else torch.get_default_dtype()
