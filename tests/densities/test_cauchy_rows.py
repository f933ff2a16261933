"""Cauchy components as scale mixtures: a plain numpy EM, its maximum, the joint table, chunks."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import cauchy, halfcauchy
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM, StepSize
from pyro_em.densities import rules
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.testing import check_block

W = torch.tensor([0.4, 0.6], dtype=torch.float64)
MU = torch.tensor([-3.0, 4.0], dtype=torch.float64)


def mixture(x: Tensor) -> None:
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    mu, s = pyro.param("mu", MU.clone()), pyro.param("s", 2 * W, constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Cauchy(mu[z], s[z]), obs=x)


def halves(x: Tensor, seen: Tensor) -> None:
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    start = torch.tensor([[0.3, 1.0], [5.0, 2.0]], dtype=torch.float64)
    s = pyro.param("s", start, constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.HalfCauchy(s[z]).mask(seen).to_event(1), obs=x)


def data(n: int) -> Tensor:
    torch.manual_seed(3)
    return dist.Cauchy(MU, torch.ones(2).double()).sample((n,)).reshape(-1)


def numpy_steps(x: np.ndarray, steps: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """EM with a precision of each datum as a latent."""
    w, mu, s = W.numpy(), MU.numpy(), 2 * W.numpy()
    history = []
    for _ in range(steps):
        table = np.log(w) + cauchy.logpdf(x[:, None], mu, s)
        total = logsumexp(table, axis=1)
        history.append(float(total.sum()))
        r = np.exp(table - total[:, None])
        u = 2 * r / (1 + ((x[:, None] - mu) / s) ** 2)
        mu = (u * x[:, None]).sum(0) / u.sum(0)
        s = np.sqrt((u * (x[:, None] - mu) ** 2).sum(0) / r.sum(0))
        w = r.mean(0)
    return history, {"w": w, "mu": mu, "s": s}


@pytest.mark.parametrize("rows", [80, 30])
def test_against_numpy(rows: int) -> None:
    x = data(40)
    history, values = numpy_steps(x.numpy(), 6)
    result = ExactPosteriorEM(mixture).fit(
        x if rows == 80 else Chunks(x, rows=rows), max_steps=6, tol=0
    )
    assert result.plan.kernel == "mixture"
    assert list(result.history) == pytest.approx(history, rel=1e-10)
    for name, value in values.items():
        assert result.params[name].tolist() == pytest.approx(value.tolist(), rel=1e-8)


def test_online_steps_are_those_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, found = Chunks(data(30), rows=25), []
    for rule in (rules.CauchyRows.of, lambda *given: None):
        monkeypatch.setattr(rules.CauchyRows, "of", rule)
        pyro.clear_param_store()
        em = ExactPosteriorEM(mixture)
        found.append(em.fit(chunks, online=StepSize(0.7), num_epochs=2, progress=False).params)
    for name, value in found[1].items():
        assert found[0][name].tolist() == pytest.approx(value.tolist(), rel=1e-9)


def test_halves_and_masks() -> None:
    check_block(Mixture, halves, data(5).abs().reshape(5, 2), torch.rand(5, 2) > 0.3, states=1)


def test_the_fixed_point_of_halves_is_the_maximum_of_the_evidence() -> None:
    x = data(40).abs().reshape(40, 2)
    x[:20] /= 10
    result = ExactPosteriorEM(halves).fit(
        x, torch.ones(40, 2) > 0, max_steps=2000, tol=1e-9, acceleration="squarem"
    )
    X = x.numpy()[:, None]

    def negative(u: np.ndarray) -> float:
        log_w = np.array([u[4], 0.0]) - np.logaddexp(u[4], 0.0)
        each = halfcauchy.logpdf(X, scale=np.exp(u[:4].reshape(2, 2))).sum(-1) + log_w
        return -float(logsumexp(each, axis=1).sum())

    p = {n: t.numpy() for n, t in result.params.items()}
    here = np.array([*np.log(p["s"]).reshape(-1), np.log(p["w"][0] / p["w"][1])])
    assert negative(here) == pytest.approx(-result.log_evidence, rel=1e-10)
    best = minimize(negative, here + 0.05, method="BFGS", options={"gtol": 1e-7})
    assert best.fun == pytest.approx(negative(here), abs=1e-6)
