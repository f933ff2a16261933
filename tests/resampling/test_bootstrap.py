"""``result.bootstrap`` against closed forms; components matched; the same bits in any processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import Bootstrap, ExactPosteriorEM, UsageError, vectorized_markov
from pyro_em.analysis.ordering import permuted
from pyro_em.resampling.matching import assignment, components_in, matched
from pyro_em.resampling.refits import Again
from pyro_em.tracing.randomness import seeds_from


@pytest.fixture(autouse=True)
def _empty_store() -> Iterator[None]:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def normal(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor(0.0))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mu, s), obs=x)


def switching(x: Tensor) -> None:
    """Two classes of chains of three states: two sets of components, one with a matrix of its own."""
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    start = torch.stack([torch.eye(3) * 0.5 + 1 / 6, torch.eye(3) * 0.2 + 0.8 / 3])
    A = pyro.param("A", start, constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([0.0, 3.0, 7.0]))
    with pyro.plate("sequences", len(x)):
        c = pyro.sample("c", dist.Categorical(w))
        z = pyro.sample("z_0", dist.Categorical(torch.ones(3) / 3))
        pyro.sample("x_0", dist.Normal(mu[z], 1.0), obs=x[:, 0])
        for t in pyro.markov(range(1, x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[c, z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[:, t])


def test_standard_errors_of_a_normal() -> None:
    """σ/√n and σ/√(2n), with the same bits here and in processes, and nothing else changed."""
    x = torch.randn(50, generator=torch.Generator().manual_seed(1)).double() * 2 + 5
    result, random = ExactPosteriorEM(normal).fit(x, tol=1e-8), torch.get_rng_state()
    found = result.bootstrap(30, seed=4)
    sigma = x.std(unbiased=False)
    errors = found.standard_errors
    assert abs(errors["mu"] / (sigma / 50**0.5) - 1) < 4 / (2 * 30) ** 0.5
    assert abs(errors["s"] / (sigma / 100**0.5) - 1) < 4 / (2 * 30) ** 0.5
    assert abs(found.bias["mu"]) < 4 * errors["mu"] / 30**0.5
    low, high = found.interval(0.9)["mu"]
    assert (low < found.draws["mu"]).sum() == (found.draws["mu"] < high).sum() == 28
    beside = result.bootstrap(4, seed=4, processes=2)
    assert all(beside.draws[n].equal(found.draws[n][:4]) for n in ("mu", "s"))
    assert torch.get_rng_state().equal(random) and pyro.param("mu").item() == result.params["mu"]


def test_rows_with_replacement() -> None:
    """Each refit has the moments of its own rows, those of one value alone are counted as failed."""
    x = torch.tensor([0.0, 0.0, 1.0]).double()
    found = ExactPosteriorEM(normal).fit(x, tol=1e-10).bootstrap(20, parametric=False, seed=2)
    means, failed = [], 0
    for _, seed in zip(range(20), seeds_from(2), strict=False):
        assert seed is not None
        rows = x[torch.randint(3, (3,), generator=torch.Generator().manual_seed(seed))]
        failed += len(rows.unique()) == 1
        means += [rows.mean()] * (len(rows.unique()) > 1)
    assert torch.allclose(found.draws["mu"], torch.stack(means), atol=1e-6)
    assert len(found.failures) == failed > 0 and f"{failed} more failed" in str(found)


def test_components_are_matched() -> None:
    """Permuted parameters come back as they were: classes, states, and both axes of transitions."""
    torch.manual_seed(0)
    x = 3.5 * torch.randint(3, (12, 6)).double() + torch.randn(12, 6)
    em = ExactPosteriorEM(switching)
    result = em.fit(x, max_steps=2, tol=0)
    assert result._bootstrap is not None
    again: Again = result._bootstrap.args[0]
    with again.at(result.params, "bootstrap") as fitted:
        own = components_in(fitted.program, result.params)
        turned = dict(result.params)
        for components, order in zip(own, ([1, 0], [2, 0, 1]), strict=True):
            for name, axes in components.axes.items():
                turned[name] = permuted(turned[name], axes, torch.tensor(order))
        back = matched(fitted.program, own, turned)
    assert [c.axes for c in own] == [{"w": (0,), "A": (0,)}, {"A": (1, 2), "mu": (0,)}]
    assert not turned["mu"].equal(result.params["mu"])
    assert all(back[n].equal(v) for n, v in result.params.items())


def test_assignments() -> None:
    """The best permutation, by trying all; with ties too."""
    rng = np.random.default_rng(0)
    for k in range(1, 6):
        for gain in (rng.normal(size=(k, k)), rng.integers(0, 3, (k, k)).astype(float)):
            best = max(sum(gain[range(k), p]) for p in itertools.permutations(range(k)))
            assert gain[range(k), assignment(gain)].sum() == pytest.approx(best)


def series(x: Tensor) -> None:
    z, mu = 0, pyro.param("mu", torch.tensor([0.0, 3.0]))
    for t in vectorized_markov("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.8, 0.2], [0.3, 0.7]])[z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


def shared(x: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(b, pyro.param("s", torch.tensor(1.0))), obs=x)


def test_refused_and_converted() -> None:
    """Dependent rows are refused; what is missing stays missing, what is cast is drawn before it."""
    x = torch.tensor([0.0, 1.0, 4.0, 3.0])
    for model, words in (
        (series, "the data are one series"),
        (shared, "rows share the latent 'b'"),
    ):
        with pytest.raises(UsageError, match=words):
            ExactPosteriorEM(model).fit(x, max_steps=1).bootstrap(2, parametric=False)
        pyro.clear_param_store()

    def cast(x: Tensor, y: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=y)
            p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
            pyro.sample("x", dist.Bernoulli(p), obs=x.float())

    y = torch.tensor([torch.nan] * 4 + [1.0])
    em = ExactPosteriorEM(cast, missing="nan")
    result = em.fit(torch.tensor([0, 1, 1, 0, 0]), y)
    assert result._bootstrap is not None
    with result._bootstrap.args[0].at(result.params, "bootstrap") as fitted:
        (new_x, new_y), _ = fitted.parametric(3, "bootstrap")
    assert new_x.dtype == torch.int64 and new_y.isnan().equal(y.isnan()) and new_y[4] != 1


def test_rows_are_named_as_in_the_summary() -> None:
    """By component and by the columns of the data; in numbers where nothing is known."""
    x = pandas.DataFrame({"height": [0.0, 1.0, 9.0, 8.0], "weight": [1.0, 2.0, 7.0, 9.0]})

    def mixture(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([[0.0, 1.0], [8.0, 8.0]]).double())
        s = pyro.param("s", torch.tensor(1.0).double(), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(mu[z], s).to_event(1), obs=x)

    result = ExactPosteriorEM(mixture).fit(x, max_steps=2, progress=False)
    found = result.bootstrap(2, progress=False)
    table, summary = found.table, result.summary(standard_errors=False)
    assert table.index.equals(summary.index) and ("mu", 1, "weight") in table.index
    assert table["estimate"].equals(summary["estimate"])
    assert table.loc[("mu", 1, "weight"), "standard_error"] == float(
        found.standard_errors["mu"][1, 1]
    )
    assert "weight" in str(found) and "weight" in found._repr_html_()
    plain = Bootstrap({"b": torch.zeros(2)}, {"b": torch.eye(2)}, torch.zeros(2), (), True)
    assert list(plain.table.index) == [("b", 0), ("b", 1)]
