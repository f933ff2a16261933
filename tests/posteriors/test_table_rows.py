"""Steps through tables of some rows at a time: those of one table of all rows, and what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import DataError, ExactPosteriorEM
from pyro_em.fitting.steps.em_on_sums import SumsPoint
from pyro_em.plan.kept import forget_readings
from pyro_em.posteriors.continuous import table_rows

K, N = 3, 60


@contextmanager
def parted(cells: int) -> Iterator[None]:
    """Go through tables in parts of so many cells, however few rows there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_rows, "_MANY", 0)
        patch.setattr(table_rows, "_CELLS", cells)
        yield


def _positive(name: str, start: Tensor) -> Tensor:
    return pyro.param(name, start.double(), constraint=C.positive)


def _weights() -> Tensor:
    return pyro.param("p", (torch.ones(K) / K).double(), constraint=C.simplex)


def students(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([-4.0, 0.0, 5.0]).double())
    s, nu = _positive("s", torch.ones(K)), _positive("nu", torch.full((K,), 4.0))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(_weights()))
        w = pyro.sample("w", dist.Gamma(nu[z] / 2, nu[z] / 2))
        pyro.sample("x", dist.Normal(mu[z], s[z] * w.rsqrt()), obs=x)


def rates(x: Tensor) -> None:
    a, b = _positive("a", torch.tensor([1.0, 4.0, 9.0])), _positive("b", torch.ones(K))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(_weights()))
        rate = pyro.sample("rate", dist.Gamma(a[z], b[z]))
        pyro.sample("x", dist.Poisson(rate), obs=x.abs().round())


def repeated(x: Tensor) -> None:
    """Several measurements of each row, some of them hidden."""
    mu, s = pyro.param("mu", torch.tensor([-4.0, 0.0, 5.0]).double()), _positive("s", torch.ones(K))
    x = x.reshape(-1, 4)
    with pyro.plate("n", len(x), dim=-2):
        z = pyro.sample("z", dist.Categorical(_weights()))
        with pyro.plate("j", 4, dim=-1), pyro.poutine.mask(mask=x < 6):
            pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)


def data() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, generator=generator).double() * 1.5
    return x + torch.tensor([-4.0, 0.0, 5.0]).double()[torch.arange(N) % K]


def fitted(model: Callable[..., None], x: Tensor) -> Any:
    pyro.clear_param_store()
    forget_readings()
    return ExactPosteriorEM(model).fit(x, max_steps=5, tol=0.0, progress=False)


@pytest.mark.parametrize("model", [students, rates, repeated], ids=lambda m: m.__name__)
def test_parts_say_together_what_one_table_says(
    model: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fitted(model, data())
    handed: list[SumsPoint] = []
    monkeypatch.setattr(SumsPoint, "judged", lambda at: handed.append(at))
    assert "chunks" not in str(whole.plan)
    with parted(K * 7):  # which divides no number of rows here
        some = fitted(model, data())
    assert "in chunks of rows" in str(some.plan) and not handed
    assert list(some.history) == pytest.approx(list(whole.history), rel=1e-12)
    for name, value in whole.params.items():
        torch.testing.assert_close(some.params[name], value, rtol=1e-9, atol=1e-12)


def test_the_evidence_is_that_of_student_distributions() -> None:
    x = data()
    with parted(K * 7):
        result = fitted(students, x)
    p = {n: v.detach().numpy() for n, v in result.params.items()}
    density = sum(
        p["p"][k] * stats.t.pdf(x.numpy(), p["nu"][k], p["mu"][k], p["s"][k]) for k in range(K)
    )
    assert result.log_evidence == pytest.approx(np.log(density).sum(), rel=1e-12)


def test_an_impossible_row_is_named_by_its_number_among_all() -> None:
    x = data()
    x[41] = 1e200
    with parted(K * 7), pytest.raises(DataError, match="n = 41"):
        fitted(students, x)


def analysers(x: Tensor) -> None:
    """A mixture of factor analysers, whose noise is shared."""
    W = pyro.param("W", torch.tensor([[[1.0, 0.5, -0.5]], [[0.2, -1.0, 0.7]]]).double())
    m = pyro.param("m", torch.tensor([[-1.0, 0.0, 1.0], [1.0, 0.5, -1.0]]).double())
    s = _positive("s", torch.tensor([1.0, 0.8, 1.2]))
    q = pyro.param("q", torch.tensor([0.4, 0.6]).double(), constraint=C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(q))
        h = pyro.sample("h", dist.Normal(0.0, torch.ones(1).double()).to_event(1))
        mean = m[z] + (h.unsqueeze(-2) @ W[z]).squeeze(-2)
        pyro.sample("x", dist.Normal(mean, s).to_event(1), obs=x)


def test_mixtures_of_factor_analysers_take_the_steps_of_numpy() -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(41, 3, generator=generator, dtype=torch.float64) * 1.5
    with parted(2**60), pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_rows, "_MATRICES", 8 * 7)  # seven rows in a part
        with pyro.get_param_store().scope():
            result = ExactPosteriorEM(analysers).fit(x, max_steps=3, tol=0, progress=False)
    X, q = x.numpy(), np.array([0.4, 0.6])
    W = np.array([[1.0, 0.5, -0.5], [0.2, -1.0, 0.7]])
    m, s = np.array([[-1.0, 0.0, 1.0], [1.0, 0.5, -1.0]]), np.array([1.0, 0.8, 1.2])
    history = []
    for _ in range(3):
        joint = np.stack(
            [
                np.log(q[k])
                + stats.multivariate_normal.logpdf(X, m[k], np.outer(W[k], W[k]) + np.diag(s**2))
                for k in range(2)
            ],
            1,
        )
        history.append(float(np.logaddexp(*joint.T).sum()))
        r = np.exp(joint - np.logaddexp(*joint.T)[:, None])
        left = np.zeros(3)
        for k in range(2):
            precision = 1 + (W[k] ** 2 / s**2).sum()
            h = (X - m[k]) @ (W[k] / s**2) / precision
            H = np.stack([h, np.ones_like(h)])
            second = (H * r[:, k]) @ H.T + np.diag([r[:, k].sum() / precision, 0.0])
            cross = (H * r[:, k]) @ X
            W[k], m[k] = np.linalg.solve(second, cross)
            fitted_now = np.stack([W[k], m[k]])
            left += r[:, k] @ X**2 - (fitted_now * cross).sum(0)
        q, s = r.mean(0), np.sqrt(left / len(X))
    assert list(result.history)[:3] == pytest.approx(history, rel=1e-10)
    for name, value in (("q", q), ("s", s), ("m", m)):
        np.testing.assert_allclose(result.params[name], value, rtol=1e-8)
    np.testing.assert_allclose(result.params["W"][:, 0], W, rtol=1e-8)


def with_gaps(x: Tensor) -> None:
    """Factor analysis of vectors that were seen in part."""
    W = pyro.param("W", torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.7, 0.4], [-0.5, 0.9]]).double())
    m = pyro.param("m", torch.zeros(4).double())
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, torch.ones(2).double()).to_event(1))
        pyro.sample("x", dist.Normal(h @ W.T + m, _positive("s", torch.ones(4))).to_event(1), obs=x)


def known_loadings(x: Tensor) -> None:
    """Normal vectors seen in part, whose latents have a free covariance: its scale is expanded."""
    W = torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.7, 0.4], [-0.5, 0.9]]).double()
    m = pyro.param("m", torch.zeros(4).double())
    L = pyro.param("L", 0.1 * torch.eye(2).double(), constraint=C.lower_cholesky)
    S = pyro.param("S", torch.eye(4).double(), constraint=C.positive_definite)
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.MultivariateNormal(torch.zeros(2).double(), scale_tril=L))
        pyro.sample("x", dist.MultivariateNormal(h @ W.T + m, S), obs=x)


def subjects(x: Tensor) -> None:
    """Measurements of each row beside an effect of its own."""
    mu = pyro.param("mu", torch.zeros(()).double())
    with pyro.plate("n", len(x), dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, _positive("t", torch.tensor(0.05))))
        with pyro.plate("j", 4, dim=-1), pyro.poutine.mask(mask=x < 3):
            pyro.sample("x", dist.Normal(mu + u, _positive("s", torch.ones(()))), obs=x)


@pytest.mark.parametrize("model", [with_gaps, known_loadings, subjects], ids=lambda m: m.__name__)
def test_gaussian_latents_of_rows_take_expanded_steps_in_parts(model: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(2)
    h = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    x = h @ torch.tensor([[2.0, 1.0, 0.5, 0.0], [0.0, -1.0, 1.0, 2.0]]).double() + 5
    x += torch.randn(N, 4, generator=generator, dtype=torch.float64)
    if model is not subjects:
        x[torch.rand(N, 4, generator=generator) < 0.2] = torch.nan
    found = []
    for cells in (None, 4 * 7):  # all rows, and seven in a part
        pyro.clear_param_store()
        forget_readings()
        with parted(cells) if cells else nullcontext():
            em = ExactPosteriorEM(model, missing="nan")
            found.append(em.fit(x, max_steps=4, tol=0.0, progress=False))
    whole, some = found
    assert "chunks" not in str(whole.plan) and "in chunks of rows" in str(some.plan)
    assert list(some.history) == pytest.approx(list(whole.history), rel=1e-12)
    for name, value in whole.params.items():
        torch.testing.assert_close(some.params[name], value, rtol=1e-9, atol=1e-12)
