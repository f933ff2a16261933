"""The importance-weighted bound on the log evidence, and whether its weights can be trusted.

    log p(x) ≥ E[ log (1/S) Σ_s w_s ],   w_s = p(x, z_s) / q(z_s),   z_s ~ q,

per element of the data plate where every draw is local to it. With q the posterior each weight is
p(x): a constant weight is what "the bound is tight" means. With q the prior, w = p(x | z) is spread
over many orders of magnitude, which is why nobody maximises the evidence that way.

The effective sample size is (Σ w)² / Σ w². Pareto k̂ is the shape of the generalised Pareto
distribution fitted to the largest weights: above 0.7 the estimate is not to be trusted at any
practical number of draws.

Source: Burda, Grosse and Salakhutdinov (2016); Vehtari, Simpson, Gelman, Yao and Gabry (2024),
"Pareto smoothed importance sampling"; Zhang and Stephens (2009) for the fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.plan.planner import Planner
from pyro_em.plan.program import Program
from pyro_em.plan.wishes import check_draws
from pyro_em.portable import Portable
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.tracing.draws import drawn_run
from pyro_em.tracing.given import without_values
from pyro_em.tracing.runs import Model
from pyro_em.tracing.sites import Role
from pyro_em.variational.bound import Variational
from pyro_em.variational.particle import LogWeights, Particle, Term, dims_of, log_weights

_FEWEST = 25  # draws for a Pareto k̂


@dataclass(frozen=True, eq=False)
class EvidenceEstimate(Portable):
    """An importance-weighted bound on the log evidence, all in nats.

    Attributes:
        value: The importance-weighted bound; below the log evidence on average.
        standard_error: Of ``value``, by the delta method; None with one draw, unless it is of the
            exact posterior, whose weights are constant.
        effective_sample_size: The smallest over the elements of the data plate.
        pareto_k: The largest over the elements; nan with fewer than 25 draws.
        num_particles: Draws.
        proposal: ``"guide"``, ``"prior"`` or ``"posterior"``.
        pointwise: The bound per element of the data plate, where the draws are local to it.
        pointwise_pareto_k: Pareto k̂ per element.
        log_weights: log w. # (S,) or (S, N)
    """

    value: float
    standard_error: float | None
    effective_sample_size: float
    pareto_k: float
    num_particles: int
    proposal: str
    pointwise: Tensor | None = field(default=None, repr=False)
    pointwise_pareto_k: Tensor | None = field(default=None, repr=False)
    log_weights: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)

    @property
    def is_reliable(self) -> bool:
        """Whether Pareto k̂ is at most 0.7."""
        return self.pareto_k <= 0.7

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        known = "" if self.standard_error is None else f" ± {self.standard_error:.3g}"
        draws = f"{self.num_particles} draw{'s' * (self.num_particles > 1)}"
        head = f"importance-weighted bound {self.value:.6f}{known} nats from {draws} of the "
        head += self.proposal
        if self.standard_error is None:
            return (
                f"{head}\none draw: estimate_evidence(..., num_particles=n) gives a standard error"
            )
        size = f"effective sample size {self.effective_sample_size:.1f}"
        if math.isnan(self.pareto_k):
            return f"{head}\n{size}; Pareto k̂ needs {_FEWEST} draws"
        rows = self.pointwise_pareto_k
        if rows is None or len(rows) < 2:
            trust = " (above 0.7: not to be trusted)" if self.pareto_k > 0.7 else ""
            return f"{head}\n{size}, Pareto k̂ {self.pareto_k:.2f}{trust}"
        share = float((rows <= 0.7).double().mean())
        return (
            f"{head}\nPareto k̂ at most 0.7 (to be trusted) in {share:.0%} of {len(rows)} rows; in "
            f"the worst row {self.pareto_k:.2f}, {size}"
        )


def estimate_from(weights: LogWeights, proposal: str) -> EvidenceEstimate:
    """Summarise log weights.

    Args:
        weights: One column per row of data, or one number per draw.
        proposal: Where the draws came from.

    Example:
        >>> one = torch.tensor(1.0)
        >>> e = estimate_from(LogWeights(torch.full((100,), -2.0), one, 0 * one), "posterior")
        >>> e.value, round(e.effective_sample_size), e.pareto_k
        (-2.0, 100, -inf)
    """
    columns = weights.values.to(torch.float64).reshape(len(weights.values), -1)
    scale = weights.scale.reshape(-1).to(columns)
    size = len(columns)
    bound = scale * (torch.logsumexp(columns, 0) - math.log(size))
    normalised = (columns - torch.logsumexp(columns, 0)).exp()
    ess = 1 / normalised.square().sum(0)
    variance = scale**2 * (normalised.square().sum(0) - 1 / size).clamp(min=0)
    error = float(torch.where(variance > 1e-12, variance, 0.0).sum().sqrt())
    k = [pareto_k(columns[:, j]) for j in range(columns.shape[1])]
    is_rows = weights.values.dim() > 1
    return EvidenceEstimate(
        value=float(bound.sum() + weights.outside.to(bound)),
        standard_error=None if size == 1 and proposal != "posterior" else error,
        effective_sample_size=float(ess.min()),
        pareto_k=max(k),
        num_particles=size,
        proposal=proposal,
        pointwise=bound if is_rows else None,
        pointwise_pareto_k=torch.tensor(k).to(bound.device) if is_rows else None,
        log_weights=weights.values,
    )


def pareto_k(log_weights: Tensor) -> float:
    """The shape of a generalised Pareto distribution fitted to the tail of some weights.

    Args:
        log_weights: In nats, unnormalised. # (S,)

    Returns:
        k̂; −inf where all weights are equal, nan with fewer than 25 of them.
    """
    size = len(log_weights)
    if size < _FEWEST:
        return math.nan
    sorted_weights = log_weights.to(torch.float64).sort().values
    if float(sorted_weights[-1] - sorted_weights[0]) < 1e-9:
        return -math.inf
    tail = min(int(0.2 * size), int(3 * math.sqrt(size)))
    cut = sorted_weights[-tail - 1]
    excess = (sorted_weights[-tail:] - sorted_weights[-1]).exp() - (cut - sorted_weights[-1]).exp()
    excess = excess[excess > 0]
    if len(excess) == 0:  # the largest weights are equal: a bounded tail
        return -math.inf
    if len(excess) < 5:
        return math.inf
    return _shape(excess)


def _shape(excess: Tensor) -> float:
    """Zhang and Stephens' estimate, with the weakly informative prior of PSIS (10 draws at 0.5)."""
    n = len(excess)
    m = 30 + int(math.sqrt(n))
    quartile = excess[max(int(n / 4 + 0.5) - 1, 0)]
    steps = torch.arange(1, m + 1, dtype=torch.float64, device=excess.device)
    b = 1 / excess[-1] + (1 - (m / (steps - 0.5)).sqrt()) / (3 * quartile)
    k = torch.log1p(-b.unsqueeze(-1) * excess).mean(-1)
    profile = n * ((-b / k).log() - k - 1)
    weights = torch.softmax(torch.nan_to_num(profile, nan=-math.inf), 0)
    mean = (b * weights).sum()
    shape = float(torch.log1p(-mean * excess).mean())
    return (shape * n + 0.5 * 10) / (n + 10)


def estimate_evidence(
    planner: Planner,
    found: Program | Variational,
    args: tuple,
    kwargs: dict[str, Any],
    num_particles: int,
    proposal: str | None,
) -> EvidenceEstimate:
    """The importance-weighted bound; see `ExactPosteriorEM.estimate_evidence`.

    Args:
        planner: What the user asked for.
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
        draw = _Prior(planner, found, args, kwargs)
    elif proposal == "guide":
        variational = (
            found if isinstance(found, Variational) else planner.all_from_guide(args, kwargs)
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
        program = found if isinstance(found, Program) else None
        if isinstance(found, Variational):
            program = planner.exact_beside(found, args, kwargs, summed_only=True)
        if program is None:
            raise UsageError(
                message(
                    "estimate_evidence",
                    "proposal='posterior' was asked for, but the model has no exact posterior here.",
                    "the guide draws a continuous latent, or the enumeration is past max_enumeration",
                    ["use proposal='guide'", "leave strategy='guide' out where it was given"],
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
        planner: Planner,
        found: Program | Variational,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> None:
        self.args, self.kwargs = args, kwargs
        if isinstance(found, Variational):
            structure, points = found.bare, set(found.routing.points)
            self.model: Model = found.point_model()
        else:
            structure, points = found.structure, set()
            self.model = without_values(found.model)
        self.plate = structure.data_plate
        latents = [n for n in structure.latents if n not in points]
        latents += [n for n, s in structure.sites.items() if s.role is Role.GAUSSIAN]
        self.is_local = structure.are_local(latents)

    def __call__(self) -> Particle:
        drawn = drawn_run(self.model, self.args, self.kwargs)
        terms = []
        for name, log_p in drawn.log_probs(Role.DATA).items():
            site = drawn.sites[name]
            terms.append(Term(name, Role.DATA, dims_of(site, log_p), log_p, site["scale"]))
        return Particle(tuple(terms), {}, {})


def _from_posterior(q: Posterior, num_particles: int) -> EvidenceEstimate:
    """At every draw z the weight p(x, z) / p(z | x) is p(x): a constant."""
    assert q.log_evidence is not None
    total = torch.tensor(q.log_evidence, dtype=torch.float64)
    row = total if q.pointwise is None else q.pointwise.to(torch.float64)
    outside = torch.zeros_like(total) if q.pointwise is None else total.to(row) - row.sum()
    constant = row.expand(num_particles, *row.shape)
    return estimate_from(LogWeights(constant, torch.ones_like(row), outside), "posterior")
