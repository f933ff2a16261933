"""Accelerated EM: fewer E-steps, the same optimum, never less than the best evidence seen."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import poisson
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, Gradient, Hard, UsageError
from pyro_em.fitting.results.history import EMStatus
from pyro_em.fitting.steps import cycles
from pyro_em.fitting.steps.em_map import ByTracing
from pyro_em.fitting.steps.em_on_sums import OnSums
from tests.data_sets import LONDON_COUNTS, faithful

OPTIMUM = -1989.945859883


def london(x: Tensor, days: Tensor) -> None:
    pi = pyro.param("pi", torch.tensor([0.3, 0.7]), constraint=C.simplex)
    rate = pyro.param("rate", torch.tensor([1.0, 2.5]), constraint=C.positive)
    with pyro.plate("counts", len(x)), pyro.poutine.scale(scale=days):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("x", dist.Poisson(rate[z]), obs=x)


def rows(x: Tensor) -> None:
    london(x, torch.ones(()))


DAYS = LONDON_COUNTS.to(torch.float64)
DEATHS = torch.arange(10, dtype=torch.float64)


def minus_evidence(u: np.ndarray) -> float:
    """−log evidence of two Poisson components in numpy; u: logit of the weight, log rates."""
    w, rates = 1 / (1 + np.exp(-u[0])), np.exp(u[1:])
    p = w * poisson.pmf(np.arange(10), rates[0]) + (1 - w) * poisson.pmf(np.arange(10), rates[1])
    return -float(DAYS.numpy() @ np.log(p))


def first_within(result: Any, optimum: float, nats: float = 1e-6) -> int:
    return next(i for i, v in enumerate(result.history) if v > optimum - nats)


def test_the_optimum_is_the_optimum() -> None:
    options = {"maxiter": 10_000, "maxfev": 10_000, "xatol": 1e-10, "fatol": 1e-12}
    best = minimize(minus_evidence, [-0.6, 0.2, 1.0], method="Nelder-Mead", options=options)
    assert -best.fun == pytest.approx(OPTIMUM, abs=1e-7)


@pytest.fixture(scope="module")
def plain_steps() -> int:
    """E-steps of plain EM, in numpy, until the evidence is within 1e-6 nats."""
    counts, w, rates = DAYS.numpy(), np.array([0.3, 0.7]), np.array([1.0, 2.5])
    for step in range(1500):
        joint = w * poisson.pmf(np.arange(10)[:, None], rates)
        total = joint.sum(1, keepdims=True)
        if counts @ np.log(total[:, 0]) > OPTIMUM - 1e-6:
            return step
        q = counts[:, None] * joint / total
        w, rates = q.sum(0) / counts.sum(), np.arange(10) @ q / q.sum(0)
    raise AssertionError


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(("how", "times"), [("squarem", 15), ("quasi-newton", 30), ("auto", 30)])
def test_london_times_needs_fewer_steps(
    how: str, times: int, kernel: bool, plain_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every E-step is in the history, those of proposals that were not kept as well."""
    model, args = (
        (rows, (DEATHS.repeat_interleave(DAYS.long()),)) if kernel else (london, (DEATHS, DAYS))
    )
    tried: list[float] = []
    for kind in (OnSums, ByTracing):

        def counted(
            self: Any, values: Any = None, index: int = 0, original: Any = kind.e_step
        ) -> Any:
            at = original(self, values, index)
            if values is not None:
                tried.append(at.objective)
            return at

        monkeypatch.setattr(kind, "e_step", counted)
    fast = ExactPosteriorEM(model).fit(*args, tol=1e-6, progress=False, acceleration=how)
    assert tried and set(tried) <= {*fast.history, fast.log_evidence}
    assert fast.num_steps == len(fast.history) == len(fast.history.after_m_step)
    fast_steps = first_within(fast, OPTIMUM)
    assert plain_steps >= times * fast_steps, (plain_steps, fast_steps)
    assert fast.log_evidence == pytest.approx(OPTIMUM, abs=2e-6)
    assert fast.log_evidence >= max(tried) - 1e-9
    assert fast.status in (EMStatus.CONVERGED, EMStatus.ROUNDING)


def test_auto_stays_plain_where_em_is_quick() -> None:
    """Components that are told apart: the digits are those of plain EM."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(300, generator=g) + 2.5 * torch.randint(0, 2, (300,), generator=g)

    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-0.5, 3.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    found = {}
    for how in (None, "auto", "quasi-newton"):
        pyro.clear_param_store()
        found[how] = ExactPosteriorEM(model).fit(x, tol=1e-12, progress=False, acceleration=how)
    assert found[None].num_steps > cycles.PLAIN_STEPS
    assert found["auto"].history == found[None].history != found["quasi-newton"].history


def mixture(x: Tensor, K: int) -> None:
    w = pyro.param("w", torch.ones(K) / K, constraint=C.simplex)
    mu = pyro.param("mu", x[:K].clone())
    S = pyro.param("S", torch.cov(x.T).repeat(K, 1, 1), constraint=C.positive_definite)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)


@pytest.mark.slow
def test_overlapping_mixtures() -> None:
    """Ten starts: a median of so many times fewer steps, the same optimum in nine of ten."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 2, generator=g) + 1.6 * torch.randint(0, 2, (500, 1), generator=g)
    ratios: dict[str, list[float]] = {"squarem": [], "quasi-newton": []}
    for seed in range(10):
        order = torch.randperm(500, generator=torch.Generator().manual_seed(seed))
        found = {}
        for how in (None, *ratios):
            pyro.clear_param_store()
            em = ExactPosteriorEM(mixture)
            found[how] = em.fit(
                x[order], 2, max_steps=20_000, tol=1e-7, progress=False, acceleration=how
            )
        best, plain = max(r.log_evidence for r in found.values()), found[None]
        for how, times in ratios.items():
            if abs(plain.log_evidence - found[how].log_evidence) < 1e-4:
                times.append(first_within(plain, best, 1e-5) / first_within(found[how], best, 1e-5))
    for how, at_least in (("squarem", 5), ("quasi-newton", 7)):
        assert len(ratios[how]) >= 9, ratios
        assert np.median(ratios[how]) >= at_least, ratios
    assert np.median(ratios["quasi-newton"]) >= np.median(ratios["squarem"])


@pytest.mark.parametrize("start", [[0, 1, 2], [0, 1, 5], [3, 10, 20]])
def test_old_faithful_with_one_covariance_needs_half_the_steps(start: list[int]) -> None:
    """The published exact optimum, -1126.315928 (mclust stops ten thousandths below it)."""

    def tied(x: Tensor) -> None:
        w = pyro.param("w", torch.ones(3) / 3, constraint=C.simplex)
        mu = pyro.param("mu", x[start].clone())
        S = pyro.param("S", torch.cov(x.T), constraint=C.positive_definite)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.MultivariateNormal(mu[z], S), obs=x)

    x = faithful()
    steps = []
    for how in (None, "quasi-newton"):
        pyro.clear_param_store()
        result = ExactPosteriorEM(tied).fit(x, tol=1e-8, progress=False, acceleration=how)
        assert result.log_evidence == pytest.approx(-1126.315928, abs=1e-6)
        steps.append(first_within(result, -1126.315928, 1e-5))
    assert steps[0] >= 2 * steps[1], steps


def test_the_last_steps_are_plain_and_rise() -> None:
    result = ExactPosteriorEM(london).fit(
        DEATHS, DAYS, max_steps=60, tol=0, progress=False, acceleration="squarem"
    )
    assert result.num_steps == 60
    end = [*list(result.history)[-cycles.PLAIN_STEPS :], result.log_evidence]
    assert all(b >= a - 1e-9 for a, b in pairwise(end))
    bounds = zip(result.history, result.history.after_m_step, strict=True)
    assert all(after >= before - 1e-9 for before, after in bounds)  # every step is an EM step


def test_zeros_stay_zero() -> None:
    """A structural zero is −∞ in the unconstrained space, and is left to EM."""

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.5, 0.5, 0.0]), constraint=C.simplex)
        rate = pyro.param("rate", torch.tensor([1.0, 2.5, 9.0]), constraint=C.positive)
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=DAYS):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Poisson(rate[z]), obs=x)

    em = ExactPosteriorEM(model)
    with pytest.warns(Warning, match="no observation had any weight"):
        result = em.fit(DEATHS, tol=1e-5, progress=False, acceleration="squarem")
    assert float(result.params["w"][2]) == 0.0
    assert result.log_evidence == pytest.approx(OPTIMUM, abs=1e-4)


@pytest.mark.parametrize("how", ["squarem", "quasi-newton"])
def test_callbacks_see_every_step_and_can_stop(how: str) -> None:
    """The evidence at the parameters after a step, in numpy, is the one that enters the next."""
    seen: list[Any] = []

    def callback(step: Any) -> bool:
        seen.append((step.index, step.elbo, step.params))
        return len(seen) == 25

    result = ExactPosteriorEM(london).fit(
        DEATHS, DAYS, progress=False, acceleration=how, callbacks=callback
    )
    assert result.status is EMStatus.STOPPED and result.num_steps == 25
    assert [index for index, _, _ in seen] == list(range(25))
    assert result.log_evidence >= max(elbo for _, elbo, _ in seen) - 1e-9
    for (_, _, params), (_, elbo, _) in pairwise(seen):
        u = [torch.logit(params["pi"][0]), *params["rate"].log()]
        assert -minus_evidence(np.array(u)) == pytest.approx(elbo, abs=1e-8)


def test_map_and_gradient_updates_can_be_accelerated() -> None:
    """Any exact EM map: here L-BFGS in the M-step of a rate that is an exponential of a sum."""

    def model(x: Tensor) -> None:
        b = pyro.param("b", torch.tensor([0.0, 0.9]))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=DAYS):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.36, 0.64])))
            pyro.sample("x", dist.Poisson((b[z] + 0.1 * b.sum()).exp()), obs=x)

    found = []
    for how in (None, "squarem"):
        pyro.clear_param_store()
        found.append(
            ExactPosteriorEM(model).fit(DEATHS, tol=1e-6, progress=False, acceleration=how)
        )
    assert found[1].log_evidence == pytest.approx(found[0].log_evidence, abs=1e-5)


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ({"strategy": Hard()}, "needs exact EM steps"),
        ({"updates": {"rate": Gradient(lambda p: torch.optim.Adam(p))}}, "needs exact EM steps"),
    ],
)
def test_refusals(how: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word) as raised:
        ExactPosteriorEM(london, **how).fit(DEATHS, DAYS, acceleration="squarem")
    assert "leave acceleration out" in str(raised.value)


def test_an_unknown_word() -> None:
    with pytest.raises(UsageError, match="'aitken' is not available"):
        ExactPosteriorEM(london).fit(DEATHS, DAYS, acceleration="aitken")


def test_a_slow_fit_suggests_it() -> None:
    result = ExactPosteriorEM(london).fit(DEATHS, DAYS, max_steps=300, progress=False)
    assert "acceleration='auto'" in str(result.plan)
    quick = ExactPosteriorEM(london).fit(DEATHS, DAYS, progress=False, acceleration="squarem")
    assert "acceleration" not in str(quick.plan)


@pytest.mark.parametrize("error", [ValueError, torch.linalg.LinAlgError])
def test_an_error_of_a_callback_is_not_swallowed(error: type[Exception]) -> None:
    def breaks(step: Any) -> None:
        if step.index == cycles.PLAIN_STEPS + 1:
            raise error("from the callback")

    em = ExactPosteriorEM(london)
    with pytest.raises(error, match="from the callback"):
        em.fit(DEATHS, DAYS, acceleration="squarem", callbacks=[breaks], progress=False)
