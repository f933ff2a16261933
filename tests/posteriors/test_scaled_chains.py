"""Chains of Gaussian latents whose variances are multiples of one latent, against multivariate t's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from torch import Tensor
from torch.distributions import constraints, kl_divergence

from pyro_em import ExactPosteriorEM
from pyro_em.posteriors.continuous import gaussian_components
from pyro_em.posteriors.scales.scaled_chain import ScaledChain

STEPS = 8
Y = torch.as_tensor(np.random.default_rng(3).normal(size=(STEPS, 2)).cumsum(0))
SEEN = torch.arange(STEPS) % 5 != 3


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def level(y: Tensor) -> None:
    """A local level that is not seen at some steps, and waiting times with the same rate."""
    q = pyro.param("q", number(0.5), constraint=constraints.positive)
    a = pyro.param("a", number(3.0), constraint=constraints.positive)
    tau = pyro.sample("tau", dist.Gamma(a, 2.0))
    pyro.sample("wait", dist.Exponential(tau), obs=number(0.4))
    x = pyro.sample("x_0", dist.Normal(number(0.3), 2.0 * tau.rsqrt()))
    for t in range(len(y)):
        if t:
            x = pyro.sample(f"x_{t}", dist.Normal(0.9 * x, q * tau.rsqrt()))
        pyro.sample(f"y_{t}", dist.Normal(x, tau.rsqrt()).mask(SEEN[t]), obs=y[t, 0])


def series(y: Tensor) -> None:
    """Two series side by side, with one variance."""
    q = pyro.param("q", number(0.5), constraint=constraints.positive)
    v = pyro.sample("tau", dist.InverseGamma(number(3.0), 2.0))
    with pyro.plate("series", 2):
        x = pyro.sample("x_0", dist.Normal(number(0.0), 2.0 * v.sqrt()))
        for t in range(len(y)):
            if t:
                x = pyro.sample(f"x_{t}", dist.Normal(x, q * v.sqrt()))
            pyro.sample(f"y_{t}", dist.Normal(x, 1.5 * v.sqrt()), obs=y[t])


def vectors(y: Tensor) -> None:
    noise = pyro.param("Q", torch.eye(2).double(), constraint=constraints.positive_definite)
    tau = pyro.sample("tau", dist.Gamma(number(3.0), 2.0))
    eye = torch.eye(2).double()
    x = pyro.sample("x_0", dist.MultivariateNormal(torch.zeros(2).double(), 4 * eye / tau))
    for t in range(len(y)):
        if t:
            x = pyro.sample(f"x_{t}", dist.MultivariateNormal(0.8 * x, noise / tau))
        pyro.sample(f"y_{t}", dist.MultivariateNormal(x, eye / tau), obs=y[t])


def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_components, "may_have_scale", lambda chain: False)


def fitted(model: Callable[..., None]) -> tuple[ExactPosteriorEM, Any]:
    pyro.clear_param_store()
    em = ExactPosteriorEM(model)
    return em, em.fit(Y, max_steps=2, tol=0.0, progress=False)


def test_a_level_is_a_multivariate_t() -> None:
    q = ExactPosteriorEM(level).posterior(Y)
    assert isinstance(q.graph.groups[-1].nested, ScaledChain)
    move = 0.9 ** np.subtract.outer(np.arange(STEPS), np.arange(STEPS)).clip(0)
    root = np.tril(move) * np.array([2.0] + [0.5] * (STEPS - 1))
    states, mean = root @ root.T, 0.3 * 0.9 ** np.arange(STEPS)
    own = SEEN.numpy()
    shape, y = states[np.ix_(own, own)] + np.eye(own.sum()), Y[:, 0].numpy()[own]
    # A waiting time first: the precision is then a Gamma of shape 4 and rate 2.4.
    expected = np.log(3 * 2.0**3 / 2.4**4)
    expected += st.multivariate_t.logpdf(y, mean[own], shape * 2.4 / 4, 8)
    assert q.log_evidence == pytest.approx(expected, abs=1e-10)
    gain = states[:, own] @ np.linalg.inv(shape)
    after = mean + gain @ (y - mean[own])
    assert np.allclose(q.mean("x_*").numpy(), after, atol=1e-10)
    a = 4 + own.sum() / 2
    b = 2.4 + (y - mean[own]) @ np.linalg.solve(shape, y - mean[own]) / 2
    tau = q.marginal("tau")
    assert (float(tau.concentration), float(tau.rate)) == pytest.approx((a, b), abs=1e-10)
    spread = b / (a - 1) * (states - gain @ states[own])[3, 3]
    assert float(q.covariance("x_3")) == pytest.approx(spread, abs=1e-10)
    assert type(q.marginal("x_3")) is dist.StudentT


@pytest.mark.parametrize("model", [series, vectors])
def test_steps_and_answers_are_those_of_a_dense_block(
    model: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    em, result = fitted(model)
    found = [_answers(em, result)]
    dense(monkeypatch)
    em, result = fitted(model)
    found.append(_answers(em, result))
    assert found[0] == pytest.approx(found[1], abs=1e-10)


def _answers(em: ExactPosteriorEM, result: Any) -> list[float]:
    q = result.posterior
    numbers = [*result.history, result.bic, q.entropy(), em.elbo(Y, q=q).gap]
    for part in (*result.params.values(), q.mean("x_5"), q.covariance("x_5")):
        numbers += part.reshape(-1).tolist()
    if "Q" not in result.params:
        numbers += [float(error) for error in result.standard_errors().values()]
    return [float(n) for n in numbers]


@pytest.mark.parametrize("is_dense", [False, True])
def test_another_scale_costs_its_divergence(
    is_dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of vectors, each of which has the scale as often as it has coordinates."""
    if is_dense:
        dense(monkeypatch)
    em = ExactPosteriorEM(vectors)
    given, exact = dist.Gamma(number(3.0), number(2.0)), em.posterior(Y).marginal("tau")
    kl = float(kl_divergence(given, exact))
    assert em.elbo(Y, q={"tau": given}).gap == pytest.approx(kl, abs=1e-9)
