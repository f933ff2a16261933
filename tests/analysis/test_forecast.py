"""Forecasts against a dense joint in numpy, and against sums over all paths of a chain."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_em import DataError, ExactPosteriorEM, UsageError, vectorized_markov

NAN = math.nan
A = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def local_level(y: Tensor, x: Tensor | None = None, seen: Tensor | None = None, loop=None) -> None:
    """A level, a slope of known inputs, and a constant that is a parameter."""
    slope = pyro.param("slope", torch.tensor(0.5))
    h = torch.tensor(1.0)
    for t in pyro.markov(range(len(y))) if loop is None else loop("time", len(y)):
        h = pyro.sample(f"h_{t}", dist.Normal(h, 0.8))
        mean = h if x is None else h + slope * x[t]
        mask = {} if seen is None else {"obs_mask": seen[t]}
        pyro.sample(f"y_{t}", dist.Normal(mean, 0.5), obs=y[t], **mask)


def conditional(mean, covariance, value) -> tuple[np.ndarray, np.ndarray]:
    """Of a joint normal, what is not seen given what is; NaN where not."""
    s = ~np.isnan(value)
    gain = covariance[np.ix_(~s, s)] @ np.linalg.inv(covariance[np.ix_(s, s)])
    rest = covariance[np.ix_(~s, ~s)] - gain @ covariance[np.ix_(s, ~s)]
    return mean[~s] + gain @ (value - mean)[s], rest


def joint_of_levels(T: int, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps = np.minimum.outer(np.arange(1, T + 1), np.arange(1, T + 1))
    return 1.0 + 0.5 * inputs, 0.64 * steps + 0.25 * np.eye(T)


@pytest.mark.parametrize(
    "how", ["nan", "nan, missing", "obs_mask", "obs_mask, zeros", "vectorised"]
)
def test_a_local_level_is_predicted_as_by_its_dense_joint(how: str) -> None:
    x = torch.linspace(-1, 2, 8)
    y = torch.tensor([1.2, 0.7, NAN, 2.0, 2.4, NAN, NAN, NAN])
    seen = ~y.isnan() if "mask" in how else None
    data = y.nan_to_num() if "zeros" in how else y
    loop = vectorized_markov if how == "vectorised" else None
    em = ExactPosteriorEM(local_level, missing="nan" if "missing" in how else None)
    found = em.forecast(data, x, seen, loop, seed=0, num_samples=20_000)
    mean, covariance = conditional(*joint_of_levels(8, x.numpy()), y.numpy())
    assert list(found.means) == ["y_2", "y_5", "y_6", "y_7"]
    assert found.means["y_*"].numpy() == pytest.approx(mean, abs=1e-11)
    half = 1.959963984540054 * np.sqrt(np.diag(covariance))
    assert found.lower["y_*"].numpy() == pytest.approx(mean - half, abs=1e-10)
    assert found.intervals["y_*"][:, 1].numpy() == pytest.approx(mean + half, abs=1e-10)
    draws = found.draws["y_*"]
    assert draws.shape == (4, 20_000)
    assert np.cov(draws) == pytest.approx(covariance, abs=0.05)
    assert draws.mean(1).numpy() == pytest.approx(mean, abs=0.05)
    assert found.from_draws == ()
    again = em.forecast(data, x, seen, loop, seed=0, num_samples=3, level=0.5)
    half = 0.6744897501960817 * np.sqrt(np.diag(covariance))
    assert again.upper["y_*"].numpy() == pytest.approx(mean + half, abs=1e-10)
    assert torch.equal(
        again.draws["y_5"], em.forecast(data, x, seen, loop, seed=0, num_samples=3).draws["y_5"]
    )


@pytest.mark.parametrize("diagonal", [True, False])
def test_vectors_are_predicted_given_the_entries_of_their_step_that_are_seen(
    diagonal: bool,
) -> None:
    """Several series, a padded step, one entry of a step missing or steps as a whole."""
    T, W = 4, torch.tensor([[1.0, 0.4], [-0.5, 1.0]])
    R = torch.tensor([[0.5, 0.3], [0.3, 0.4]])
    y = torch.tensor(np.random.default_rng(0).normal(size=(T, 2, 2)))
    y[3] = NAN
    y[2, 0, 1:] = NAN
    if not diagonal:
        y[2, 0] = NAN
    there = torch.ones(T, 2, dtype=torch.bool)
    there[2:, 1] = False

    def model() -> None:
        h = torch.zeros(2)
        with pyro.plate("series", 2):
            for t in pyro.markov(range(T)):
                h = pyro.sample(f"h_{t}", dist.Normal(0.9 * h, 1.0).to_event(1))
                fn = dist.MultivariateNormal(h @ W.T, R)
                if diagonal:
                    fn = dist.Normal(h @ W.T, R.diagonal().sqrt()).to_event(1)
                pyro.sample(f"y_{t}", fn.mask(there[t]), obs=y[t])

    prior = np.zeros((T, T))
    for i, j in itertools.product(range(T), repeat=2):
        prior[i, j] = sum(0.9 ** (i + j - 2 * k) for k in range(min(i, j) + 1))
    noise = np.diag(np.diag(R)) if diagonal else R.numpy()
    covariance = np.kron(prior, (W @ W.T).numpy()) + np.kron(np.eye(T), noise)
    found = ExactPosteriorEM(model).forecast(seed=0, num_samples=20_000)
    mean, rest = conditional(np.zeros(2 * T), covariance, y[:, 0].reshape(-1).numpy())
    assert list(found.means) == ["y_2", "y_3"]
    assert found.means["y_3"][0].numpy() == pytest.approx(mean[-2:], abs=1e-10)
    width = found.upper["y_3"] - found.lower["y_3"]
    right = 2 * 1.959963984540054 * np.sqrt(np.diag(rest))[-2:]
    assert width[0].numpy() == pytest.approx(right, abs=1e-9)
    draws = torch.cat([found.draws["y_2"][:, 0, 1:], found.draws["y_3"][:, 0]], -1)
    assert np.cov(draws.T) == pytest.approx(rest[-3:, -3:], abs=0.08)
    if diagonal:
        assert found.means["y_2"][0].tolist() == pytest.approx(
            [float(y[2, 0, 0]), mean[0]], abs=1e-10
        )
        assert torch.equal(found.upper["y_2"][0, 0], y[2, 0, 0])
        assert (found.draws["y_2"][:, 0, 0] == y[2, 0, 0]).all()


def test_a_seen_coordinate_tells_of_the_other_under_each_state() -> None:
    locs = torch.tensor([[-1.0, 0.0], [1.0, 2.0]])
    R = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    y = torch.tensor([[-0.5, 0.3], [0.7, NAN], [NAN, NAN]])
    em = ExactPosteriorEM(chain)
    found = em.forecast(
        y, lambda z: dist.MultivariateNormal(locs[z], R), seed=0, num_samples=20_000
    )
    whole = [dist.MultivariateNormal(m, R) for m in locs]

    def emission(t: int, k: int) -> float:
        if t == 0:
            return float(whole[k].log_prob(y[0]))
        return float(dist.Normal(locs[k, 0], 1.0).log_prob(y[1, 0])) if t == 1 else 0.0

    every, p = paths(3, emission)
    w = [sum(q for path, q in zip(every, p, strict=True) if path[1] == k) for k in (0, 1)]
    each = [float(locs[k, 1] + 0.8 * (y[1, 0] - locs[k, 0])) for k in (0, 1)]
    assert found.means["y_1"][1].item() == pytest.approx(float(np.dot(w, each)), abs=1e-12)
    below = sum(
        q * float(dist.Normal(m, 0.6).cdf(found.upper["y_1"][1]))
        for q, m in zip(w, each, strict=True)
    )
    assert below == pytest.approx(0.975, abs=1e-12)
    draws = found.draws["y_1"]
    assert (draws[:, 0] == y[1, 0]).all()
    assert draws[:, 1].mean().item() == pytest.approx(found.means["y_1"][1].item(), abs=0.02)
    assert np.cov(found.draws["y_2"].T)[0, 1] > 0.8


def paths(T: int, emission) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """All paths, with their probabilities given the data that an emission's log density knows."""
    every = list(itertools.product(range(2), repeat=T))
    log_p = []
    for path in every:
        total, z = 0.0, 0
        for t, k in enumerate(path):
            total += math.log(float(A[z, k])) + emission(t, k)
            z = k
        log_p.append(total)
    p = np.exp(np.array(log_p) - max(log_p))
    return every, p / p.sum()


def chain(y: Tensor, emission) -> None:
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"y_{t}", emission(z), obs=y[t])


def test_states_with_normal_data_have_the_quantiles_of_their_mixture() -> None:
    y = torch.tensor([-0.8, 1.1, NAN, NAN])
    locs, scales = torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 1.5])
    em = ExactPosteriorEM(chain)
    found = em.forecast(y, lambda z: dist.Normal(locs[z], scales[z]), seed=0, num_samples=20_000)
    fns = [dist.Normal(m, s) for m, s in zip(locs, scales, strict=True)]
    every, p = paths(4, lambda t, k: float(fns[k].log_prob(y[t])) if t < 2 else 0.0)
    for t in (2, 3):
        w = np.array(
            [sum(q for path, q in zip(every, p, strict=True) if path[t] == k) for k in (0, 1)]
        )
        assert found.means[f"y_{t}"].item() == pytest.approx(float(w @ locs.numpy()), abs=1e-12)
        for end, right in ((found.lower, 0.025), (found.upper, 0.975)):
            below = sum(q * float(fn.cdf(end[f"y_{t}"])) for q, fn in zip(w, fns, strict=True))
            assert below == pytest.approx(right, abs=1e-12)
    first, second = found.draws["y_2"], found.draws["y_3"]
    pairs = {(i, j): 0.0 for i in (0, 1) for j in (0, 1)}
    for path, q in zip(every, p, strict=True):
        pairs[path[2], path[3]] += q
    right = sum(q * float(locs[i] * locs[j]) for (i, j), q in pairs.items())
    assert float((first * second).mean()) == pytest.approx(right, abs=0.06)
    assert found.from_draws == ()


def test_counts_and_symbols_have_exact_means_and_probabilities() -> None:
    rates = torch.tensor([1.0, 6.0])
    y = torch.tensor([0.0, 7.0, NAN])
    em = ExactPosteriorEM(chain)
    found = em.forecast(y, lambda z: dist.Poisson(rates[z]), seed=0, num_samples=20_000)
    fns = [dist.Poisson(r) for r in rates]
    every, p = paths(3, lambda t, k: float(fns[k].log_prob(y[t])) if t < 2 else 0.0)
    w = np.array([sum(q for path, q in zip(every, p, strict=True) if path[2] == k) for k in (0, 1)])
    assert found.means["y_2"].item() == pytest.approx(float(w @ rates.numpy()), abs=1e-12)
    assert found.from_draws == ("y_2",) and found.means_from_draws == ()
    draws = found.draws["y_2"]
    assert draws.mean().item() == pytest.approx(found.means["y_2"].item(), abs=0.1)
    assert found.lower["y_2"] <= found.means["y_2"] <= found.upper["y_2"]

    table = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    codes = torch.tensor([0.0, 2.0, NAN])
    found = em.forecast(codes, lambda z: dist.Categorical(table[z]), seed=0, num_samples=20_000)
    every, p = paths(3, lambda t, k: math.log(float(table[k, int(codes[t])])) if t < 2 else 0.0)
    w = np.array([sum(q for path, q in zip(every, p, strict=True) if path[2] == k) for k in (0, 1)])
    assert found.probs["y_2"].numpy() == pytest.approx(w @ table.numpy(), abs=1e-12)
    share = torch.bincount(found.draws["y_2"].long(), minlength=3) / 20_000
    assert share.numpy() == pytest.approx(found.probs["y_2"].numpy(), abs=0.02)
    assert not found.means

    def masked(codes: Tensor, seen: Tensor) -> None:
        z = torch.tensor(0)
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            fn = dist.Categorical(table[z])
            pyro.sample(f"y_{t}", fn, obs=codes[t], obs_mask=seen[t])

    same = ExactPosteriorEM(masked).forecast(
        torch.tensor([0, 2, 0]), torch.tensor([True, True, False])
    )
    assert torch.allclose(same.probs["y_2"], found.probs["y_2"], atol=1e-12)


def test_a_class_of_each_series_mixes_its_predictions() -> None:
    scales = torch.tensor([0.1, 2.0])
    y = torch.tensor([[0.1, 1.5], [0.0, -2.0], [NAN, NAN]])

    def model() -> None:
        with pyro.plate("series", 2):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            h = torch.zeros(2)
            for t in pyro.markov(range(3)):
                h = pyro.sample(f"h_{t}", dist.Normal(h, scales[z]))
                pyro.sample(f"y_{t}", dist.Normal(h, 0.5), obs=y[t])

    found = ExactPosteriorEM(model).forecast(seed=0, num_samples=20_000)
    steps = np.minimum.outer(np.arange(1, 4), np.arange(1, 4))
    for b in range(2):
        w, means, deviations = [], [], []
        for s in scales.tolist():
            covariance = s**2 * steps + 0.25 * np.eye(3)
            value = y[:, b].numpy()
            mean, rest = conditional(np.zeros(3), covariance, value)
            seen = torch.distributions.MultivariateNormal(
                torch.zeros(2), torch.tensor(covariance[:2, :2])
            )
            w.append(math.exp(seen.log_prob(y[:2, b])))
            means.append(mean.item())
            deviations.append(math.sqrt(rest.item()))
        w = np.array(w) / sum(w)
        assert found.means["y_2"][b].item() == pytest.approx(w @ means, abs=1e-11)
        normal = torch.distributions.Normal(torch.tensor(means), torch.tensor(deviations))
        below = w @ normal.cdf(found.upper["y_2"][b]).numpy()
        assert below == pytest.approx(0.975, abs=1e-11)
        share = float((found.draws["y_2"][:, b] < found.upper["y_2"][b]).double().mean())
        assert share == pytest.approx(0.975, abs=0.006)


def test_what_was_fitted_predicts_and_stays(tmp_path: Path) -> None:
    def model(y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        h = torch.zeros(())
        for t in pyro.markov(range(len(y))):
            h = pyro.sample(f"h_{t}", dist.Normal(h, scale))
            pyro.sample(f"y_{t}", dist.Normal(h, 0.5), obs=y[t])

    y = torch.tensor([0.4, 1.5, 0.9, 2.2])
    longer = torch.cat([y, y.new_full((2,), NAN)])
    em = ExactPosteriorEM(model)
    result = em.fit(y, max_steps=4, tol=0)
    scale = result.params["scale"].clone()
    found = em.forecast(longer)
    steps = np.minimum.outer(np.arange(1, 7), np.arange(1, 7))
    covariance = float(scale) ** 2 * steps + 0.25 * np.eye(6)
    mean, _ = conditional(np.zeros(6), covariance, longer.numpy())
    assert found.means["y_*"].numpy() == pytest.approx(mean, abs=1e-10)
    assert torch.equal(pyro.param("scale"), scale) and longer[4:].isnan().all()
    assert result.posterior.mean("h_3").item() == pytest.approx(em.posterior(y).mean("h_3").item())
    em.save(tmp_path / "fitted.pt")
    pyro.clear_param_store()
    loaded = ExactPosteriorEM(model)
    loaded.load(tmp_path / "fitted.pt")
    assert torch.allclose(loaded.forecast(longer).means["y_*"], found.means["y_*"], atol=1e-12)
    with pytest.raises(DataError):
        em.posterior(longer)  # NaN is data for nothing else


def test_other_distributions_and_guides_are_predicted_by_draws() -> None:
    y = torch.tensor([[0.2, 0.8], [0.7, 0.3], [NAN, NAN]])
    conc = torch.tensor([[2.0, 8.0], [8.0, 2.0]])
    found = ExactPosteriorEM(chain).forecast(
        y, lambda z: dist.Dirichlet(conc[z]), num_samples=50, seed=1
    )
    assert found.means_from_draws == ("y_2",)
    assert found.draws["y_2"].shape == (50, 2)
    assert torch.allclose(found.draws["y_2"].sum(-1), torch.ones(50))

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Cauchy(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(m, 0.1), obs=y)

    em = ExactPosteriorEM(model, AutoNormal)
    y = torch.tensor([1.0, 1.2, NAN])
    found = em.forecast(y, num_samples=20, seed=0)
    assert found.draws["y"].shape == (20, 3) and (found.draws["y"][:, :2] == y[:2]).all()


def test_what_cannot_be_predicted_is_said() -> None:
    em = ExactPosteriorEM(local_level)
    y = torch.tensor([1.0, 2.0])
    with pytest.raises(UsageError, match="no entry of an observed site is missing"):
        em.forecast(y)
    longer = torch.tensor([1.0, NAN])
    for wrong in ({"level": 1.0}, {"level": "high"}, {"num_samples": 0}, {"seed": 0.5}):
        with pytest.raises(UsageError):
            em.forecast(longer, **wrong)
    found = em.forecast(longer, num_samples=2)
    assert "y_1" in str(found) and "level=0.95" in repr(found)
