"""Regressions of vectors on the kernels: every step is that through tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, Fixed, vectorized_markov
from pyro_em.plan import program as programs
from pyro_em.plan.eligibility import Kernel
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.testing import check_block

N = 30
RNG = torch.Generator().manual_seed(1)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=RNG)


U, W, B = draw(N, 5), draw(2, 3, 5), draw(2, 3)
Y = torch.where((torch.arange(N) % 3 == 0)[:, None], U @ W[0].T, U @ W[1].T) + 0.7 * draw(N, 3)
ROOT = torch.eye(3, dtype=torch.float64) + 0.3 * draw(2, 3, 3).tril(-1)


def times(W: Tensor, u: Tensor) -> Tensor:
    return (W @ u.unsqueeze(-1)).squeeze(-1)


def full(W: Tensor, b: Tensor, z: Any, u: Tensor, dtype: torch.dtype) -> Any:
    S = pyro.param("S", (ROOT @ ROOT.mT).to(dtype), constraint=C.positive_definite)
    return dist.MultivariateNormal(times(W[z], u) + b[z], S[z])


def pooled(W: Tensor, b: Tensor, z: Any, u: Tensor, dtype: torch.dtype) -> Any:
    L = pyro.param("L", ROOT[0].to(dtype), constraint=C.lower_cholesky)
    return dist.MultivariateNormal(times(W[z], u) + b[z], scale_tril=L)


def tied(W: Tensor, b: Tensor, z: Any, u: Tensor, dtype: torch.dtype) -> Any:
    """One slope for all components."""
    L = pyro.param("L", ROOT.to(dtype), constraint=C.lower_cholesky)
    return dist.MultivariateNormal(times(W[0], u) + b[z], scale_tril=L[z])


def known(W: Tensor, b: Tensor, z: Any, u: Tensor, dtype: torch.dtype) -> Any:
    return dist.MultivariateNormal(times(W[z], u) + b[z] + 1, scale_tril=ROOT.to(dtype)[z])


def few(W: Tensor, b: Tensor, z: Any, u: Tensor, dtype: torch.dtype) -> Any:
    """One covariate, so that six rows determine all that is read."""
    return dist.MultivariateNormal(W[z][..., 0] * u[..., :1] + b[z], scale_tril=ROOT.to(dtype)[z])


def diagonal(W: Tensor, b: Tensor, z: Any, u: Tensor, dtype: torch.dtype) -> Any:
    s = pyro.param("s", torch.ones(2, 3, dtype=dtype), constraint=C.positive)
    return dist.Normal(times(W[z], u) + b[z], s[z]).to_event(1)


def rows(emission: Callable[..., Any], dtype: torch.dtype = torch.float64, n: int = N) -> None:
    W0, b = pyro.param("W", 0.5 * W.to(dtype)), pyro.param("b", B.to(dtype))
    p = pyro.param("p", torch.tensor([0.4, 0.6], dtype=dtype), constraint=C.simplex)
    with pyro.plate("n", n):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("y", emission(W0, b, z, U[:n].to(dtype), dtype), obs=Y[:n].to(dtype))


def chain(emission: Callable[..., Any], dtype: torch.dtype = torch.float64) -> None:
    W0, b = pyro.param("W", 0.5 * W.to(dtype)), pyro.param("b", B.to(dtype))
    A = pyro.param("A", torch.tensor([[0.6, 0.4], [0.3, 0.7]], dtype=dtype), constraint=C.simplex)
    z: Any = None
    with pyro.plate("two", 2, dim=-1):
        for t in vectorized_markov("t", N // 2, dim=-2):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[0] if z is None else A[z]))
            u, y = (d.reshape(N // 2, 2, -1)[t].to(dtype) for d in (U, Y))
            pyro.sample(f"y_{t}", emission(W0, b, z, u, dtype), obs=y)


def fit(model: Callable[[], None], monkeypatch: pytest.MonkeyPatch, quick: bool, **how: Any) -> Any:
    with monkeypatch.context() as patch, pyro.get_param_store().scope():
        if not quick:
            patch.setattr(programs, "kernel_of", lambda *a: Kernel("contraction"))
        return ExactPosteriorEM(model, **how).fit(max_steps=4, tol=0, progress=False)


@pytest.mark.parametrize(
    ("model", "emission"),
    [
        (rows, full),
        (rows, pooled),
        (rows, known),
        (rows, diagonal),
        (chain, tied),
        (chain, diagonal),
    ],
)
def test_every_step_is_that_through_tables(
    model: Any, emission: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = partial(model, emission)
    a, b = fit(one, monkeypatch, True), fit(one, monkeypatch, False)
    assert a.plan.kernel == ("mixture" if model is rows else "chain")
    assert list(a.history) == pytest.approx(list(b.history), rel=1e-10)
    for name, value in b.params.items():
        torch.testing.assert_close(a.params[name], value, rtol=1e-7, atol=1e-8)


def test_single_precision_and_held_spreads(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = fit(partial(rows, full), monkeypatch, True)
    rough = fit(partial(rows, full, torch.float32), monkeypatch, True)
    assert rough.plan.kernel == "mixture" and rough.params["W"].dtype == torch.float32
    assert list(rough.history) == pytest.approx(list(exact.history), rel=1e-5)
    held = {"updates": {"S": Fixed(), "b": Fixed()}}
    quick = fit(partial(rows, full), monkeypatch, True, **held)
    slow = fit(partial(rows, full), monkeypatch, False, **held)
    assert list(quick.history) == pytest.approx(list(slow.history), rel=1e-10)


def test_against_the_joint_table() -> None:
    check_block(Mixture, partial(rows, few, n=6))
