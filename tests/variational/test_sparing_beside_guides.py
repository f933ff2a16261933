"""Large data beside point estimates: guide and model are looked at without numbers for latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, ModelError
from pyro_em.tracing.allocation import NumbersNeeded
from pyro_em.tracing.prototypes import SparingOnce
from tests.tracing.test_sparing import Largest, of_data, sparing

X = torch.randn(60, 2, generator=torch.Generator().manual_seed(3)).double()
X[:20] += 4.0


def means(x: Tensor) -> None:
    with pyro.plate("k", 8):
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(x.shape[1]), 10.0).to_event(1))
    p = pyro.sample("p", dist.Dirichlet(x.new_ones(8)))
    S = pyro.param("S", torch.eye(x.shape[1]).double().repeat(8, 1, 1), C.positive_definite)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)


def steps_of(x: Tensor) -> None:
    """A latent of each row whose prior reads another: its point estimates have to have numbers."""
    p = pyro.param("p", x.new_full((2,), 0.5), constraint=C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        u = pyro.sample("u", dist.LogNormal(z.double(), 1.0))
        pyro.sample("x", dist.Normal(u, 1.0), obs=x[:, 0])


def points(x: Tensor) -> None:
    """A user's own point estimates."""
    with pyro.plate("k", 8):
        mu = pyro.param(
            "means", lambda: torch.linspace(-2, 2, 8 * x.shape[1]).double().reshape(8, -1)
        )
        pyro.sample("mu", dist.Delta(mu, event_dim=1))
    pyro.sample("p", dist.Delta(pyro.param("q", x.new_full((8,), 0.125), C.simplex), event_dim=1))


def fitted(model: Callable[..., Any], guide: Any, x: Tensor) -> tuple[float, dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    result = ExactPosteriorEM(model, guide=guide).fit(x, max_steps=2, tol=0)
    return result.log_evidence, dict(result.params)


@pytest.mark.parametrize("guide", ["map", points])
def test_planning_beside_point_estimates_makes_no_table_of_the_rows(guide: Any) -> None:
    x = torch.randn(30_000, 8).double()
    with sparing(2**16, 256), Largest() as seen:
        ExactPosteriorEM(means, guide=guide).plan(x)
    assert seen.bytes <= 3 * of_data(x)
    pyro.clear_param_store()
    with Largest() as with_numbers:  # what the bound is about: S[z] is N x D x D
        ExactPosteriorEM(means, guide=guide).plan(x)
    assert with_numbers.bytes >= 8 * of_data(x)


def test_point_estimates_of_a_users_guide_take_the_same_steps() -> None:
    """Shadows spare draws of ``z`` only: what begins at given values goes on with the same digits."""
    plain = fitted(means, points, X)
    with sparing():
        spared = fitted(means, points, X)
    assert spared[0] == plain[0]
    torch.testing.assert_close(spared[1], plain[1], rtol=0, atol=0)


def test_a_point_estimate_whose_prior_reads_a_large_latent_gets_numbers() -> None:
    plain = fitted(steps_of, "map", X)
    with sparing():
        spared = fitted(steps_of, "map", X)
    assert spared[1].keys() == plain[1].keys()
    assert all(bool(t.isfinite().all()) for t in spared[1].values())


def test_a_guide_whose_run_needs_numbers_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[SparingOnce] = []

    def run(self: SparingOnce, *args: Any) -> None:
        runs.append(self)
        raise NumbersNeeded

    monkeypatch.setattr(SparingOnce, "__call__", run)
    with sparing():
        plan = ExactPosteriorEM(means, guide="map").plan(X)
    assert len(runs) == 1 and {r.route for r in plan.routes} == {"point estimate", "enumerate"}


def test_arguments_outside_their_constraint_are_refused_beside_points() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(x.new_zeros(8, 2), 10.0).to_event(2))
        s = x.new_tensor([1.0, -1.0]).repeat(4)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(x.new_ones(8)))
            pyro.sample("x", dist.Normal(mu[z], s[z].unsqueeze(-1)).to_event(1), obs=x)

    said = []
    for limit in (2**30, 0):
        pyro.clear_param_store()
        with sparing(limit), pytest.raises(ModelError) as error:
            ExactPosteriorEM(model, guide="map").plan(X)
        said.append(str(error.value))
    assert "scale" in said[0] and "scale" in said[1]
