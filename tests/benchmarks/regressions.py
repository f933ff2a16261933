"""Mixtures of logistic regressions beside numpy, and autoregressive Markov chains beside dynamax.

``python -m tests.benchmarks.regressions``; dynamax is left out where it is not installed. Tables are
components before rows, so that sums over components run along rows of memory.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import vectorized_markov
from tests.benchmarks.models import iterations
from tests.benchmarks.timing import Steps

Array = NDArray[np.float64]


def reweighted(X: Array, XT: Array, y: Array, r: Array, w: Array) -> Array:
    """Logistic regressions of all components by iteratively reweighted least squares, to 1e-10 nats.

    Args:
        X: Covariates. # (N, d)
        XT: The same, transposed in memory. # (d, N)
        y: Outcomes. # (N,)
        r: Responsibilities. # (K, N)
        w: Where to begin. # (K, d)
    """
    while True:
        p = expit(w @ XT)
        slope = (r * (y - p)) @ X
        p *= 1 - p
        p *= r
        curve = np.stack([(XT * own) @ X for own in p])
        step = np.linalg.solve(curve, slope[..., None])[..., 0]
        w = w + step
        if (step * slope).sum() < 1e-10:
            return w


def logistic_steps(X: Array, y: Array, p: Array, w: Array, steps: int) -> tuple[list[float], Array]:
    """EM of a mixture of logistic regressions: the evidence entering each step, and coefficients."""
    XT, evidence = np.ascontiguousarray(X.T), []
    for _ in range(steps):
        eta = w @ XT
        joint = np.log(p)[:, None] + y * eta - np.logaddexp(0, eta)
        top = joint.max(0)
        joint -= top
        np.exp(joint, out=joint)
        mass = joint.sum(0)
        joint /= mass
        evidence.append(float(np.log(mass).sum() + top.sum()))
        p = joint.mean(1)
        w = reweighted(X, XT, y, joint, w)
    return evidence, w


def logistic(x: Tensor, y: Tensor, start: Tensor) -> None:
    """A mixture of logistic regressions."""
    K = len(start)
    w = pyro.param("w", start.clone())
    p = pyro.param("p", torch.full((K,), 1 / K, dtype=torch.float64), constraint=C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("y", dist.Bernoulli(logits=(x * w[z]).sum(-1)), obs=y)


def logistic_data(N: int, d: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Covariates with a constant, outcomes, and coefficients to begin with."""
    rng = np.random.default_rng(0)
    X = np.column_stack([np.ones(N), rng.normal(size=(N, d))])
    true = 1.5 * rng.normal(size=(K, d + 1))
    y = rng.random(N) < expit((X * true[rng.integers(0, K, N)]).sum(1))
    start = true + 0.5 * rng.normal(size=true.shape)
    return torch.tensor(X), torch.tensor(y, dtype=torch.float64), torch.tensor(start)


def logistic_mixture(N: int, d: int, K: int) -> Callable[[], tuple[Steps, Steps]]:
    """Against numpy."""

    def make() -> tuple[Steps, Steps]:
        x, y, start = logistic_data(N, d, K)
        even = np.full(K, 1 / K)

        def theirs(steps: int) -> None:
            logistic_steps(x.numpy(), y.numpy(), even, start.numpy(), steps)

        return iterations(logistic, x, y, start), theirs

    return make


def autoregressive(y: Tensor, W0: Tensor, b0: Tensor) -> None:
    """A Markov chain of vector autoregressions."""
    K, D = b0.shape
    W, b = pyro.param("W", W0.clone()), pyro.param("b", b0.clone())
    eye = torch.eye(D, dtype=torch.float64)
    S = pyro.param("S", eye.expand(K, D, D).clone(), constraint=C.positive_definite)
    even = torch.full((K, K), 0.5 / K, dtype=torch.float64)
    A = pyro.param("A", even + 0.5 * torch.eye(K, dtype=torch.float64), constraint=C.simplex)
    p = pyro.param("p", torch.full((K,), 1 / K, dtype=torch.float64), constraint=C.simplex)
    before = torch.cat([torch.zeros(1, D, dtype=torch.float64), y[:-1]])
    z: Any = None
    for t in vectorized_markov("time", len(y), dim=-1):
        z = pyro.sample(f"z_{t}", dist.Categorical(p if z is None else A[z]))
        loc = (W[z] @ before[t].unsqueeze(-1)).squeeze(-1) + b[z]
        pyro.sample(f"y_{t}", dist.MultivariateNormal(loc, S[z]), obs=y[t])


def against_dynamax(T: int, K: int, D: int) -> Callable[[], tuple[Steps, Steps]]:
    """Against dynamax in float64, jitted; its compilation is paid in the short run."""

    def make() -> tuple[Steps, Steps]:
        import jax
        import jax.numpy as jnp
        from dynamax.hidden_markov_model import LinearAutoregressiveHMM

        jax.config.update("jax_enable_x64", True)
        rng = np.random.default_rng(0)
        y = np.cumsum(rng.normal(size=(T, D)), 0) * 0.1 + rng.normal(size=(T, D))
        hmm = LinearAutoregressiveHMM(K, D, num_lags=1)
        emissions, inputs = jnp.asarray(y), hmm.compute_inputs(jnp.asarray(y))
        first, properties = hmm.initialize(key=jax.random.PRNGKey(0), method="prior")
        state = hmm.initialize_m_step_state(first, properties)

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            found = jax.vmap(lambda e, i: hmm.e_step(params, e, i))(emissions[None], inputs[None])
            return hmm.m_step(params, properties, found[0], state)

        step(first, state)

        def theirs(steps: int) -> None:
            at = first, state
            for _ in range(steps):
                at = step(*at)
            jax.block_until_ready(at)

        W, b = torch.tensor(0.3 * rng.normal(size=(K, D, D))), torch.tensor(rng.normal(size=(K, D)))
        return iterations(autoregressive, torch.tensor(y), W, b), theirs

    return make


def per_step(run: Steps, few: int, many: int) -> float:
    """Processor time of one step, in ms."""
    taken = []
    for steps in (few, many):
        begin = time.process_time()
        run(steps)
        taken.append(time.process_time() - begin)
    return 1e3 * (taken[1] - taken[0]) / (many - few)


def table(name: str, pair: tuple[Steps, Steps], few: int, many: int, rounds: int = 5) -> None:
    """Both in turns, and the ratio of their medians."""
    each = [[per_step(run, few, many) for run in pair] for _ in range(rounds)]
    ours, theirs = np.median(np.array(each), 0)
    print(f"{name}: {ours:.3g} ms, {theirs:.3g} ms, ours over theirs {ours / theirs:.2f}")


def main() -> None:
    """Print what a step takes beside the peer's."""
    torch.set_num_threads(1)
    name = "mixture of logistic regressions, N=100k, 8 covariates, K=3, against numpy"
    table(name, logistic_mixture(100_000, 8, 3)(), 2, 8)
    if importlib.util.find_spec("dynamax") is not None:
        name = "autoregressive HMM, T=5,000 K=5 D=3, against dynamax"
        table(name, against_dynamax(5_000, 5, 3)(), 10, 110)


if __name__ == "__main__":
    main()
