"""Parameters that sites of different kinds read: the joint maximum, by scipy and by flat gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM, Fixed, PyroEMWarning

N = 40
I = np.arange(N)
X = np.stack([np.ones(N), np.sin(1.7 * I), np.cos(0.9 * I + 1)], 1)
LINE = X @ np.array([0.4, 0.6, -0.5])
REAL = LINE + 0.8 * np.sin(5.3 * I)
COUNTS = np.floor(np.exp(LINE) * (0.3 + 1.7 * (I % 3)))
BITS = (I % 3 == 0).astype(float)


def tensor(a: np.ndarray | float | list[float]) -> Tensor:
    return torch.as_tensor(np.asarray(a), dtype=torch.float64)


def positive(name: str, value: float) -> Tensor:
    return pyro.param(name, tensor(value), constraint=C.positive)


def regressions(x: Tensor, y: Tensor, c: Tensor) -> None:
    """A coefficient in a Normal mean, a log rate and a logit."""
    w, v = pyro.param("w", torch.zeros(3, dtype=torch.float64)), positive("v", 2.0)
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.Normal(x @ w, v.sqrt()), obs=y)
        pyro.sample("c", dist.Poisson((x @ w).exp()), obs=c)


def of_regressions(t: np.ndarray, scale: float) -> float:
    real = stats.norm.logpdf(REAL, X @ t[:3], scale).sum()
    return -real - stats.poisson.logpmf(COUNTS, np.exp(X @ t[:3])).sum()


def data() -> tuple[Tensor, Tensor, Tensor]:
    return tensor(X), tensor(REAL), tensor(COUNTS)


@pytest.mark.parametrize("chunks", [False, True])
def test_one_step_reaches_the_joint_maximum(chunks: bool) -> None:
    best = optimize.minimize(lambda t: of_regressions(t, np.exp(t[3])), np.zeros(4), method="BFGS")
    pyro.clear_param_store()
    arguments = (Chunks(*data(), rows=15),) if chunks else data()
    result = ExactPosteriorEM(regressions).fit(*arguments, max_steps=1, tol=0)
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-8)
    assert "Normal.loc and Poisson.rate read it" in str(result.plan)


def test_what_is_held_stays() -> None:
    best = optimize.minimize(lambda t: of_regressions(t, 2**0.5), np.zeros(3), method="BFGS")
    pyro.clear_param_store()
    em = ExactPosteriorEM(regressions, updates={"v": Fixed()})
    result = em.fit(*data(), max_steps=1, tol=0)
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-8)


Q = Callable[[Mapping[str, Tensor], Tensor], Tensor]


def _mean_and_rate(p: Mapping[str, Tensor], z: Tensor) -> dict[str, dist.Distribution]:
    return {
        "y": dist.Normal(p["m"][z], p["s"][z]),
        "c": dist.Poisson(p["m"][z].exp()),
        "b": dist.Bernoulli(logits=p["m"][z] + p["a"]),
    }


def _scale_and_rate(p: Mapping[str, Tensor], z: Tensor) -> dict[str, dist.Distribution]:
    return {
        "y": dist.Normal(p["m"][z], p["s"][z]),
        "c": dist.Poisson(3 * p["s"][z]),
        "b": dist.Geometric(logits=p["a"]),
    }


@pytest.mark.parametrize("sites", [_mean_and_rate, _scale_and_rate])
def test_in_a_mixture_the_expected_log_joint_is_flat_in_all_of_them(
    sites: Callable[[Mapping[str, Tensor], Tensor], dict[str, dist.Distribution]],
) -> None:
    observed = {"y": tensor(REAL), "c": tensor(COUNTS), "b": tensor(BITS)}

    def model() -> None:
        p = {
            "m": pyro.param("m", tensor([0.0, 0.8])),
            "s": pyro.param("s", tensor([1.0, 0.7]), constraint=C.positive),
            "a": pyro.param("a", tensor(0.2)),
        }
        with pyro.plate("n", N):
            z = pyro.sample("z", dist.Categorical(tensor([0.4, 0.6])))
            for name, fn in sites(p, z).items():
                pyro.sample(name, fn, obs=observed[name])

    pyro.clear_param_store()
    em = ExactPosteriorEM(model)
    assert "gradient" not in str(em.plan())
    q = em.posterior()
    em.m_step(q)
    p = {n: pyro.param(n).detach().requires_grad_() for n in ("m", "s", "a")}
    each = sites(p, torch.arange(2))
    log_p = sum(each[n].log_prob(observed[n].unsqueeze(-1)) for n in observed)
    for slope in torch.autograd.grad((q.probs("z") * log_p).sum(), list(p.values())):
        assert float(slope.abs().max()) < 1e-7


def test_a_mean_that_is_a_scale_of_its_own_site() -> None:
    def model(y: Tensor) -> None:
        m = pyro.param("m", tensor(1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(m, m.exp()), obs=y)

    best = optimize.minimize_scalar(lambda t: -stats.norm.logpdf(REAL, t, np.exp(t)).sum())
    pyro.clear_param_store()
    result = ExactPosteriorEM(model).fit(tensor(REAL), max_steps=1, tol=0)
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-8)


def test_a_spread_that_collapses_is_named() -> None:
    def model(y: Tensor, c: Tensor) -> None:
        m, s = (
            pyro.param("m", tensor([0.0, 3.0])),
            pyro.param("s", tensor([1.0, 0.01]), constraint=C.positive),
        )
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(tensor([0.9, 0.1])))
            pyro.sample("y", dist.Normal(m[z], s[z]), obs=y)
            pyro.sample("c", dist.Poisson(m[z].exp()), obs=c)

    y, c = np.append(np.sin(2.3 * np.arange(15)), 3.0), np.append(np.ones(15), 20.0)
    pyro.clear_param_store()
    with pytest.warns(PyroEMWarning, match="parameter 's', component 1: its spread collapses"):
        result = ExactPosteriorEM(model).fit(tensor(y), tensor(c), max_steps=5)
    assert float(result.params["s"][1]) > 1e-3
