"""Loadings with an equation of their own move as the normal equations of all together move them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM
from pyro_em.updates.regressions import least_squares

D, Q = 5, 2


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> Iterator[None]:
    """Each case begins with an empty param store, in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def numbers(seed: int, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


X = numbers(0, 30, Q) @ numbers(1, Q, D) + numbers(2, 30, D)


def factors(x: Tensor, how: str) -> None:
    W = pyro.param("W", lambda: numbers(3, D, Q))
    mu = pyro.param("mu", lambda: torch.zeros(D))
    s = pyro.param("s", lambda: torch.ones(D), constraint=constraints.positive)
    loadings = W * torch.ones(D, Q).tril() if how == "some zero" else W
    loadings = W[[0, 0, 1, 2, 3]] if how == "shared" else loadings
    mean = mu[0].expand(D) if how == "one mean" else mu
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(h @ loadings.T + mean, s).to_event(1), obs=x)


def mixture(x: Tensor, how: str) -> None:
    """Of factor analysers; with means of their own, or with one for all."""
    W = pyro.param("W", lambda: numbers(3, 2, D, Q))
    mu = pyro.param("mu", lambda: numbers(4, 2, D))
    s = pyro.param("s", lambda: torch.ones(D), constraint=constraints.positive)
    w = pyro.param("w", lambda: torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        h = pyro.sample("h", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
        mean = mu[0] if how == "one mean" else mu[z]
        loc = (W[z] @ h.unsqueeze(-1)).squeeze(-1) + mean
        pyro.sample("x", dist.Normal(loc, s).to_event(1), obs=x)


CASES = {
    "factor analysis": (factors, "as they stand", True),
    "some loadings are zero": (factors, "some zero", True),
    "features share loadings": (factors, "shared", False),
    "features share a mean": (factors, "one mean", False),
    "a mixture": (mixture, "as they stand", True),
    "components share a mean": (mixture, "one mean", False),
}


@pytest.mark.parametrize(("model", "how", "separate"), CASES.values(), ids=list(CASES))
def test_they_move_as_all_together(
    model: Any, how: str, separate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, taken, step = [], [], least_squares.separate_step

    def noted(*args: Any) -> Tensor | None:
        out = step(*args)
        taken.append(out is not None)
        return out

    for kind in (noted, lambda *_: None):
        monkeypatch.setattr(least_squares, "separate_step", kind)
        pyro.clear_param_store()
        em = ExactPosteriorEM(model)
        found.append([em.step(X, how) for _ in range(3)])
        found.append({n: v.detach().clone() for n, v in pyro.get_param_store().items()})
    assert taken == [separate] * 3
    assert found[0] == pytest.approx(found[2], rel=1e-12)
    for name, value in found[1].items():
        torch.testing.assert_close(value, found[3][name], rtol=1e-10, atol=1e-12)
