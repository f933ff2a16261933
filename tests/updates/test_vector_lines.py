"""Multivariate Normals whose means are affine in parameters: against textbook EM in numpy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM, Fixed, vectorized_markov

T = 36
RNG = np.random.default_rng(5)
U = RNG.normal(size=(T, 2))
TURN = np.where(np.arange(T) // 6 % 2, 1.0, -0.7)
Y = np.column_stack([TURN * U[:, 0] + 0.4, -TURN + U[:, 1]]) + 0.4 * RNG.normal(size=(T, 2))
W0 = np.array([[[0.9, 0.1], [0.0, 0.8]], [[-0.5, 0.0], [0.2, 1.1]]])
B0 = np.array([[0.3, -0.6], [0.2, 0.5]])
S0 = np.array([[[0.5, 0.1], [0.1, 0.4]], [[0.6, -0.1], [-0.1, 0.3]]])
A0, P0 = np.array([[0.8, 0.2], [0.3, 0.7]]), np.array([0.4, 0.6])


def tensor(a: Any) -> Tensor:
    return torch.as_tensor(np.array(a), dtype=torch.float64)


def real(name: str, value: Any) -> Tensor:
    return pyro.param(name, tensor(value))


def simplex(name: str, value: Any) -> Tensor:
    return pyro.param(name, tensor(value), constraint=C.simplex)


def spread(value: Any = S0) -> Tensor:
    return pyro.param("S", tensor(value), constraint=C.positive_definite)


def times(W: Tensor, u: Tensor) -> Tensor:
    return (W @ u.unsqueeze(-1)).squeeze(-1)


# ------------------------------------------------------------------ EM that is not this library


def log_rows(X: np.ndarray, y: np.ndarray, coef: np.ndarray, S: np.ndarray) -> np.ndarray:
    """Log densities of rows for each component. # (N, K)"""
    return np.stack(
        [
            multivariate_normal(np.zeros(y.shape[1]), s).logpdf(y - X @ c.T)
            for c, s in zip(coef, S, strict=True)
        ],
        1,
    )


def regressed(X: np.ndarray, y: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares and the covariance of residuals, component by component."""
    coef, spreads = [], []
    for w in r.T:
        c = np.linalg.solve((X * w[:, None]).T @ X, (X * w[:, None]).T @ y).T
        e = y - X @ c.T
        coef.append(c)
        spreads.append((e * w[:, None]).T @ e / w.sum())
    return np.stack(coef), np.stack(spreads)


def smoothed(
    log_l: np.ndarray, p: np.ndarray, A: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Marginals, expected transitions and evidence of a chain, in log space."""
    n, K = log_l.shape
    alpha, beta = np.zeros((n, K)), np.zeros((n, K))
    alpha[0] = np.log(p) + log_l[0]
    for t in range(1, n):
        alpha[t] = logsumexp(alpha[t - 1][:, None] + np.log(A), axis=0) + log_l[t]
    for t in reversed(range(n - 1)):
        beta[t] = logsumexp(np.log(A) + log_l[t + 1] + beta[t + 1], axis=1)
    evidence = logsumexp(alpha[-1])
    xi = np.exp(alpha[:-1, :, None] + np.log(A) + (log_l[1:] + beta[1:])[:, None] - evidence).sum(0)
    return np.exp(alpha + beta - evidence), xi, float(evidence)


def em_of_chain(X: np.ndarray, y: np.ndarray, steps: int) -> tuple[list[float], np.ndarray]:
    p, A, S = P0, A0, S0
    coef = np.concatenate([W0, B0[..., None]], 2)
    history = []
    for _ in range(steps):
        r, xi, evidence = smoothed(log_rows(X, y, coef, S), p, A)
        history.append(evidence)
        p, A = r[0], xi / xi.sum(1, keepdims=True)
        coef, S = regressed(X, y, r)
    return history, coef


# ------------------------------------------------------------------ models


def loop(u: Tensor, y: Tensor) -> None:
    W, b, S = real("W", W0), real("b", B0), spread()
    p, A = simplex("p", P0), simplex("A", A0)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(p if z is None else A[z]))
        loc = times(W[z], u[t]) + b[z]
        pyro.sample(f"y_{t}", dist.MultivariateNormal(loc, S[z]), obs=y[t])


def vectorized(u: Tensor, y: Tensor) -> None:
    W, b, S = real("W", W0), real("b", B0), spread()
    p, A = simplex("p", P0), simplex("A", A0)
    z: Any = None
    for t in vectorized_markov("time", len(y), dim=-1):
        z = pyro.sample(f"z_{t}", dist.Categorical(p if z is None else A[z]))
        loc = times(W[z], u[t]) + b[z]
        pyro.sample(f"y_{t}", dist.MultivariateNormal(loc, S[z]), obs=y[t])


def rows(u: Tensor, y: Tensor) -> None:
    W, b, S = real("W", W0), real("b", B0), spread()
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("p", P0)))
        pyro.sample("y", dist.MultivariateNormal(times(W[z], u) + b[z], S[z]), obs=y)


@pytest.mark.parametrize("model", [loop, vectorized])
def test_a_regression_hmm_takes_the_steps_of_numpy(model: Any) -> None:
    em = ExactPosteriorEM(model)
    plan = str(em.plan(tensor(U), tensor(Y)))
    assert "least squares with b" in plan and "chain kernel" in plan
    result = em.fit(tensor(U), tensor(Y), max_steps=6, tol=0)
    history, coef = em_of_chain(np.column_stack([U, np.ones(T)]), Y, 6)
    np.testing.assert_allclose([float(h) for h in result.history], history, rtol=1e-10)
    np.testing.assert_allclose(result.params["W"], coef[..., :2], rtol=1e-8)
    np.testing.assert_allclose(result.params["b"], coef[..., 2], rtol=1e-8)


def test_a_mixture_of_multivariate_regressions_takes_the_steps_of_numpy() -> None:
    em = ExactPosteriorEM(rows)
    result = em.fit(tensor(U), tensor(Y), max_steps=6, tol=0)
    X, p, S = np.column_stack([U, np.ones(T)]), P0, S0
    coef, history = np.concatenate([W0, B0[..., None]], 2), []
    for _ in range(6):
        joint = np.log(p) + log_rows(X, Y, coef, S)
        history.append(logsumexp(joint, 1).sum())
        r = np.exp(joint - logsumexp(joint, 1, keepdims=True))
        p, (coef, S) = r.mean(0), regressed(X, Y, r)
    np.testing.assert_allclose([float(h) for h in result.history], history, rtol=1e-10)
    np.testing.assert_allclose(result.params["S"], S, rtol=1e-8)
    pyro.clear_param_store()  # the same from chunks of the data
    chunked = ExactPosteriorEM(rows).fit(Chunks(tensor(U), tensor(Y), rows=10), max_steps=6, tol=0)
    np.testing.assert_allclose([float(h) for h in chunked.history], history, rtol=1e-9)


def steepest(em: ExactPosteriorEM, names: list[str]) -> float:
    """The largest derivative of the evidence in unconstrained numbers, by central differences."""
    out = 0.0
    for name in names:
        leaf = pyro.param(name).unconstrained().detach().reshape(-1)  # shares its memory
        for j, kept in enumerate(leaf.tolist()):
            losses = []
            for step in (1e-5, -1e-5):
                leaf[j] = kept + step
                losses.append(em.evaluate_loss())
            leaf[j] = kept
            out = max(out, abs(losses[0] - losses[1]) / 2e-5)
    return out


def tied() -> None:
    """One slope for all components, offsets that two sites share, and a mean stacked of numbers."""
    W, b = real("W", W0[0]), real("b", B0)
    m, S = real("m", 0.1), spread()
    with pyro.plate("n", T):
        z = pyro.sample("z", dist.Categorical(simplex("p", P0)))
        pyro.sample("y", dist.MultivariateNormal(times(W, tensor(U)) + b[z], S[z]), obs=tensor(Y))
        alike = dist.MultivariateNormal(b[z], tensor(S0[0]))
        pyro.sample("v", alike, obs=tensor(Y[::-1].copy()))
        halves = torch.stack([m.expand(T), 2 * m.expand(T)], -1)
        pyro.sample("h", dist.MultivariateNormal(halves, tensor(S0[1])), obs=tensor(U))


def ridge() -> None:
    """A Normal prior on slopes, and known covariances that differ from row to row."""
    scales = tensor(1 + np.arange(T) % 3)[:, None, None] * tensor(S0[1])
    W = pyro.sample("W", dist.Normal(tensor(W0 * 0), 0.5).to_event(3))
    b = real("b", B0)
    with pyro.plate("n", T):
        z = pyro.sample("z", dist.Categorical(simplex("p", P0)))
        loc = times(W[z], tensor(U)) + b[z]
        pyro.sample("y", dist.MultivariateNormal(loc, scales), obs=tensor(Y))


def test_shared_and_stacked_means_end_where_the_evidence_is_flat() -> None:
    em = ExactPosteriorEM(tied)
    update = em.plan().updates
    assert update["m"].block == ("m",) and set(update["W"].block) == {"W", "b"}
    history = em.fit(max_steps=4, tol=0).history
    assert all(b >= a for a, b in pairwise(history))
    em.fit(max_steps=100, tol=0, acceleration="squarem")
    assert steepest(em, ["W", "b", "m"]) < 1e-5


def test_normal_priors_on_slopes_and_known_covariances() -> None:
    em = ExactPosteriorEM(ridge, guide="map")
    result = em.fit(max_steps=4, tol=0)
    assert all(b >= a for a, b in pairwise(result.history))
    # At the responsibilities of the last step the ridge regression of each component is the update.
    X = np.column_stack([U, np.ones(T)])
    precision = np.linalg.inv(S0[1])
    before = ExactPosteriorEM(ridge, guide="map")
    pyro.clear_param_store()
    before.fit(max_steps=1, tol=0)
    r = before.posterior().probs("z").numpy()
    after = before.fit(max_steps=1, tol=0)
    for k in range(2):
        w = r[:, k] / (1 + np.arange(T) % 3)
        gram = np.kron((X * w[:, None]).T @ X, precision)
        penalty = np.kron(np.diag([1.0, 1.0, 0.0]), np.eye(2)) / 0.25
        right = (precision @ (Y.T * w) @ X).T.reshape(-1)
        solution = np.linalg.solve(gram + penalty, right).reshape(3, 2).T
        W = next(v for n, v in after.params.items() if "W" in n)
        np.testing.assert_allclose(W[k], solution[:, :2], rtol=1e-7)


def test_fixed_slopes_leave_offsets_to_least_squares() -> None:
    em = ExactPosteriorEM(rows, updates={"W": Fixed()})
    result = em.fit(tensor(U), tensor(Y), max_steps=1, tol=0)
    joint = np.log(P0) + log_rows(
        np.column_stack([U, np.ones(T)]), Y, np.concatenate([W0, B0[..., None]], 2), S0
    )
    r = np.exp(joint - logsumexp(joint, 1, keepdims=True))
    for k in range(2):
        expected = np.average(Y - U @ W0[k].T, axis=0, weights=r[:, k])
        np.testing.assert_allclose(result.params["b"][k], expected, rtol=1e-10)
