"""Rows of logits with a coefficient for every class: a number added to all of a row changes nothing.

Their M-steps end at the maximum, and what data do not determine stays where the user began, however the
sums are rounded. Against Newton's method by hand with the last class as reference, in numpy.
"""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from tests.benchmarks.chains import forward_backward, series, with_covariate

K = 3


def maximiser(design: np.ndarray, n: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Of Σ n log softmax(design θ), the last class's coefficients zero. # (T, P), (T, K), (P, K)"""
    P, free = len(theta), n.shape[1] - 1
    theta = theta - theta[:, -1:]
    mass = n.sum(1)
    for _ in range(60):
        p = np.exp(design @ theta)
        p /= p.sum(1, keepdims=True)
        gradient = (design.T @ (n - mass[:, None] * p))[:, :free].T.reshape(-1)
        hessian = np.zeros((free, P, free, P))
        for a in range(free):
            for b in range(free):
                w = mass * p[:, a] * ((a == b) - p[:, b])
                hessian[a, :, b] = design.T @ (w[:, None] * design)
        step = np.linalg.solve(hessian.reshape(free * P, -1), gradient)
        theta[:, :free] += step.reshape(free, P).T
        if gradient @ step < 1e-22:
            break
    return theta


def by_hand(u: np.ndarray, x: np.ndarray, b: np.ndarray, W: np.ndarray, steps: int) -> list[float]:
    """Log evidence at each E-step of `with_covariate`, in nats."""
    theta = np.stack([b, W], 1)
    mu, s, first = np.linspace(-1, 1, K), np.ones(K), np.full(K, 1 / K)
    design, out = np.stack([np.ones(len(x) - 1), u[1:]], 1), []
    for _ in range(steps):
        A = np.exp(np.einsum("tp,ipj->tij", design, theta))
        z = (x[:, None] - mu) / s
        log_l = -0.5 * z * z - np.log(s) - 0.5 * np.log(2 * np.pi)
        gamma, xi, log_evidence = forward_backward(first, A / A.sum(-1, keepdims=True), log_l)
        out.append(log_evidence)
        theta = np.stack([maximiser(design, xi[:, i], theta[i]) for i in range(K)])
        mass = gamma.sum(0)
        mu = gamma.T @ x / mass
        s = np.sqrt((gamma * (x[:, None] - mu) ** 2).sum(0) / mass)
    return out


def test_transitions_with_a_covariate_are_those_of_newton_by_hand() -> None:
    u, x = series(1000)
    em = ExactPosteriorEM(with_covariate)
    history = em.fit(u, x, K, max_steps=5, tol=0, progress=False).history
    g = torch.Generator().manual_seed(0)
    start = 0.1 * torch.randn(K, K, generator=g, dtype=x.dtype)
    asked = by_hand(u.numpy(), x.numpy(), 2 * np.eye(K), start.numpy(), 5)
    np.testing.assert_allclose(np.array(list(history)), asked, rtol=0, atol=1e-9)
    rows = pyro.param("W").detach().sum(-1)  # nothing determines these
    torch.testing.assert_close(rows, start.sum(-1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gates_of_many_rows_stay_where_data_do_not_determine_them(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    N, d = 100_000, 4
    x = torch.cat([torch.ones(N, 1), torch.randn(N, d, generator=g)], 1).double()
    p = (x @ torch.randn(d + 1, K, generator=g).double()).softmax(-1)
    y = torch.randn(N, generator=g).double() + 3 * (torch.multinomial(p, 1, generator=g)[:, 0] - 1)
    start, mu = 0.1 * torch.randn(d + 1, K, generator=g).double(), torch.linspace(-3, 3, K).double()

    def experts(x: Tensor, y: Tensor) -> None:
        v, m = pyro.param("v", start.clone()), pyro.param("mu", mu.clone())
        s = pyro.param("s", torch.ones(K).double(), constraint=C.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=x @ v))
            pyro.sample("y", dist.Normal(m[z], s[z]), obs=y)

    ExactPosteriorEM(experts).fit(x, y, max_steps=1, tol=0, progress=False)
    v = pyro.param("v").detach()
    log_joint = (x @ start).log_softmax(-1) + dist.Normal(mu, 1.0).log_prob(y[:, None])
    slope = x.T @ (log_joint.softmax(-1) - (x @ v).softmax(-1)) / N
    assert float(slope.abs().max()) < 1e-11
    torch.testing.assert_close(v.sum(-1), start.sum(-1), rtol=0, atol=1e-10)
