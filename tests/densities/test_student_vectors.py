"""Student vectors as scale mixtures: the joint table, a plain numpy EM, rows against tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import digamma, logsumexp
from scipy.stats import multivariate_t
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, EMResult, ExactPosteriorEM, StepSize
from pyro_em.densities import rules
from pyro_em.densities.student_vectors import StudentVectorRows
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.testing import check_block
from pyro_em.updates.update import Gradient

W = torch.tensor([0.4, 0.6], dtype=torch.float64)
MU = torch.tensor([[-1.0, 0.5], [2.0, 1.0]], dtype=torch.float64)
TRIL = torch.tensor([[[1.0, 0.0], [0.3, 0.7]], [[0.5, 0.0], [-0.2, 1.2]]], dtype=torch.float64)


def mixture(x: Tensor, known: float = 0.0) -> None:
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    mu = pyro.param("mu", MU.clone())
    tril = pyro.param("tril", TRIL.clone(), constraint=C.lower_cholesky)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        df = known or pyro.param("df", 5 * W, constraint=C.positive)[z]
        pyro.sample("x", dist.MultivariateStudentT(df, mu[z], tril[z]), obs=x)


def data(n: int) -> Tensor:
    torch.manual_seed(3)
    tails = torch.tensor([2.0, 6.0], dtype=torch.float64)
    return dist.MultivariateStudentT(tails, 2 * MU, TRIL).sample((n,)).reshape(-1, 2)


def numpy_steps(x: np.ndarray, steps: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """EM as in Peel and McLachlan (2000), component by component."""
    w, mu, df = W.numpy().copy(), MU.numpy().copy(), (5 * W).numpy()
    S = (TRIL @ TRIL.mT).numpy()
    history, D = [], x.shape[1]
    for _ in range(steps):
        parts = zip(w, mu, S, df, strict=True)
        joint = [np.log(p) + multivariate_t(m, s, df=v).logpdf(x) for p, m, s, v in parts]
        table = np.stack(joint, -1)
        total = logsumexp(table, axis=1)
        history.append(float(total.sum()))
        r = np.exp(table - total[:, None])
        for k in range(len(w)):
            d = x - mu[k]
            u = (df[k] + D) / (df[k] + np.einsum("ni,ij,nj->n", d, np.linalg.inv(S[k]), d))
            mu[k] = (r[:, k] * u) @ x / (r[:, k] @ u)
            d = x - mu[k]
            S[k] = (r[:, k] * u * d.T) @ d / r[:, k].sum()
            old = (df[k] + D) / 2
            rest = (r[:, k] @ (np.log(u) - u)) / r[:, k].sum() + digamma(old) - np.log(old) + 1
            df[k] = brentq(lambda v, rest=rest: np.log(v / 2) - digamma(v / 2) + rest, 1e-3, 1e4)
        w = r.mean(0)
    return history, {"w": w, "mu": mu, "df": df, "tril": np.linalg.cholesky(S)}


def test_block() -> None:
    check_block(Mixture, mixture, data(4), states=1)


@pytest.mark.parametrize("size", [30, 10])  # all rows at once, and chunks of them
def test_against_numpy(size: int) -> None:
    x = data(30)
    history, values = numpy_steps(x.numpy(), 6)
    fitted = x if size == 30 else Chunks(x, rows=size)
    result = ExactPosteriorEM(mixture).fit(fitted, max_steps=6, tol=0)
    assert result.plan.kernel == "mixture"
    assert list(result.history) == pytest.approx(history, rel=1e-10)
    for name, value in values.items():
        assert result.params[name].numpy() == pytest.approx(value, rel=1e-6), name


def both(monkeypatch: pytest.MonkeyPatch, fit: Callable[[], EMResult]) -> tuple[EMResult, ...]:
    """A fit by products over features of rows, and the same through the family's own density."""
    made: list[StudentVectorRows | None] = []
    rule = rules.as_student_vectors

    def noted(*given: Any) -> StudentVectorRows | None:
        made.append(rule(*given))
        return made[-1]

    monkeypatch.setattr(rules, "as_student_vectors", noted)
    quick = fit()
    assert any(made)
    pyro.clear_param_store()
    monkeypatch.setattr(rules, "as_student_vectors", lambda *given: None)
    return quick, fit()


@pytest.mark.parametrize("away", [0.0, 1e4])  # far away the features of rows would cancel
def test_rows_are_what_tables_say(away: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(x: Tensor) -> None:
        pyro.param("mu", MU + away)
        mixture(x, known=3.0)

    x = torch.cat([data(30) + away, torch.full((1, 2), 1e5 + away)])
    quick, slow = both(monkeypatch, lambda: ExactPosteriorEM(shifted).fit(x, max_steps=4, tol=0))
    assert list(quick.history) == pytest.approx(list(slow.history), rel=1e-9)
    for name, value in slow.params.items():
        assert quick.params[name].numpy() == pytest.approx(value.numpy(), rel=1e-6), name


def test_online_steps_take_sums_of_other_rows_along(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = Chunks(data(30), rows=20)

    def fit() -> EMResult:
        em = ExactPosteriorEM(mixture)
        return em.fit(chunks, online=StepSize(0.7), num_epochs=2, progress=False)

    quick, slow = both(monkeypatch, fit)
    for name, value in slow.params.items():
        assert quick.params[name].numpy() == pytest.approx(value.numpy(), rel=1e-8), name


def test_single_precision() -> None:
    def model(x: Tensor) -> None:
        w = pyro.param("w", W.to(x.dtype), constraint=C.simplex)
        mu = pyro.param("mu", MU.to(x.dtype))
        tril = pyro.param("tril", TRIL.to(x.dtype), constraint=C.lower_cholesky)
        df = pyro.param("df", 5 * W.to(x.dtype), constraint=C.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.MultivariateStudentT(df[z], mu[z], tril[z]), obs=x)

    x = data(50).float()
    history, _ = numpy_steps(x.double().numpy(), 5)
    result = ExactPosteriorEM(model).fit(x, max_steps=5, tol=0)
    assert list(result.history) == pytest.approx(history, rel=2e-6)


def test_vectors_without_latents_are_found_in_one_climb() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.param("mu", MU[0].clone())
        tril = pyro.param("tril", TRIL[0].clone(), constraint=C.lower_cholesky)
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.MultivariateStudentT(3.0, mu, tril), obs=x)

    updates = ExactPosteriorEM(model).plan(data(5)).updates
    assert all(isinstance(u.update, Gradient) for u in updates.values())
