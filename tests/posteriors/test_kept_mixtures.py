"""Mixtures that are known from earlier data: the same numbers as where everything is decided anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.plan.kept import forget_readings
from pyro_em.posteriors.mixtures.kept_mixtures import DecidedMixture

Fitted = tuple[float, tuple[float, ...], dict[str, Tensor]]


def vectors(x: Tensor) -> None:
    """Full covariances. # x: (N, 2)"""
    w = pyro.param("w", x.new_tensor([0.5, 0.5]), constraint=C.simplex)
    mu = pyro.param("mu", x[:2].clone())
    S = pyro.param("S", torch.cov(x.T).repeat(2, 1, 1), constraint=C.positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)


def features(x: Tensor) -> None:
    """Independent features, and a number beside them. # x: (N, 2)"""
    w = pyro.param("w", x.new_tensor([0.5, 0.5]), constraint=C.simplex)
    mu = pyro.param("mu", x[:2].clone())
    s = pyro.param("s", x.new_ones(2, 2), constraint=C.positive)
    m = pyro.param("m", x[:2, 0].clone())
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], s[z]).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(m[z], 1.0), obs=x[:, 0] - 1)


def of_one_spread(x: Tensor) -> None:
    """One spread for all components. # x: (N, 2)"""
    w = pyro.param("w", x.new_tensor([0.5, 0.5]), constraint=C.simplex)
    mu = pyro.param("mu", x[:2].clone())
    L = pyro.param("L", torch.eye(2, dtype=x.dtype), constraint=C.lower_cholesky)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], scale_tril=L), obs=x)


def data(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Two clusters. # (40, 2)"""
    g = torch.Generator().manual_seed(seed)
    centres = torch.arange(40).remainder(2).unsqueeze(-1) * 3.0
    return (centres + torch.randn(40, 2, generator=g)).to(dtype)


def fitted(model: Callable[[Tensor], None], x: Tensor) -> Fitted:
    """Evidence, path and parameters after a few steps."""
    pyro.clear_param_store()
    found = ExactPosteriorEM(model).fit(x, max_steps=4, tol=0, progress=False)
    return found.log_evidence, found.history.entering, dict(found.params)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For each mixture that was known whether it held for the data."""
    forget_readings()
    found: list[bool] = []
    plain = DecidedMixture.on

    def on(self: DecidedMixture, *args: object) -> object:
        out = plain(self, *args)  # type: ignore[arg-type]
        found.append(out is not None)
        return out

    monkeypatch.setattr(DecidedMixture, "on", on)
    yield found
    forget_readings()


def assert_same(a: Fitted, b: Fitted) -> None:
    """Equal to the bit."""
    assert a[:2] == b[:2]
    assert all(torch.equal(a[2][name], value) for name, value in b[2].items())


@pytest.mark.parametrize("model", [vectors, features, of_one_spread])
def test_known_mixtures_give_what_is_given_anew(
    model: Callable[[Tensor], None], made: list[bool]
) -> None:
    far = 1e3 * data(2) + 1e5  # another centre, and another least spread
    for x in (data(0), data(1), far):
        known = fitted(model, x)
    held = len(made)
    forget_readings()
    assert_same(known, fitted(model, far))
    assert held >= (1 if model is not features else 0) and all(made)


def test_rows_that_recur_are_counted_though_those_before_did_not(made: list[bool]) -> None:
    for seed in range(3):
        fitted(vectors, data(seed))
    few = data(3).round()[torch.arange(40) % 10]
    known = fitted(vectors, few)
    assert made[-1] is False
    forget_readings()
    assert_same(known, fitted(vectors, few))


def test_another_dtype_constraint_or_wish_is_decided_anew(made: list[bool]) -> None:
    bound = C.positive

    def model(x: Tensor) -> None:
        w = pyro.param("w", x.new_tensor([0.5, 0.5]), constraint=C.simplex)
        mu = pyro.param("mu", x[:2, 0].clone())
        s = pyro.param("s", x.new_ones(2), constraint=bound)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x[:, 0])

    for seed in range(3):
        fitted(model, data(seed))
    assert made and all(made)
    before = len(made)
    single = fitted(model, data(0, torch.float32))
    assert len(made) == before
    forget_readings()
    assert_same(single, fitted(model, data(0, torch.float32)))
    for seed in range(3):
        fitted(model, data(seed))
    before = len(made)
    bound = C.greater_than(0.9)
    held = fitted(model, data(0))
    assert len(made) == before
    forget_readings()
    assert_same(held, fitted(model, data(0)))
    assert float(held[2]["s"].min()) >= 0.9
