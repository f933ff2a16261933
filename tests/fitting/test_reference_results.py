"""Published optima and paths that an exact EM must reproduce, at the default stopping rule too."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_em import ClosedForm, EMStatus, ExactPosteriorEM, Gradient
from tests.data_sets import (
    CARCINOMA,
    EARTHQUAKES,
    LONDON_COUNTS,
    VALUES,
    faithful,
    iris,
    patterns,
)

STRUCTURES = ("full", "tied", "diag", "spherical")


def gaussian_mixture(structure: str, K: int = 2):
    """A Gaussian mixture of one of scikit-learn's four covariance structures."""

    def model(x, start=None):
        start = x[:K] if start is None else start
        D = x.shape[1]
        w = pyro.param("w", torch.ones(K) / K, constraint=constraints.simplex)
        mu = pyro.param("mu", start.clone())
        cov = torch.cov(x.T, correction=0)
        if structure == "full":
            S = pyro.param("S", cov.repeat(K, 1, 1), constraint=constraints.positive_definite)
        elif structure == "tied":
            S = pyro.param("S", cov, constraint=constraints.positive_definite)
        elif structure == "diag":
            s = pyro.param("s", cov.diagonal().sqrt().repeat(K, 1), constraint=constraints.positive)
        else:
            s = pyro.param(
                "s", cov.diagonal().mean().sqrt().repeat(K), constraint=constraints.positive
            )
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            if structure == "full":
                emission = dist.MultivariateNormal(mu[z], S[z])
            elif structure == "tied":
                emission = dist.MultivariateNormal(mu[z], S)
            elif structure == "diag":
                emission = dist.Normal(mu[z], s[z]).to_event(1)
            else:
                emission = dist.Normal(mu[z], s[z].unsqueeze(-1)).to_event(1)
            pyro.sample("x", emission, obs=x)
        return D

    return model


def textbook_em(x: np.ndarray, mu: np.ndarray, structure: str, steps: int) -> list[float]:
    """EM of a Gaussian mixture, written from the textbook in numpy: evidence entering each step."""
    N, D = x.shape
    K = len(mu)
    w = np.ones(K) / K
    cov = np.cov(x.T, bias=True)
    if structure == "diag":
        cov = np.diag(np.diag(cov))
    elif structure == "spherical":
        cov = np.eye(D) * np.trace(cov) / D
    S = np.stack([cov] * K)
    path = []
    for _ in range(steps):
        log_p = np.empty((N, K))
        for k in range(K):
            d = x - mu[k]
            quad = np.einsum("nd,de,ne->n", d, np.linalg.inv(S[k]), d)
            log_p[:, k] = np.log(w[k]) - 0.5 * (
                quad + np.log(np.linalg.det(S[k])) + D * np.log(2 * np.pi)
            )
        top = log_p.max(1, keepdims=True)
        total = np.log(np.exp(log_p - top).sum(1)) + top[:, 0]
        path.append(total.sum())
        r = np.exp(log_p - total[:, None])
        Nk = r.sum(0)
        w, mu = Nk / N, (r.T @ x) / Nk[:, None]
        each = []
        for k in range(K):
            d = x - mu[k]
            each.append((r[:, k : k + 1] * d).T @ d / Nk[k])
        S = np.stack(each)
        if structure == "tied":
            S = np.stack([(Nk[:, None, None] * S).sum(0) / N] * K)
        elif structure == "diag":
            S = np.stack([np.diag(np.diag(s)) for s in S])
        elif structure == "spherical":
            S = np.stack([np.eye(D) * np.trace(s) / D for s in S])
    return path


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("data,K", [("iris", 2), ("iris", 3), ("faithful", 2), ("faithful", 3)])
def test_each_step_equals_textbook_em(structure: str, data: str, K: int) -> None:
    x = {"iris": iris, "faithful": faithful}[data]()
    start = x[[0, 60, 120][:K]]
    result = ExactPosteriorEM(gaussian_mixture(structure, K)).fit(x, start, max_steps=15, tol=0)
    expected = textbook_em(x.numpy(), start.numpy(), structure, 15)
    np.testing.assert_allclose(list(result.history), expected, rtol=1e-8)
    assert result.plan.compiled
    assert all(type(u.update) is ClosedForm for u in result.plan.updates.values())


GMM_OPTIMA = {
    "faithful": (-1130.263960, -1140.186759, -1147.806353, -1709.529282),
    "iris": (-214.354704, -296.447575, -386.185347, -478.559096),
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("data", ["faithful", "iris"])
def test_gaussian_mixture_optima(structure: str, data: str) -> None:
    x = {"iris": iris, "faithful": faithful}[data]()
    # "Things are easy when we know z": a rough split of the longest feature starts it.
    labels = (x[:, 1] > 68).long() if data == "faithful" else (x[:, 2] > 2.5).long()
    start = x[:2]
    optimum = GMM_OPTIMA[data][STRUCTURES.index(structure)]
    em = ExactPosteriorEM(gaussian_mixture(structure))
    at_default = em.fit(x, start, init={"z": labels})
    assert at_default.converged
    assert at_default.log_evidence == pytest.approx(optimum, abs=1e-2)  # ten times tol
    result = em.fit(x, start, tol=1e-10, max_steps=3000)  # continues
    assert result.log_evidence == pytest.approx(optimum, abs=1e-5)
    assert np.all(np.diff(result.history) > -1e-9 * abs(optimum))


def test_old_faithful_parameters() -> None:
    x = faithful()
    result = ExactPosteriorEM(gaussian_mixture("full")).fit(x, tol=1e-10)
    order = result.params["w"].argsort()
    expected = {
        "w": [0.3558729, 0.6441271],
        "mu": [[2.036388, 54.478517], [4.289662, 79.968115]],
        "S": [
            [[0.0691677, 0.4351678], [0.4351678, 33.6972835]],
            [[0.1699684, 0.9406089], [0.9406089, 36.0462071]],
        ],
    }
    for name, value in expected.items():
        torch.testing.assert_close(
            result.params[name][order], torch.tensor(value), atol=1e-4, rtol=0
        )


def test_the_slow_tied_three_component_optimum() -> None:
    """mclust publishes −1126.32624 for it: a program that stopped early."""
    x = faithful()
    start = torch.tensor([[2.0, 54.5], [4.0, 75.0], [4.4, 84.0]])
    em = ExactPosteriorEM(gaussian_mixture("tied", 3))
    result = em.fit(x, start, max_steps=6000, tol=1e-7)
    assert result.status is EMStatus.CONVERGED
    assert result.log_evidence == pytest.approx(-1126.315928, abs=1e-5)
    weights = result.params["w"].sort().values
    torch.testing.assert_close(
        weights, torch.tensor([0.168602, 0.356378, 0.475020]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("shared", [False, True])
def test_waiting_times(shared: bool) -> None:
    y = faithful()[:, 1]

    def model(y):
        w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([55.0, 80.0]))
        s = pyro.param(
            "s", torch.tensor(6.0 if shared else [6.0, 6.0]), constraint=constraints.positive
        )
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Normal(mu[z], s if shared else s[z]), obs=y)

    result = ExactPosteriorEM(model).fit(y, tol=1e-9)
    assert result.log_evidence == pytest.approx(-1034.001760 if shared else -1034.001750, abs=1e-5)


def test_two_coins() -> None:
    heads = torch.tensor([5.0, 9.0, 8.0, 4.0, 7.0])

    def model(heads):
        p = pyro.param("p", torch.tensor([0.6, 0.5]), constraint=constraints.unit_interval)
        with pyro.plate("rows", len(heads)):
            coin = pyro.sample("coin", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("heads", dist.Binomial(10, p[coin]), obs=heads)

    em = ExactPosteriorEM(model)
    path = {}
    for step in em.steps(heads):
        path[step.index + 1] = step.params["p"].clone()
        if step.index == 9:
            break
    close = {"atol": 1e-6, "rtol": 0}
    torch.testing.assert_close(path[1], torch.tensor([0.713012, 0.581339]), **close)
    torch.testing.assert_close(path[10], torch.tensor([0.796744, 0.519659]), **close)
    result = em.fit(heads, tol=1e-13)
    torch.testing.assert_close(
        result.params["p"], torch.tensor([0.7967890669, 0.5195831201]), atol=1e-7, rtol=0
    )
    assert result.log_evidence == pytest.approx(-9.7969242922, abs=1e-9)


def latent_class(K: int, seed: int = 0):
    def model(x):
        generator = torch.Generator().manual_seed(seed)
        start = 0.2 + 0.6 * torch.rand(K, x.shape[1], generator=generator, dtype=x.dtype)
        w = pyro.param("w", torch.ones(K) / K, constraint=constraints.simplex)
        p = pyro.param("p", start, constraint=constraints.unit_interval)
        with pyro.plate("people", len(x)):
            z = pyro.sample("class", dist.Categorical(w))
            pyro.sample("x", dist.Bernoulli(p[z]).to_event(1), obs=x)

    return model


@pytest.mark.parametrize("K,optimum", [(2, -317.256837), (3, -293.704979), (4, -289.285849)])
def test_carcinoma_latent_classes(K: int, optimum: float) -> None:
    x = patterns(CARCINOMA)
    result = ExactPosteriorEM(latent_class(K)).fit(
        x, num_restarts=8, seed=3, tol=1e-7, max_steps=3000
    )
    assert result.log_evidence == pytest.approx(optimum, abs=1e-5)
    assert bool(torch.isfinite(result.params["p"]).all())


def test_values_latent_classes() -> None:
    result = ExactPosteriorEM(latent_class(2)).fit(patterns(VALUES), tol=1e-10, max_steps=5000)
    assert result.log_evidence == pytest.approx(-504.467670, abs=1e-5)
    torch.testing.assert_close(
        result.params["w"].sort().values, torch.tensor([0.279246, 0.720754]), atol=1e-4, rtol=0
    )


def test_earthquakes_poisson_hmm() -> None:
    def model(y):
        A = pyro.param("A", torch.tensor([[0.9, 0.1], [0.1, 0.9]]), constraint=constraints.simplex)
        pi = pyro.param("pi", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
        rate = pyro.param("rate", torch.tensor([15.0, 25.0]), constraint=constraints.positive)
        z = None
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
            pyro.sample(f"y_{t}", dist.Poisson(rate[z]), obs=y[t])

    em = ExactPosteriorEM(model)
    assert em.fit(EARTHQUAKES).log_evidence == pytest.approx(-341.878701, abs=1e-2)
    result = em.fit(EARTHQUAKES, tol=1e-10)
    assert result.log_evidence == pytest.approx(-341.878701, abs=1e-5)
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(result.params["rate"], torch.tensor([15.420764, 26.018241]), **close)
    torch.testing.assert_close(
        result.params["A"], torch.tensor([[0.928374, 0.071626], [0.119034, 0.880966]]), **close
    )


def linkage_model(counts):
    """Cells ½ + p/4, (1−p)/4, (1−p)/4, p/4; the first is the sum of ½ and p/4."""
    p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
    q = 1 - p
    cells = torch.stack([torch.full_like(p, 0.5), p / 4, q / 4, q / 4, p / 4])
    shown = torch.tensor([0, 0, 1, 2, 3])
    observed = torch.repeat_interleave(torch.arange(4), counts)
    with pyro.plate("animals", len(observed)):
        z = pyro.sample("z", dist.Categorical(cells))
        seen = torch.nn.functional.one_hot(shown, 4).to(p.dtype)
        pyro.sample("x", dist.Categorical(seen[z]), obs=observed)


LINKAGE = torch.tensor([125, 18, 20, 34])


def test_genetic_linkage_digit_by_digit() -> None:
    em = ExactPosteriorEM(linkage_model)
    assert isinstance(em.plan(LINKAGE).updates["p"].update, Gradient)
    path = []
    for step in em.steps(LINKAGE):
        path.append(float(step.params["p"]))
        if step.index == 4:
            break
    expected = [0.608247423, 0.624321050, 0.626488879, 0.626777322, 0.626815632]
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-9)
    result = em.fit(LINKAGE, tol=0, max_steps=20)
    assert float(result.params["p"]) == pytest.approx((15 + np.sqrt(53809)) / 394, abs=1e-9)
    assert float(result.standard_errors()["p"]) == pytest.approx(0.0514673, abs=1e-6)


def london_model(counts):
    w = pyro.param("w", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
    rate = pyro.param("rate", torch.tensor([1.0, 2.5]), constraint=constraints.positive)
    with pyro.plate("values", len(counts)), pyro.poutine.scale(scale=counts):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Poisson(rate[z]), obs=torch.arange(len(counts)).to(counts.dtype))


def test_london_times_standard_errors() -> None:
    em = ExactPosteriorEM(london_model)
    result = em.fit(LONDON_COUNTS, tol=1e-11, max_steps=20000)
    close = {"atol": 1e-5, "rtol": 0}
    assert float(result.params["w"][0]) == pytest.approx(0.3598854, abs=2e-5)
    torch.testing.assert_close(
        result.params["rate"], torch.tensor([1.2560951, 2.6634044]), atol=2e-5, rtol=0
    )
    errors = result.standard_errors()
    torch.testing.assert_close(errors["w"], torch.tensor([0.194684, 0.194684]), **close)
    torch.testing.assert_close(errors["rate"], torch.tensor([0.350029, 0.250478]), **close)
    assert result.num_rows == 1096


def test_weights_equal_replication() -> None:
    n = int(LONDON_COUNTS.sum())
    replicated = torch.repeat_interleave(torch.arange(10.0), LONDON_COUNTS.long())

    def model(x):
        w = pyro.param("w", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        rate = pyro.param("rate", torch.tensor([1.0, 2.5]), constraint=constraints.positive)
        with pyro.plate("days", n):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Poisson(rate[z]), obs=x)

    long = ExactPosteriorEM(model).fit(replicated, max_steps=20, tol=0)
    pyro.clear_param_store()
    short = ExactPosteriorEM(london_model).fit(LONDON_COUNTS, max_steps=20, tol=0)
    np.testing.assert_allclose(list(short.history), list(long.history), rtol=1e-12)
    torch.testing.assert_close(short.params["rate"], long.params["rate"])
    assert short.bic == pytest.approx(long.bic)
