"""Draws for the importance-weighted bound: from the guide, the prior or the exact posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em import _pyro
from pyro_em._errors import UsageError, message
from pyro_em._pyro import Role
from pyro_em.importance import EvidenceEstimate, estimate_from
from pyro_em.looking import Looker
from pyro_em.posterior import Posterior
from pyro_em.program import Program
from pyro_em.structure import Structure, frames_of
from pyro_em.variational import Particle, Term, Variational, data_plate


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
    if num_particles < 1:
        raise UsageError(
            message("estimate_evidence", f"num_particles={num_particles} is no number of draws.")
        )
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
    return _summarised(particles, draw.plate, draw.is_local, proposal)


def _summarised(
    particles: list[Particle], plate: str | None, is_local: bool, proposal: str
) -> EvidenceEstimate:
    if plate is not None and is_local:
        parts = [p.along(plate) for p in particles]
        inside = [i for i, _ in parts if i is not None]
        if len(inside) == len(parts):
            outside = torch.stack([o for _, o in parts])
            if bool((outside == outside[0]).all()):
                return estimate_from(torch.stack(inside), proposal, outside[0])
    return estimate_from(torch.stack([p.bound for p in particles]), proposal)


class _Guide:
    """Draws from the guide; latents that are summed exactly stay so."""

    def __init__(self, variational: Variational, args: tuple, kwargs: dict[str, Any]) -> None:
        # Weights need draws: nothing is enumerated under the guide.
        self.variational = variational.with_draws_only()
        self.args, self.kwargs = args, kwargs
        self.plate = variational.data_plate
        self.is_local = _are_local(
            variational.bare, (*variational.routing.drawn, *variational.routing.exact), self.plate
        )

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
        self.plate = data_plate(structure)
        latents = tuple(n for n in structure.latents if n not in points)
        self.is_local = _are_local(structure, latents, self.plate)

    def __call__(self) -> Particle:
        sites = _pyro.drawn_run(self.model, self.args, self.kwargs).sites
        terms = tuple(
            Term(name, Role.DATA, _dims(site), site["log_prob"])
            for name, site in sites.items()
            if _pyro.is_factor(site) and _pyro.role_of(site) is Role.DATA
        )
        return Particle(terms, {}, {})


def _from_posterior(q: Posterior, num_particles: int) -> EvidenceEstimate:
    """At every draw z the weight p(x, z) / p(z | x) is p(x): a constant."""
    assert q.log_evidence is not None
    row = q.pointwise if q.pointwise is not None else torch.tensor(q.log_evidence)
    outside = None if q.pointwise is None else torch.tensor(q.log_evidence) - row.sum()
    return estimate_from(row.expand(num_particles, *row.shape), "posterior", outside)


def _are_local(structure: Structure, latents: tuple[str, ...], plate: str | None) -> bool:
    """Whether every latent is drawn anew for each element of the data plate."""
    return plate is not None and all(
        plate in structure.sites[n].plates for n in latents if n in structure.sites
    )


def _dims(site: Mapping[str, Any]) -> tuple[str, ...]:
    by_dim = {f.dim: name for name, f in frames_of(site).items()}
    value: Tensor = site["log_prob"]
    return tuple(by_dim.get(d, "") for d in range(-value.dim(), 0))
