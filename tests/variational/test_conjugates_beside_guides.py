"""Conjugate latents under draws of a guide: the bound, its gradient and posterior against integrals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyro_em import ExactPosteriorEM, TraceExact_ELBO

COUNTS = torch.tensor([0.0, 2.0, 5.0, 1.0, 3.0, 0.0]).double()


def a_tensor(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def counts(x: Tensor) -> None:
    """Rates that are conjugate given a latent that has no exact posterior."""
    u = pyro.sample("u", dist.LogNormal(a_tensor(0.0), 0.5))
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(a_tensor(2.0), u))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def counts_guide(x: Tensor) -> None:
    loc = pyro.param("loc", a_tensor(0.3))
    pyro.sample("u", dist.LogNormal(loc, 0.2))


def sure_guide(x: Tensor) -> None:
    pyro.sample("u", dist.LogNormal(a_tensor(0.3), 1e-6))


def means(x: Tensor) -> None:
    """A Normal-Gamma given such a latent, in a mean and in a precision's prior."""
    u = pyro.sample("u", dist.LogNormal(a_tensor(0.0), 0.5))
    tau = pyro.sample("tau", dist.Gamma(a_tensor(2.0), u))
    mu = pyro.sample("mu", dist.Normal(u, (0.5 * tau).rsqrt()))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, tau.rsqrt()), obs=x)


def _log_counts(u: float) -> float:
    return float(st.nbinom.logpmf(COUNTS.numpy(), 2, u / (u + 1)).sum())


def _log_means(u: float) -> float:
    n = len(COUNTS)
    scale = (np.eye(n) + np.ones((n, n)) / 0.5) * u / 2
    return float(st.multivariate_t.logpdf(COUNTS.numpy(), np.full(n, u), scale, df=4))


@pytest.mark.parametrize(
    ("model", "log_given"), [(counts, _log_counts), (means, _log_means)], ids=["counts", "means"]
)
def test_bound_and_gradient_are_those_of_the_integrated_model(
    model: Callable[[Tensor], None], log_given: Callable[[float], float]
) -> None:
    """One draw u = exp(loc + 0.2 ε), its derivative by differences."""
    elbo = TraceExact_ELBO()
    elbo.loss(
        model, counts_guide, COUNTS
    )  # the first one looks at the model, with draws of its own
    pyro.set_rng_seed(3)
    loss = elbo.differentiable_loss(model, counts_guide, COUNTS)
    loss.backward()
    pyro.set_rng_seed(3)
    noise = float(torch.randn((), dtype=torch.float64))

    def expected(loc: float) -> float:
        u = np.exp(loc + 0.2 * noise)
        log_q = st.norm.logpdf(np.log(u), loc, 0.2)
        return log_given(u) + st.norm.logpdf(np.log(u), 0, 0.5) - log_q

    assert -float(loss.detach()) == pytest.approx(expected(0.3), abs=1e-9)
    slope = (expected(0.3 + 1e-5) - expected(0.3 - 1e-5)) / 2e-5
    grad = pyro.get_param_store()._params["loc"].grad
    assert grad is not None and -float(grad) == pytest.approx(slope, rel=1e-6)


def test_latents_leave_a_guide_that_draws_others() -> None:
    def routes(guide: type, model: Callable[[Tensor], None] = counts) -> dict[str, str]:
        pyro.clear_param_store()
        return {r.site: r.route for r in ExactPosteriorEM(model, guide).plan(COUNTS).routes}

    assert routes(AutoNormal) == {"u": "guide", "rate": "conjugate"}
    assert routes(AutoNormal, means) == {"u": "guide", "tau": "conjugate", "mu": "Gaussian"}
    assert routes(AutoMultivariateNormal) == {"u": "guide", "rate": "guide"}
    pyro.clear_param_store()
    q = ExactPosteriorEM(counts, sure_guide).posterior(COUNTS)
    u = np.exp(0.3)
    assert torch.allclose(q.mean("rate", num_particles=2), (2 + COUNTS) / (u + 1), rtol=1e-4)
    spread = (2 + COUNTS) / (u + 1) ** 2
    assert torch.allclose(q.covariance("rate", num_particles=2), spread, rtol=1e-4)


def test_rows_of_a_batch_count_as_often_as_they_stand_for() -> None:
    """A batch of all rows is all rows; a latent outside the plate is refused."""
    found = []
    for more in ({}, {"batch_size": 3}):
        pyro.clear_param_store()
        em = ExactPosteriorEM(counts, counts_guide, optim=pyro.optim.Adam({"lr": 0.02}))
        found.append(float(em.fit(COUNTS.new_ones(6), max_steps=4, seed=0, **more).params["loc"]))
    # All rows are alike, so that any batch has the gradient of all.
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    pyro.clear_param_store()

    def guide(model: Callable[[Tensor], None]) -> AutoNormal:
        return AutoNormal(poutine.block(model, hide=["tau", "mu"]))

    with pytest.raises(Exception, match="connect rows of plate 'rows', of which a batch holds"):
        ExactPosteriorEM(means, guide).fit(COUNTS, max_steps=1, batch_size=3)
