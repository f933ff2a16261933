"""Least squares from sums over the data: against numpy, and against steps through tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.plan import program as programs
from pyro_em.plan.eligibility import Kernel
from pyro_em.posteriors.chains.chain import Chain
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.testing import check_block

torch.manual_seed(3)
X = torch.randn(24, dtype=torch.float64) * 2
U = torch.randn(24, dtype=torch.float64)
SIGNS = torch.tensor([-1.0, 1.0, 2.0], dtype=torch.float64)


def real(name: str, *values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return pyro.param(name, torch.tensor(values, dtype=dtype).squeeze())


def simplex(name: str, *rows: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return pyro.param(name, torch.tensor(rows, dtype=dtype), constraint=C.simplex)


def sigma(dtype: torch.dtype = torch.float64) -> Tensor:
    return pyro.param("sigma", torch.tensor(1.0, dtype=dtype), constraint=C.positive)


def shifted(dtype: torch.dtype = torch.float64, n: int = 24) -> None:
    """Means on a line: m + d s_k."""
    m, d = real("m", 0.3, dtype=dtype), real("d", 1.0, dtype=dtype)
    with pyro.plate("n", n):
        z = pyro.sample("z", dist.Categorical(simplex("w", 0.3, 0.4, 0.3, dtype=dtype)))
        loc = m + d * SIGNS.to(dtype)[z]
        pyro.sample("x", dist.Normal(loc, sigma(dtype)), obs=X[:n].to(dtype))


def ridge() -> None:
    """The same with Normal priors."""
    m = pyro.sample("m", dist.Normal(torch.tensor(0.5).double(), 1.0))
    d = pyro.sample("d", dist.Normal(torch.tensor(1.0).double(), 0.5))
    with pyro.plate("n", 24):
        z = pyro.sample("z", dist.Categorical(simplex("w", 0.3, 0.4, 0.3)))
        pyro.sample("x", dist.Normal(m + d * SIGNS[z], sigma()), obs=X)


def chains(*names: str) -> None:
    """Chains that share their lines."""
    a, b, A = real("a", -1.0, 1.0), real("b", 0.5, 0.2), simplex("A", [0.7, 0.3], [0.2, 0.8])
    for i, name in enumerate(names):
        z = None
        for t in range(6):
            z = pyro.sample(f"{name}_{t}", dist.Categorical(A[0] if z is None else A[z]))
            loc = a[z] + b[z] * U[t + i]
            pyro.sample(f"x_{name}_{t}", dist.Normal(loc, sigma()), obs=X[t + 6 * i])


def additive() -> None:
    """A mixture beside two latents per row whose means add."""
    w, a, b = simplex("w", 0.3, 0.7), real("a", -1.0, 1.0), real("b", -0.5, 0.7)
    with pyro.plate("rows", 24):
        u = pyro.sample("u", dist.Categorical(w))
        pyro.sample("y", dist.Normal(real("mu", -1.0, 1.0)[u], sigma()), obs=X.flip(0))
    with pyro.plate("pairs", 24):
        z = pyro.sample("z", dist.Categorical(w))
        h = pyro.sample("h", dist.Categorical(simplex("v", 0.4, 0.6)))
        pyro.sample("x", dist.Normal(a[z] + b[h], 1.0), obs=X)


def fit(model: Callable[..., None], monkeypatch: pytest.MonkeyPatch, quick: bool) -> Any:
    with monkeypatch.context() as patch, pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        if not quick:
            patch.setattr(programs, "kernel_of", lambda *a: Kernel("contraction"))
        guide = "map" if model is ridge else None
        return ExactPosteriorEM(model, guide).fit(max_steps=6, tol=0, progress=False)


CASES: dict[str, tuple[Callable[..., None], set[str]]] = {
    "a mixture": (shifted, {"mixture"}),
    "priors": (ridge, {"mixture"}),
    "two chains": (lambda: chains("z", "u"), {"chain"}),
    "additive means": (additive, {"mixture"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_through_tables(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, names = CASES[case]
    a, b = fit(model, monkeypatch, True), fit(model, monkeypatch, False)
    kernel = a.plan.kernel
    assert (set(kernel.values()) if isinstance(kernel, dict) else {kernel}) == names
    assert list(a.history) == pytest.approx(list(b.history), rel=1e-10)
    for name, value in b.params.items():
        torch.testing.assert_close(a.params[name], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_are_those_of_the_textbook(dtype: torch.dtype) -> None:
    """EM in numpy: least squares of all rows under each component, weighted by responsibilities."""
    with pyro.get_param_store().scope():
        em = ExactPosteriorEM(shifted)
        assert em.plan(dtype).kernel == "mixture"
        result = em.fit(dtype, max_steps=5, tol=0, progress=False)
    x, s = X.numpy(), SIGNS.numpy()
    w, beta, scale = np.array([0.3, 0.4, 0.3]), np.array([0.3, 1.0]), 1.0
    design = np.stack([np.ones(3), s], 1)
    path = []
    for _ in range(6):
        log_p = -0.5 * ((x[:, None] - design @ beta) / scale) ** 2 - np.log(scale)
        log_p += np.log(w) - 0.5 * np.log(2 * np.pi)
        top = log_p.max(1, keepdims=True)
        total = top[:, 0] + np.log(np.exp(log_p - top).sum(1))
        path.append(total.sum())
        r = np.exp(log_p - total[:, None])
        last = (w, beta, scale)
        w = r.mean(0)
        root = np.sqrt(r).reshape(-1)
        rows = np.tile(design, (len(x), 1)) * root[:, None]
        beta = np.linalg.lstsq(rows, np.repeat(x, 3) * root, rcond=None)[0]
        scale = np.sqrt((r * (x[:, None] - design @ beta) ** 2).sum() / len(x))
    rel = 1e-10 if dtype == torch.float64 else 1e-5
    assert [*result.history, result.log_evidence] == pytest.approx(path, rel=rel)
    for name, value in zip(("w", "m", "d", "sigma"), (last[0], *last[1], last[2]), strict=True):
        np.testing.assert_allclose(result.params[name], value, rtol=100 * rel)


def test_against_the_joint_table() -> None:
    check_block(Mixture, lambda: shifted(n=6))
    check_block(Chain, lambda: chains("z"))
