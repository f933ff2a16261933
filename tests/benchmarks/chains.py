"""Chains beyond the homogeneous one: covariates in the transitions against numpy, factorial chains.

``python -m tests.benchmarks.chains`` prints processor times of one thread. A fit with covariates is
the whole call, planning included, beside forward–backward and Newton's method written by hand; a step
of two chains is a difference between two fits, beside hmmlearn's on as many states.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, vectorized_markov


def with_covariate(u: Tensor, x: Tensor, K: int) -> None:
    """A hidden Markov model whose transitions read a covariate. # u, x: (T,)"""
    g = torch.Generator().manual_seed(0)
    b = pyro.param("b", 2 * torch.eye(K, dtype=x.dtype))
    W = pyro.param("W", 0.1 * torch.randn(K, K, generator=g, dtype=x.dtype))
    mu = pyro.param("mu", torch.linspace(-1.0, 1.0, K, dtype=x.dtype))
    s = pyro.param("s", torch.ones(K, dtype=x.dtype), constraint=C.positive)
    z = None
    for t in vectorized_markov("time", len(x)):
        logits = torch.zeros(K, dtype=x.dtype) if z is None else b[z] + W[z] * u[t].unsqueeze(-1)
        z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], s[z]), obs=x[t])


def two_chains(x: Tensor) -> None:
    """Independent chains of 2 and 3 states with one emission. # x: (T,)"""
    g = torch.Generator().manual_seed(0)
    rows = [torch.rand(n, n, generator=g).double() + torch.eye(n) for n in (2, 3)]
    A, B = (
        pyro.param(name, row / row.sum(-1, keepdim=True), constraint=C.simplex)
        for name, row in zip("AB", rows, strict=True)
    )
    mu = pyro.param("mu", torch.linspace(-2.0, 2.0, 6).double().reshape(2, 3))
    s = pyro.param("s", torch.ones(2, 3).double(), constraint=C.positive)
    z = w = None
    for t in vectorized_markov("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2) / 2 if z is None else A[z]))
        w = pyro.sample(f"w_{t}", dist.Categorical(torch.ones(3) / 3 if w is None else B[w]))
        seen = dist.Normal(Vindex(mu)[z, w], Vindex(s)[z, w])
        pyro.sample(f"x_{t}", seen, obs=x[t])


def forward_backward(
    first: np.ndarray, A: np.ndarray, log_l: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """γ, ξ of each step and the log evidence, scaled. # (K,), (T - 1, K, K), (T, K)"""
    T, K = log_l.shape
    top = log_l.max(1)
    likelihood = np.exp(log_l - top[:, None])
    alpha, beta, norm = np.empty((T, K)), np.empty((T, K)), np.empty(T)
    a = first * likelihood[0]
    norm[0] = a.sum()
    alpha[0] = a = a / norm[0]
    for t in range(1, T):
        a = (a @ A[t - 1]) * likelihood[t]
        norm[t] = a.sum()
        a /= norm[t]
        alpha[t] = a
    beta[-1] = b = np.ones(K)
    scaled = likelihood / norm[:, None]
    for t in range(T - 1, 0, -1):
        b = A[t - 1] @ (scaled[t] * b)
        beta[t - 1] = b
    xi = alpha[:-1, :, None] * A * (scaled[1:] * beta[1:])[:, None, :]
    return alpha * beta, xi, float(np.log(norm).sum() + top.sum())


def newton(design: np.ndarray, n: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Maximise Σ n log softmax(design θ) for the rows of transitions together.

    Args:
        design: # (T, P)
        n: Expected transitions. # (T, K, K)
        theta: # (K, P, K)
    """
    K, P = theta.shape[:2]
    mass = n.sum(-1)
    pairs = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)

    def at(theta: np.ndarray) -> tuple[float, np.ndarray]:
        eta = np.einsum("tp,ipj->tij", design, theta)
        eta -= eta.max(-1, keepdims=True)
        eta -= np.log(np.exp(eta).sum(-1, keepdims=True))
        return float((n * eta).sum()), np.exp(eta)

    value, p = at(theta)
    for _ in range(50):
        gradient = np.einsum("tij,tp->ipj", n - mass[..., None] * p, design)
        weighted = mass[..., None] * p
        full = -np.einsum("tij,tik,tq->ijkq", weighted, p, pairs, optimize=True)
        own = np.einsum("tij,tq->ijq", weighted, pairs, optimize=True)
        full[:, range(K), range(K)] += own
        hessian = full.reshape(K, K, K, P, P).transpose(0, 3, 1, 4, 2).reshape(K, P * K, P * K)
        g = gradient.reshape(K, -1)
        step = np.einsum("iab,ib->ia", np.linalg.pinv(hessian, hermitian=True), g)
        rise = float((g * step).sum())
        size = 1.0
        while True:
            new = theta + size * step.reshape(theta.shape)
            found = at(new)
            if found[0] >= value - 1e-12 * abs(value) or size < 1e-9:
                break
            size /= 2
        theta, (value, p) = new, found
        if rise < 1e-10:
            break
    return theta


def by_hand(u: Tensor, x: Tensor, K: int, steps: int) -> float:
    """EM of `with_covariate` in numpy; the log evidence after the last step, in nats."""
    g = torch.Generator().manual_seed(0)
    b, W = 2 * np.eye(K), 0.1 * torch.randn(K, K, generator=g, dtype=x.dtype).numpy()
    theta, data = np.stack([b, W], 1), x.numpy()
    design = np.stack([np.ones(len(data) - 1), u.numpy()[1:]], 1)
    mu, s, first = np.linspace(-1, 1, K), np.ones(K), np.full(K, 1 / K)

    def e_step() -> tuple[np.ndarray, np.ndarray, float]:
        eta = np.einsum("tp,ipj->tij", design, theta)
        A = np.exp(eta - eta.max(-1, keepdims=True))
        A /= A.sum(-1, keepdims=True)
        z = (data[:, None] - mu) / s
        return forward_backward(first, A, -0.5 * z * z - np.log(s) - 0.5 * np.log(2 * np.pi))

    gamma, xi, log_evidence = e_step()
    for _ in range(steps):
        theta = newton(design, xi, theta)
        mass = gamma.sum(0)
        mu = gamma.T @ data / mass
        s = np.sqrt((gamma * (data[:, None] - mu) ** 2).sum(0) / mass)
        gamma, xi, log_evidence = e_step()
    return log_evidence


def ours(u: Tensor, x: Tensor, K: int, steps: int) -> float:
    """The same by the library: the whole call."""
    pyro.clear_param_store()
    em = ExactPosteriorEM(with_covariate)
    found = em.fit(u, x, K, max_steps=steps, tol=0, progress=False).log_evidence
    assert found is not None
    return found


def series(T: int) -> tuple[Tensor, Tensor]:
    """A covariate, and data of three levels that it moves between."""
    g = torch.Generator().manual_seed(1)
    u = torch.randn(T, generator=g, dtype=torch.float64)
    z, x = 0, []
    for t in range(T):
        logits = 2 * torch.eye(3, dtype=u.dtype)[z] + torch.tensor([1.0, 0.0, -1.0]) * u[t]
        z = int(torch.multinomial(logits.softmax(-1), 1, generator=g))
        x.append(2.0 * z + float(torch.randn((), generator=g)))
    return u, torch.tensor(x, dtype=torch.float64)


def of_pairs(x: Tensor, steps: int) -> None:
    """hmmlearn on nine states, as many as two chains of three have."""
    from hmmlearn.hmm import GaussianHMM

    K = 9
    model = GaussianHMM(
        K, "diag", n_iter=steps, tol=-np.inf, init_params="", implementation="scaling", min_covar=0
    )
    model.startprob_, model.transmat_ = np.full(K, 1 / K), np.full((K, K), 0.5 / K) + np.eye(K) / 2
    model.means_, model.covars_ = np.linspace(-2, 2, K)[:, None], np.ones((K, 1))
    model.fit(x.numpy()[:, None])


def pairs(x: Tensor, steps: int) -> None:
    """Two chains by the library."""
    pyro.clear_param_store()
    ExactPosteriorEM(two_chains).fit(x, max_steps=steps, tol=0, progress=False)


def seconds(run: Callable[[], object]) -> float:
    """Processor time of a call."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def table() -> list[str]:
    """What the two cost beside their peers."""
    torch.set_num_threads(1)
    u, x = series(1000)
    off = abs(ours(u, x, 3, 20) - by_hand(u, x, 3, 20))
    rounds = [
        (seconds(lambda: ours(u, x, 3, 20)), seconds(lambda: by_hand(u, x, 3, 20)))
        for _ in range(5)
    ]
    mine, theirs = (statistics.median(r) for r in zip(*rounds, strict=True))
    x = series(2000)[1] / 2
    steps = []
    for run in (pairs, of_pairs):
        run(x, 5)
        found = [_more(run, x) for _ in range(5)]
        steps.append(1e3 * statistics.median(found) / 200)
    return [
        "",
        "Chains beyond the homogeneous one, processor time of one thread:",
        "",
        f"* a covariate in the transitions, T = 1,000, K = 3, a whole fit of 20 steps: {mine:.3f} s, "
        f"numpy {theirs:.3f} s: {mine / theirs:.2f} times (at most 1); {off:.0e} nats apart",
        f"* two chains of 2 and 3 states, T = 2,000, a step: {steps[0]:.2f} ms, hmmlearn on 9 states "
        f"{steps[1]:.2f} ms: {steps[0] / steps[1]:.2f} times (at most 1.5)",
    ]


def _more(run: Callable[[Tensor, int], None], x: Tensor) -> float:
    """Processor time of two hundred steps."""
    return seconds(lambda: run(x, 205)) - seconds(lambda: run(x, 5))


if __name__ == "__main__":
    print("\n".join(table()))
