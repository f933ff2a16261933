"""Every shipped record passes the conformance suite; a wrong one does not."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyro_em import Family, Kind, Rule, UsageError, register_family
from pyro_em.families import _REGISTRY, family_of
from pyro_em.testing import check_family

P = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
H = torch.tensor([0.3, 0.8])
LOC = torch.tensor([[0.0, 1.0], [3.0, -1.0]])
COV = torch.tensor([[[1.0, 0.3], [0.3, 0.5]], [[2.0, -0.4], [-0.4, 1.0]]])

CASES = {
    "Categorical": (dist.Categorical, {"probs": P}),
    "Categorical logits": (dist.Categorical, {"logits": P.log()}),
    "OneHotCategorical": (dist.OneHotCategorical, {"probs": P}),
    "OneHotCategorical logits": (dist.OneHotCategorical, {"logits": P.log() + 1}),
    "Multinomial": (dist.Multinomial, {"probs": P, "total_count": torch.tensor([5, 5])}),
    "Bernoulli": (dist.Bernoulli, {"probs": H}),
    "Bernoulli logits": (dist.Bernoulli, {"logits": torch.logit(H)}),
    "Binomial": (dist.Binomial, {"probs": H, "total_count": torch.tensor([7.0, 7.0])}),
    "Binomial logits": (
        dist.Binomial,
        {"logits": torch.logit(H), "total_count": torch.tensor([7.0, 7.0])},
    ),
    "Geometric": (dist.Geometric, {"probs": H}),
    "Geometric logits": (dist.Geometric, {"logits": torch.logit(H)}),
    "Poisson": (dist.Poisson, {"rate": torch.tensor([1.5, 6.0])}),
    "Exponential": (dist.Exponential, {"rate": torch.tensor([0.5, 2.0])}),
    "Normal": (dist.Normal, {"loc": torch.tensor([0.0, 100.0]), "scale": torch.tensor([1.0, 3.0])}),
    "LogNormal": (dist.LogNormal, {"loc": torch.tensor([0.0, 1.0]), "scale": H}),
    "Laplace": (dist.Laplace, {"loc": torch.tensor([0.0, 5.0]), "scale": H}),
    "MultivariateNormal": (dist.MultivariateNormal, {"loc": LOC, "covariance_matrix": COV}),
    "MultivariateNormal tril": (
        dist.MultivariateNormal,
        {"loc": LOC, "scale_tril": torch.linalg.cholesky(COV)},
    ),
    "MultivariateNormal precision": (
        dist.MultivariateNormal,
        {"loc": LOC, "precision_matrix": torch.linalg.inv(COV)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_shipped_family(case: str) -> None:
    cls, arguments = CASES[case]
    family = _REGISTRY[cls]
    check_family(family, {n: a.to(torch.float64) for n, a in arguments.items()})


def test_every_shipped_record_has_a_case() -> None:
    shipped = {c for c, f in _REGISTRY.items() if c.__module__.startswith("pyro.") and f.rules}
    shipped -= {dist.HalfNormal}
    assert shipped == {cls for cls, _ in CASES.values()}


def test_a_wrong_record_is_caught() -> None:
    wrong = Family(
        dist.HalfNormal,
        statistics=lambda x, a: {"square": x * x},
        rules={"scale": Rule(Kind.SCALE, lambda s, a: (2 * s["square"], s["weight"]))},
    )
    before = dict(_REGISTRY)
    try:
        register_family(wrong, replace=True)
        with pytest.raises(AssertionError, match="gradient of the expected log joint in 'scale'"):
            check_family(wrong, {"scale": torch.tensor([1.0, 2.0])})
        right = Family(
            dist.HalfNormal,
            statistics=lambda x, a: {"square": x * x},
            rules={"scale": Rule(Kind.SCALE, lambda s, a: (s["square"], s["weight"]))},
        )
        with pytest.raises(UsageError, match="has a record already"):
            register_family(right)
        check_family(register_family(right, replace=True), {"scale": torch.tensor([1.0, 2.0])})
    finally:
        _REGISTRY.clear()
        _REGISTRY.update(before)


def test_lookup_is_by_exact_type() -> None:
    assert family_of(dist.Chi2(3.0)) is None
    assert family_of(dist.Normal(torch.zeros(3), 1.0).to_event(1)) is _REGISTRY[dist.Normal]
    masked = dist.Normal(torch.zeros(3), 1.0).mask(torch.tensor([True, False, True]))
    assert family_of(masked) is _REGISTRY[dist.Normal]
    with pytest.raises(UsageError, match="Family record was expected"):
        register_family(dist.Normal)
