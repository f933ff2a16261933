"""Vectors with full covariances below Gaussian latents, of which some coordinates were not seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_em import ExactPosteriorEM
from tests.posteriors.chain_models import noise, number

Case = tuple[
    Callable[..., None], tuple[Any, ...], Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
]


def parameters() -> tuple[Tensor, Tensor, Tensor]:
    """Loadings, an offset and a covariance."""
    W = number("W", [[1.0, 0.2], [0.5, 1.0], [0.3, -1.0]])
    b = number("b", [0.1, -0.2, 0.3])
    R = number(
        "R", [[1.0, 0.3, 0.1], [0.3, 0.8, -0.2], [0.1, -0.2, 0.6]], constraints.positive_definite
    )
    return W, b, R


def chain(y: Tensor) -> None:
    """A vector that follows itself."""
    W, b, R = parameters()
    h = pyro.sample("h_0", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    for t in range(len(y)):
        if t:
            h = pyro.sample(f"h_{t}", dist.Normal(0.8 * h, 0.6).to_event(1))
        pyro.sample(f"y_{t}", dist.MultivariateNormal(W @ h + b, R), obs=y[t])


def rows(y: Tensor) -> None:
    """A vector for each row."""
    W, b, R = parameters()
    with pyro.plate("rows", len(y)):
        h = pyro.sample("h", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("y", dist.MultivariateNormal(h @ W.T + b, R), obs=y)


def marginal(follows: bool, steps: int, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all data, one row after the other."""
    W, b, R = values["W"], values["b"], values["R"]
    lag = torch.arange(steps)
    variance = torch.zeros(steps, steps).double()
    own = torch.ones(()).double()
    for t in range(steps):
        for s in range(t + 1):
            past = variance[s, s] if s < t else own
            variance[t, s] = variance[s, t] = past * (0.8 ** (t - s) if follows else float(t == s))
        own = 0.64 * own + 0.36 if follows else own
    del lag
    covariance = torch.kron(variance, W @ W.T) + torch.kron(torch.eye(steps).double(), R)
    return b.repeat(steps), covariance


def evidence(y: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """log N of what was seen."""
    seen = ~y.reshape(-1).isnan()
    part = covariance[seen][:, seen]
    return dist.MultivariateNormal(mean[seen], part).log_prob(y.reshape(-1)[seen])


def data() -> Tensor:
    """Nine rows: whole ones, some seen in part, one not at all."""
    y = noise(9, 3, seed=30)
    y[1, 0] = y[2, 1] = y[4, 0] = y[4, 2] = y[7, 2] = torch.nan
    y[5] = torch.nan
    return y


@pytest.mark.slow
@pytest.mark.parametrize("model", [chain, rows])
def test_vectors_seen_in_part(model: Callable[..., None]) -> None:
    y = data()
    follows = model is chain
    em = ExactPosteriorEM(model, missing="nan")
    q = em.posterior(y)
    start = {n: p.detach().clone() for n, p in pyro.get_param_store().items()}
    assert q.log_evidence == pytest.approx(
        float(evidence(y, *marginal(follows, len(y), start))), abs=1e-10
    )
    assert float(em.elbo(y).value) == pytest.approx(q.log_evidence, abs=1e-9)
    name = "h_4" if follows else "h"
    given = {r.site: dist.Normal(q.mean(r.site), 0.7).to_event(1) for r in em.plan(y).routes}
    assert given[name].event_shape == (2,)
    bound = float(em.elbo(y, q=given).value)
    assert bound < q.log_evidence

    result = em.fit(y, max_steps=150, tol=0)
    assert all(b >= a - 1e-9 for a, b in zip(result.history, result.history[1:], strict=False))
    # A step of the gradient of the data's own density gains what is left: the maximum is near.
    slope = {}
    for n, value in result.params.items():
        constraint = constraints.positive_definite if n == "R" else constraints.real
        u = transform_to(constraint).inv(value.detach()).requires_grad_()
        slope[n] = (u, transform_to(constraint)(u))
    density = evidence(y, *marginal(follows, len(y), {n: v for n, (_, v) in slope.items()}))
    assert result.log_evidence == pytest.approx(float(density.detach()), abs=1e-9)
    gradient = torch.autograd.grad(density, [u for u, _ in slope.values()])
    first = evidence(y, *marginal(follows, len(y), start))
    assert max(float(g.abs().max()) for g in gradient) < 0.05
    assert float((density - first).detach()) > 1.0


def test_the_expected_scatter_of_one_row() -> None:
    """One row of two coordinates with a known mean: EM's step for the covariance, by hand."""
    y = torch.tensor([[1.0, torch.nan], [0.5, -0.5]]).double()

    def model() -> None:
        R = number("R", [[1.0, 0.5], [0.5, 2.0]], constraints.positive_definite)
        with pyro.plate("rows", 2):
            u = pyro.sample("u", dist.Normal(torch.zeros(()).double(), 1e-8))
            zero = torch.zeros(2).double()
            pyro.sample("y", dist.MultivariateNormal(u.unsqueeze(-1) + zero, R), obs=y)

    result = ExactPosteriorEM(model, missing="nan").fit(max_steps=1, tol=0)
    guess, left = 0.5 * 1.0, 2.0 - 0.5**2
    expected = torch.tensor([[1.0, guess], [guess, guess**2 + left]]).double()
    expected = (expected + y[1].unsqueeze(-1) * y[1]) / 2
    torch.testing.assert_close(result.params["R"], expected, rtol=0.0, atol=1e-6)
    assert math.isfinite(result.log_evidence)
