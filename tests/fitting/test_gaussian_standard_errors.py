"""Standard errors of models with Gaussian latents, against numeric curvature of dense evidences."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM
from tests.dyestuff import BATCH
from tests.dyestuff import FIRST as DYES


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> Iterator[None]:
    """Each case begins with an empty param store, in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def dyes(y: Tensor, batch: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor(1500.0))
    between = pyro.param("between", torch.tensor(50.0), constraint=constraints.positive)
    within = pyro.param("within", torch.tensor(50.0), constraint=constraints.positive)
    with pyro.plate("batches", 6):
        u = pyro.sample("u", dist.Normal(0.0, between))
    with pyro.plate("samples", len(y)):
        pyro.sample("y", dist.Normal(mu + u[batch], within), obs=y)


def curvature(evidence: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """−∂² of an evidence."""
    return -torch.autograd.functional.hessian(evidence, at)


def test_random_intercepts() -> None:
    result = ExactPosteriorEM(dyes).fit(DYES, BATCH, max_steps=300, tol=1e-9)
    Z = torch.eye(6)[BATCH]

    def evidence(v: Tensor) -> Tensor:
        covariance = v[1] ** 2 * Z @ Z.T + v[2] ** 2 * torch.eye(30)
        return dist.MultivariateNormal(v[0].expand(30), covariance).log_prob(DYES)

    names = ("mu", "between", "within")
    at = torch.stack([result.params[n] for n in names])
    wanted = torch.linalg.inv(curvature(evidence, at)).diagonal().sqrt()
    errors = result.standard_errors()
    assert not errors.notes
    torch.testing.assert_close(torch.stack([errors[n] for n in names]), wanted, rtol=1e-4, atol=0.0)


def factors(x: Tensor) -> None:
    n, d = x.shape
    w = pyro.param("W", lambda: torch.randn(d, 2, generator=torch.Generator().manual_seed(0)))
    mu = pyro.param("mu", lambda: torch.zeros(d))
    s = pyro.param("s", lambda: torch.ones(d), constraint=constraints.positive)
    with pyro.plate("rows", n):
        h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(h @ w.T + mu, s).to_event(1), obs=x)


def some_factors() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(7, 2, generator=generator)
    h = torch.randn(200, 2, generator=generator)
    return h @ w.T + 0.7 * torch.randn(200, 7, generator=generator)


@pytest.mark.parametrize("tol", [1.0, 1e-9])
def test_loadings_are_known_up_to_a_rotation(tol: float) -> None:
    """Also where the fit ended early, and the Hessian has some curvature along the rotation."""
    x = some_factors()
    result = ExactPosteriorEM(factors).fit(x, max_steps=300, tol=tol, acceleration="squarem")
    errors = result.standard_errors()

    def evidence(v: Tensor) -> Tensor:
        w = v[:14].reshape(7, 2)
        covariance = w @ w.T + torch.diag(v[21:] ** 2)
        return dist.MultivariateNormal(v[14:21], covariance).log_prob(x).sum()

    at = torch.cat([result.params[n].reshape(-1) for n in ("W", "mu", "s")])
    information = curvature(evidence, at)
    turned = result.params["W"] @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    tangent = torch.cat([turned.reshape(-1), torch.zeros(14)])
    outside = torch.linalg.svd(tangent.unsqueeze(0)).Vh[1:]  # all that is no rotation
    covariance = outside.T @ torch.linalg.inv(outside @ information @ outside.T) @ outside
    wanted = covariance.diagonal().sqrt()
    slack = 1e-6 if tol < 1e-3 else 5e-2  # the slope adds curvature to the map from log s to s
    assert bool(errors["W"].isnan().all())
    torch.testing.assert_close(errors["mu"], wanted[14:21], rtol=slack, atol=0.0)
    torch.testing.assert_close(errors["s"], wanted[21:], rtol=slack, atol=0.0)
    assert len(errors.notes) == 2 and "'W'. The evidence is flat along 1 dir" in errors.notes[0]
    assert "rotated" in errors.notes[1]


def test_one_factor_has_no_rotation() -> None:
    def model(x: Tensor) -> None:
        w = pyro.param("W", lambda: torch.ones(x.shape[1]))
        s = pyro.param("s", lambda: torch.ones(x.shape[1]), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h.unsqueeze(-1) * w, s).to_event(1), obs=x)

    x = some_factors()[:, :4]
    result = ExactPosteriorEM(model).fit(x, max_steps=400, tol=1e-9, acceleration="squarem")
    errors = result.standard_errors()

    def evidence(v: Tensor) -> Tensor:
        covariance = torch.outer(v[:4], v[:4]) + torch.diag(v[4:] ** 2)
        return dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(x).sum()

    at = torch.cat([result.params["W"], result.params["s"]])
    wanted = torch.linalg.inv(curvature(evidence, at)).diagonal().sqrt()
    assert not errors.notes
    torch.testing.assert_close(errors["W"], wanted[:4], rtol=1e-4, atol=0.0)
    torch.testing.assert_close(errors["s"], wanted[4:], rtol=1e-4, atol=0.0)
