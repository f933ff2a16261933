"""Linear-Gaussian series beside statsmodels: whole fits, and E-steps by themselves."""

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
from pyro_em.posteriors.kalman import smoothed
from pyro_em.posteriors.state_space import StateSpace

Run = Callable[[], Any]


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
        return lambda: smoothed(space), lambda: [peer.smooth() for peer in peers]

    return make
