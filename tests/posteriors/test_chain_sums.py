"""Steps on sums over the steps of Gaussian chains are the steps that go through all sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM, Fixed, PyroEMWarning, vectorized_markov
from pyro_em.fitting.results import identified
from pyro_em.fitting.steps.em_map import ByTracing
from pyro_em.posteriors.chain_sums import numba_m_step
from pyro_em.posteriors.filters import kalman
from pyro_em.posteriors.filters.state_space import SmoothedArrays
from pyro_em.tracing.parameters import values_of
from tests.posteriors.chain_models import noise, number, positive
from tests.posteriors.random_chains import random_chain

SUMS = "pyro_em.plan.eligibility.chain_sums"


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> Iterator[None]:
    """Each case begins with an empty param store, in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@dataclass(frozen=True)
class System:
    """A linear system of two numbers that three numbers are seen of.

    Attributes:
        spread: "numbers", "scale_tril" or "covariance_matrix".
        missing: "row" or "entry"; nothing if empty.
        series: How many series there are in a plate.
        own: Whether each has loadings, offsets and noises of its own.
        inputs: Whether known numbers enter the means of data.
        loop: Whether the loop is one of pyro.markov.
    """

    spread: str = "numbers"
    missing: str = ""
    series: int = 1
    own: bool = False
    inputs: bool = False
    loop: bool = False
    steps: int = 10

    def __call__(self) -> None:
        """Run it."""
        lead = (self.series,) if self.series > 1 else ()
        own = lead if self.own else ()
        T = self.steps
        y, x = 0.5 * noise(T, *lead, 3), noise(T, *lead, 2, seed=1)
        g = torch.Generator().manual_seed(2)
        shape = (T, *lead, 3) if self.missing == "entry" else (T, *lead)
        ok = torch.rand(shape, generator=g) > 0.3
        A = number("A", [[0.8, 0.1], [0.0, 0.7]])
        W = pyro.param("W", lambda: torch.randn(3, 2, generator=g).expand(*own, 3, 2).clone())
        b, d = pyro.param("b", torch.zeros(2)), pyro.param("d", torch.zeros(*own, 3))
        beta = pyro.param("beta", torch.zeros(3, 2))
        Q, R = self._spread("Q", 2, own), self._spread("R", 3, own)
        h, start = torch.zeros(*lead, 2), torch.ones(2)
        every = pyro.markov(range(T)) if self.loop else vectorized_markov("time", T)
        plate = pyro.plate("series", self.series) if lead else nullcontext()
        for i, t in enumerate(every):
            with plate:
                mean = (A @ h.unsqueeze(-1)).squeeze(-1) + b
                h = pyro.sample(
                    f"h_{t}", self._normal(mean, Q) if i else dist.Normal(h, start).to_event(1)
                )
                mean = (W @ h.unsqueeze(-1)).squeeze(-1) + d
                if self.inputs:
                    mean = mean + (beta @ x[t].unsqueeze(-1)).squeeze(-1)
                seen = self._normal(mean, R, ok[t])
                pyro.sample(f"y_{t}", seen, obs=y[t])

    def _spread(self, name: str, size: int, own: tuple[int, ...]) -> Tensor:
        if self.spread == "numbers":
            start, constraint = torch.ones(*own, size), constraints.positive
        else:
            start = torch.eye(size).expand(*own, size, size).clone()
            constraint = constraints.positive_definite
            if self.spread == "scale_tril":
                constraint = constraints.lower_cholesky
        out: Tensor = pyro.param(name, start, constraint=constraint)
        return out

    def _normal(self, mean: Tensor, spread: Tensor, ok: Tensor | None = None) -> Any:
        if self.spread == "numbers":
            fn = dist.Normal(mean, spread)
            if ok is not None and self.missing == "entry":
                return fn.mask(ok).to_event(1)
            fn = fn.to_event(1)
        else:
            fn = dist.MultivariateNormal(mean, **{self.spread: spread})
        return fn.mask(ok) if ok is not None and self.missing == "row" else fn


def mapped() -> None:
    """Deviations through functions and factors, one of them of two sites, and means with a factor."""
    y = noise(12)
    low = pyro.param("low", torch.tensor(-0.3))
    v = positive("v", 0.8)
    h = torch.zeros(())
    for t in vectorized_markov("time", 12):
        h = pyro.sample(f"h_{t}", dist.Normal(0.9 * h + 2 * number("m", 0.1), 0.5 * v.sqrt()))
        pyro.sample(f"y_{t}", dist.Normal(h, low.exp()), obs=y[t])


def autoregression() -> None:
    """Two lags with one mean, of which each second step is seen."""
    y, phi = noise(16), number("phi", [0.6, 0.2])
    h: list[Tensor] = []
    for t in pyro.markov(range(16), history=2):
        mean = sum((phi[k] * h[t - 1 - k] for k in range(min(2, t))), number("m", 0.1))
        h.append(pyro.sample(f"h_{t}", dist.Normal(mean, positive("s", 0.8))))
        if t % 2 == 0:
            pyro.sample(f"y_{t}", dist.Normal(h[t], positive("r", 0.6)), obs=y[t])


CASES: dict[str, Callable[[], None]] = {
    "numbers": System(inputs=True),
    "matrices": System("scale_tril", missing="row", loop=True),
    "covariances": System("covariance_matrix", series=2, inputs=True),
    "entries of series": System(missing="entry", series=3, inputs=True),
    "own entries": System(missing="entry", series=2, own=True, loop=True),
    "own matrices": System("scale_tril", missing="row", series=2, own=True, inputs=True),
    "maps and factors": mapped,
    "an autoregression": autoregression,
    "series below series": random_chain(3),
    "a series beside others": random_chain(30),
}


def fitted(model: Callable[[], None], monkeypatch: pytest.MonkeyPatch, **how: Any) -> EMResult:
    """Some steps on sums, none of which is handed over."""
    with monkeypatch.context() as m:
        m.setattr(ByTracing, "step", lambda *_, **__: pytest.fail("a step was handed over"))
        result = ExactPosteriorEM(model, **how).fit(max_steps=4, tol=0)
    assert result.plan.kernel == "Kalman" and result.plan.kernel_reason is None
    assert "on sums over steps" in str(result.plan)
    return result


def require_same(quick: EMResult, slow: EMResult) -> None:
    """History and parameters must be the same but for rounding."""
    assert list(quick.history) == pytest.approx(list(slow.history), rel=1e-9)
    assert list(quick.history.after_m_step) == pytest.approx(
        list(slow.history.after_m_step), rel=1e-9
    )
    assert quick.log_evidence == pytest.approx(slow.log_evidence, rel=1e-9)
    for name, value in slow.params.items():
        torch.testing.assert_close(quick.params[name], value, rtol=1e-9, atol=1e-9)


def require_same_when_compiled(model: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled loops must take the step of numpy, and not leave it."""
    with monkeypatch.context() as m:
        m.setattr(kalman, "_FEW", 0)
        program = ExactPosteriorEM(model)._session.look((), {})
        theta = program.kernel.block.theta
        at = theta.enter(values_of(program.graph.parameters))
        found = theta.e_step(at)
        step = theta._compiled.maximiser(at.theta, found.found)
    assert step is not None and not np.array_equal(step, at.theta)
    np.testing.assert_allclose(step, theta._by_numpy(at.theta, found), rtol=1e-11, atol=1e-13)
    for own, states in found.found:
        smoothed = states.tensors if isinstance(states, SmoothedArrays) else states
        by_numpy = kalman.smoothed(own.space)
        for name in ("log_evidence", "mean", "disturbance", "covariance", "transition", "noise"):
            one, other = getattr(smoothed, name), getattr(by_numpy, name)
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_its_steps_are_those_through_all_sites(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CASES[case]
    quick = fitted(model, monkeypatch)
    require_same_when_compiled(model, monkeypatch)
    monkeypatch.setattr(SUMS, lambda *_: None)
    pyro.clear_param_store()
    slow = ExactPosteriorEM(model).fit(max_steps=4, tol=0)
    assert slow.plan.kernel == "Gaussian"
    require_same(quick, slow)


@pytest.mark.parametrize("case", ["numbers", "own matrices", "covariances", "maps and factors"])
def test_what_data_determine_is_that_of_one_dense_block(case: str) -> None:
    """Directions that no data determine: a state with a whole covariance may be turned."""
    program = ExactPosteriorEM(CASES[case])._session.look((), {})
    (group,), parameters = program.graph.groups, program.graph.parameters
    names = list(group.params)
    of_chain = identified._of_chain(program.kernel.block.theta, 0, names, parameters)
    of_block = identified._of_block(group.nested.representative, names, parameters)
    found, expected = (identified._left(s.gram, s) for s in (of_chain, of_block))
    assert found == expected and (found.count > 0) == (case in ("own matrices", "covariances"))


def test_what_is_fixed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is another number at a later fit of one object."""
    model, fixed = System(), {"R": Fixed(), "d": Fixed(), "A": Fixed()}
    fitted(model, monkeypatch, updates=fixed)
    pyro.get_param_store()["d"] = torch.tensor([1.0, 0.0, -1.0])
    quick = fitted(model, monkeypatch, updates=fixed)
    assert quick.params["d"].tolist() == [1.0, 0.0, -1.0]
    monkeypatch.setattr(SUMS, lambda *_: None)
    pyro.clear_param_store()
    ExactPosteriorEM(model, updates=fixed).fit(max_steps=4, tol=0)
    pyro.get_param_store()["d"] = torch.tensor([1.0, 0.0, -1.0])
    require_same(quick, ExactPosteriorEM(model, updates=fixed).fit(max_steps=4, tol=0))


def test_one_object_fits_a_vectorised_system_again() -> None:
    """Lines whose every coefficient is a parameter hold no data: a second fit reads them anew."""
    model = System()
    em = ExactPosteriorEM(model)
    first = em.fit(max_steps=2, tol=0)
    second = ExactPosteriorEM(model).fit(max_steps=2, tol=0)
    assert second.history[0] == pytest.approx(first.log_evidence, rel=1e-12)


def walk(
    y: Tensor, h: Callable[[Tensor, Any], Tensor], observed: Callable[[Tensor, Any], Any]
) -> None:
    level = pyro.sample("h_0", dist.Normal(0.0, 1.0))
    for t in pyro.markov(range(len(y))):
        level = pyro.sample(f"h_{t}", dist.Normal(h(level, t), positive("q", 0.7))) if t else level
        pyro.sample(f"y_{t}", observed(level, t), obs=y[t])


def test_a_model_that_it_does_not_serve_says_why() -> None:
    y, x = noise(10), noise(10, seed=3)
    weights = 0.5 + torch.arange(10.0)

    def seen(level: Tensor, t: int) -> Any:
        return dist.Normal(level, positive("r", 0.9))

    def reason(h: Callable[[Tensor, Any], Tensor], observed: Any, **how: Any) -> str:
        pyro.clear_param_store()
        plan = ExactPosteriorEM(lambda: walk(y, h, observed), **how).plan()
        assert plan.kernel == "Gaussian" and isinstance(plan.kernel_reason, str)
        return plan.kernel_reason

    def same(level: Tensor, t: int) -> Tensor:
        return level

    found = reason(same, lambda h, t: dist.Normal(h * x[t], positive("r", 0.9)))
    assert found == "coefficients of 'y_0' differ from step to step"
    found = reason(same, lambda h, t: dist.Normal(h, positive("r", 0.9) * (1 + t)))
    assert found == "the spread of 'y_0' differs from step to step"
    found = reason(same, seen, updates={"q": Fixed(), "r": Fixed()})
    assert found == "no parameter is updated"

    def weighted() -> None:
        level = pyro.sample("g_0", dist.Normal(0.0, 1.0))
        for t in pyro.markov(range(len(y))):
            level = pyro.sample(f"g_{t}", dist.Normal(level, positive("q", 0.7))) if t else level
            with pyro.poutine.scale(scale=float(weights[t])):
                pyro.sample(f"x_{t}", seen(level, t), obs=x[t])

    pyro.clear_param_store()
    found = ExactPosteriorEM(weighted).plan().kernel_reason
    assert found == "data of 'x_0' count otherwise than once"


def test_a_noise_that_vanishes_is_named() -> None:
    """Data without noise of their own: the kernel hands over, and the step through sites judges."""

    def model() -> None:
        h = torch.zeros(())
        for t in vectorized_markov("time", 10):
            h = pyro.sample(f"h_{t}", dist.Normal(h, positive("q", 1.0)))
            pyro.sample(f"y_{t}", dist.Normal(0.0 * h, positive("r", 1.0)), obs=torch.zeros(()))

    with pytest.warns(PyroEMWarning):
        ExactPosteriorEM(model).fit(max_steps=3, tol=0)


def test_what_is_not_clear_is_left_by_compiled_loops() -> None:
    """Regressors that are nearly the same, deviations near zero, matrices near a singular one."""

    def solves(gap: float) -> bool:
        gram = np.array([2.0, 1.0, 1.0 - gap, 1.0 - gap, 1.0, 0.0])
        right, sizes, out = np.array([4.0, 1.0, 1.0, 0.0]), np.array([1, 2]), np.zeros(4)
        clear = numba_m_step.solved(gram, right, sizes, out, np.zeros((3, 2, 2)), 1e8)
        assert not clear or out == pytest.approx([2.0, 1 / (2 - gap), 1 / (2 - gap), 0.0])
        return bool(clear)

    def deviates(total: float, count: float, before: float) -> bool:
        sums, out = np.array([total]), np.zeros(1)
        one = np.ones(1)
        least = 1e-14 * one
        return bool(
            numba_m_step.deviations(
                sums, np.array([0]), count * one, least, before * one, 1e-7, out
            )
        )

    def regular(variance: float, count: float, before: float = 1.0) -> bool:
        total, size = np.array([4.0, 0.0, 0.0, variance]), np.ones((1, 2))
        old, out = before * np.array([1.0, 0.0, 0.0, 1.0]), np.zeros(4)
        work, counts = np.zeros((2, 2, 2)), np.array([count])
        found = numba_m_step.matrices(total, 0, counts, size, False, old, 1e-7, out, work)
        assert not found or out == pytest.approx(total / count)
        return bool(found)

    assert solves(0.5) and not solves(1e-9) and not solves(0.0)
    assert deviates(1.0, 2.0, 1e9) and not deviates(0.0, 2.0, 1.0)
    assert not deviates(1e-29, 2.0, 1.0) and not deviates(1e-8, 1.0, 1.0)
    assert regular(1.0, 4.0) and not regular(1e-11, 4.0) and not regular(-1.0, 4.0)
    assert regular(1.0, 1.0) and not regular(1.0, 1.0, before=1e8) and not regular(1.0, 0.0)


def test_a_variance_of_latents_may_be_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a level that does not move: a boundary, where both kinds of steps stay."""
    y = torch.tensor([0.3, -0.2, 0.1, -0.4, 0.2, 0.0, -0.1, 0.3, -0.3, 0.1])

    def model() -> None:
        h = torch.zeros(())
        for t in vectorized_markov("time", 10):
            h = pyro.sample(f"h_{t}", dist.Normal(h, positive("q", 1e-9)))
            pyro.sample(f"y_{t}", dist.Normal(h, positive("r", 1.0)), obs=y[t])

    quick = ExactPosteriorEM(model).fit(max_steps=3, tol=0)
    monkeypatch.setattr(SUMS, lambda *_: None)
    pyro.clear_param_store()
    require_same(quick, ExactPosteriorEM(model).fit(max_steps=3, tol=0))
