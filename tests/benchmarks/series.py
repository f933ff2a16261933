"""Linear-Gaussian series beside statsmodels and dynamax: whole fits, E-steps and EM steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, vectorized_markov
from pyro_em.posteriors.filters import kalman
from pyro_em.posteriors.filters.state_space import StateSpace
from tests.benchmarks.models import iterations

Run = Callable[[], Any]
Steps = Callable[[int], None]


def local_level(y: Tensor) -> None:
    """A random walk with noise. # y: (T,)"""
    q = pyro.param("q", y.new_tensor(1.0), constraint=constraints.positive)
    r = pyro.param("r", y.new_tensor(1.0), constraint=constraints.positive)
    h = None
    for t in vectorized_markov("time", len(y)):
        h = pyro.sample(f"h_{t}", dist.Normal(*((0.0, 1e3) if h is None else (h, q))))
        pyro.sample(f"y_{t}", dist.Normal(h, r), obs=y[t])


def local_level_fit(T: int, steps: int) -> Callable[[], tuple[Run, Run]]:
    """Some EM steps of a local level, reading included, against the peer's own fit."""

    def make() -> tuple[Run, Run]:
        from statsmodels.tsa.statespace.structural import UnobservedComponents

        draw = np.random.default_rng(0).normal
        y = np.cumsum(0.5 * draw(size=T)) + draw(size=T)
        x = torch.from_numpy(y)

        def ours() -> None:
            pyro.clear_param_store()
            ExactPosteriorEM(local_level).fit(x, max_steps=steps, tol=0, progress=False)

        def theirs() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                UnobservedComponents(y, "local level").fit(disp=0)

        return ours, theirs

    return make


def e_step(T: int, n: int, D: int, chains: int = 1) -> Callable[[], tuple[Run, Run]]:
    """The smoother of one or many series, against the peer's, one series after the other."""

    def make() -> tuple[Run, Run]:
        from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

        draw = np.random.default_rng(0).normal
        A, H = 0.9 * np.linalg.qr(draw(size=(n, n)))[0], draw(size=(D, n))
        y = draw(size=(chains, T, D))
        eye = torch.eye(n, dtype=torch.float64)
        step = torch.ones(T, dtype=torch.long)
        step[0] = 0
        space = StateSpace(
            torch.stack([torch.zeros_like(eye), torch.from_numpy(A)])[None],
            torch.zeros(1, T, n, dtype=torch.float64),
            torch.stack([eye, 0.5 * eye])[None],
            step,
            torch.from_numpy(H)[None, None],
            torch.full((1, 1, D), 0.7, dtype=torch.float64),
            0 * step,
            torch.from_numpy(y),
        )
        peers = []
        for own in y:
            peer = KalmanSmoother(D, n, n)
            peer.bind(np.asfortranarray(own.T))
            peer["transition"], peer["design"], peer["selection"] = A, H, np.eye(n)
            peer["state_cov"], peer["obs_cov"] = 0.25 * np.eye(n), 0.49 * np.eye(D)
            peer.initialize_known(np.zeros(n), np.eye(n))
            peers.append(peer)
        return lambda: kalman.smoothed(space), lambda: [peer.smooth() for peer in peers]

    return make


def by_numpy(make: Callable[[], tuple[Run, Run]]) -> Callable[[], tuple[Run, Run]]:
    """The same work without numba."""

    def plain() -> tuple[Run, Run]:
        ours, theirs = make()

        def slow() -> None:
            before = kalman._HAS_NUMBA
            kalman._HAS_NUMBA = False
            try:
                ours()
            finally:
                kalman._HAS_NUMBA = before

        return slow, theirs

    return plain


def system(y: Tensor, A: Tensor, H: Tensor) -> None:
    """A linear dynamical system, all of it learned. # y: (T, D), A: (n, n), H: (D, n)"""
    (D, n), triangle = H.shape, constraints.lower_cholesky
    A, H = pyro.param("A", A), pyro.param("H", H)
    Q = pyro.param("Q", torch.eye(n).to(y), constraint=triangle)
    R = pyro.param("R", torch.eye(D).to(y), constraint=triangle)
    mean = pyro.param("mean", torch.zeros(n).to(y))
    P = pyro.param("P", torch.eye(n).to(y), constraint=triangle)
    h = None
    for t in vectorized_markov("time", len(y)):
        loc, own = (mean, P) if h is None else (h @ A.T, Q)
        h = pyro.sample(f"h_{t}", dist.MultivariateNormal(loc, scale_tril=own))
        pyro.sample(f"y_{t}", dist.MultivariateNormal(h @ H.T, scale_tril=R), obs=y[t])


def system_steps(T: int, n: int, D: int) -> Callable[[], tuple[Steps, Steps]]:
    """EM steps of a linear dynamical system against dynamax in float64, jitted."""

    def make() -> tuple[Steps, Steps]:
        import jax
        import jax.numpy as jnp
        from dynamax.linear_gaussian_ssm import LinearGaussianSSM

        jax.config.update("jax_enable_x64", True)
        draw = np.random.default_rng(0).normal
        A, H = 0.9 * np.linalg.qr(draw(size=(n, n)))[0], draw(size=(D, n))
        x, y = np.zeros(n), np.empty((T, D))
        for t in range(T):
            x = A @ x + 0.5 * draw(size=n)
            y[t] = H @ x + 0.7 * draw(size=D)
        peer = LinearGaussianSSM(n, D, has_dynamics_bias=False, has_emissions_bias=False)
        first, properties = peer.initialize(
            jax.random.PRNGKey(0), dynamics_weights=jnp.asarray(A), emission_weights=jnp.asarray(H)
        )
        data = jnp.asarray(y)[None]

        @jax.jit
        def step(params: Any) -> Any:
            sums, _ = jax.vmap(lambda e: peer.e_step(params, e))(data)
            return peer.m_step(params, properties, sums, None)[0]

        def theirs(steps: int) -> None:
            at = first
            for _ in range(steps):
                at = step(at)
            jax.block_until_ready(at)

        tensors = (torch.from_numpy(v) for v in (y, A, H))
        return iterations(system, *tensors), theirs

    return make
