"""Draws for the importance-weighted bound: from the guide, the prior or the exact posterior."""

from __future__ import annotations

from typing import Any

import torch

from pyro_em import _pyro
from pyro_em._errors import UsageError, message
from pyro_em._pyro import Role
from pyro_em.arguments import check_draws
from pyro_em.importance import EvidenceEstimate, estimate_from
from pyro_em.looking import Looker
from pyro_em.particle import LogWeights, Particle, Term, log_weights
from pyro_em.posterior import Posterior
from pyro_em.program import Program
from pyro_em.variational import Variational, dims_of


def estimate_evidence(
    looker: Looker,
    found: Program | Variational,
    args: tuple,
    kwargs: dict[str, Any],
    num_particles: int,
    proposal: str | None,
) -> EvidenceEstimate:
    """The importance-weighted bound; see `ExactPosteriorEM.estimate_evidence`.

    Args:
        looker: What the user asked for.
        found: What a look at the model found.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        num_particles: Draws.
        proposal: ``"guide"``, ``"prior"``, ``"posterior"`` or None.

    Raises:
        UsageError: If there is no such proposal for this model.
    """
    check_draws(num_particles, "estimate_evidence")
    drawn = isinstance(found, Variational)
    proposal = proposal or ("guide" if drawn else "posterior")
    if proposal not in ("guide", "prior", "posterior"):
        raise UsageError(
            message(
                "estimate_evidence",
                f"proposal={proposal!r} is not known.",
                fixes=["use 'guide', 'prior' or 'posterior'"],
            )
        )
    draw: _Prior | _Guide
    if proposal == "prior":
        draw = _Prior(looker, found, args, kwargs)
    elif proposal == "guide":
        variational = (
            found if isinstance(found, Variational) else looker.all_from_guide(args, kwargs)
        )
        if variational is None:
            raise UsageError(
                message(
                    "estimate_evidence",
                    "proposal='guide' was asked for, but no guide covers the latents.",
                    fixes=["pass guide= to ExactPosteriorEM", "use proposal='posterior'"],
                )
            )
        draw = _Guide(variational, args, kwargs)
    else:
        program = found if isinstance(found, Program) else looker.exact_beside(found, args, kwargs)
        if program is None:
            raise UsageError(
                message(
                    "estimate_evidence",
                    "proposal='posterior' was asked for, but the model has no exact posterior.",
                    "some latent is continuous, or the enumeration is past max_enumeration",
                    ["use proposal='guide'"],
                )
            )
        return _from_posterior(program.posterior(), num_particles)
    with torch.no_grad():
        particles = [draw() for _ in range(num_particles)]
        weights = log_weights(particles, draw.plate, draw.is_local)
    return estimate_from(weights, proposal)


class _Guide:
    """Draws from the guide; latents that are summed exactly stay so."""

    def __init__(self, variational: Variational, args: tuple, kwargs: dict[str, Any]) -> None:
        # Weights need draws: nothing is enumerated under the guide.
        self.variational = variational.with_draws_only()
        self.args, self.kwargs = args, kwargs
        self.plate = variational.bare.data_plate
        self.is_local = variational.draws_are_local

    def __call__(self) -> Particle:
        v = self.variational
        return v.particle(self.args, self.kwargs, analytic=False)


class _Prior:
    """Draws from the model itself: w = p(x | z)."""

    def __init__(
        self,
        looker: Looker,
        found: Program | Variational,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> None:
        self.args, self.kwargs = args, kwargs
        if isinstance(found, Variational):
            structure, points = found.bare, set(found.routing.points)
            self.model: _pyro.Model = found.point_model()
        else:
            structure, points = found.structure, set()
            self.model = found.model
        self.plate = structure.data_plate
        latents = tuple(n for n in structure.latents if n not in points)
        self.is_local = structure.are_local(latents)

    def __call__(self) -> Particle:
        sites = _pyro.drawn_run(self.model, self.args, self.kwargs).sites
        terms = tuple(
            Term(
                name,
                Role.DATA,
                dims_of(site, site["log_prob"]),
                site["log_prob"],
                site["scale"],
            )
            for name, site in sites.items()
            if _pyro.is_factor(site) and _pyro.role_of(site) is Role.DATA
        )
        return Particle(terms, {}, {})


def _from_posterior(q: Posterior, num_particles: int) -> EvidenceEstimate:
    """At every draw z the weight p(x, z) / p(z | x) is p(x): a constant."""
    assert q.log_evidence is not None
    total = torch.tensor(q.log_evidence, dtype=torch.float64)
    row = total if q.pointwise is None else q.pointwise.to(torch.float64)
    outside = torch.zeros_like(total) if q.pointwise is None else total.to(row) - row.sum()
    constant = row.expand(num_particles, *row.shape)
    return estimate_from(LogWeights(constant, torch.ones_like(row), outside), "posterior")
