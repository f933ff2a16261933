"""Steps on sums of models with conjugate priors: those through tables at every step."""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, Fixed
from pyro_em.fitting.results.history import EMStatus
from pyro_em.posteriors.chains.chain import Chain
from pyro_em.posteriors.mixtures.mixture import Mixture
from tests.densities.test_kernels import Model, both_fits, points, steps_of, symbols

K = 3
CONCENTRATION = 2.0 + torch.tensor(
    [[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0], [0.0, 2.0, 0.0, 2.0]]
)


def numbers(x: Tensor, spread: str) -> None:
    w = pyro.sample("w", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.5]).to(x)))
    with pyro.plate("components", K):
        mu = pyro.sample("mu", dist.Normal(x.new_tensor([-1.0, 0.0, 2.0]), 2.0))
        if spread == "precision":
            s = pyro.sample("s", dist.Gamma(x.new_tensor(3.0), 2.0)).rsqrt()
        elif spread == "variance":
            s = pyro.sample("s", dist.InverseGamma(x.new_tensor(3.0), 2.0)).sqrt()
        else:
            s = pyro.param("s", x.new_ones(K), constraint=C.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)


def vectors(x: Tensor, prior: str) -> None:
    D = x.shape[1]
    if prior == "weights":
        w = pyro.sample("w", dist.Dirichlet(x.new_full((K,), 5.0)))
        mu = pyro.param("mu", x[:K].clone())
    else:
        w = pyro.param("w", x.new_ones(K) / K, constraint=C.simplex)
        with pyro.plate("components", K):
            if prior == "vector":
                cov = torch.eye(D).to(x) + 0.5
                mu = pyro.sample("mu", dist.MultivariateNormal(x.new_zeros(D), cov))
            else:
                mu = pyro.sample("mu", dist.Normal(x.new_zeros(D), 3.0).to_event(1))
    S = pyro.param("S", torch.cov(x.T).repeat(K, 1, 1), constraint=C.positive_definite)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)


def rates(x: Tensor, prior: str) -> None:
    w = pyro.sample("w", dist.Dirichlet(torch.ones(K)))
    with pyro.plate("components", K):
        if prior == "Gamma":
            rate = pyro.sample("rate", dist.Gamma(torch.tensor([2.0, 3.0, 9.0]), 1.5))
        else:
            rate = pyro.sample("rate", dist.Exponential(0.3))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Poisson(rate[z]), obs=x)


def classes(x: Tensor, mask: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Dirichlet(torch.tensor([2.0, 2.0, 4.0])))
    with pyro.plate("components", K):
        p = pyro.sample("p", dist.Beta(2.0, 3.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        for j in range(x.shape[1]):
            keep = True if mask is None else mask[:, j]
            with pyro.poutine.mask(mask=keep):
                pyro.sample(f"x_{j}", dist.Bernoulli(p[z, j]), obs=x[:, j])


def chain(x: Tensor, emission: str) -> None:
    pi = pyro.sample("pi", dist.Dirichlet(torch.full((K,), 1.5)))
    A = pyro.sample("A", dist.Dirichlet(0.9 * torch.eye(K) + 1.1).to_event(1))
    if emission == "symbols":
        B = pyro.sample("B", dist.Dirichlet(CONCENTRATION.double()).to_event(1))
    else:
        with pyro.plate("states", K):
            mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 0.0, 1.0]), 1.0))
    with pyro.plate("sequences", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
            if emission == "symbols":
                pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=x[:, t])
            else:
                pyro.sample(f"x_{t}", dist.Normal(mu[z], 0.8), obs=x[:, t])


BITS = (points(300, 4) > 0.5).double()
CASES: dict[str, tuple[type, Model, tuple[Any, ...]]] = {
    **{
        f"numbers, {spread}": (Mixture, numbers, (points(80, 1)[:, 0] * 2, spread))
        for spread in ("precision", "variance", "parameter")
    },
    **{
        f"vectors, {prior}": (Mixture, vectors, (points(120, 2), prior))
        for prior in ("weights", "vector", "numbers")
    },
    "rates, Gamma": (Mixture, rates, (symbols(90).double(), "Gamma")),
    "rates, Exponential": (Mixture, rates, (symbols(90).double(), "Exponential")),
    "classes": (Mixture, classes, (BITS,)),
    "classes, missing": (Mixture, classes, (BITS, points(300, 4, 5) > 0.5)),
    "chains": (Chain, chain, (symbols(4, 8), "symbols")),
    "chains, Normal": (Chain, chain, (points(5, 8), "numbers")),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_the_full_step(case: str) -> None:
    kernel, model, args = CASES[case]
    em = steps_of(model, args, kernel, guide="map")
    assert em.block.theta.prior.counts is not None or em.block.theta.prior.rest


@pytest.mark.parametrize("case", CASES)
def test_fits_are_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, args = CASES[case]
    quick, full = both_fits(monkeypatch, model, *args, guide="map", max_steps=15)
    assert quick.num_steps == full.num_steps and quick.status is full.status
    np.testing.assert_allclose(quick.history, full.history, rtol=1e-10)
    np.testing.assert_allclose(quick.history.after_m_step, full.history.after_m_step, rtol=1e-10)
    assert quick.log_evidence == pytest.approx(full.log_evidence, rel=1e-10)
    assert quick.elbo == pytest.approx(full.elbo, rel=1e-10)
    assert abs(quick.elbo - quick.log_evidence) > 1e-3  # the log prior
    for name in full.params:
        torch.testing.assert_close(quick.params[name], full.params[name], rtol=1e-7, atol=1e-9)
    site = next(iter(full.posterior.graph.latents))
    torch.testing.assert_close(quick.posterior.probs(site), full.posterior.probs(site))


def test_the_mode_of_a_mixture_by_hand() -> None:
    """MAP-EM in numpy: counts plus prior counts, precisions plus prior precisions."""
    x = points(200, 1)[:, 0] * 2

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.tensor([3.0, 2.0])))
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 0.7))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], 0.9), obs=x)

    em = ExactPosteriorEM(model, "map")
    start = em.fit(x, max_steps=0, progress=False).params
    w, mu = (start[n].numpy().copy() for n in ("w", "mu"))
    result = em.fit(x, max_steps=25, tol=0.0, progress=False)
    assert result.num_steps == 25
    data = x.numpy()[:, None]
    for _ in range(25):
        joint = w * np.exp(-0.5 * ((data - mu) / 0.9) ** 2)
        r = joint / joint.sum(1, keepdims=True)
        n = r.sum(0)
        w = (n + np.array([2.0, 1.0])) / (len(data) + 3.0)
        mu = ((r * data).sum(0) / 0.81 + np.array([-1.0, 1.0]) / 0.49) / (n / 0.81 + 1 / 0.49)
    np.testing.assert_allclose(result.params["w"].detach(), w, rtol=1e-9)
    np.testing.assert_allclose(result.params["mu"].detach(), mu, rtol=1e-9)
    joint = w * np.exp(-0.5 * ((data - mu) / 0.9) ** 2) / (0.9 * math.sqrt(2 * math.pi))
    evidence = float(np.log(joint.sum(1)).sum())
    prior = dist.Dirichlet(torch.tensor([3.0, 2.0])).log_prob(torch.as_tensor(w))
    prior += dist.Normal(torch.tensor([-1.0, 1.0]), 0.7).log_prob(torch.as_tensor(mu)).sum()
    assert result.log_evidence == pytest.approx(evidence, rel=1e-12)
    assert result.elbo == pytest.approx(evidence + float(prior), rel=1e-12)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    concentration=st.floats(1.0, 20.0),
    shape=st.floats(1.0, 9.0),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_random_priors(seed: int, concentration: float, shape: float, scale: float) -> None:
    pyro.clear_param_store()
    x = (points(60, 1, seed)[:, 0].abs() * 3 * scale).round()

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.full((2,), concentration)))
        with pyro.plate("components", 2):
            rate = pyro.sample("rate", dist.Gamma(shape, torch.tensor([1.0, 0.3]) / scale))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Poisson(rate[z]), obs=x)

    steps_of(model, (x,), Mixture, steps=3, guide="map")


def test_a_mode_on_the_boundary_is_said_by_the_full_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dirichlet(0.2) on a symbol that one state hardly has."""

    def model(x: Tensor) -> None:
        with pyro.plate("components", 2):
            p = pyro.sample("p", dist.Dirichlet(torch.full((4,), 0.2)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Categorical(p[z]), obs=x)

    x = torch.tensor([0] * 20 + [1] * 20 + [2])
    with pytest.warns(match="on the boundary"):
        quick, full = both_fits(monkeypatch, model, x, guide="map")
    assert quick.status is full.status is EMStatus.DEGENERATE
    assert quick.message == full.message and quick.num_steps == full.num_steps


@pytest.mark.parametrize("concentration", [1.5, 0.9])
def test_a_row_without_data_and_without_a_mode_is_said(
    monkeypatch: pytest.MonkeyPatch, concentration: float
) -> None:
    """Without its prior it would keep its value."""

    def model(x: Tensor) -> None:
        with pyro.plate("components", 3):
            p = pyro.sample("p", dist.Dirichlet(torch.full((4,), concentration)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5, 0.0])))
            pyro.sample("x", dist.Categorical(p[z]), obs=x)

    x = torch.tensor([0] * 20 + [1] * 20 + [2] * 5 + [3] * 5)
    with contextlib.nullcontext() if concentration > 1 else pytest.warns(match="on the boundary"):
        quick, full = both_fits(monkeypatch, model, x, guide="map", max_steps=5)
    assert quick.num_steps == full.num_steps and quick.message == full.message
    assert (quick.status is full.status is EMStatus.DEGENERATE) == (concentration < 1)


def test_what_the_kernels_do_not_know_keeps_the_full_step() -> None:
    def uniform(x: Tensor) -> None:
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Uniform(torch.tensor([-3.0, 0.0]), 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    def learned(x: Tensor) -> None:
        tau = pyro.param("tau", torch.tensor(1.0), constraint=C.positive)
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(torch.tensor([-3.0, 0.0]), tau))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    def weighted(x: Tensor) -> None:
        with pyro.plate("components", 2), pyro.poutine.scale(scale=0.5):
            mu = pyro.sample("mu", dist.Normal(torch.tensor([-3.0, 0.0]), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    for model in (uniform, learned, weighted):
        pyro.clear_param_store()
        steps_of(model, (points(40, 1)[:, 0],), None, guide="map")


def test_a_fixed_estimate_keeps_its_prior() -> None:
    x = points(80, 1)[:, 0] * 2
    found = []
    for updates in ({}, {"*mu": Fixed()}):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        em = ExactPosteriorEM(numbers, "map", updates=updates)
        found.append(em.fit(x, "precision", max_steps=30, progress=False))
    free, fixed = found
    log_prior = dist.Normal(x.new_tensor([-1.0, 0.0, 2.0]), 2.0).log_prob(fixed.params["mu"]).sum()
    log_prior += dist.Gamma(3.0, 2.0).log_prob(fixed.params["s"]).sum()
    log_prior += dist.Dirichlet(x.new_tensor([1.0, 2.0, 3.5])).log_prob(fixed.params["w"])
    assert fixed.elbo - fixed.log_evidence == pytest.approx(float(log_prior), rel=1e-9)
    assert fixed.elbo < free.elbo


def test_single_precision() -> None:
    x = points(400, 2).float()
    pyro.set_rng_seed(0)
    em = ExactPosteriorEM(vectors, "map")
    result = em.fit(x, "weights", max_steps=50, progress=False)
    single = {n: v.clone() for n, v in result.params.items()}
    assert all(v.dtype == torch.float32 for v in single.values())
    assert all(
        b >= a - 1e-5 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False)
    )


def test_accelerated_steps_climb_the_same_posterior() -> None:
    found = []
    for acceleration in (None, "squarem", "quasi-newton"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        em = ExactPosteriorEM(rates, "map")
        x = torch.poisson(torch.tensor([1.0, 3.0, 6.0]).double().repeat(150))
        found.append(
            em.fit(x, "Gamma", max_steps=5000, tol=1e-8, acceleration=acceleration, progress=False)
        )
    plain, *accelerated = found
    for fast in accelerated:
        assert fast.elbo == pytest.approx(plain.elbo, abs=1e-5)
        assert fast.num_steps < plain.num_steps


@pytest.mark.parametrize("kept", [None, torch.tensor([True, True, False])])
def test_elements_of_a_vector_may_have_plates_of_their_own(
    monkeypatch: pytest.MonkeyPatch, kept: Tensor | None
) -> None:
    """Normal priors in two plates on the means of a MultivariateNormal: one prior per element."""
    x, D = points(60, 3), 3
    cov = torch.eye(D).to(x) + 0.5
    loc = torch.arange(6.0).reshape(2, D).to(x) - 2

    def model(x: Tensor) -> None:
        fn = dist.Normal(loc, 0.5).mask(True if kept is None else kept)
        with pyro.plate("components", 2, dim=-2), pyro.plate("features", D, dim=-1):
            mu = pyro.sample("mu", fn)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.MultivariateNormal(mu[z], cov), obs=x)

    quick, full = both_fits(monkeypatch, model, x, guide="map", max_steps=6, tol=0.0)
    np.testing.assert_allclose(quick.history, full.history, rtol=1e-10)
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    em = ExactPosteriorEM(model, "map")
    mu = em.fit(x, max_steps=0, progress=False).params["mu"].clone().to(x)
    precision = torch.linalg.inv(cov)
    prior = torch.diag(4.0 * (torch.ones(D) if kept is None else kept).to(x))
    for _ in range(6):
        joint = dist.MultivariateNormal(mu, cov).log_prob(x.unsqueeze(1))
        r = joint.softmax(-1)
        for k in range(2):
            n = precision @ (r[:, k] @ x) + prior @ loc[k]
            mu[k] = torch.linalg.solve(r[:, k].sum() * precision + prior, n)
    for result in (quick, full):
        torch.testing.assert_close(result.params["mu"].to(x), mu, rtol=1e-5, atol=1e-5)


def test_what_only_a_flat_prior_reads_is_not_said_to_be_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three probabilities for two components: without a prior the third is passed over too."""

    def model(x: Tensor) -> None:
        with pyro.plate("components", 3):
            p = pyro.sample("p", dist.Beta(torch.tensor([2.0, 3.0, 1.0]), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Binomial(5, p[z]), obs=x)

    x = symbols(60).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick, full = both_fits(monkeypatch, model, x, guide="map", max_steps=8, tol=0.0)
    np.testing.assert_allclose(quick.history, full.history, rtol=1e-6)
    torch.testing.assert_close(quick.params["p"], full.params["p"])


@pytest.mark.parametrize("first", ["fine", "coarse"])
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_priors_may_be_finer_than_the_data(
    monkeypatch: pytest.MonkeyPatch, first: str, far: float
) -> None:
    """Means from float64 priors beside float32 parameters, in features and whitened."""
    x = points(80, 1)[:, 0].float()
    y = torch.cat([points(79, 1, 4)[:, 0], torch.tensor([far])]).float()

    def model(x: Tensor, y: Tensor) -> None:
        nu = pyro.param("nu", torch.tensor([-0.5, 0.7]).float())
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]).double(), 1.0))
        sites = {"fine": (mu, x), "coarse": (nu, y)}
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            for name in (first, *sites.keys() - {first}):
                loc, data = sites[name]
                pyro.sample(name, dist.Normal(loc[z], torch.tensor(0.8).to(loc)), obs=data)

    quick, full = both_fits(monkeypatch, model, x, y, guide="map", max_steps=8, tol=0.0)
    np.testing.assert_allclose(quick.history, full.history, rtol=1e-5)
    for name in full.params:
        torch.testing.assert_close(quick.params[name], full.params[name], rtol=1e-3, atol=1e-4)
