"""Gradient updates under constraints and flat priors, against a search of the interval by scipy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM

WAITS = torch.tensor([0.3, 0.7, 1.1, 1.6, 2.0, 2.4, 3.9], dtype=torch.float64)
REALS = torch.tensor([-1.2, -0.3, 0.4, 0.5, 0.9, 2.2, 7.5], dtype=torch.float64)
SHARES = torch.tensor([0.1, 0.25, 0.3, 0.4, 0.45, 0.7], dtype=torch.float64)
EVENTS = torch.tensor([0.0, 1.0, 1.0, 3.0, 4.0, 6.0], dtype=torch.float64)
Law = Callable[[Tensor], Any]

LAWS: dict[str, tuple[Law, Tensor]] = {
    "Gamma concentration": (lambda t: dist.Gamma(t, 1.0), WAITS),
    "Gamma rate": (lambda t: dist.Gamma(2.0, t), WAITS),
    "Beta concentration": (lambda t: dist.Beta(t, 3.0), SHARES),
    "StudentT location": (lambda t: dist.StudentT(3.0, t, 1.0), REALS),
    "StudentT scale": (lambda t: dist.StudentT(3.0, 0.5, t), REALS),
    "StudentT freedom": (lambda t: dist.StudentT(t, 0.5, 1.0), REALS),
    "Cauchy scale": (lambda t: dist.Cauchy(0.5, t), REALS),
    "NegativeBinomial total": (lambda t: dist.NegativeBinomial(t, 0.5), EVENTS),
    "Bernoulli power": (
        lambda t: dist.Bernoulli(0.9 * (t / (1 + t)) ** 2),
        (EVENTS > 0).to(torch.float64),
    ),
}


def best_on(law: Law, x: Tensor, low: float, high: float) -> float:
    """The highest log likelihood on an interval: a grid, then scipy beside its best point."""

    def value(t: float) -> float:
        return float(law(torch.tensor(t)).log_prob(x).sum())

    edge = 1e-12 * (high - low)
    grid = torch.linspace(low + edge, high - edge, 400)
    values = law(grid.unsqueeze(-1)).log_prob(x).sum(-1)
    k = int(values.argmax())
    around = float(grid[max(k - 1, 0)]), float(grid[min(k + 1, len(grid) - 1)])
    found = minimize_scalar(lambda t: -value(t), bounds=around, method="bounded")
    return max(float(values[k]), -float(found.fun))


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("low", "high"), [(0.0, 4.0), (2.5, 3.0)])
@pytest.mark.parametrize("start", [1e-6, 1 - 1e-12])
def test_no_start_in_an_interval_is_too_close_to_its_bound(
    name: str, low: float, high: float, start: float
) -> None:
    law, x = LAWS[name]
    first = torch.tensor(low + start * (high - low))

    def model(x: Tensor) -> None:
        t = pyro.param("t", first, constraint=C.interval(low, high))
        with pyro.plate("n", len(x)):
            pyro.sample("x", law(t), obs=x)

    result = ExactPosteriorEM(model).fit(x, tol=1e-9, progress=False)
    assert result.log_evidence > best_on(law, x, low, high) - 1e-6
    assert result.converged


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("low", "high"), [(0.0, 4.0), (0.0, 200.0)])
def test_a_point_estimate_under_a_uniform_prior_is_the_best_of_its_interval(
    name: str, low: float, high: float
) -> None:
    law, x = LAWS[name]

    def model(x: Tensor) -> None:
        t = pyro.sample("t", dist.Uniform(low, high))
        with pyro.plate("n", len(x)):
            pyro.sample("x", law(t), obs=x)

    def guide(x: Tensor) -> None:
        first = torch.tensor(high - 1e-12 * (high - low))
        pyro.sample("t", dist.Delta(pyro.param("at", first, constraint=C.interval(low, high))))

    best = best_on(law, x, low, high)
    for given in ("map", guide):
        pyro.clear_param_store()
        result = ExactPosteriorEM(model, given).fit(x, tol=1e-9, progress=False)
        assert result.log_evidence > best - 1e-6
        assert result.log_prior == pytest.approx(-math.log(high - low))


@pytest.mark.parametrize("constraint", [C.positive, C.greater_than(0.0), C.nonnegative])
def test_half_lines_have_a_bound_too(constraint: Any) -> None:
    def model(x: Tensor) -> None:
        t = pyro.param("t", torch.tensor(1e-13), constraint=constraint)
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.StudentT(3.0, t, 1.0), obs=x)

    result = ExactPosteriorEM(model).fit(REALS, tol=1e-9, progress=False)
    law = LAWS["StudentT location"][0]
    assert result.log_evidence == pytest.approx(best_on(law, REALS, 0.0, 8.0), abs=1e-6)


def test_many_elements_leave_their_bounds_together() -> None:
    x = torch.linspace(0.1, 0.9, 30)

    def model(x: Tensor) -> None:
        t = pyro.param("t", torch.full((30,), 1e-12), constraint=C.unit_interval)
        with pyro.plate("n", 30):
            pyro.sample("x", dist.StudentT(3.0, t, 1.0), obs=x)

    result = ExactPosteriorEM(model).fit(x, tol=1e-9, progress=False)
    torch.testing.assert_close(result.params["t"], x, atol=1e-4, rtol=0)


def test_a_corner_of_a_simplex_is_left() -> None:
    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([1 - 2e-13, 1e-13, 1e-13]), constraint=C.simplex)
        with pyro.plate("n", len(x)):
            pyro.sample(
                "x", dist.StudentT(3.0, (w * torch.tensor([0.0, 2.0, -3.0])).sum(), 1.0), obs=x
            )

    result = ExactPosteriorEM(model).fit(REALS, tol=1e-9, progress=False)
    law = LAWS["StudentT location"][0]
    assert result.log_evidence == pytest.approx(best_on(law, REALS, -3.0, 2.0), abs=1e-6)


def test_a_bound_that_is_the_maximum_is_kept_and_structural_zeros_stay() -> None:
    def model(x: Tensor) -> None:
        t = pyro.sample("t", dist.Uniform(5.0, 9.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.StudentT(3.0, t, 1.0), obs=x)

    result = ExactPosteriorEM(model, "map").fit(REALS[:5], tol=1e-9, progress=False)
    assert float(result.params["t"]) == pytest.approx(5.0, abs=1e-9) and result.converged

    def zeros(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.5, 0.5, 0.0]), constraint=C.simplex)
        with pyro.plate("n", len(x)):
            pyro.sample(
                "x", dist.StudentT(3.0, (w * torch.tensor([0.0, 1.0, 2.0])).sum(), 1.0), obs=x
            )

    result = ExactPosteriorEM(zeros).fit(REALS + 3, tol=1e-9, progress=False)
    assert float(result.params["w"][2]) == 0.0
    assert float(result.params["w"][1]) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("power", [2, 3])
@pytest.mark.parametrize("constraint", [C.real, C.interval(-3.0, 3.0)])
def test_a_start_without_a_slope_is_no_place_to_stay(power: int, constraint: Any) -> None:
    """At t = 0 the density of loc = t² or t³ has no slope, and is no maximum."""

    def model(x: Tensor) -> None:
        t = pyro.param("t", torch.tensor(0.0), constraint=constraint)
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(t**power, 1.0), obs=x)

    x = torch.tensor([0.4, 1.5, 1.1])
    result = ExactPosteriorEM(model).fit(x, tol=1e-9, progress=False)
    assert abs(float(result.params["t"])) == pytest.approx(1.0, abs=1e-5)
