"""Means that are linear in Gaussian latents and not in parameters: the model is run at each step."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> Iterator[None]:
    """Each case begins with an empty param store, in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def features(y: Tensor, x: Tensor) -> None:
    """Bayesian linear regression on features that are learned."""
    a = pyro.param("A", lambda: torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    s = pyro.param("s", torch.tensor(0.5), constraint=constraints.positive)
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(torch.tanh(x @ a) @ w, s), obs=y)


def test_learned_features_have_the_dense_evidence_and_rise() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20, 2, generator=g)
    y = torch.sin(2 * x[:, 0]) + 0.1 * torch.randn(20, generator=g)
    em = ExactPosteriorEM(features)
    plan = em.plan(y, x)
    assert {r.site: r.route for r in plan.routes} == {"w": "Gaussian"}
    assert "not linear in 'A' (tanh)" in plan.updates["A"].reason
    assert "the mean of 'y' is not linear in parameters" in plan.iterations
    result = em.fit(y, x, max_steps=4, tol=0)
    f, s = torch.tanh(x @ result.params["A"]), result.params["s"]
    dense = dist.MultivariateNormal(torch.zeros(20), f @ f.T + s**2 * torch.eye(20))
    assert result.log_evidence == pytest.approx(float(dense.log_prob(y)), abs=1e-8)
    assert min(torch.as_tensor(result.history).diff()) > 0


def test_a_coefficient_through_a_map_is_bound() -> None:
    """tanh(rho) is one element of a parameter through a map: no run of the model is needed."""

    def chain(y: Tensor) -> None:
        rho = pyro.param("rho", torch.tensor(0.5))
        h = torch.tensor(0.0)
        for t in range(len(y)):
            h = pyro.sample(f"h_{t}", dist.Normal(rho.exp() * h, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(h, 0.3), obs=y[t])

    y = torch.randn(5, generator=torch.Generator().manual_seed(2))
    em = ExactPosteriorEM(chain)
    assert em.plan(y).compiled
    result = em.fit(y, max_steps=20, tol=1e-12)
    rho = result.params["rho"].exp()
    low = torch.tensor(
        [[float(rho) ** (i - j) if i >= j else 0.0 for j in range(5)] for i in range(5)]
    )
    dense = dist.MultivariateNormal(torch.zeros(5), low @ low.T + 0.09 * torch.eye(5))
    assert result.log_evidence == pytest.approx(float(dense.log_prob(y)), abs=1e-8)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_networks_of_a_module_are_loadings(layers: int) -> None:
    """A linear network is bound, and the product of two; three in a row are read at each step."""
    torch.manual_seed(0)
    sizes = {1: [(1, 2)], 2: [(1, 3), (3, 2)], 3: [(1, 3), (3, 3), (3, 2)]}[layers]
    network = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in sizes))

    def model(x: Tensor) -> None:
        pyro.module("network", network)
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(network(h[..., None]), 1.0).to_event(1), obs=x)

    x = torch.randn(12, 2)
    em = ExactPosteriorEM(model)
    assert em.plan(x).compiled == (layers < 3)
    result = em.fit(x, max_steps=3, tol=0)
    with torch.no_grad():
        mean = network(torch.zeros(1, 1))[0]
        w = network(torch.ones(1, 1))[0] - mean
    dense = dist.MultivariateNormal(mean, torch.outer(w, w) + torch.eye(2))
    assert result.log_evidence == pytest.approx(dense.log_prob(x).sum().item(), abs=1e-8)
    assert min(torch.as_tensor(result.history).diff()) > -1e-9


def test_who_only_looks_sees_parameters_as_they_are() -> None:
    """A look at loadings of zero shows no shape that other loadings would not have."""
    covariate = torch.arange(6.0)

    def model(x: Tensor) -> None:
        w = pyro.param("W", torch.zeros(2))
        c = pyro.param("c", torch.zeros(()))
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            mean = (h * covariate)[:, None] * w + c * covariate[:, None]
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    em = ExactPosteriorEM(model)
    for w, c in (([0.0, 0.0], 0.0), ([1.0, -0.5], 0.3), ([0.0, 0.0], 1.0)):
        if "W" in pyro.get_param_store():
            with torch.no_grad():
                pyro.get_param_store()._params["W"].copy_(torch.tensor(w))
                pyro.get_param_store()._params["c"].fill_(c)
        total = 0.0
        for row, a in zip(x, covariate, strict=True):
            v = a * torch.tensor(w)
            dense = dist.MultivariateNormal(c * a * torch.ones(2), torch.outer(v, v) + torch.eye(2))
            total += dense.log_prob(row).item()
        assert em.elbo(x).log_evidence == pytest.approx(total, abs=1e-10)
        assert em.score(x) == pytest.approx(total, abs=1e-10)
        assert em.posterior(x).log_evidence == pytest.approx(total, abs=1e-10)
