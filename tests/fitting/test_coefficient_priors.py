"""Priors of regression coefficients under ``guide="map"``: scipy on the log joint, flat gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM

N = 40
I = np.arange(N)
X = np.stack([np.ones(N), np.sin(1.7 * I), np.cos(0.9 * I + 1)], 1)
LINE = X @ np.array([0.4, 0.9, -0.5])
REAL = LINE + 0.8 * np.sin(5.3 * I)
BITS = (REAL > 0.3).astype(float)
COUNTS = np.floor(np.exp(LINE) * (0.3 + 1.7 * (I % 3)))
COVARIANCE = np.eye(3) * 2 + 0.5


def tensor(a: Any) -> Tensor:
    return torch.as_tensor(np.asarray(a), dtype=torch.float64)


def positive(name: str, value: float = 1.0) -> Tensor:
    return pyro.param(name, tensor(value), constraint=C.positive)


KINDS: dict[str, tuple[Callable[[Tensor], Any], np.ndarray, Callable[[np.ndarray], np.ndarray]]] = {
    "normal": (
        lambda e: dist.Normal(e, positive("s")),
        REAL,
        lambda t: stats.norm.logpdf(REAL, X @ t[:3], np.exp(t[3])),
    ),
    "logistic": (
        lambda e: dist.Bernoulli(logits=e),
        BITS,
        lambda t: BITS * (X @ t[:3]) - np.logaddexp(0, X @ t[:3]) - t[3] ** 2,
    ),
    "Poisson": (
        lambda e: dist.Poisson(e.exp()),
        COUNTS,
        lambda t: stats.poisson.logpmf(COUNTS, np.exp(X @ t[:3])) - t[3] ** 2,
    ),
}
PRIORS: dict[str, tuple[Callable[[], Any], Callable[[np.ndarray], float]]] = {
    "Normal": (
        lambda: dist.Normal(tensor([0.1, 0, 0]), 0.7).to_event(1),
        lambda t: stats.norm.logpdf(t[:3], [0.1, 0, 0], 0.7).sum(),
    ),
    "multivariate": (
        lambda: dist.MultivariateNormal(tensor([0.3, 0, 0]), tensor(COVARIANCE)),
        lambda t: stats.multivariate_normal.logpdf(t[:3], [0.3, 0, 0], COVARIANCE),
    ),
    "with the data's spread": (
        lambda: dist.Normal(tensor([0.0, 0, 0]), 2 * positive("s")).to_event(1),
        lambda t: stats.norm.logpdf(t[:3], 0, 2 * np.exp(t[3])).sum(),
    ),
}
CASES = [("normal", p) for p in PRIORS] + [("logistic", "multivariate"), ("Poisson", "Normal")]


@pytest.mark.parametrize(("kind", "prior"), CASES)
def test_a_fit_ends_at_the_mode_that_scipy_finds(kind: str, prior: str) -> None:
    likelihood, y, log_p = KINDS[kind]
    of_w, log_prior = PRIORS[prior]

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", of_w())
        with pyro.plate("n", len(x)):
            pyro.sample("y", likelihood(x @ w), obs=y)

    pyro.clear_param_store()
    em = ExactPosteriorEM(model, guide="map")
    how = "least squares" if kind == "normal" else "Newton"
    assert how in str(em.plan(tensor(X), tensor(y)))
    # Of Normals a known prior is weighed by the spread before it: coefficients and spread alternate.
    steps = 8 if kind == "normal" and "spread" not in prior else 1
    result = em.fit(tensor(X), tensor(y), max_steps=steps, tol=0)
    best = optimize.minimize(
        lambda t: -log_p(t).sum() - log_prior(t), np.zeros(4), method="BFGS", options={"gtol": 1e-7}
    )
    assert float(result.elbo) == pytest.approx(-best.fun, abs=1e-8)


def test_a_dispersion_with_a_prior_is_found_with_its_coefficients() -> None:
    """Even counts, whose dispersion would run off without one."""
    even = np.round(np.exp(1 + LINE / 2))

    def model(x: Tensor, y: Tensor) -> None:
        r = pyro.sample("r", dist.Gamma(tensor(2.0), tensor(0.1)))
        w = pyro.sample("w", PRIORS["Normal"][0]())
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.NegativeBinomial(r, logits=x @ w - r.log()), obs=y)

    pyro.clear_param_store()
    em = ExactPosteriorEM(model, guide="map")
    result = em.fit(tensor(X), tensor(even), max_steps=1, tol=0)
    assert "with a Gamma prior" in str(result.plan)

    def loss(t: np.ndarray) -> float:
        r, mean = np.exp(t[3]), np.exp(X @ t[:3])
        density = stats.nbinom.logpmf(even, r, r / (r + mean)).sum()
        return -density - PRIORS["Normal"][1](t) - stats.gamma.logpdf(r, 2, scale=10)

    best = optimize.minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-7})
    assert float(result.elbo) == pytest.approx(-best.fun, abs=1e-7)


def test_in_a_mixture_the_expected_log_joint_with_its_prior_is_flat() -> None:
    start = tensor([[0.1, 0.5, 0.0], [0.3, -0.2, 0.1]])
    root = torch.linalg.cholesky(tensor(COVARIANCE))

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("k", 2):
            w = pyro.sample("w", dist.MultivariateNormal(tensor([0.3, 0, 0]), scale_tril=root))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(tensor([0.5, 0.5])))
            pyro.sample("y", dist.Poisson((x * w[z]).sum(-1).exp()), obs=y)

    pyro.clear_param_store()
    em = ExactPosteriorEM(
        model,
        pyro.infer.autoguide.AutoDelta(
            pyro.poutine.block(model, expose=["w"]),
            init_loc_fn=pyro.infer.autoguide.init_to_value(values={"w": start}),
        ),
    )
    x, y = tensor(X), tensor(COUNTS)
    q = em.posterior(x, y)
    em.m_step(q, x, y)
    w = pyro.param("AutoDelta.w").detach().requires_grad_()
    log_p = dist.Poisson((x @ w.T).exp()).log_prob(y.unsqueeze(-1))
    prior = dist.MultivariateNormal(tensor([0.3, 0, 0]), scale_tril=root).log_prob(w)
    (slope,) = torch.autograd.grad((q.probs("z") * log_p).sum() + prior.sum(), w)
    assert float(slope.abs().max()) < 1e-7


def test_a_prior_with_an_edge_is_left_to_gradients() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Laplace(tensor([0.0, 0, 0]), 1.0).to_event(1))
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    pyro.clear_param_store()
    plan = ExactPosteriorEM(model, guide="map").plan(tensor(X), tensor(BITS))
    assert "gradient" in str(plan)
