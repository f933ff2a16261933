"""Log densities in predictors of all arguments, for parameters that sites of several kinds share.

    Normal        −log σ − ½ ((x − μ) / σ)²                    μ, log σ
    Poisson       x ζ − exp ζ                                  ζ = log λ
    Exponential   ζ − x exp ζ                                  ζ = log λ
    Binomial      x ζ − n log(1 + exp ζ)                       ζ = logit p

each up to a term of the data alone; LogNormal is a Normal of log x, Bernoulli and Geometric are a
Binomial of one trial and of x + 1. A parameter that is a mean here and a rate there has no closed form,
and no sums of one form: Newton's method on all of them together goes to the joint maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_em.families.family import Family
from pyro_em.families.predicted import Bend, Data, PredictedForm


def _normal(data: Data, at: Mapping[str, Tensor]) -> Bend:
    (x,) = data
    log_scale = at["scale"]
    precision = (-2 * log_scale).exp()
    away = x - at["loc"]
    square = away * away * precision
    return Bend(
        -log_scale - 0.5 * square,
        {"loc": away * precision, "scale": square - 1},
        {
            ("loc", "loc"): precision,
            ("loc", "scale"): 2 * away * precision,
            ("scale", "scale"): 2 * square,
        },
    )


def _poisson(data: Data, at: Mapping[str, Tensor]) -> Bend:
    (x,), zeta = data, at["rate"]
    mean = zeta.exp()
    return Bend(x * zeta - mean, {"rate": x - mean}, {("rate", "rate"): mean})


def _exponential(data: Data, at: Mapping[str, Tensor]) -> Bend:
    (x,), zeta = data, at["rate"]
    mean = x * zeta.exp()
    return Bend(zeta - mean, {"rate": 1 - mean}, {("rate", "rate"): mean})


def _trials(
    count: Callable[[Data, Mapping[str, Tensor]], tuple[Tensor, Tensor]],
) -> Callable[[Data, Mapping[str, Tensor]], Bend]:
    """That of x successes among n; ``count`` says how many."""

    def bend(data: Data, at: Mapping[str, Tensor]) -> Bend:
        x, n = count(data, at)
        name = "logits" if "logits" in at else "probs"
        zeta = at[name]
        p = zeta.sigmoid()
        return Bend(
            x * zeta - n * softplus(zeta),
            {name: x - n * p},
            {(name, name): n * p * (-zeta).sigmoid()},
        )

    return bend


_ODDS = {"logits": "", "probs": "sigmoid"}
_SPREAD = {"loc": "", "scale": "exp"}
_ABOUT = ("scale", "loc")

POISSON = PredictedForm(lambda x: (x,), {"rate": "exp"}, _poisson)

_FORMS = {
    "Normal": PredictedForm(lambda x: (x,), _SPREAD, _normal, "scale", spread=_ABOUT),
    "LogNormal": PredictedForm(lambda x: (x.log(),), _SPREAD, _normal, "scale", spread=_ABOUT),
    "Poisson": POISSON,
    "Exponential": PredictedForm(lambda x: (x,), {"rate": "exp"}, _exponential),
    "Bernoulli": PredictedForm(
        lambda x: (x,), _ODDS, _trials(lambda d, at: (d[0], torch.ones_like(d[0])))
    ),
    "Geometric": PredictedForm(
        lambda x: (x,), _ODDS, _trials(lambda d, at: (torch.ones_like(d[0]), 1 + d[0]))
    ),
    "Binomial": PredictedForm(
        lambda x: (x,), _ODDS, _trials(lambda d, at: (d[0], at["total_count"]))
    ),
}


def predicted_form_of(family: Family) -> PredictedForm | None:
    """The density of a family in predictors of all its arguments; None where it is not known."""
    return family.predicted or _FORMS.get(family.name)
