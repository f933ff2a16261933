"""Gaussian latents with a conjugate latent as their scale, against Student distributions."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special as sp
import scipy.stats as st
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, ModelError, UsageError


def tensor(values: Any) -> Tensor:
    out = torch.as_tensor(np.asarray(values))
    return out.to(torch.float64) if out.is_floating_point() else out


A, B, M, K = 1.5, 0.7, 0.4, 0.3
RNG = np.random.default_rng(0)
X = tensor(RNG.normal(size=(9, 3)))
Y = X @ tensor([1.0, -2.0, 0.5]) + 0.3 * tensor(RNG.normal(size=9))
ROWS = tensor([[0.3, -1.2, 2.5], [0.1, 0.8, 0.9], [1.3, math.nan, 0.2], [0.5, 1.0, -1.0]])
GROUP = tensor([0, 1, 0, 2, 1, 0, 2, 2, 0])
SPREAD = tensor([[0.5, 0.1, 0.0], [0.1, 0.4, 0.1], [0.0, 0.1, 0.6]])


def a_tensor(value: float) -> Tensor:
    return tensor(value)


def student(y: Any, design: Any = None, spread: Any = 1 / K, a: float = A, m: float = M) -> float:
    """log ∫ N(y | m + C h, 1/τ) N(h | 0, S/τ) Gamma(τ | a, B) dh dτ, by scipy."""
    y = np.asarray(y)
    n = len(y)
    design = np.ones((n, 1)) if design is None else np.asarray(design)
    spread = np.asarray(spread) * np.eye(design.shape[1]) if np.ndim(spread) == 0 else spread
    scale = (np.eye(n) + design @ np.asarray(spread) @ design.T) * B / a
    return float(st.multivariate_t.logpdf(y, np.full(n, m), scale, df=2 * a))


def normal_gamma() -> None:
    tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B))
    mu = pyro.sample("mu", dist.Normal(M, 1 / (K * tau).sqrt()))
    with pyro.plate("rows", 9):
        pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=Y)


def normal_inverse_gamma() -> None:
    v = pyro.sample("tau", dist.InverseGamma(a_tensor(A), B))
    mu = pyro.sample("mu", dist.Normal(M, (v / K).sqrt()))
    with pyro.plate("rows", 9):
        pyro.sample("y", dist.Normal(mu, v.sqrt()), obs=Y)


def by_group() -> None:
    with pyro.plate("groups", 3):
        tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B))
        mu = pyro.sample("mu", dist.Normal(M, (K * tau).rsqrt()))
    with pyro.plate("rows", 9):
        pyro.sample("y", dist.Normal(mu[GROUP], tau[GROUP].rsqrt()), obs=Y)


def per_coordinate() -> None:
    tau = pyro.sample("tau", dist.Gamma(A * torch.ones(3).double(), B).to_event(1))
    mu = pyro.sample("mu", dist.Normal(M, (K * tau).rsqrt()).to_event(1))
    with pyro.plate("rows", 4):
        pyro.sample("y", dist.Normal(mu, tau.rsqrt()).to_event(1), obs=ROWS)


def regression() -> None:
    """Two Gaussian latents that no row connects to one another, but for the scale; and a count."""
    tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B))
    w = pyro.sample("mu", dist.Normal(0.0, (K * tau).rsqrt()).expand([3]).to_event(1))
    other = pyro.sample("other", dist.Normal(0.0, tau.rsqrt()))
    pyro.sample("count", dist.Poisson(2 * tau), obs=a_tensor(3.0))
    with pyro.plate("rows", 9):
        pyro.sample("y", dist.Normal(X @ w, tau.rsqrt()), obs=Y)
    with pyro.plate("others", 4):
        pyro.sample("x", dist.Normal(2 * other, (tau / 3).rsqrt()), obs=ROWS[:, 0])


def _of_regression() -> float:
    a, b = A + 3, B + 2
    design = np.zeros((13, 4))
    design[:9, :3], design[9:, 3] = X, 2 / math.sqrt(3)
    y = np.concatenate([Y, ROWS[:, 0] / math.sqrt(3)])
    spread = np.diag([1 / K, 1 / K, 1 / K, 1.0])
    scale = (np.eye(13) + design @ spread @ design.T) * b / a
    count = A * math.log(B) - a * math.log(b) + sp.gammaln(a) - sp.gammaln(A)
    count += 3 * math.log(2) - math.log(6) - 2 * math.log(3)
    return float(count + st.multivariate_t.logpdf(y, np.zeros(13), scale, df=2 * a))


def correlated() -> None:
    tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B))
    w = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(3).double(), SPREAD / tau))
    with pyro.plate("rows", 9):
        pyro.sample("y", dist.Normal(X @ w, tau.rsqrt()), obs=Y)


def vectors() -> None:
    """Vectors below one precision that no Gaussian latent reaches."""
    tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B))
    factor = torch.linalg.cholesky(SPREAD) / tau.sqrt()
    pyro.sample(
        "y", dist.MultivariateNormal(M * torch.ones(3).double(), scale_tril=factor), obs=Y[:3]
    )


def _of_mixture() -> np.ndarray:
    rows = [[student(ROWS[:1, d], a=A + z, m=M + z) for z in range(2)] for d in (0, 2)]
    return np.array(rows) + np.log([0.4, 0.6])


def mixture() -> None:
    y = ROWS[0, [0, 2]]
    with pyro.plate("rows", 2):
        z = pyro.sample("z", dist.Categorical(tensor([0.4, 0.6])))
        tau = pyro.sample("tau", dist.Gamma(A + z, a_tensor(B)))
        mu = pyro.sample("mu", dist.Normal(M + z, (K * tau).rsqrt()))
        pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)


V, NU = np.array([[0.5, 0.1], [0.1, 0.4]]), 4.0


def normal_wishart() -> None:
    L = pyro.sample("tau", dist.Wishart(a_tensor(NU), tensor(V)))
    mu = pyro.sample(
        "mu", dist.MultivariateNormal(M * torch.ones(2).double(), precision_matrix=K * L)
    )
    with pyro.plate("rows", 9):
        pyro.sample("y", dist.MultivariateNormal(mu, precision_matrix=L), obs=X[:, :2])


def _of_wishart() -> float:
    y = np.asarray(X[:, :2])
    n, off = len(y), y.mean(0) - M
    inverse = np.linalg.inv(V)
    after = inverse + np.cov(y.T) * (n - 1) + K * n / (K + n) * np.outer(off, off)
    out = sp.multigammaln((NU + n) / 2, 2) - sp.multigammaln(NU / 2, 2) - n * math.log(math.pi)
    out += NU / 2 * np.linalg.slogdet(inverse)[1] - (NU + n) / 2 * np.linalg.slogdet(after)[1]
    return float(out + math.log(K / (K + n)))


COMPOUND: dict[str, tuple[Callable[[], None], Callable[[], float]]] = {
    "Normal-Gamma": (normal_gamma, lambda: student(Y)),
    "Normal-inverse-gamma": (normal_inverse_gamma, lambda: student(Y)),
    "by group": (by_group, lambda: sum(student(Y[g == GROUP]) for g in range(3))),
    "per coordinate": (
        per_coordinate,
        lambda: sum(student(c[~torch.isnan(c)]) for c in ROWS.unbind(-1)),
    ),
    "regression": (regression, _of_regression),
    "correlated": (correlated, lambda: student(Y, X, SPREAD, m=0.0)),
    "vectors": (
        vectors,
        lambda: float(st.multivariate_t.logpdf(Y[:3], [M] * 3, SPREAD * B / A, df=2 * A)),
    ),
    "mixture": (mixture, lambda: float(sp.logsumexp(_of_mixture(), -1).sum())),
    "Normal-Wishart": (normal_wishart, _of_wishart),
}


@pytest.mark.parametrize("case", COMPOUND)
def test_evidence_is_that_of_a_multivariate_student_distribution(case: str) -> None:
    model, expected = COMPOUND[case]
    em = ExactPosteriorEM(model, missing="nan")
    q = em.posterior()
    assert q.log_evidence == pytest.approx(expected(), abs=1e-11)
    assert em.elbo(q=pickle.loads(pickle.dumps(q))).gap == pytest.approx(0.0, abs=1e-10)


def test_the_posterior_is_a_student_distribution_and_draws_are_joint() -> None:
    q = ExactPosteriorEM(normal_gamma).posterior()
    n, mean = 9, float(Y.mean())
    k, a = K + n, A + n / 2
    m = (K * M + n * mean) / k
    b = B + 0.5 * float((Y - mean).square().sum()) + 0.5 * K * n / k * (mean - M) ** 2
    own, scale = q.marginal("mu"), math.sqrt(b / (a * k))
    assert float(own.log_prob(a_tensor(1.0))) == pytest.approx(
        st.t.logpdf(1.0, 2 * a, m, scale), abs=1e-10
    )
    assert float(q.covariance("mu")) == pytest.approx(b / (a - 1) / k, rel=1e-12)
    draws = q.sample(5_000, seed=0)
    off = (draws["mu"] - q.mean("mu")).square()
    assert float((draws["tau"] * off).mean()) == pytest.approx(1 / k, rel=0.05)
    assert float((draws["tau"].square() * off).mean()) == pytest.approx(a / b / k, rel=0.05)
    joint = ExactPosteriorEM(correlated).posterior().marginal("mu")
    design, prior = np.asarray(X), np.linalg.inv(np.asarray(SPREAD))
    precision = design.T @ design + prior
    centre = np.linalg.solve(precision, design.T @ np.asarray(Y))
    assert np.allclose(joint.loc, centre, atol=1e-12)
    rest = float(Y @ Y) - centre @ precision @ centre
    shape = np.linalg.inv(precision) * (B + rest / 2) / a
    reference = st.multivariate_t.logpdf(np.zeros(3), centre, shape, df=2 * a)
    assert float(joint.log_prob(torch.zeros(3).double())) == pytest.approx(reference, abs=1e-9)


def test_numbers_of_one_event_are_of_one_distribution_where_they_share_a_scale() -> None:
    def model(place: Tensor) -> None:
        with pyro.plate("groups", 2):
            tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B).expand([2, 3]).to_event(1))
            mu = pyro.sample("mu", dist.Normal(M, (K * tau[..., place]).rsqrt()).to_event(1))
            pyro.sample("y", dist.Normal(mu, tau[..., place].rsqrt()).to_event(1), obs=X[:2])

    em = ExactPosteriorEM(model)
    own = em.posterior(tensor([1, 1, 1])).marginal("mu")
    assert isinstance(own, dist.MultivariateStudentT) and own.batch_shape == (2,)
    assert em.posterior(tensor([2, 0, 1])).marginal("mu").base_dist.batch_shape == (2, 3)
    with pytest.raises(UsageError, match="some numbers of its event have one scale"):
        em.posterior(tensor([0, 0, 1])).marginal("mu")


def test_vectors_below_a_matrix_are_drawn_with_it() -> None:
    q = ExactPosteriorEM(normal_wishart).posterior()
    draws, mean = q.sample(5_000, seed=0), q.mean("mu")
    off = draws["mu"] - mean
    inner = torch.einsum("nij,nj->ni", draws["tau"], off)
    assert torch.allclose(inner.mT @ off / 5_000, torch.eye(2).double() / (K + 9), atol=6e-3)
    assert float(q.marginal("mu").df) == NU + 9 - 1
    assert torch.allclose(q.marginal("mu").variance, q.covariance("mu").diagonal())


def learned(y: Tensor, m: float = 0.0, k: float = 1.0) -> None:
    m = pyro.param("m", a_tensor(m))
    k = pyro.param("k", a_tensor(k), constraint=constraints.positive)
    with pyro.plate("groups", 3):
        tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B))
        mu = pyro.sample("mu", dist.Normal(m, (k * tau).rsqrt()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu[GROUP], tau[GROUP].rsqrt()), obs=y)


def test_hyperparameters_take_the_steps_of_em() -> None:
    """Against iterations written in numpy, and standard errors by differences of the evidence."""
    em = ExactPosteriorEM(learned)
    result = em.fit(Y, max_steps=4, tol=0.0)
    y, m, k = np.asarray(Y), 0.0, 1.0
    groups = [y[np.asarray(GROUP) == g] for g in range(3)]

    def evidence(m: float, k: float) -> float:
        return sum(student(own, spread=1 / k, m=m) for own in groups)

    path = []
    for _ in range(4):
        path.append(evidence(m, k))
        ks = np.array([k + len(own) for own in groups])
        ms = np.array([(k * m + own.sum()) / (k + len(own)) for own in groups])
        bs = [
            B + 0.5 * ((own - c) ** 2).sum() + 0.5 * k * (c - m) ** 2
            for own, c in zip(groups, ms, strict=True)
        ]
        taus = np.array([(A + len(own) / 2) / b for own, b in zip(groups, bs, strict=True)])
        m = (taus * ms).sum() / taus.sum()
        k = 1 / (taus * (ms - m) ** 2 + 1 / ks).mean()
    assert list(result.history)[:4] == pytest.approx(path, abs=1e-9)
    assert float(result.params["m"]) == pytest.approx(m, abs=1e-9)
    assert float(result.params["k"]) == pytest.approx(k, rel=1e-9)
    h = np.array([1e-3, 5e-3])
    steps = np.array(
        [[evidence(m + i * h[0], k + j * h[1]) for j in (-1, 0, 1)] for i in (-1, 0, 1)]
    )
    second = np.array(
        [
            [steps[2, 1] - 2 * steps[1, 1] + steps[0, 1], (steps[2, 2] - steps[2, 0]) / 4],
            [0.0, steps[1, 2] - 2 * steps[1, 1] + steps[1, 0]],
        ]
    )
    second[0, 1] = second[1, 0] = second[0, 1] - (steps[0, 2] - steps[0, 0]) / 4
    errors = np.sqrt(np.diag(np.linalg.inv(-second / np.outer(h, h))))
    found = result.standard_errors()
    assert [float(found["m"]), float(found["k"])] == pytest.approx(list(errors), rel=2e-5)


def test_the_gap_of_another_posterior_is_its_divergence() -> None:
    """KL of two Normal-Gammas; and independent Gamma and Normal in the posterior's place."""
    em = ExactPosteriorEM(learned)
    before = em.posterior(Y)
    pyro.clear_param_store()
    at = em.posterior(Y, 0.3, 2.0)
    expected = 0.0
    for g in range(3):
        own = np.asarray(Y[g == GROUP])
        (m0, k0, a0, b0), (m1, k1, a1, b1) = (_after(own, 0.0, 1.0), _after(own, 0.3, 2.0))
        mean = a0 / b0
        expected += 0.5 * (math.log(k0 / k1) + k1 / k0 - 1 + k1 * mean * (m1 - m0) ** 2)
        expected += (a0 - a1) * sp.digamma(a0) - sp.gammaln(a0) + sp.gammaln(a1)
        expected += a1 * math.log(b0 / b1) + mean * (b1 - b0)
    assert em.elbo(Y, 0.3, 2.0, q=before).gap == pytest.approx(expected, abs=1e-10)
    tau, mu = at.marginal("tau"), at.mean("mu")
    given = em.elbo(Y, 0.3, 2.0, q={"tau": tau, "mu": dist.Normal(mu, 0.2)})
    counts = torch.bincount(GROUP).double()
    # Given τ the posterior of μ has the precision k τ: E[KL] of Normals of one centre.
    ratio = (2.0 + counts) * 0.04
    own = 0.5 * (ratio * tau.mean - 1 - ratio.log() - _expected_log(tau))
    assert given.gap == pytest.approx(float(own.sum()), abs=1e-10)


def test_weighted_rows_are_rows_that_are_there_so_often() -> None:
    def model(y: Tensor, weight: Tensor) -> None:
        k = pyro.param("k", a_tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)), pyro.poutine.scale(scale=weight):
            tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B))
            mu = pyro.sample("mu", dist.Normal(M, (k * tau).rsqrt()))
            pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=y)

    weight = tensor([1.0, 2.0, 3.0, 1.0])
    often, found = torch.repeat_interleave(Y[:4], weight.long()), []
    for data in ((Y[:4], weight), (often, torch.ones(7))):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model)
        q, result = em.posterior(*data), em.fit(*data, max_steps=2, tol=0.0)
        terms = em.elbo(*data, q=q)
        found.append([q.entropy(), terms.expected_log_joint, result.log_evidence, result.bic])
    assert found[0] == pytest.approx(found[1], abs=1e-10)


def _weighed() -> None:
    with pyro.plate("rows", 9):
        tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B))
        with pyro.poutine.scale(scale=2.0):
            mu = pyro.sample("mu", dist.Normal(M, tau.rsqrt()))
        pyro.sample("y", dist.Normal(mu, tau.rsqrt()), obs=Y)


def _after(y: np.ndarray, m: float, k: float) -> tuple[float, float, float, float]:
    n = len(y)
    c = (k * m + y.sum()) / (k + n)
    return c, k + n, A + n / 2, B + 0.5 * ((y - c) ** 2).sum() + 0.5 * k * (c - m) ** 2


def _expected_log(tau: Any) -> Tensor:
    return tau.concentration.digamma() - tau.rate.log()


def _other_spread() -> None:
    tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B))
    mu = pyro.sample("mu", dist.Normal(M, tau.rsqrt()))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=Y[0])


def _other_element() -> None:
    with pyro.plate("groups", 2):
        tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B))
        mu = pyro.sample("mu", dist.Normal(M, tau.rsqrt()))
        pyro.sample("y", dist.Normal(mu, tau.flip(0).rsqrt()), obs=Y[:2])


def _in_the_mean() -> None:
    tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B))
    mu = pyro.sample("mu", dist.Normal(M, tau.rsqrt()))
    pyro.sample("y", dist.Normal(mu * tau, tau.rsqrt()), obs=Y[0])


def _turned() -> None:
    L = pyro.sample("tau", dist.Wishart(a_tensor(NU), tensor(V)))
    mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2).double(), precision_matrix=L))
    pyro.sample("y", dist.MultivariateNormal(mu.flip(-1), precision_matrix=L), obs=X[0, :2])


def _of_components() -> None:
    """A mixture whose components are drawn globally: no posterior in closed form."""
    with pyro.plate("components", 2):
        tau = pyro.sample("tau", dist.Gamma(a_tensor(A), B))
        mu = pyro.sample("mu", dist.Normal(M, tau.rsqrt()))
    with pyro.plate("rows", 9):
        z = pyro.sample("z", dist.Categorical(tensor([0.4, 0.6])))
        pyro.sample("y", dist.Normal(mu[z], tau[z].rsqrt()), obs=Y)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_other_spread, "its spread reads 'tau', which the spread of 'y' does not"),
        (_other_element, "its elements of 'tau' are others than those of 'mu', which it reads"),
        (_in_the_mean, "Normal of 'tau' has no posterior of its prior's form"),
        (_turned, "its mean is no known multiple of 'mu'"),
        (_weighed, "poutine.scale weighs it otherwise than 'tau'"),
        (_of_components, "connects elements of that plate: a mixture of 2 to the power"),
    ],
)
def test_what_has_no_common_scale_is_refused_by_name(model: Callable[[], None], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        ExactPosteriorEM(model).posterior()
