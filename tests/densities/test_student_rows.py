"""Student distributions as scale mixtures: the joint table, a plain numpy EM, the maximum by scipy."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import t as student
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, EMStatus, ExactPosteriorEM
from pyro_em.posteriors.chains.chain import Chain
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.testing import check_block
from tests.benchmarks.exponential import student_steps

W = torch.tensor([0.4, 0.6], dtype=torch.float64)
MU = torch.tensor([[-1.0, 0.5], [2.0, 1.0]], dtype=torch.float64)


def positive(name: str, value: Tensor) -> Tensor:
    return pyro.param(name, value.clone(), constraint=C.positive)


def rows(x: Tensor, seen: Tensor) -> None:
    """Two numbers per row, some masked, with one scale for both; a third with a known tail."""
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    mu, s, df = pyro.param("mu", MU.clone()), positive("s", W), positive("df", 5 * W)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        both = dist.StudentT(df[z].unsqueeze(-1), mu[z], s[z].unsqueeze(-1))
        pyro.sample("x", both.mask(seen).to_event(1), obs=x)
        pyro.sample("y", dist.StudentT(4.0, mu[z, 0], 1.0), obs=x[:, 0])


def chain(x: Tensor, seen: Tensor) -> None:
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    P = pyro.param("P", torch.stack([W, W.flip(0)]), constraint=C.simplex)
    mu, s, df = pyro.param("mu", MU.clone()), positive("s", W), positive("df", 5 * W)
    z = None
    for i in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{i}", dist.Categorical(w if z is None else P[z]))
        one = dist.StudentT(df[z], mu[z, 0], s[z]).mask(seen[i])
        pyro.sample(f"x_{i}", one, obs=x[i])


def mixture(x: Tensor) -> None:
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    mu, s, df = pyro.param("mu", MU[:, 0].clone()), positive("s", W), positive("df", 5 * W)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.StudentT(df[z], mu[z], s[z]), obs=x)


def data(n: int) -> Tensor:
    torch.manual_seed(3)
    tails = torch.tensor([2.0, 5.0], dtype=torch.float64)
    return dist.StudentT(tails, 3 * MU[:, 0], 1.0).sample((n,)).reshape(-1)


def test_blocks() -> None:
    torch.manual_seed(0)
    x = MU.repeat(3, 1) + torch.randn(6, 2, dtype=torch.float64)
    seen = torch.rand(6, 2) > 0.3
    check_block(Mixture, rows, x, seen, states=1)
    check_block(Chain, chain, x[:5, 0], seen.any(-1)[:5], states=1)


def test_against_numpy() -> None:
    x = data(40)
    start = {"w": W, "df": 5 * W, "mu": MU[:, 0], "s": W}
    evidence, values = student_steps(x.numpy(), {n: t.numpy() for n, t in start.items()}, 6)
    result = ExactPosteriorEM(mixture).fit(x, max_steps=6, tol=0)
    assert result.plan.kernel == "mixture"
    assert list(result.history) == pytest.approx(evidence, rel=1e-10)
    assert min(np.diff(evidence)) > 0
    for name, value in values.items():
        assert result.params[name].tolist() == pytest.approx(value.tolist(), rel=1e-7)
    pyro.clear_param_store()
    parts = ExactPosteriorEM(mixture).fit(Chunks(x, rows=30), max_steps=6, tol=0)
    assert list(parts.history) == pytest.approx(evidence, rel=1e-10)


def test_the_fixed_point_is_the_maximum_of_the_evidence() -> None:
    x = data(60)
    result = ExactPosteriorEM(mixture).fit(x, max_steps=1000, tol=1e-8, acceleration="squarem")
    assert result.converged
    X = x.numpy()

    def negative(u: np.ndarray) -> float:
        df, mu, s = np.exp(u[:2]), u[2:4], np.exp(u[4:6])
        log_w = np.array([u[6], 0.0]) - np.logaddexp(u[6], 0.0)
        each = student.logpdf(X[:, None], df, mu, s) + log_w
        return -float(logsumexp(each, axis=1).sum())

    p = {n: t.numpy() for n, t in result.params.items()}
    log_odds = np.log(p["w"][:1] / p["w"][1:])
    here = np.concatenate([np.log(p["df"]), p["mu"], np.log(p["s"]), log_odds])
    assert negative(here) == pytest.approx(-result.log_evidence, rel=1e-10)
    best = minimize(negative, here + 0.05, method="BFGS", options={"gtol": 1e-7})
    assert best.fun == pytest.approx(negative(here), abs=1e-7)
    assert best.x == pytest.approx(here, abs=1e-3)


def test_a_scale_that_collapses_on_equal_data_is_named() -> None:
    def model(x: Tensor) -> None:
        m = pyro.param("m", torch.tensor([0.9, -1.0]))
        a = pyro.param("a", torch.tensor([1.0, 3.0]), constraint=C.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.StudentT(3.0, m[z], a[z]), obs=x)

    x = torch.tensor([1.0, 1.0, 1.0, 1.0, 5.0, -3.0, 2.0])
    with pytest.warns(UserWarning, match=r"parameter 'a', component 0: its spread collapses"):
        result = ExactPosteriorEM(model).fit(x, progress=False)
    assert result.status is EMStatus.DEGENERATE
    assert 1e-15 < float(result.params["a"][0]) < 1e-3  # before it was rounding
