"""Whitened rows in blocks of features, beside full matrices and EM written in numpy."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.densities import whitened
from pyro_em.densities.whitened import Whitened
from pyro_em.fitting.steps.em_on_sums import on_sums
from pyro_em.plan.program import Program
from pyro_em.tracing.parameters import values_of


def components(D: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lower triangles, means, rows and weights."""
    g = torch.Generator().manual_seed(D)
    W = torch.randn(K, D, D, generator=g, dtype=torch.float64).tril()
    mean = torch.randn(K, D, generator=g, dtype=torch.float64)
    x = torch.randn(D, 7, generator=g, dtype=torch.float64)
    r = torch.rand(K, 7, generator=g, dtype=torch.float64)
    return W.to(dtype), mean.to(dtype), x.to(dtype), r.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("D", [3, 16, 33, 150])
def test_blocks_are_the_full_products(
    D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whitened, "_ROWS", 4)  # seven rows are two parts of unequal size
    K, eps = 3, torch.finfo(dtype).eps
    W, mean, x, r = components(D, K, dtype)
    i, j = np.triu_indices(D)
    for is_near in (False, True) if dtype == torch.float64 else (False,):
        white = Whitened(W, mean, is_near)
        Wn, mn, xn, rn = (t.double().numpy() for t in (W, mean, x, r))
        d = xn[None] - mn[:, :, None]
        expected = ((Wn @ d) ** 2).sum(1)
        squares = white.squares(x).double().numpy()
        np.testing.assert_allclose(squares, expected, rtol=200 * D * eps)
        flat = torch.as_tensor(i * D + j)
        found = white.over_rows(2 * white.moments(r, x), flat).numpy()
        about = xn[None] if is_near else d
        second = np.einsum("kn,kin,kjn->kij", rn, about + 0 * d, about + 0 * d)[:, i, j]
        first = np.einsum("kn,kin->ki", rn, about + 0 * d)
        np.testing.assert_allclose(
            found, 2 * np.concatenate([first, second], 1), atol=200 * D * eps
        )


def mixture(x: Tensor, K: int) -> None:
    """Full covariances, beginning at the first rows."""
    w = pyro.param("w", x.new_ones(K) / K, constraint=C.simplex)
    mu = pyro.param("mu", x[:K].clone())
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    S = pyro.param("S", (1000 * eye).repeat(K, 1, 1), constraint=C.positive_definite)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)


def by_numpy(x: np.ndarray, K: int, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same steps row by row about each mean."""
    D = x.shape[1]
    w, mu, S = np.full(K, 1 / K), x[:K].copy(), np.stack([1000 * np.eye(D)] * K)
    for _ in range(steps):
        d = x[:, None] - mu  # (N, K, D)
        squares = np.einsum("nki,kij,nkj->nk", d, np.linalg.inv(S), d)
        joint = np.log(w) - 0.5 * (squares + np.linalg.slogdet(S)[1])
        r = np.exp(joint - joint.max(1, keepdims=True))
        r /= r.sum(1, keepdims=True)
        w = r.mean(0)
        mu = r.T @ x / r.sum(0)[:, None]
        d = x[:, None] - mu
        S = np.einsum("nk,nki,nkj->kij", r, d, d) / r.sum(0)[:, None, None]
    return w, mu, S


@pytest.mark.parametrize("apart", [1.5, 2.0**13])
def test_steps_far_from_zero_are_those_by_numpy(apart: float) -> None:
    N, D, K, steps = 240, 30, 2, 3
    g = np.random.default_rng(0)
    x = g.normal(size=(N, D)) @ (np.eye(D) + 0.1 * g.normal(size=(D, D)))
    x[::2] += apart
    x = np.round(x * 2**12) / 2**8  # exact beside an offset of a million
    pyro.clear_param_store()
    program = ExactPosteriorEM(mixture)._ready((torch.as_tensor(x + 2.0**20), K), {})
    assert isinstance(program, Program)
    em = on_sums(program)
    assert em is not None
    at = em.e_step(values_of(program.graph.parameters))
    (prepared,) = at.at.prepared.values()
    assert prepared.white.is_near == (apart < 10)  # both forms are met
    for _ in range(steps):
        at = em.step(at)[0]
    values = at.values
    w, mu, S = by_numpy(x, K, steps)
    np.testing.assert_allclose(values["w"].numpy(), w, rtol=1e-11)
    np.testing.assert_allclose(values["mu"].numpy() - 2.0**20, mu, atol=1e-9)
    np.testing.assert_allclose(values["S"].numpy(), S, atol=3e-9)
