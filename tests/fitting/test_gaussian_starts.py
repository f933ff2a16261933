"""Starts of fits with Gaussian latents: draws of the prior, or values that are given."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, UsageError


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> Iterator[None]:
    """Each case begins with an empty param store, in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


GENERATOR = torch.Generator().manual_seed(6)
SCORES = torch.randn(60, 2, generator=GENERATOR, dtype=torch.float64)
X = SCORES @ torch.randn(2, 5, generator=GENERATOR, dtype=torch.float64)
X = X + 0.3 * torch.randn(60, 5, generator=GENERATOR, dtype=torch.float64)


def factors(x: Tensor) -> None:
    w = pyro.param("W", lambda: torch.zeros(5, 2))  # where EM would stay for ever
    mu = pyro.param("mu", lambda: torch.zeros(5))
    s = pyro.param("s", lambda: torch.ones(5), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(h @ w.T + mu, s).to_event(1), obs=x)


def fitted(seed: int, init: object = "random", **how: int) -> dict[str, Tensor]:
    pyro.clear_param_store()
    result = ExactPosteriorEM(factors).fit(X, init=init, seed=seed, **{"max_steps": 1, **how})
    return dict(result.params)


def test_random_starts_draw_from_the_prior() -> None:
    one, again, other = fitted(0), fitted(0), fitted(1)
    assert torch.equal(one["W"], again["W"]) and not torch.equal(one["W"], other["W"])
    assert float(one["W"].abs().min()) > 0


def test_restarts_leave_a_start_without_loadings() -> None:
    pyro.clear_param_store()
    result = ExactPosteriorEM(factors).fit(X, num_restarts=2, seed=0, max_steps=60, tol=0)
    assert len(result.ends) == 2 and result.starts[1] > result.starts[0] + 50


@pytest.mark.parametrize("as_distribution", [False, True])
def test_given_values_start_from_the_regression_on_them(as_distribution: bool) -> None:
    init = {"h": dist.Delta(SCORES, event_dim=1) if as_distribution else SCORES}
    em = ExactPosteriorEM(factors)
    first = next(iter(em.fit(X, init=init, max_steps=1, tol=0).history))
    phi = np.concatenate([SCORES.numpy(), np.ones((60, 1))], 1)
    beta, rest, *_ = np.linalg.lstsq(phi, X.numpy(), rcond=None)
    covariance = beta[:2].T @ beta[:2] + np.diag(rest / 60)
    there = dist.MultivariateNormal(torch.tensor(beta[2]), torch.tensor(covariance))
    assert first == pytest.approx(float(there.log_prob(X).sum()), rel=1e-9)


def test_values_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(UsageError, match=r"init\['h'\].*\(60, 2\) was expected"):
        ExactPosteriorEM(factors).fit(X, init={"h": SCORES[:5]})
