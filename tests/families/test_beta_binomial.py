"""Beta-binomial components: scipy on each expected log joint, the Binomial's limit, tables, chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, special, stats
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM
from pyro_em.posteriors.chains.chain import Chain
from pyro_em.testing import check_block

I = np.arange(48)
TRIALS = 12
SHARES = stats.beta.ppf((0.618034 * I + 0.3) % 1, *np.where(I % 3, [[1.2], [3.0]], [[3.5], [1.1]]))
WON = np.sort(np.round(TRIALS * SHARES))  # the first chunk has lower counts than the last
OWN = TRIALS + np.where(I % 3, I % 5, 9)  # a number of trials of each row


def tensor(a: Any) -> Tensor:
    return torch.as_tensor(a, dtype=torch.float64)


def param(name: str, value: Any, constraint: C.Constraint = C.positive) -> Tensor:
    return pyro.param(name, tensor(value), constraint=constraint)


def alone(x: Tensor, by_mean: bool = False, trials: Any = TRIALS) -> None:
    if by_mean:
        m, k = param("m", 0.5, C.unit_interval), param("k", 3.0)
        fn = dist.BetaBinomial(m * k, (1 - m) * k, total_count=trials)
    else:
        fn = dist.BetaBinomial(param("a", 1.0), param("b", 1.0), total_count=trials)
    with pyro.plate("n", len(x)):
        pyro.sample("x", fn, obs=x)


def two_kinds(x: Tensor, trials: Any = TRIALS) -> None:
    p = param("p", [0.4, 0.6], C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        a, b = param("a", [1.0, 4.0])[z], param("b", [3.0, 1.0])[z]
        pyro.sample("x", dist.BetaBinomial(a, b, total_count=trials), obs=x)


@pytest.mark.parametrize("trials", [TRIALS, OWN], ids=["one number", "of each row"])
@pytest.mark.parametrize("by_mean", [False, True])
def test_one_step_is_scipys_maximum(by_mean: bool, trials: Any) -> None:
    def loss(u: np.ndarray) -> float:
        return -float(stats.betabinom.logpmf(WON, trials, *np.exp(u)).sum())

    best = optimize.minimize(loss, [0.0, 0.0], method="BFGS", options={"gtol": 1e-8})
    a, b = np.exp(best.x)
    em = ExactPosteriorEM(alone)
    result = em.fit(tensor(WON), by_mean, tensor(trials), max_steps=1, tol=0)
    assert {type(u.update).__name__ for u in result.plan.updates.values()} == {"NewtonOnSums"}
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-9)
    known = {"m": a / (a + b), "k": a + b} if by_mean else {"a": a, "b": b}
    for name, value in known.items():
        assert float(result.params[name]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("trials", [TRIALS, OWN], ids=["one number", "of each row"])
def test_a_mixture_follows_an_em_whose_m_steps_are_scipys(trials: Any) -> None:
    p, u, steps = np.array([0.4, 0.6]), np.log([[1.0, 3.0], [4.0, 1.0]]), 3
    evidence = []

    def log_p(u: np.ndarray) -> np.ndarray:
        return np.asarray(stats.betabinom.logpmf(WON, trials, *np.exp(u)))

    for _ in range(steps + 1):
        joint = np.stack([np.log(p[k]) + log_p(u[k]) for k in range(2)])
        evidence.append(float(special.logsumexp(joint, 0).sum()))
        r = special.softmax(joint, 0)
        p = r.mean(1)
        for k in range(2):

            def loss(v: np.ndarray, w: np.ndarray = r[k]) -> float:
                return -float((w * log_p(v)).sum())

            u[k] = optimize.minimize(loss, u[k], method="BFGS", options={"gtol": 1e-7}).x
    data = (tensor(WON),) if trials is TRIALS else (tensor(WON), tensor(trials))
    result = ExactPosteriorEM(two_kinds).fit(*data, max_steps=steps, tol=0)
    assert result.plan.kernel == "mixture"
    assert [*result.history, result.log_evidence] == pytest.approx(evidence, abs=1e-6)
    pyro.clear_param_store()
    parts = ExactPosteriorEM(two_kinds).fit(Chunks(*data, rows=20), max_steps=steps, tol=0)
    assert list(parts.history) == pytest.approx(list(result.history), rel=1e-12)


def chain(x: Tensor) -> None:
    A = param("A", [[0.7, 0.3], [0.4, 0.6]], C.simplex)
    a, b = param("a", [1.0, 4.0]), param("b", [3.0, 1.0])
    z: Any = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.BetaBinomial(a[z], b[z], total_count=TRIALS), obs=x[t])


def test_a_chain_against_the_joint_table() -> None:
    check_block(Chain, chain, tensor([0, 12, 1, 9, 12, 2]), states=1)


def test_counts_that_vary_no_more_than_a_binomials_end_there_and_say_so() -> None:
    x = tensor(np.tile([3.0, 4.0, 4.0, 5.0], 6))
    result = ExactPosteriorEM(alone).fit(x, max_steps=10)
    binomial = float(stats.binom.logpmf(x.numpy(), 12, 1 / 3).sum())
    assert result.log_evidence == pytest.approx(binomial, abs=1e-7)
    share = result.params["a"] / (result.params["a"] + result.params["b"])
    assert float(share) == pytest.approx(1 / 3, rel=1e-6)
    assert "'a' and 'b': the BetaBinomial of 'x' has run off to its limit, a Binomial" in str(
        result.plan
    )
