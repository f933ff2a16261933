"""Counts with more zeros: statsmodels, a published table, scipy on each expected log joint, tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, special, stats
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM
from pyro_em.posteriors.chains.chain import Chain
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.testing import check_block

# Articles of 915 biochemists (Long 1990): how many wrote 0, 1, 2, …; by sex and marriage men single,
# men married, women single, women married.
ARTICLES = [
    [31, 30, 18, 12, 10, 1, 4, 7],
    [105, 105, 69, 42, 28, 15, 5, 4, 1, 2, 0, 1, 2, 0, 0, 0, 1, 0, 0, 1],
    [68, 54, 42, 10, 12, 5, 4, 1],
    [71, 57, 49, 20, 17, 6, 4, 0, 0, 0, 1],
]
I = np.arange(60)
X = np.stack([np.ones(60), np.sin(1.7 * I)], 1)
COUNTS = np.array([
    *(0, 2, 0, 0, 4, 0, 0, 4, 0, 2, 0, 5, 5, 0, 0, 7, 0, 1, 0, 10, 4, 1, 0, 0, 0, 1, 0, 12, 3, 0),
    *(1, 0, 2, 1, 0, 9, 2, 0, 1, 8, 2, 3, 0, 7, 3, 0, 1, 7, 4, 0, 0, 13, 0, 4, 1, 0, 8, 0, 0, 0),
])  # fmt: skip


def tensor(a: Any) -> Tensor:
    return torch.as_tensor(a, dtype=torch.float64)


def param(name: str, value: Any, constraint: C.Constraint = C.real) -> Tensor:
    return pyro.param(name, tensor(value), constraint=constraint)


def articles() -> tuple[Tensor, Tensor, Tensor]:
    """Counts, covariates and how many of each."""
    kinds = [(1.0, 0.0, 0.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, 1.0)]
    rows = [
        (y, kind, n)
        for kind, own in zip(kinds, ARTICLES, strict=True)
        for y, n in enumerate(own)
        if n
    ]
    y, x, n = zip(*rows, strict=True)
    return tensor(y), tensor(x), tensor(n)


def regression(x: Tensor, y: Tensor, n: Tensor | None, shape: float | None) -> None:
    w, v = param("w", np.zeros(x.shape[1])), param("v", np.zeros(x.shape[1]))
    with pyro.plate("n", len(y)), pyro.poutine.scale(scale=1.0 if n is None else n):
        if shape is None:
            fn = dist.ZeroInflatedPoisson((x @ w).exp(), gate_logits=x @ v)
        else:
            r = param("r", shape, C.positive)
            fn = dist.ZeroInflatedNegativeBinomial(r, logits=x @ w - r.log(), gate_logits=x @ v)
        pyro.sample("y", fn, obs=y)


def test_one_rate_and_gate_are_those_of_statsmodels_in_one_step() -> None:
    # statsmodels 0.15.0: ZeroInflatedPoisson(articles, ones)
    def model(y: Tensor, n: Tensor) -> None:
        rate, gate = param("rate", 1.0, C.positive), param("gate", 0.5, C.unit_interval)
        with pyro.plate("n", len(y)), pyro.poutine.scale(scale=n):
            pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)

    y, _, n = articles()
    result = ExactPosteriorEM(model).fit(y, n, max_steps=1, tol=0)
    assert result.log_evidence == pytest.approx(-1679.3910842143814, abs=1e-9)
    assert float(result.params["rate"].log()) == pytest.approx(0.7578912937914657, rel=1e-8)
    assert float(result.params["gate"].logit()) == pytest.approx(-1.3454328516204797, rel=1e-8)


def test_biochemists_are_those_of_statsmodels_in_one_step() -> None:
    # statsmodels 0.15.0: ZeroInflatedPoisson(articles, [1, women, married], exog_infl=the same)
    y, x, n = articles()
    result = ExactPosteriorEM(regression).fit(x, y, n, None, max_steps=1, tol=0)
    assert result.log_evidence == pytest.approx(-1670.1203451032538, abs=1e-9)
    known = [0.8457809965837261, -0.23648226933251495, 0.011061931261879541]
    np.testing.assert_allclose(result.params["w"], known, atol=1e-8)
    known = [-1.3233947509416089, 0.01850729310482491, -0.09164490200706461]
    np.testing.assert_allclose(result.params["v"], known, atol=1e-7)


def test_negative_binomial_regressions_are_those_of_statsmodels_in_one_step() -> None:
    # statsmodels 0.15.0: ZeroInflatedNegativeBinomialP(COUNTS, X, exog_infl=X), method="newton"
    result = ExactPosteriorEM(regression).fit(
        tensor(X), tensor(COUNTS), None, 1.0, max_steps=1, tol=0
    )
    assert result.log_evidence == pytest.approx(-115.76321480353361, abs=1e-9)
    known = [1.252234535494674, 0.19750507785632457]
    np.testing.assert_allclose(result.params["w"], known, atol=1e-7)
    known = [-0.6650630117598073, 0.3415425135096792]
    np.testing.assert_allclose(result.params["v"], known, atol=1e-6)
    assert float(result.params["r"]) == pytest.approx(1 / 0.7937461550710324, rel=1e-6)


def two_kinds(x: Tensor, shapes: bool) -> None:
    """One gate for both components, or a gate for each beside shapes."""
    p = param("p", [0.4, 0.6], C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        if shapes:
            r, logits = param("r", [1.0, 3.0], C.positive), param("logits", [-0.5, 1.0])
            gate = param("gate", [0.3, 0.2], C.unit_interval)
            fn = dist.ZeroInflatedNegativeBinomial(r[z], logits=logits[z], gate=gate[z])
        else:
            rate, gate = param("rate", [1.0, 6.0], C.positive), param("gate", 0.2, C.unit_interval)
            fn = dist.ZeroInflatedPoisson(rate[z], gate=gate)
        pyro.sample("x", fn, obs=x)


def _log_p(shapes: bool, u: np.ndarray) -> np.ndarray:
    """Log densities of both components, from coordinates without bounds. # (2, N)"""
    if shapes:
        r, logits, gate = np.exp(u[:2]), u[2:4], special.expit(u[4:6])
        own = [stats.nbinom.logpmf(COUNTS, r[k], special.expit(-logits[k])) for k in range(2)]
    else:
        rate, gate = np.exp(u[:2]), special.expit(np.repeat(u[2], 2))
        own = [stats.poisson.logpmf(COUNTS, rate[k]) for k in range(2)]
    zero = np.where(COUNTS == 0, 1.0, 0.0)
    return np.log(gate[:, None] * zero + (1 - gate[:, None]) * np.exp(np.stack(own)))


@pytest.mark.parametrize("shapes", [False, True])
def test_mixtures_follow_an_em_whose_m_steps_are_scipys(shapes: bool) -> None:
    steps, p = 3, np.array([0.4, 0.6])
    gate = special.logit([0.3, 0.2]) if shapes else special.logit([0.2])
    u = np.r_[np.log([1.0, 3.0]), -0.5, 1.0, gate] if shapes else np.r_[np.log([1.0, 6.0]), gate]
    evidence = []
    for _ in range(steps + 1):
        joint = np.log(p)[:, None] + _log_p(shapes, u)
        evidence.append(float(special.logsumexp(joint, 0).sum()))
        r = special.softmax(joint, 0)
        p = r.mean(1)

        def loss(u: np.ndarray, r: np.ndarray = r) -> float:
            return -float((r * _log_p(shapes, u)).sum())

        u = optimize.minimize(loss, u, method="BFGS", options={"gtol": 1e-7}).x
    x = tensor(COUNTS)
    result = ExactPosteriorEM(two_kinds).fit(x, shapes, max_steps=steps, tol=0)
    assert result.plan.kernel == "mixture"
    assert [*result.history, result.log_evidence] == pytest.approx(evidence, abs=2e-7)
    pyro.clear_param_store()
    parts = ExactPosteriorEM(two_kinds).fit(Chunks(x, rows=25), shapes, max_steps=steps, tol=0)
    assert list(parts.history) == pytest.approx(list(result.history), rel=1e-12)


def chain(x: Tensor) -> None:
    A = param("A", [[0.7, 0.3], [0.4, 0.6]], C.simplex)
    rate, gate = param("rate", [1.0, 6.0], C.positive), param("gate", [-1.0, 0.5])
    r, logits = param("r", 1.5, C.positive), param("logits", [0.2, 1.0])
    z: Any = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.ZeroInflatedPoisson(rate[z], gate_logits=gate[z]), obs=x[t])
        fn = dist.ZeroInflatedNegativeBinomial(r, logits=logits[z], gate=tensor(0.1))
        pyro.sample(f"y_{t}", fn, obs=(4 * x[t]).square())


def test_blocks() -> None:
    check_block(Mixture, two_kinds, tensor(COUNTS[:6]), False, states=1)
    check_block(Chain, chain, tensor([0, 4, 1, 0, 3]), states=1)


def _one(fn: Callable[..., Any], gate: Callable[..., Any]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        rate = param("rate", 2.0, C.positive)
        with pyro.plate("n", len(x)):
            pyro.sample("x", fn(rate, **gate()), obs=x)

    return model


@pytest.mark.parametrize(
    "gate",
    [
        lambda: {"gate": param("g", 0.3, C.unit_interval)},
        lambda: {"gate_logits": param("g", 0.3)},
        lambda: {"gate": tensor(0.0)},
    ],
)
def test_counts_with_fewer_zeros_than_a_poissons_close_the_gate(gate: Callable[..., Any]) -> None:
    """The maximum is at its end, where what is left are the Poisson's: the rate is the mean."""
    x = tensor(np.minimum(COUNTS[COUNTS > 0], 4))
    result = ExactPosteriorEM(_one(dist.ZeroInflatedPoisson, gate)).fit(x, max_steps=5)
    assert float(result.params["rate"]) == pytest.approx(float(x.mean()), rel=1e-9)
    exact = stats.poisson.logpmf(x.numpy(), float(x.mean())).sum()
    assert result.log_evidence == pytest.approx(float(exact), abs=1e-8)
