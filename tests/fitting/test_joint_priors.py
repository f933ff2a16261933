"""Priors of a mean and its spread together, under ``guide="map"``, against their closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em import Chunks, ClosedForm, EMStatus, ExactPosteriorEM, Gradient

A, B = 3.0, 2.0  # of the inverse gamma
M, KAPPA = 0.5, 4.0  # of the Normal
DF, V = 5.0, torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64)

_g = torch.Generator().manual_seed(0)
Y = torch.randn(60, 2, generator=_g, dtype=torch.float64) @ V + 2.5 * torch.randint(
    0, 2, (60, 1), generator=_g
)
X = Y[:, 0]


def updates_of(result: Any) -> set[type]:
    return {type(u.update) for u in result.plan.updates.values()}


SPREADS: dict[str, Callable[[Tensor], Tensor]] = {
    "of a variance": lambda v: (v / KAPPA).sqrt(),
    "of a standard deviation": lambda v: v.sqrt() / math.sqrt(KAPPA),
}


@pytest.mark.parametrize("how", SPREADS)
def test_normal_inverse_gamma_is_its_closed_form(how: str) -> None:
    """Gelman et al. (2013), section 3.3, at the joint mode of μ and σ²; one step is enough."""

    def model(x: Tensor) -> None:
        v = pyro.sample("v", dist.InverseGamma(A, B))
        mu = pyro.sample("mu", dist.Normal(M, SPREADS[how](v)))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, v.sqrt()), obs=x)

    result = ExactPosteriorEM(model, "map").fit(X, max_steps=1, progress=False)
    n = len(X)
    mu = (KAPPA * M + X.sum()) / (KAPPA + n)
    square = KAPPA * (mu - M) ** 2 + ((X - mu) ** 2).sum()
    torch.testing.assert_close(result.params["AutoDelta.mu"], mu)
    torch.testing.assert_close(result.params["AutoDelta.v"], (2 * B + square) / (n + 1 + 2 * A + 2))
    assert updates_of(result) == {ClosedForm}
    assert "without bound" not in str(result.plan) and result.status is not EMStatus.UNBOUNDED


@pytest.mark.parametrize("argument", ["precision_matrix", "covariance_matrix"])
def test_normal_wishart_is_its_closed_form(argument: str) -> None:
    """Gelman et al. (2013), section 3.6, at the joint mode of μ and Λ."""

    def model(y: Tensor) -> None:
        P = pyro.sample("P", dist.Wishart(torch.tensor(DF).double(), **{argument: V}))
        mu = pyro.sample("mu", dist.MultivariateNormal(V[0], precision_matrix=KAPPA * P))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.MultivariateNormal(mu, precision_matrix=P), obs=y)

    em = ExactPosteriorEM(model, "map")
    em.plan(Y)
    pyro.get_param_store()["AutoDelta.P"] = torch.eye(2)  # zeros beside the diagonal
    result = em.fit(Y, max_steps=1, progress=False)
    n = len(Y)
    mu = (KAPPA * V[0] + Y.sum(0)) / (KAPPA + n)
    about = KAPPA * torch.outer(mu - V[0], mu - V[0]) + (Y - mu).T @ (Y - mu)
    inverse_of_scale = V if argument == "precision_matrix" else V.inverse()
    expected = (about + inverse_of_scale) / (n + 1 + DF - 2 - 1)
    torch.testing.assert_close(result.params["AutoDelta.mu"], mu)
    torch.testing.assert_close(result.params["AutoDelta.P"], expected.inverse())
    assert updates_of(result) == {ClosedForm}


@pytest.mark.parametrize("form", ["precision_matrix", "covariance_matrix"])
def test_a_wishart_prior_is_one_on_precisions(form: str) -> None:
    def model(y: Tensor) -> None:
        P = pyro.sample("P", dist.Wishart(torch.tensor(DF).double(), V))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.MultivariateNormal(V[0], **{form: P}), obs=y)

    result = ExactPosteriorEM(model, "map").fit(Y, max_steps=1, progress=False)
    if form == "covariance_matrix":
        reason = result.plan.updates["AutoDelta.P"].reason
        assert reason == "its Wishart prior is not conjugate to a covariance"
        return
    expected = ((Y - V[0]).T @ (Y - V[0]) + V.inverse()) / (len(Y) + DF - 3)
    torch.testing.assert_close(result.params["AutoDelta.P"], expected.inverse())
    assert updates_of(result) == {ClosedForm}


def mixture(x: Tensor) -> None:
    """Components of a mixture, each with a Normal–inverse-gamma prior."""
    v = pyro.sample("v", dist.InverseGamma(torch.full((2,), A).double(), B).to_event(1))
    factor = torch.tensor([0.5, 0.8], dtype=torch.float64)
    prior = dist.Normal(torch.tensor([0.0, 3.0], dtype=torch.float64), factor * v.sqrt())
    mu = pyro.sample("mu", prior.to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5], dtype=torch.float64)))
        pyro.sample("x", dist.Normal(mu[z], v[z].sqrt()), obs=x)


def log_joint(mu: Tensor, v: Tensor) -> Tensor:
    """log p(x, μ, σ²) of `mixture`, the labels summed out."""
    rows = -0.5 * ((X[:, None] - mu) ** 2 / v + v.log() + math.log(2 * math.pi)) - math.log(2)
    factor, m = torch.tensor([0.5, 0.8]).double(), torch.tensor([0.0, 3.0]).double()
    prior = torch.distributions.Normal(m, factor * v.sqrt()).log_prob(mu).sum()
    gamma = torch.distributions.InverseGamma(torch.tensor(A).double(), torch.tensor(B).double())
    return rows.logsumexp(1).sum() + prior + gamma.log_prob(v).sum()


@pytest.mark.parametrize("chunks", [False, True])
def test_a_mixture_climbs_to_where_the_log_joint_is_flat(chunks: bool) -> None:
    data = Chunks(X, rows=40) if chunks else X
    result = ExactPosteriorEM(mixture, "map").fit(data, tol=1e-10, progress=False)
    assert updates_of(result) == {ClosedForm}
    assert all(b >= a - 1e-9 for a, b in pairwise(result.history))
    mu, v = (result.params[f"AutoDelta.{n}"].clone().requires_grad_() for n in ("mu", "v"))
    value = log_joint(mu, v)
    assert result.elbo == pytest.approx(float(value), abs=1e-9)
    for gradient in torch.autograd.grad(value, [mu, v]):
        assert float(gradient.abs().max()) < 1e-4


def test_a_spread_in_another_form_is_left_to_gradients() -> None:
    def model(x: Tensor) -> None:
        s = pyro.sample("s", dist.InverseGamma(A, B))
        mu = pyro.sample("mu", dist.Normal(M, s.sqrt()))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mu, s), obs=x)

    updates = ExactPosteriorEM(model, "map").plan(X).updates
    assert isinstance(updates["AutoDelta.s"].update, Gradient)
    assert isinstance(updates["AutoDelta.mu"].update, ClosedForm)
