"""Discrete latents that are seen in part: kernels against numpy with clamped responsibilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, PyroEMError

START = ([0.2, 0.3, 0.5], [-1.0, 0.0, 1.5], [1.0, 0.8, 1.2])


def mixture(x: Any, labels: Any, seen: Any, weight: Any = 1.0) -> None:
    p, mu, s = (torch.tensor(t, dtype=x.dtype) for t in START)
    p = pyro.param("p", p, constraint=constraints.simplex)
    mu, s = pyro.param("mu", mu), pyro.param("s", s, constraint=constraints.positive)
    with pyro.plate("n", len(x)), poutine.scale(scale=weight):
        z = pyro.sample("z", dist.Categorical(p), obs=labels, obs_mask=seen).long()
        pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)


def em_by_hand(x: Any, labels: Any, seen: Any, weight: Any, steps: int) -> tuple[Any, Any, Any]:
    """Log evidences before each step, the last means, and the responsibilities there."""
    p, mu, s = (np.array(t) for t in START)
    evidences = []
    for step in range(steps + 1):
        log_p = np.log(p) - 0.5 * ((x[:, None] - mu) / s) ** 2 - np.log(s) - 0.5 * np.log(2 * np.pi)
        log_p[seen[:, None] & (np.arange(3) != labels[:, None])] = -np.inf
        top = log_p.max(1, keepdims=True)
        r = np.exp(log_p - top)
        evidences.append((weight * (np.log(r.sum(1)) + top[:, 0])).sum())
        r /= r.sum(1, keepdims=True)
        if step == steps:
            break
        counts = weight[:, None] * r
        n = counts.sum(0)
        p, mu = n / n.sum(), (counts * x[:, None]).sum(0) / n
        s = np.sqrt((counts * (x[:, None] - mu) ** 2).sum(0) / n)
    return evidences, mu, r


@pytest.mark.parametrize("rows", [60, 3000])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_steps_are_those_of_clamped_responsibilities(
    rows: int, share: float, dtype: torch.dtype, weighted: bool
) -> None:
    made = np.random.default_rng(rows)
    z = made.integers(0, 3, rows)
    x = made.normal(np.array([-2.0, 0.0, 3.0])[z]).astype(np.float32).astype(float)
    weight = made.uniform(0.5, 2.0, rows) if weighted else np.ones(rows)
    seen = made.random(rows) < share
    evidences, mu, r = em_by_hand(x, z, seen, weight, 3)
    given = torch.tensor(x, dtype=dtype), torch.tensor(np.where(seen, z, -1)), torch.tensor(seen)
    args = (*given, torch.tensor(weight, dtype=dtype)) if weighted else given
    em = ExactPosteriorEM(mixture)
    assert em.plan(*args).kernel == "mixture"
    found = em.fit(*args, max_steps=3, tol=0, progress=False)
    near = 1e-10 if dtype == torch.float64 else 3e-5
    assert list(found.history.entering)[:3] == pytest.approx(evidences[:3], rel=near)
    np.testing.assert_allclose(found.params["mu"].numpy(), mu, atol=near * 30)
    q = em.posterior(*args)
    np.testing.assert_allclose(q.probs("z").numpy(), r, atol=near * 30)
    kept = torch.tensor(seen)
    assert torch.equal(q.mode()["z"][kept], torch.tensor(z)[kept])
    assert bool((q.sample(2, seed=0)["z"][:, kept] == torch.tensor(z)[kept]).all())


def test_a_label_that_is_none_is_refused_where_it_is_seen() -> None:
    x, seen = torch.zeros(4), torch.tensor([True, True, False, False])
    ExactPosteriorEM(mixture).posterior(x, torch.tensor([0, 2, 7, -1]), seen)
    with pytest.raises(PyroEMError, match="'z'"):
        ExactPosteriorEM(mixture).posterior(x, torch.tensor([0, 3, 0, 0]), seen)


@pytest.mark.parametrize("steps", [4])
def test_states_of_a_chain_that_are_seen(steps: int) -> None:
    """Against the sum over all paths that go through them."""
    torch.manual_seed(0)
    A = torch.rand(2, 2, dtype=torch.float64).softmax(-1)
    x = torch.randn(steps, dtype=torch.float64)
    labels, seen = torch.tensor([1, 0, 1, 0]), torch.tensor([False, True, False, False])

    def model() -> None:
        a = pyro.param("a", A.clone(), constraint=constraints.simplex)
        z: Any = 0
        for t in pyro.markov(range(steps)):
            fn = dist.Categorical(a[z])
            z = pyro.sample(f"z_{t}", fn, obs=labels[t], obs_mask=seen[t])
            pyro.sample(f"x_{t}", dist.Normal(2.0 * z, 1.0), obs=x[t])

    paths = torch.cartesian_prod(*[torch.arange(2)] * steps)
    paths = paths[paths[:, 1] == 0]
    before = torch.cat([torch.zeros(len(paths), 1, dtype=torch.long), paths[:, :-1]], 1)
    joint = A[before, paths].log().sum(1) + dist.Normal(2.0 * paths, 1.0).log_prob(x).sum(1)
    q = ExactPosteriorEM(model).posterior()
    assert q.log_evidence == pytest.approx(float(joint.logsumexp(0)), rel=1e-12)
    weights = joint.softmax(0)
    for t in range(steps):
        expected = torch.stack([weights[paths[:, t] == k].sum() for k in range(2)])
        torch.testing.assert_close(q.probs(f"z_{t}"), expected)
