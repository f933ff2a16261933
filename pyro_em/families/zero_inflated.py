"""ZeroInflatedPoisson and ZeroInflatedNegativeBinomial: counts with more zeros, in one linear form.

    log p(0) = log(g + (1 − g) p₀(0)),    log p(x) = log(1 − g) + log p₀(x) for x > 0

with the gate g and the density p₀ of the counts. Where log p₀ is linear in statistics that are zero at
zero, and 1{x > 0} is one of them, so is log p: sums over the data say how many counts are above zero,
and what these say of p₀. No latent is needed for where a zero comes from, and Newton's method finds the
gate and the counts' own parameters together. In predictors ζ of their arguments and γ = logit g,

    ∂ log p(0) = ρ ∂ log p₀(0),    ∂/∂γ log p(0) = 1 − ρ − g,    ρ = (1 − g) p₀(0) / p(0)

where ρ is the probability that a zero is one of the counts.

Source: Lambert (1992), "Zero-inflated Poisson regression, with an application to defects in
manufacturing", Technometrics 34; Zeileis, Kleiber and Jackman (2008), "Regression models for count data
in R", Journal of Statistical Software 27.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_em.families import overdispersed, rates
from pyro_em.families.family import Arguments, Family, NaturalForm, Statistics
from pyro_em.families.predicted import NEGATIVE_BINOMIAL, Bend, Data, PredictedForm
from pyro_em.families.predictor_forms import POISSON

_FAR = -30.0  # nats, below which zeros of the counts are nothing beside those of the gate

_GATES = ("gate", "gate_logits")

Density = Callable[[Tensor, Arguments], Tensor]


def _poisson_statistics(x: Tensor, a: Arguments) -> Statistics:
    x = x.to(torch.float64)
    return {"feature": torch.stack([(x > 0).to(x), x, (x + 1).lgamma()], -1)}


def _poisson_coefficients(a: Arguments, P: int) -> Tensor:
    rate = a["rate"]
    return torch.stack([torch.zeros_like(rate), rate.log(), -torch.ones_like(rate), -rate], -1)


def _poisson_derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
    inverse = a["rate"].reciprocal()
    first = s["feature"][..., 1] * inverse
    slope = (first - s["weight"]).unsqueeze(-1)
    return slope, (-first * inverse).unsqueeze(-1).unsqueeze(-1)


_POISSON = NaturalForm(("rate",), _poisson_coefficients, _poisson_derivatives, shapes=("rate",))
"""A Poisson by statistics that are zero at zero: 1{x > 0}, x and log x!."""


def _log_density(counts: Family) -> Density:
    of_counts = counts.log_density
    assert of_counts is not None

    def density(x: Tensor, a: Arguments) -> Tensor:
        if "gate" not in a:
            closed, opened = logsigmoid(a["gate_logits"]), logsigmoid(-a["gate_logits"])
            own = opened + of_counts(x, a)
            return torch.where(x == 0, torch.logaddexp(closed.expand_as(own), own), own)
        own = (-a["gate"]).log1p() + of_counts(x, a)
        return torch.where(x == 0, _with_gate(a["gate"], own), own)

    return density


def _with_gate(gate: Tensor, own: Tensor) -> Tensor:
    """log(g + p) of p = (1 − g) p₀(0) by its logarithm, with a derivative where g is zero."""
    is_near = own > _FAR
    near = torch.where(is_near, own, 0.0)
    is_open = gate > 0
    far = torch.where(is_open, torch.where(is_open & ~is_near, gate, 1.0).log(), -torch.inf)
    return torch.where(
        is_near, near + (gate * (-near).exp()).log1p(), torch.logaddexp(far, own.expand_as(far))
    )


def _log_gate(a: Arguments) -> tuple[Tensor, Tensor]:
    """log g and log(1 − g)."""
    if "gate" in a:
        return a["gate"].log(), (-a["gate"]).log1p()
    return logsigmoid(a["gate_logits"]), logsigmoid(-a["gate_logits"])


def _natural(counts: NaturalForm) -> NaturalForm:
    """The linear form with a gate; the counts' first statistic is 1{x > 0}, all are zero at zero."""

    def coefficients(a: Arguments, P: int) -> Tensor:
        own = counts.coefficients
        assert own is not None
        found = own(a, P)
        log_g, log_open = _log_gate(a)
        log_g, log_open, constant = torch.broadcast_tensors(log_g, log_open, found[..., -1])
        at_zero = torch.logaddexp(log_g, log_open + constant).unsqueeze(-1)
        features = found[..., :-1].expand(*constant.shape, P)
        if P:
            more = (log_open + constant).unsqueeze(-1) - at_zero
            features = torch.cat([features[..., :1] + more, features[..., 1:]], -1)
        return torch.cat([features, at_zero], -1)

    def derivatives(s: Statistics, a: Arguments) -> tuple[Tensor, Tensor]:
        of_counts = counts.derivatives
        assert of_counts is not None and counts.coefficients is not None
        feature, name = s["feature"], "gate" if "gate" in a else "gate_logits"
        above = feature[..., 0] if feature.shape[-1] else torch.zeros_like(s["weight"])
        zeros = s["weight"] - above
        own = {n: t for n, t in a.items() if n not in _GATES}
        slope, curve = of_counts({"feature": feature, "weight": above}, own)
        zero = {"feature": torch.zeros_like(feature), "weight": torch.ones_like(above)}
        slope_at_zero, curve_at_zero = of_counts(zero, own)
        log_p = counts.coefficients(own, 0)[..., -1]
        log_g, log_open = _log_gate(a)
        at_zero = torch.logaddexp(log_g, log_open + log_p)
        share = (log_open + log_p - at_zero).exp()  # ρ
        rest = (log_g - at_zero).exp()  # 1 − ρ
        slope = slope + (zeros * share).unsqueeze(-1) * slope_at_zero
        outer = slope_at_zero.unsqueeze(-1) * slope_at_zero.unsqueeze(-2)
        curve = curve + _wide(zeros * share) * (curve_at_zero + _wide(rest) * outer)
        if name == "gate":
            q = 1 - a["gate"]
            lifted = -log_p.expm1() * (-at_zero).exp()  # of log p(0) in g
            own_slope = zeros * lifted - above / q
            own_curve = -zeros * lifted.square() - above / q.square()
            mixed = -zeros * (log_p - 2 * at_zero).exp()
        else:
            g = log_g.exp()
            own_slope = zeros * rest - s["weight"] * g
            own_curve = zeros * share * rest - s["weight"] * g * log_open.exp()
            mixed = -zeros * share * rest
        across = mixed.unsqueeze(-1) * slope_at_zero
        own_slope, own_curve = own_slope.unsqueeze(-1), own_curve.unsqueeze(-1)
        batch = torch.broadcast_shapes(own_slope.shape[:-1], slope.shape[:-1], across.shape[:-1])
        A = slope.shape[-1]
        top = torch.cat([curve.expand(*batch, A, A), across.expand(*batch, A).unsqueeze(-1)], -1)
        bottom = torch.cat([across.expand(*batch, A), own_curve.expand(*batch, 1)], -1)
        return (
            torch.cat([slope.expand(*batch, A), own_slope.expand(*batch, 1)], -1),
            torch.cat([top, bottom.unsqueeze(-2)], -2),
        )

    return NaturalForm(
        (*counts.arguments, *_GATES),
        coefficients,
        derivatives,
        of_counts=counts.of_counts,
        base=counts.base,
        shapes=counts.shapes,
        limit=counts.limit,
    )


def _wide(t: Tensor) -> Tensor:
    return t.unsqueeze(-1).unsqueeze(-1)


def _predicted(counts: PredictedForm) -> PredictedForm:
    """The density with a gate in predictors of all arguments; the gate's own is its logit."""

    def at(data: Data, at: Mapping[str, Tensor]) -> Bend:
        gate = next(n for n in at if n in _GATES)
        found = counts.at(data, {n: t for n, t in at.items() if n != gate})
        logit, is_zero = at[gate], data[0] == 0
        log_g, log_open = logsigmoid(logit), logsigmoid(-logit)
        own = log_open + found.value
        at_zero = torch.logaddexp(log_g.expand_as(own), own)
        share = torch.where(is_zero, (own - at_zero).exp(), 1.0)  # ρ
        rest = torch.where(is_zero, (log_g - at_zero).exp(), 0.0)
        both, g = share * rest, log_g.exp()
        slope = {n: share * t for n, t in found.slope.items()}
        curvature = {
            (m, n): share * t - both * found.slope[m] * found.slope[n]
            for (m, n), t in found.curvature.items()
        }
        curvature |= {(n, gate): both * t for n, t in found.slope.items()}
        curvature[gate, gate] = g * log_open.exp() - both
        return Bend(torch.where(is_zero, at_zero, own), {**slope, gate: rest - g}, curvature)

    links = {**counts.links, "gate": "sigmoid", "gate_logits": ""}
    return PredictedForm(counts.data, links, at, counts.shape, counts.limit)


def _family(
    distribution: type,
    counts: Family,
    natural: NaturalForm,
    predicted: PredictedForm,
    statistics: Callable[[Tensor, Arguments], Statistics] | None = None,
) -> Family:
    return Family(
        distribution,
        statistics or counts.statistics,
        {},
        log_density=_log_density(counts),
        accumulate=None if statistics else counts.accumulate,
        natural=_natural(natural),
        predicted=_predicted(predicted),
    )


def _counted(module_families: tuple[Family, ...], distribution: type) -> Family:
    return next(f for f in module_families if f.distribution is distribution)


_NEGATIVE_BINOMIAL = _counted(overdispersed.FAMILIES, dist.NegativeBinomial)
assert _NEGATIVE_BINOMIAL.natural is not None

FAMILIES = (
    _family(
        dist.ZeroInflatedPoisson,
        _counted(rates.FAMILIES, dist.Poisson),
        _POISSON,
        POISSON,
        _poisson_statistics,
    ),
    _family(
        dist.ZeroInflatedNegativeBinomial,
        _NEGATIVE_BINOMIAL,
        _NEGATIVE_BINOMIAL.natural,
        NEGATIVE_BINOMIAL,
    ),
)
