"""Many draws by one run of the model: closed forms, how often the model runs, models that cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM
from tests.analysis.test_predictive import assert_mean

T = torch.tensor
A = T([[0.8, 0.2], [0.3, 0.7]]).double()
SHAPE = T([2.0, 30.0]).double()


class Counted:
    """A model that knows how often it was run."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model, self.runs = model, 0

    def __call__(self, *args: Any) -> Any:
        self.runs += 1
        return self.model(*args)


def gamma_poisson(y: Tensor) -> None:
    z: Any = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        rate = pyro.sample(f"r_{t}", dist.Gamma(SHAPE[z], 2.0))
        pyro.sample(f"y_{t}", dist.Poisson(rate), obs=y[t])


def inflated(y: Tensor) -> None:
    """Rows of two events, with a site that follows from the latent and one that reads none."""
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(A[0]))
        pyro.deterministic("twice", 2 * z)
        loc = 10.0 * z.unsqueeze(-1) + torch.zeros(2).double()
        pyro.sample("y", dist.Gumbel(loc, 1.0).to_event(1), obs=y)
        pyro.sample("free", dist.Normal(0.0, 1.0), obs=y[:, 0])


def test_forecasts_of_gamma_poisson_emissions() -> None:
    """Against the forward recursion over negative binomials."""
    y = T([0.0, 2.0, 18.0, 15.0]).double()
    state = T([1.0, 0.0]).double() @ A
    for value in y:
        state = state * dist.GammaPoisson(SHAPE, T(2.0).double()).log_prob(value).exp()
        state = (state / state.sum()) @ A
    model = Counted(gamma_poisson)
    em = ExactPosteriorEM(model)
    found = em.forecast(torch.cat([y, y.new_full((1,), torch.nan)]), seed=0)
    mean = state @ SHAPE / 2
    variance = state @ (SHAPE / 2 + SHAPE / 4 + SHAPE**2 / 4) - mean**2
    assert_mean(found.draws["y_4"], mean, variance)
    assert model.runs <= 15


def test_all_sites_of_rows_and_what_follows_from_them() -> None:
    model = Counted(inflated)
    x = T([[0.0, 0.5], [9.0, 11.0], [0.0, 1.0]]).double()
    draws = ExactPosteriorEM(model).predictive(x, num_samples=2000, seed=0)
    assert model.runs <= 12
    assert {n: tuple(v.shape) for n, v in draws.items()} == {
        "z": (2000, 3),
        "twice": (2000, 3),
        "y": (2000, 3, 2),
        "free": (2000, 3),
    }
    torch.testing.assert_close(draws["twice"], 2 * draws["z"])
    own = draws["y"] - 10.0 * draws["z"].unsqueeze(-1)  # one draw of z and y belongs together
    assert_mean(own, 0.5772156649015329, torch.pi**2 / 6)
    assert_mean(draws["free"], 0.0, 1.0)
    assert len(draws["free"].unique()) > 5900  # of each draw its own


def matrix(y: Tensor) -> None:
    """Not written for several draws: of as many as it has dimensions it takes draws for columns."""
    h = pyro.sample("h", dist.Normal(torch.zeros(8).double(), 1.0).to_event(1))
    upper = 100.0 * torch.ones(8, 8).double().triu(1)
    pyro.sample("y", dist.Normal(upper @ h, 1.0).to_event(1), obs=y)


@pytest.mark.parametrize("n", [8, 20])
def test_models_that_take_several_draws_for_something_else_answer_one_by_one(n: int) -> None:
    model = Counted(matrix)
    draws = ExactPosteriorEM(model).predictive(torch.zeros(8).double(), num_samples=n, seed=0)
    upper = 100.0 * torch.ones(8, 8).double().triu(1)
    assert float((draws["y"] - draws["h"] @ upper.mT).abs().max()) < 6
    assert model.runs >= n


def test_draws_by_one_run_are_those_of_a_seed() -> None:
    x = T([[0.0, 0.5], [9.0, 11.0]]).double()
    em = ExactPosteriorEM(inflated)
    first, second = (em.predictive(x, num_samples=9, seed=3) for _ in range(2))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0)


def decided(y: Tensor) -> None:
    """A site after another, whose distribution the value decides by Python."""
    count = pyro.sample("count", dist.Poisson(T(5.0).double()), obs=y[0])
    pyro.sample("after", dist.Normal(100.0 if bool((count > 2).any()) else 0.0, 1.0), obs=y[1])


def chosen(y: Tensor) -> None:
    """The same by an index that takes all of a value together."""
    count = pyro.sample("count", dist.Poisson(T(5.0).double()), obs=y[0])
    loc = T([0.0, 100.0]).double()[(count > 2).max().long()]
    pyro.sample("after", dist.Normal(loc, 1.0), obs=y[1])


@pytest.mark.parametrize("model", [decided, chosen])
def test_what_takes_all_of_a_value_together_is_drawn_one_by_one(
    model: Callable[[Tensor], None],
) -> None:
    """Seven of eight draws are above 2, so that two that are looked at may well agree."""
    for seed in range(3):
        draws = ExactPosteriorEM(model).predictive(
            T([4.0, 100.0]).double(), num_samples=60, seed=seed
        )
        low = draws["count"].reshape(-1) <= 2
        assert 0 < int(low.sum()) < 60
        assert float((draws["after"].reshape(-1) - 100.0 * ~low).abs().max()) < 6
