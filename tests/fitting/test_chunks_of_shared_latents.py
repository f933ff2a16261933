"""Conjugate latents outside the rows where the data come in chunks: the steps on all data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import Chunks, EMResult, ExactPosteriorEM, UsageError

RNG = np.random.default_rng(4)
GROUP = torch.arange(30) // 9  # a chunk has rows of some groups alone
UNITS = torch.as_tensor(RNG.uniform(0.5, 2.0, 30))
COUNTS = torch.as_tensor(RNG.poisson(RNG.gamma(2.0, 1.5, 4)[GROUP] * UNITS.numpy()).astype(float))
REALS = torch.as_tensor(RNG.normal(size=(30, 2)))


def _positive(name: str, *value: float) -> Tensor:
    given = torch.tensor(value[0] if len(value) == 1 else value, dtype=torch.float64)
    return pyro.param(name, given, constraint=constraints.positive)


def rates(x: Tensor, group: Tensor, units: Tensor) -> None:
    a, b, u = _positive("a", 1.0), _positive("b", 1.0), _positive("u", 1.0, 1.5)
    with pyro.plate("groups", 4):
        rate = pyro.sample("rate", dist.Gamma(a, b))
    with pyro.plate("rows", len(x)):
        exposure = units * u[(units > 1).long()]
        pyro.sample("x", dist.Poisson(exposure * rate[group]), obs=x)


def one_precision_beside_a_mixture(x: Tensor, y: Tensor) -> None:
    a, m = _positive("a", 2.0), pyro.param("m", torch.tensor([-1.0, 1.0], dtype=torch.float64))
    precision = pyro.sample("precision", dist.Gamma(a, 1.0))
    pyro.sample("before", dist.Exponential(precision), obs=torch.tensor(0.7))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.4)).long()
        pyro.sample("y", dist.Normal(m[z], 1.0), obs=y[:, 0])
        pyro.sample("w", dist.Normal(0.1, precision.rsqrt()), obs=y[:, 1])


def simplexes_of_a_loop(x: Tensor) -> None:
    a = pyro.param("a", torch.ones(3).double(), constraint=constraints.positive)
    thetas = [pyro.sample(f"theta_{i}", dist.Dirichlet(a)) for i in range(2)]
    with pyro.plate("rows", len(x)):
        for i, theta in enumerate(thetas):
            pyro.sample(f"x_{i}", dist.Categorical(theta), obs=(x + i).long() % 3)


_CASES: dict[str, tuple[Callable[..., None], tuple[Tensor, ...], str]] = {
    "rates with estimated exposures": (rates, (COUNTS, GROUP, UNITS), "rate"),
    "one precision": (one_precision_beside_a_mixture, (COUNTS, REALS), "precision"),
    "simplexes of a loop": (simplexes_of_a_loop, (COUNTS,), "theta_1"),
}


def _fitted(model: Callable[..., None], *given: Any) -> EMResult:
    pyro.clear_param_store()
    return ExactPosteriorEM(model).fit(*given, max_steps=2, tol=0.0, progress=False)


def turned(x: Tensor, flag: Tensor) -> None:
    """Rows whose own rate is read in some of them, and whose probability is turned in some."""
    a = _positive("a", 1.0)
    with pyro.plate("rows", len(x)):
        rate, p = pyro.sample("rate", dist.Gamma(a, 1.0)), pyro.sample("p", dist.Beta(a, 2.0))
        pyro.sample("x", dist.Poisson(torch.where(flag > 1, rate, 2.0)), obs=x)
        pyro.sample("g", dist.Geometric(torch.where(flag > 2, p, 1 - p)), obs=x)


def test_chunks_that_are_read_again_may_read_latents_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyro_em.fitting.parts.chunked._KEPT_BYTES", 0)
    parts = _fitted(turned, Chunks(COUNTS, GROUP, rows=15))
    assert list(parts.history) == pytest.approx(list(_fitted(turned, COUNTS, GROUP).history))


@pytest.mark.parametrize("case", _CASES)
def test_steps_and_answers_are_those_on_all_data(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, latent = _CASES[case]
    if latent == "rate":  # chunks that are read anew in each pass
        monkeypatch.setattr("pyro_em.fitting.parts.chunked._KEPT_BYTES", 0)
    whole, parts = (_fitted(model, *given) for given in (data, (Chunks(*data, rows=16),)))
    em = ExactPosteriorEM(model)
    assert list(parts.history) == pytest.approx(list(whole.history), abs=1e-10)
    assert parts.bic == pytest.approx(whole.bic, abs=1e-9)
    chunks = Chunks(*data, rows=16)
    assert em.score(chunks) == pytest.approx(em.score(*data), abs=1e-10)
    each, q = list(em.posterior(chunks)), em.posterior(*data)
    assert sum(own.log_evidence for own in each) == pytest.approx(q.log_evidence, abs=1e-10)
    for own in each:  # in each chunk what all rows say of it
        assert torch.allclose(own.mean(latent), q.mean(latent), rtol=1e-12)
    if case == "simplexes of a loop":
        errors = whole.standard_errors()
        for name, error in parts.standard_errors().items():
            assert torch.allclose(error, errors[name], rtol=1e-8)


def test_what_does_not_add_up_is_refused_by_name() -> None:
    em = ExactPosteriorEM(rates)
    chunks = Chunks(COUNTS, GROUP, UNITS, rows=16)
    result = em.fit(chunks, max_steps=1, progress=False)
    with pytest.raises(UsageError, match="'x' reads 'rate', and its density depends on parameters"):
        result.standard_errors()
    with pytest.raises(UsageError, match="'rate': it is outside plate 'rows'"):
        em.elbo(chunks)
    with pytest.raises(UsageError, match="what the model says of a row depends on the rows beside"):
        ExactPosteriorEM(rate_of_centred).fit(Chunks(COUNTS, GROUP, rows=16))


def rate_of_centred(x: Tensor, group: Tensor) -> None:
    a = _positive("a", 1.0)
    rate = pyro.sample("rate", dist.Gamma(a, float(x.mean())))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)
