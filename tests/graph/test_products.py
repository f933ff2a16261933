"""Covariances written as products or diagonals of parameters: each step is that of the plain model."""

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

from pyro_em import Chunks, ExactPosteriorEM
from pyro_em.updates.update import ClosedForm

MVN = dist.MultivariateNormal
_DRAWN = torch.Generator().manual_seed(0)
Z = torch.arange(60) % 2
MIX = torch.tensor([[1.0, 0.3, 0.0], [0.0, 1.2, 0.4], [0.2, 0.0, 0.8]], dtype=torch.float64)
X = torch.randn(60, 3, generator=_DRAWN, dtype=torch.float64) @ MIX + 3 * Z[:, None]
EYE = torch.eye(3, dtype=torch.float64)
LOWER = 1.5 * EYE.repeat(2, 1, 1) + 0.2 * torch.ones(3, 3, dtype=torch.float64).tril(-1)
FREE = LOWER + 0.3
START: dict[str, tuple[Tensor, C.Constraint]] = {
    "lower": (LOWER, C.lower_cholesky),
    "free": (FREE, C.real),
    "one": (LOWER[0], C.lower_cholesky),
    "covariance": (FREE @ FREE.mT, C.positive_definite),
    "stds": (torch.full((2, 3), 1.5, dtype=torch.float64), C.positive),
    "real stds": (torch.full((2, 3), 1.5, dtype=torch.float64), C.real),
    "variances": (torch.full((2, 3), 2.25, dtype=torch.float64), C.positive),
    "std": (torch.full((2,), 1.5, dtype=torch.float64), C.positive),
    "log": (torch.full((2, 3), 2 * float(np.log(1.5)), dtype=torch.float64), C.real),
}
Observe = Callable[[Tensor, Tensor, Tensor], Any]


def em_of(observe: Observe, start: str) -> Any:
    def model(x: Tensor) -> None:
        weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
        w = pyro.param("w", weights, constraint=C.simplex)
        m = pyro.param("m", X[:2].clone())
        value, constraint = START[start]
        p = pyro.param("p", value.clone(), constraint=constraint)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", observe(m[z], p, z), obs=x)

    return model


def fitted(observe: Observe, start: str, *data: Any, **how: Any) -> Any:
    with pyro.get_param_store().scope():
        em = ExactPosteriorEM(em_of(observe, start), **how)
        return em.fit(*(data or (X,)), max_steps=3, tol=0, progress=False)


# What is written, its start, and the same model as it is solved without it.
PLAIN: dict[str, tuple[Observe, str]] = {
    "tril": (lambda m, L, z: MVN(m, scale_tril=L[z]), "lower"),
    "one tril": (lambda m, L, z: MVN(m, scale_tril=L), "one"),
    "covariance": (lambda m, S, z: MVN(m, S[z]), "covariance"),
    "precision": (lambda m, P, z: MVN(m, precision_matrix=P[z]), "covariance"),
    "normal": (lambda m, s, z: dist.Normal(m, s[z]).to_event(1), "stds"),
    "spheres": (lambda m, s, z: dist.Normal(m, s[z].unsqueeze(-1)).to_event(1), "std"),
}
WRITTEN: dict[str, tuple[Observe, str, str]] = {
    "selected product": (lambda m, L, z: MVN(m, (L @ L.mT)[z]), "lower", "tril"),
    "product of selected": (lambda m, L, z: MVN(m, L[z] @ L[z].mT), "lower", "tril"),
    "einsum": (lambda m, L, z: MVN(m, torch.einsum("kij,klj->kil", L, L)[z]), "lower", "tril"),
    "one for all": (lambda m, L, z: MVN(m, L @ L.T), "one", "one tril"),
    "free factor": (lambda m, A, z: MVN(m, (A @ A.mT)[z]), "free", "covariance"),
    "precision": (lambda m, A, z: MVN(m, precision_matrix=(A @ A.mT)[z]), "free", "precision"),
    "squares": (lambda m, s, z: MVN(m, torch.diag_embed(s[z] ** 2)), "stds", "normal"),
    "square of a diagonal": (lambda m, s, z: MVN(m, torch.diag_embed(s)[z] ** 2), "stds", "normal"),
    "unconstrained": (lambda m, s, z: MVN(m, torch.diag_embed(s[z] ** 2)), "real stds", "normal"),
    "variances": (lambda m, v, z: MVN(m, torch.diag_embed(v[z])), "variances", "normal"),
    "log variances": (lambda m, v, z: MVN(m, torch.diag_embed(v[z].exp())), "log", "normal"),
    "diagonal factor": (
        lambda m, s, z: MVN(m, scale_tril=torch.diag_embed(s[z])),
        "stds",
        "normal",
    ),
    "diagonal precision": (
        lambda m, s, z: MVN(m, precision_matrix=torch.diag_embed(s[z] ** -2)),
        "stds",
        "normal",
    ),
    "identity": (lambda m, s, z: MVN(m, (s**2)[z][..., None, None] * EYE), "std", "spheres"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_every_step_is_that_of_the_plain_model(case: str) -> None:
    observe, start, plain = WRITTEN[case]
    a, b = fitted(observe, start), fitted(*PLAIN[plain])
    assert list(a.history) == pytest.approx(list(b.history), rel=1e-11)
    assert a.plan.kernel == "mixture" and isinstance(a.plan.updates["p"].update, ClosedForm)
    torch.testing.assert_close(a.params["m"], b.params["m"], rtol=1e-9, atol=1e-9)
    if "tril" in plain or case == "squares":
        torch.testing.assert_close(a.params["p"], b.params["p"], rtol=1e-9, atol=1e-9)
    if case == "free factor":  # the lower factor of what was found
        torch.testing.assert_close(a.params["p"], torch.linalg.cholesky(b.params["p"]))


def test_weighted_scatter() -> None:
    """Against numpy: means and covariances of responsibilities."""
    x, w, m = X.numpy(), np.array([0.4, 0.6]), X[:2].numpy()
    S = (FREE @ FREE.mT).numpy()
    for _ in range(3):
        d = x[:, None] - m
        square = np.einsum("nki,kij,nkj->nk", d, np.linalg.inv(S), d)
        r = w * np.exp(-0.5 * square) / np.sqrt(np.linalg.det(S))
        r /= r.sum(1, keepdims=True)
        w, m = r.mean(0), (r.T @ x) / r.sum(0)[:, None]
        d = x[:, None] - m
        S = np.einsum("nk,nki,nkj->kij", r, d, d) / r.sum(0)[:, None, None]
    L = fitted(*WRITTEN["free factor"][:2]).params["p"].numpy()
    np.testing.assert_allclose(L @ L.swapaxes(1, 2), S, rtol=1e-10)


def test_missing_entries_and_chunks() -> None:
    x = X.clone()
    x[::4, 1] = torch.nan
    observe, start, plain = WRITTEN["selected product"]
    a, b = (fitted(*m, x, missing="nan") for m in ((observe, start), PLAIN[plain]))
    assert list(a.history) == pytest.approx(list(b.history), rel=1e-11)
    for case in ("selected product", "squares"):
        whole, parts = (fitted(*WRITTEN[case][:2], *d) for d in ((X,), (Chunks(X, rows=25),)))
        assert list(whole.history) == pytest.approx(list(parts.history), rel=1e-12)


OTHER: dict[str, tuple[Observe, str]] = {
    "two factors": (lambda m, L, z: MVN(m, (L @ (L + 0.0 * L).mT)[z]), "lower"),
    "a square": (lambda m, S, z: MVN(m, (S @ S)[z]), "covariance"),
    "symmetric factors": (lambda m, S, z: MVN(m, (S @ S.mT)[z]), "covariance"),
    "part of it": (lambda m, L, z: MVN(m[..., :2], (L @ L.mT)[z][..., :2, :2]), "lower"),
    "a correlation": (lambda m, s, z: MVN(m, torch.diag_embed(s[z] ** 2) + 0.1), "stds"),
}


@pytest.mark.parametrize("case", OTHER)
def test_what_is_neither_has_no_closed_form(case: str) -> None:
    with pyro.get_param_store().scope():
        data = X[:, :2] if case == "part of it" else X
        plan = ExactPosteriorEM(em_of(*OTHER[case])).plan(data)
        assert plan.updates["p"].kind is None


def test_logarithms_of_a_simplex_are_logits() -> None:
    fits = []
    for observe in (lambda w: dist.Categorical(w), lambda w: dist.Categorical(logits=w.log())):

        def model(x: Tensor) -> None:
            w = pyro.param("w", torch.tensor([0.4, 0.6], dtype=torch.float64), C.simplex)
            m = pyro.param("m", torch.tensor([-1.0, 1.0], dtype=torch.float64))
            with pyro.plate("n", len(x)):
                z = pyro.sample("z", observe(w))
                pyro.sample("x", dist.Normal(m[z], 1.0), obs=x)

        with pyro.get_param_store().scope():
            fits.append(ExactPosteriorEM(model).fit(X[:, 0], max_steps=3, tol=0, progress=False))
    assert list(fits[0].history) == pytest.approx(list(fits[1].history), rel=1e-12)
    assert fits[1].plan.kernel == "mixture"
