"""E-steps by compiled loops: what operations on tables give, and what numbers are to the last bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.densities import compiled

N, K = 3000, 3
START = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def positive(name: str, value: Tensor) -> Tensor:
    return pyro.param(name, value.clone(), constraint=C.positive)


def students(x: Tensor, often: Tensor | None) -> None:
    """Two numbers per row, weighted rows or none."""
    w = pyro.param("w", START.clone(), constraint=C.simplex)
    mu = pyro.param("mu", X[:K].clone())
    df, s = positive("df", 10 * START), positive("s", 2 * START)
    weighted = pyro.poutine.scale(scale=1.0 if often is None else often)
    with pyro.plate("n", len(x)), weighted:
        z = pyro.sample("z", dist.Categorical(w))
        one = dist.StudentT(df[z].unsqueeze(-1), mu[z], s[z].unsqueeze(-1))
        pyro.sample("x", one.to_event(1), obs=x)


def gammas(x: Tensor, often: Tensor | None) -> None:
    w = pyro.param("w", START.clone(), constraint=C.simplex)
    a, b = positive("a", 10 * START), positive("b", START)
    weighted = pyro.poutine.scale(scale=1.0 if often is None else often)
    with pyro.plate("n", len(x)), weighted:
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Gamma(a[z], b[z]), obs=x[:, 0].exp())


def weibulls(x: Tensor, often: Tensor | None) -> None:
    w = pyro.param("w", START.clone(), constraint=C.simplex)
    scale, k = positive("l", torch.stack([2 * START, START], -1)), positive("k", 3 * START)
    weighted = pyro.poutine.scale(scale=1.0 if often is None else often)
    with pyro.plate("n", len(x)), weighted:
        z = pyro.sample("z", dist.Categorical(w))
        one = dist.Weibull(scale[z], k[z].unsqueeze(-1))
        pyro.sample("x", one.to_event(1), obs=x.exp())


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("model", [students, gammas, weibulls])
def test_a_fit_is_that_of_operations_on_tables(
    model: Callable[[Tensor, Tensor | None], None], weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = 0.5 + X[:, 1].abs() if weighted else None
    monkeypatch.setattr(compiled, "_PART", 1000)
    found, loops = [], []
    swept = compiled.swept
    monkeypatch.setattr(
        "pyro_em.posteriors.mixtures.mixture.swept",
        lambda *args: loops.append(args) or swept(*args),
    )
    for few in (0, 2**60):
        monkeypatch.setattr(compiled, "_FEW", few)
        pyro.clear_param_store()
        result = ExactPosteriorEM(model).fit(X, often, max_steps=3, tol=0)
        found.append((list(result.history), {n: v.clone() for n, v in result.params.items()}))
        assert len(loops) > 2  # of the first fit alone
        loops = loops if few else loops[:3]
    assert len(loops) == 3
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for name, value in found[0][1].items():
        assert torch.allclose(value, found[1][1][name], rtol=1e-9, atol=1e-12)


def test_impossible_rows_are_left_to_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_FEW", 0)
    x = X.clone()
    x[17, 0] = 1e200  # its square is infinite: no density is left
    pyro.clear_param_store()
    with pytest.raises(Exception, match=r"row|datum|impossible|17"):
        ExactPosteriorEM(gammas).fit(x, None, max_steps=2, tol=0)


def test_exponentials_and_logarithms_are_right_to_the_last_bits() -> None:
    import numba

    from pyro_em.densities.numba_rows import _exp2, _log1p

    @numba.njit
    def both(x: np.ndarray, t: np.ndarray, e: np.ndarray, log: np.ndarray) -> None:
        for i in range(len(x)):
            e[i] = _exp2(x[i])
            u = 1.0 + t[i]
            log[i] = _log1p(t[i], u, 1.0 / u)

    rng = np.random.default_rng(0)
    x = np.concatenate([-rng.exponential(80, 5000), [0.0, -999.0, -np.inf, -1e300, np.nan]])
    t = np.concatenate([np.exp(rng.normal(0, 12, 5000)), [0.0, 1e-300, 1e300, np.inf, np.nan]])
    e, log = np.empty_like(x), np.empty_like(t)
    both(x, t, e, log)
    assert np.allclose(e, np.where(x < -1000, 0.0, np.exp2(x)), rtol=1e-15, atol=0, equal_nan=True)
    assert np.allclose(log[:-2], np.log1p(t[:-2]), rtol=1e-15, atol=0)
    assert not np.isfinite(log[-2:]).any()
