"""Densities of large counts and shapes keep their digits; numbers of 60 digits by mpmath 1.3.0."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM
from pyro_em.errors import DataError
from pyro_em.families.registry import family_of, given_arguments
from pyro_em.families.saddle_point import excess


def T(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


LARGE = [
    (dist.Poisson(T(1.00001e9)), T(1e9), -11.330571118430378),
    (dist.Binomial(T(2e9), T(0.50001)), T(1e9), -11.333997861599265),
    (dist.Multinomial(2**31, T([0.2, 0.3, 0.5])), T([2e8, 3e8, 5e8]), -20.807863955473544),
    (dist.NegativeBinomial(T(2.5), T(1 - 2.0**-28)), T(1e9), -21.445377057775282),
    (dist.GammaPoisson(T(2.5), T(2.0**-28)), T(1e9), -21.44537705321072),
    (dist.Gamma(T(1e10), T(5e9)), T(2.00001), 9.7758351678732433),
    (dist.InverseGamma(T(1e10), T(2e10)), T(2.00001), 9.775835584536785),
    (dist.Beta(T(3e9), T(7e9)), T(0.300001), 11.350499407535063),
    (dist.Dirichlet(T([3e9, 7e9])), T([0.300001, 0.699999]), 11.350499407535063),
    (dist.BetaBinomial(T(1e10), T(2e10), 9), T(4.0), -1.5854927883617827),
    (dist.DirichletMultinomial(T([1e10, 2e10, 1e10]), 6), T([1.0, 3.0, 2.0]), -2.1439800629424071),
]


@pytest.mark.parametrize(("fn", "x", "exact"), LARGE, ids=lambda v: type(v).__name__)
def test_a_density_of_large_numbers(fn: dist.Distribution, x: Tensor, exact: float) -> None:
    family = family_of(fn)
    assert family is not None
    found = float(family.log_prob(x, given_arguments(fn, family)))
    # A simplex is rounded when it is written down: n = 1e10 times the last digit.
    assert found == pytest.approx(exact, abs=2e-6 if isinstance(fn, dist.Dirichlet) else 2e-9)


EXCESS = [
    (0.5, -1.4189385332046727),
    (3.0, -0.39731031455561624),
    (15.9, 0.45898062152766407),
    (16.1, 0.46529578423217604),
    (20.0, 0.57476128388032583),
    (30.0, 0.77888248269665225),
    (100.0, 1.382813229233738),
    (1e4, 3.6862233194500881),
]


def test_what_is_left_of_a_gamma_function_by_either_of_its_ways() -> None:
    """a log a − a − log Γ(a), as it stands below sixteen and by Stirling's series from there on."""
    a, exact = T(EXCESS).unbind(1)
    torch.testing.assert_close(excess(a), exact, rtol=1e-13, atol=1e-14)


def test_small_numbers_and_ends_of_the_compound_families() -> None:
    theirs = dist.BetaBinomial(T(0.4), T(3.0), 5)
    family = family_of(theirs)
    assert family is not None
    x = torch.arange(6.0)
    arguments = given_arguments(theirs, family)
    torch.testing.assert_close(family.log_prob(x, arguments), theirs.log_prob(x))
    assert family.log_prob(T(6.0), arguments) == -torch.inf
    counts = T([[0.0, 0.0, 0.0], [4.0, 0.0, 1.0]])
    several = dist.DirichletMultinomial(T([0.2, 1.0, 9.0]), 5)
    family = family_of(several)
    assert family is not None
    found = family.log_prob(counts, given_arguments(several, family))
    torch.testing.assert_close(found, several.log_prob(counts))


@pytest.mark.parametrize("gate", [{"gate": T(0.3)}, {"gate_logits": T(-0.8)}, {"gate": T(0.0)}])
def test_zero_inflated_counts_have_the_density_of_their_counts(gate: dict[str, Tensor]) -> None:
    x, rate = torch.arange(6.0).to(T(0.0)), T(1.7)
    poisson = dist.ZeroInflatedPoisson(rate, **gate)
    moderate = T(2.5), T(0.4)
    others = [
        dist.ZeroInflatedNegativeBinomial(moderate[0], probs=moderate[1], **gate),
        dist.ZeroInflatedNegativeBinomial(moderate[0], logits=moderate[1], **gate),
    ]
    for theirs in (poisson, *others):
        family = family_of(theirs)
        assert family is not None
        found = family.log_prob(x, given_arguments(theirs, family))
        torch.testing.assert_close(found, theirs.log_prob(x))
    large = T(
        1e12
    )  # counts that vary as a Poisson's: a difference of gamma functions is off by 1e-3
    limit = dist.ZeroInflatedNegativeBinomial(large, probs=rate / (large + rate), **gate)
    family = family_of(limit)
    assert family is not None
    found = family.log_prob(x, given_arguments(limit, family))
    torch.testing.assert_close(found, poisson.log_prob(x), rtol=1e-10, atol=1e-10)
    assert float((limit.log_prob(x) - poisson.log_prob(x)).abs().max()) > 1e-4


def _mixture(of: Callable[[Tensor], dist.Distribution]) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        w = pyro.param("w", T([0.4, 0.6]), constraint=constraints.simplex)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", of(z), obs=y)

    return model


def _positive(name: str, value: Tensor) -> Tensor:
    return pyro.param(name, value, constraint=constraints.positive)


def _poisson(z: Tensor) -> dist.Distribution:
    return dist.Poisson(_positive("rate", T([1e9, 1.0001e9]))[z])


def _poisson_regression(z: Tensor) -> dist.Distribution:
    x = torch.linspace(0, 1e-4, 6)
    level = pyro.param("level", T([1e9, 1.0001e9]).log())
    return dist.Poisson((level[z] + pyro.param("slope", T([0.5, -0.5]))[z] * x).exp())


def _gamma(z: Tensor) -> dist.Distribution:
    shape = _positive("shape", T([1e10, 2e10]))[z]
    return dist.Gamma(shape, shape / T([1e9, 1.00003e9])[z])


@pytest.mark.parametrize("of", [_poisson, _poisson_regression, _gamma])
def test_kernels_leave_large_numbers_to_densities_that_hold_them(
    of: Callable[[Tensor], dist.Distribution],
) -> None:
    y = (1e9 + 3e4 * T([0.0, -1.0, 1.0, 2.0, 3.0, 4.0])).round()
    em = ExactPosteriorEM(_mixture(of))
    for steps in (1, 4):
        result = em.fit(y, max_steps=steps, tol=0, progress=False)
        parts = []
        for k, w in enumerate(result.params["w"]):
            fn = of(torch.full((6,), k))
            family = family_of(fn)
            assert family is not None
            parts.append(family.log_prob(y, given_arguments(fn, family)) + w.log())
        exact = float(torch.stack(parts).logsumexp(0).sum().detach())
        assert result.log_evidence == pytest.approx(exact, abs=1e-9)
    path = [*result.history, result.log_evidence]
    assert min(b - a for a, b in pairwise(path)) > -1e-9 * abs(exact)


def test_counts_that_vary_less_than_a_binomial_do_not_climb_on_rounding() -> None:
    y = T([4.0, 5.0, 4.0, 5.0, 4.0, 4.0, 5.0, 5.0, 4.0, 5.0])

    def model(y: Tensor) -> None:
        one, zero = _positive("one", T(1.0)), _positive("zero", T(1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.BetaBinomial(one, zero, 9), obs=y)

    result = ExactPosteriorEM(model).fit(y, max_steps=1, progress=False)
    # At best it is a Binomial.
    best = float(dist.Binomial(9, y.mean() / 9).log_prob(y).sum())
    assert best - 1e-6 < result.log_evidence <= best + 1e-9


def test_a_multinomial_with_totals_of_its_own() -> None:
    y = T([[2.0, 1.0, 0.0], [5.0, 6.0, 7.0], [0.0, 0.0, 0.0]])

    def model(y: Tensor, **given: object) -> None:
        p = pyro.param("p", T([0.2, 0.3, 0.5]), constraint=constraints.simplex)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Multinomial(probs=p, **given), obs=y)

    with pytest.raises(DataError, match=r"at most total_count=1(.|\n)*Multinomial\(18, "):
        ExactPosteriorEM(model).fit(y, progress=False)
    result = ExactPosteriorEM(model).fit(y, validate_args=False, progress=False)
    torch.testing.assert_close(result.params["p"], y.sum(0) / y.sum())
