"""A continuous latent that can be integrated out: the refusal names the marginal, rightly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, tensor
from torch.distributions import constraints
from torch.distributions.transforms import AffineTransform

from pyro_em import ExactPosteriorEM, ModelError


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> None:
    """Each case begins with an empty param store."""


def scale() -> Tensor:
    return pyro.param("s", tensor(0.7), constraint=constraints.positive)


def local(x: Tensor, prior: Callable[[], Any], child: Callable[[Tensor], Any]) -> None:
    """A latent per row."""
    with pyro.plate("n", len(x)):
        pyro.sample("x", child(pyro.sample("h", prior())), obs=x)


def masked(x: Tensor, prior: Callable[[], Any], child: Callable[[Tensor], Any]) -> None:
    """The same, its latent under a mask, so that nothing is integrated."""
    with pyro.poutine.mask(mask=tensor(True)):
        local(x, prior, child)


def shared(x: Tensor, prior: Callable[[], Any], child: Callable[[Tensor], Any]) -> None:
    """One latent for all rows, under a mask."""
    with pyro.poutine.mask(mask=tensor(True)):
        h = pyro.sample("h", prior())
    with pyro.plate("n", len(x)):
        pyro.sample("x", child(h), obs=x)


def refusal(model: Any, *args: Any) -> str:
    with pytest.raises(ModelError) as caught:
        ExactPosteriorEM(model).fit(*args)
    return str(caught.value)


def advised(text: str, **values: Any) -> Any:
    """The distribution that a refusal advises, made from its very words."""
    words = re.search(r"be (dist\..*?)(, with|; the|$)", text, re.MULTILINE)
    assert words is not None, text
    return eval(words[1], {"dist": dist, "AffineTransform": AffineTransform, **values})


A, B = tensor(2.5, dtype=torch.float64), tensor(1.5, dtype=torch.float64)
COUNTS = tensor([0.0, 2.0, 5.0], dtype=torch.float64)
REALS = tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
AB = {"concentration": A, "rate": B}
POSITIVE = torch.linspace(-14, 6, 40001, dtype=torch.float64).exp()
UNIT = torch.linspace(1e-7, 1 - 1e-7, 40001, dtype=torch.float64)

# prior, child, data, points for the integral, what the words of the advice stand for
LOCAL: dict[str, tuple[Any, Any, Tensor, Tensor, dict[str, Any]]] = {
    "Gamma, Poisson": (lambda: dist.Gamma(A, B), dist.Poisson, COUNTS, POSITIVE, AB),
    "Gamma, exposed Poisson": (
        lambda: dist.Gamma(A, B),
        lambda h: dist.Poisson(3.0 * h),
        COUNTS,
        POSITIVE,
        {**AB, "factor": 3.0},
    ),
    "Exponential, Poisson": (lambda: dist.Exponential(B), dist.Poisson, COUNTS, POSITIVE, AB),
    "Gamma, Exponential": (
        lambda: dist.Gamma(A, B),
        dist.Exponential,
        COUNTS + 0.5,
        POSITIVE,
        AB,
    ),
    "Gamma, Normal": (
        lambda: dist.Gamma(A, B),
        lambda h: dist.Normal(0.3, h.rsqrt()),
        REALS,
        POSITIVE,
        {**AB, "loc": 0.3},
    ),
    "Gamma, wide Normal": (
        lambda: dist.Gamma(A, B),
        lambda h: dist.Normal(0.3, 2.0 * h.rsqrt()),
        REALS,
        POSITIVE,
        {**AB, "loc": 0.3, "factor": 2.0},
    ),
    "Chi2, Normal": (
        lambda: dist.Chi2(A),
        lambda h: dist.Normal(0.3, h.rsqrt()),
        REALS,
        POSITIVE,
        {"df": A, "loc": 0.3},
    ),
    "Exponential, Normal": (
        lambda: dist.Exponential(B),
        lambda h: dist.Normal(0.3, h.rsqrt()),
        REALS,
        POSITIVE,
        {"rate": B, "loc": 0.3},
    ),
    "InverseGamma, Normal": (
        lambda: dist.InverseGamma(A, B),
        lambda h: dist.Normal(0.3, h.sqrt()),
        REALS,
        POSITIVE,
        {**AB, "loc": 0.3},
    ),
    "Beta, Binomial": (
        lambda: dist.Beta(A, B),
        lambda h: dist.Binomial(7, h),
        COUNTS,
        UNIT,
        {"concentration1": A, "concentration0": B, "total_count": 7},
    ),
    "Beta, Bernoulli": (
        lambda: dist.Beta(A, B),
        dist.Bernoulli,
        (COUNTS > 1).double(),
        UNIT,
        {"concentration1": A, "concentration0": B},
    ),
}


@pytest.mark.parametrize("case", LOCAL)
def test_the_marginal_of_a_latent_per_row(case: str) -> None:
    prior, child, x, points, values = LOCAL[case]
    text = refusal(masked, x, prior, child)
    got = advised(text, **values).log_prob(x)
    joint = prior().log_prob(points) + child(points).log_prob(x[:, None])
    expected = torch.trapezoid(joint.exp(), points).log()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    if not case.startswith("Chi2"):  # without the mask it is integrated
        exact = ExactPosteriorEM(local).posterior(x, prior, child).log_evidence
        assert exact == pytest.approx(float(expected.sum()), rel=1e-4)
    assert text.index("integrate it out") < text.index("give a guide"), "the exact way comes first"


def test_a_dirichlet_has_its_own() -> None:
    c = tensor([0.5, 1.0, 2.5])
    text = refusal(
        masked, torch.eye(3) * 3, lambda: dist.Dirichlet(c), lambda h: dist.Multinomial(3, h)
    )
    q = advised(text, concentration=c, total_count=3)
    assert isinstance(q, dist.DirichletMultinomial)
    text = refusal(masked, tensor([0, 2]), lambda: dist.Dirichlet(c), dist.Categorical)
    torch.testing.assert_close(advised(text, concentration=c).probs, c / c.sum())


def test_a_sum_of_poisson_counts_thinned() -> None:
    text = refusal(local, torch.zeros(3), lambda: dist.Poisson(B), lambda h: dist.Binomial(h, 0.5))
    assert advised(text, rate=B, probs=0.5).rate == 0.75


SHARED: dict[str, tuple[Any, Any, Tensor, Tensor, Any, dict[str, Any], str]] = {
    "Gamma, Poisson": (
        lambda a: dist.Gamma(a, B),
        dist.Poisson,
        COUNTS,
        POSITIVE,
        COUNTS.sum(),
        {"rate": B, "N": 3},
        "a Gamma",
    ),
    "Beta, Bernoulli": (
        lambda a: dist.Beta(a, B),
        dist.Bernoulli,
        (COUNTS > 1).double(),
        UNIT,
        tensor(2.0),
        {"concentration0": B, "N": 3},
        "a Beta",
    ),
    "Beta, Binomial": (
        lambda a: dist.Beta(a, B),
        lambda h: dist.Binomial(7, h),
        COUNTS,
        UNIT,
        COUNTS.sum(),
        {"concentration0": B, "total_count": tensor([7.0, 7.0, 7.0])},
        "a Beta",
    ),
}


@pytest.mark.parametrize("case", SHARED)
def test_the_sum_of_what_shares_a_latent(case: str) -> None:
    prior, child, x, points, total, values, own = SHARED[case]
    text = refusal(shared, x, lambda: prior(A), child)
    assert f"guide that draws it from {own}" in text
    name = "concentration" if "Gamma" in case else "concentration1"
    off = []
    for a in (A, 2 * A):
        got = advised(text, **{name: a}, **values).log_prob(total)
        joint = prior(a).log_prob(points) + child(points).log_prob(x[:, None]).sum(0)
        off.append(float(got - torch.trapezoid(joint.exp(), points).log()))
    assert math.isclose(off[0], off[1], rel_tol=1e-4, abs_tol=1e-4), "a constant"


def test_linear_gaussian_models_need_no_advice() -> None:
    def factors(x: Tensor, net: Any) -> None:
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(h), scale()).to_event(1), obs=x)

    def groups(x: Tensor) -> None:
        with pyro.plate("g", x.shape[0], dim=-2):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            with pyro.plate("n", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(h, scale()), obs=x)

    w = torch.randn(2, 3)
    x = torch.randn(6, 3)
    noise, one = 0.7**2, torch.ones(3, 3)
    got = ExactPosteriorEM(factors).elbo(x, lambda h: 1.0 + h @ w).log_evidence
    rows = dist.LowRankMultivariateNormal(torch.ones(3), w.T, noise * torch.ones(3))
    assert got == pytest.approx(float(rows.log_prob(x).sum()), rel=1e-6)
    assert "LowRank" not in refusal(factors, x, lambda h: torch.tanh(h @ w))
    pyro.clear_param_store()
    got = ExactPosteriorEM(groups).elbo(x).log_evidence
    rows = dist.MultivariateNormal(torch.zeros(3), one + noise * torch.eye(3))
    assert got == pytest.approx(float(rows.log_prob(x).sum()), rel=1e-6)


def level(y: Tensor, how: str) -> None:
    x, s = tensor(0.0), scale()
    steps = pyro.markov(range(len(y))) if how == "markov" else range(len(y))
    for t in steps:
        x = pyro.sample(f"x_{t}", dist.Normal(x if how != "curved" else x.tanh(), s))
        pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[t])


def test_a_chain_that_is_not_linear_is_told_once() -> None:
    text = refusal(level, torch.randn(8), "curved")
    assert text.count("no exact posterior here") == 1 and "7 more alike, up to site 'x_7'" in text
    assert "dist.GaussianHMM(" not in text and "not linear in 'x_0' (tanh)" in text
    assert text.count("give a guide") == 1


def test_the_gaussian_chain_that_is_advised_has_the_evidence() -> None:
    y = torch.randn(5, generator=torch.Generator().manual_seed(0))

    def hmm(y: Tensor) -> None:
        s = scale()

        def one(sd: Tensor) -> Any:
            return dist.Normal(torch.zeros(1), sd.reshape(1)).to_event(1)

        eye = torch.eye(1)
        start = one(tensor(1e-6))  # the state before the first step is 0
        chain = dist.GaussianHMM(start, eye, one(s), eye, one(tensor(1.0)), duration=len(y))
        pyro.sample("y", chain, obs=y[:, None])

    got = ExactPosteriorEM(hmm).elbo(y).log_evidence
    low = torch.tril(torch.ones(5, 5)) * 0.7
    by_hand = dist.MultivariateNormal(torch.zeros(5), low @ low.T + torch.eye(5)).log_prob(y)
    assert got == pytest.approx(float(by_hand), abs=1e-6)
    for how in ("range", "markov"):
        assert ExactPosteriorEM(level).elbo(y, how).log_evidence == pytest.approx(got, abs=1e-6)


def test_what_has_no_marginal_gets_no_such_advice() -> None:
    cases = [
        (lambda: dist.Normal(0.0, 1.0), lambda h: dist.Poisson(h.exp()), COUNTS),
        (lambda: dist.Gamma(A, B), lambda h: dist.Normal(0.0, h), REALS),
        (lambda: dist.Gamma(A, B), lambda h: dist.Poisson(h**2), COUNTS),
        (lambda: dist.Gamma(A, B), lambda h: dist.Normal(h, h.rsqrt()), REALS),
        (lambda: dist.Beta(A, B), lambda h: dist.Bernoulli(h**2), (COUNTS > 1).double()),
        (lambda: dist.Normal(0.0, 1.0), lambda h: dist.Normal(h, h.exp()), REALS),
        (lambda: dist.LogNormal(0.0, 1.0), dist.Poisson, COUNTS),
    ]
    for prior, child, x in cases:
        assert "integrate" not in refusal(local, x, prior, child)


def test_a_hierarchy_has_its_evidence() -> None:
    def hierarchy(x: Tensor) -> None:
        top = pyro.sample("top", dist.Normal(0.0, scale()))
        with pyro.plate("g", x.shape[0], dim=-2):
            mid = pyro.sample("mid", dist.Normal(top, 1.0))
            with pyro.plate("n", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(mid, 1.0), obs=x)

    x = torch.randn(3, 2)
    got = ExactPosteriorEM(hierarchy).elbo(x).log_evidence
    same = torch.arange(6) // 2
    covariance = 0.49 + (same == same[:, None]).float() + torch.eye(6)
    by_hand = dist.MultivariateNormal(torch.zeros(6), covariance).log_prob(x.reshape(-1))
    assert got == pytest.approx(float(by_hand), rel=1e-6)


def test_no_family_is_promised_where_another_latent_reaches_the_same_values() -> None:
    def spread(x: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(mu, tau.rsqrt()), obs=x)

    text = refusal(spread, torch.randn(5))
    assert "integrate it out: one dist.LowRankMultivariateNormal" in text
    assert "has no gap" not in text
    assert "has no gap" in refusal(shared, torch.ones(5), gamma_prior, poisson_exposed)


def gamma_prior() -> Any:
    return dist.Gamma(2.0, 1.0)


def poisson_exposed(h: Tensor) -> Any:
    return dist.Poisson(3.0 * h)
