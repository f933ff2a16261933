"""Several latents per row of a plate: against the joint table, and at every step against tables."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

import pyro_em.plan.program as programs
from pyro_em import Chunks, ExactPosteriorEM
from pyro_em.plan.eligibility import Kernel
from pyro_em.posteriors.mixtures.product_rows import ProductRows
from pyro_em.testing import check_block

_DRAWN = torch.Generator().manual_seed(1)
X = torch.randn(60, generator=_DRAWN, dtype=torch.float64)
Y = torch.randn(60, 2, generator=_DRAWN, dtype=torch.float64)
S = torch.randint(0, 3, (60,), generator=_DRAWN)


def simplex(name: str, *rows: Any) -> Tensor:
    return pyro.param(name, torch.tensor(rows, dtype=torch.float64), constraint=C.simplex)


def real(name: str, *rows: Any) -> Tensor:
    return pyro.param(name, torch.tensor(rows, dtype=torch.float64))


def positive(name: str, *rows: Any) -> Tensor:
    return pyro.param(name, torch.tensor(rows, dtype=torch.float64), constraint=C.positive)


def dependent(
    x: Tensor, y: Tensor, s: Tensor, ok: Tensor | None = None, often: Tensor | None = None
) -> None:
    """A class with a sub-class: each datum reads one of the two."""
    w, B = simplex("w", 0.3, 0.7), simplex("B", [0.8, 0.2], [0.5, 0.5])
    mu, sigma = real("mu", -1.0, 1.0), positive("sigma", 1.2)
    E = simplex("E", [0.6, 0.3, 0.1], [0.2, 0.3, 0.5])
    m = real("m", [0.0, 1.0], [1.0, 0.0])
    eye = torch.eye(2, dtype=torch.float64)
    L = pyro.param("L", 1.1 * eye, constraint=C.lower_cholesky)
    counted = nullcontext() if often is None else pyro.poutine.scale(scale=often)
    with pyro.plate("n", len(x)), counted:
        a = pyro.sample("a", dist.Categorical(w))
        b = pyro.sample("b", dist.Categorical(B[a]))
        fn = dist.Normal(mu[a], sigma)
        pyro.sample("x", fn if ok is None else fn.mask(ok), obs=x)
        pyro.sample("y", dist.MultivariateNormal(m[b], scale_tril=L), obs=y)
        pyro.sample("s", dist.Categorical(E[b]), obs=s)


def meeting(x: Tensor, y: Tensor, s: Tensor) -> None:
    """Independent latents whose means add, whose tables cross, and one of which is a spread."""
    w, v = simplex("w", 0.3, 0.7), simplex("v", 0.2, 0.8)
    mu, nu, sigma = real("mu", -1.0, 1.0), real("nu", -0.5, 0.3), positive("sigma", 0.8, 1.2)
    rows = [[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]], [[0.1, 0.3, 0.6], [0.2, 0.5, 0.3]]
    T, rate = simplex("T", *rows), positive("rate", [0.5, 1.0], [2.0, 1.5])
    with pyro.plate("n", len(x)):
        a, b = (
            pyro.sample(*args) for args in zip("ab", map(dist.Categorical, (w, v)), strict=True)
        )
        pyro.sample("x", dist.Normal(mu[a] + nu[b], 1.3), obs=x)
        pyro.sample("y", dist.Normal(real("xi", -1.0, 1.0)[a], sigma[b]), obs=y[:, 0])
        pyro.sample("s", dist.Categorical(T[a, b]), obs=s)
        pyro.sample("k", dist.Poisson(rate[a, b]), obs=s.double())


def tree(x: Tensor, y: Tensor, s: Tensor) -> None:
    """Two leaves of equal form below a root, which are stacked and read parameters of their own."""
    z_and_leaves = simplex("w", 0.3, 0.7), simplex("A", [0.6, 0.4], [0.3, 0.7])
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(z_and_leaves[0]))
        for i, name in enumerate("uv"):
            u = pyro.sample(name, dist.Categorical(z_and_leaves[1][z]))
            mu = real(f"mu_{name}", -1.0 + i, 1.0)
            pyro.sample(f"x_{name}", dist.Normal(mu[u], 1.0), obs=y[:, i])


OK = torch.tensor([True, False, True, True, True])
CASES: dict[str, tuple[Callable[..., None], int, tuple[Tensor, ...]]] = {
    "dependent": (dependent, 5, ()),
    "masked": (dependent, 5, (OK,)),
    "meeting": (meeting, 5, ()),
    "tree": (tree, 4, ()),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_joint_table(case: str) -> None:
    model, n, more = CASES[case]
    check_block(ProductRows, model, X[:n], Y[:n], S[:n], *more, states=1 + (case == "dependent"))


def both(
    monkeypatch: pytest.MonkeyPatch, model: Callable[..., None], *data: Any, **how: Any
) -> tuple[Any, Any]:
    """The same fit by the kernel and through tables."""
    out = []
    for quick in (True, False):
        with monkeypatch.context() as patch, pyro.get_param_store().scope():
            if not quick:
                patch.setattr(programs, "kernel_of", lambda *a: Kernel("contraction"))
            em = ExactPosteriorEM(model, **how)
            out.append(em.fit(*data, max_steps=4, tol=0, progress=False))
    return out[0], out[1]


def same(a: Any, b: Any) -> None:
    assert list(a.history) == pytest.approx(list(b.history), rel=1e-11)
    for name, value in b.params.items():
        torch.testing.assert_close(a.params[name], value, rtol=1e-9, atol=1e-9)


def test_rows_that_weigh_are_masked_and_have_missing_entries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    y = Y.clone()
    y[::7, 1] = torch.nan
    often = 0.5 + torch.rand(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a, b = both(monkeypatch, dependent, X, y, S, X > -1.5, often, missing="nan")
    assert a.plan.kernel == "mixture"
    same(a, b)


def test_in_chunks() -> None:
    fits = []
    for data in ((X, Y, S), (Chunks(X, Y, S, rows=25),)):
        with pyro.get_param_store().scope():
            fits.append(ExactPosteriorEM(meeting).fit(*data, max_steps=4, tol=0, progress=False))
    same(*fits)


def test_rows_that_occur_again_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is discrete: nine rows stand for sixty."""

    def model(s: Tensor, t: Tensor) -> None:
        w, B = simplex("w", 0.3, 0.7), simplex("B", [0.5, 0.2, 0.3], [0.2, 0.5, 0.3])
        E = simplex("E", [0.6, 0.3, 0.1], [0.2, 0.3, 0.5])
        F = simplex("F", [0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.7, 0.2])
        with pyro.plate("n", len(s)):
            a = pyro.sample("a", dist.Categorical(w))
            b = pyro.sample("b", dist.Categorical(B[a]))
            pyro.sample("s", dist.Categorical(E[a]), obs=s)
            pyro.sample("t", dist.Categorical(F[b]), obs=t)

    same(*both(monkeypatch, model, S, S.roll(7)))
