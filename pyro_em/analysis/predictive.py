"""Predictions: latents from their posterior, observations drawn anew or kept where observed.

p(x_new | x) = E_{q(z | x)}[p(x_new | z)]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.globs import Values
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.answers.protocol import AnyPosterior
from pyro_em.tracing.many_draws import ManyDraws
from pyro_em.tracing.randomness import seeded


def predictive_draws(
    model: Callable[..., Any],
    q: AnyPosterior,
    args: tuple,
    kwargs: dict[str, Any],
    num_samples: int,
    seed: int | None,
    keep_observed: bool,
) -> Values:
    """Draws of all sites; see `ExactPosteriorEM.predictive`.

    Args:
        model: The model, at its point estimates where it has any.
        q: The posterior of its latents.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        num_samples: Number of draws.
        seed: Seed of the draws.
        keep_observed: Whether observed values stay as they are.
    """
    if num_samples < 1:
        raise UsageError(
            message(
                "predictive",
                f"num_samples={num_samples} is no number of draws.",
                fixes=["pass a whole number from 1"],
            )
        )
    with seeded(seed):
        latents = _for_model(q.sample(num_samples), q)
        nesting = q.graph.structure.max_plate_nesting if isinstance(q, Posterior) else 0
        run = ManyDraws(model, args, kwargs, keep_observed, nesting)
        if isinstance(q, Posterior) and not q.graph.structure.random_plates:
            together = run.of(latents, num_samples)
            if together is not None:
                return Values(under_user_names(together))
        draws = []
        for i in range(num_samples):
            sites = run.one({n: v[i] for n, v in latents.items()})
            draws.append(under_user_names({n: s["value"] for n, s in sites.items()}))
    shared = [n for n in draws[0] if all(n in d for d in draws)]
    return Values({n: torch.stack([d[n] for d in draws]) for n in shared})


def _for_model(values: Mapping[str, Tensor], q: AnyPosterior) -> dict[str, Tensor]:
    """Values of ``obs_mask`` sites belong to their unobserved part."""
    pairs = q.graph.structure.masked_pairs if isinstance(q, Posterior) else {}
    return {f"{n}_unobserved" if n in pairs else n: v for n, v in values.items()}


def under_user_names(sites: Mapping[str, Any]) -> dict[str, Tensor]:
    """Values by site; an ``obs_mask`` site appears once, under its own name."""
    out: dict[str, Tensor] = {}
    for name, value in sites.items():
        stem = name.removesuffix("_observed").removesuffix("_unobserved")
        paired = f"{stem}_observed" in sites and f"{stem}_unobserved" in sites
        if paired and name != stem:
            continue  # the model's own deterministic site holds both
        if isinstance(value, Tensor):
            out[name] = value.detach()
    return out
