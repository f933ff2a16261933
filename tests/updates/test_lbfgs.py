"""The library's own L-BFGS beside scipy's and torch's, and where values end or are imprecise."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize

from pyro_em.updates.gradients.lbfgs import minimise


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def bowl(x):
    return (torch.logspace(0, 3, len(x), dtype=x.dtype) * x**2).sum() / 2


def logistic(x):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(200, len(x), generator=g, dtype=torch.float64).to(x.dtype)
    y = (torch.rand(200, generator=g) < 0.3).to(x.dtype)
    scores = rows @ x
    return (torch.nn.functional.softplus(scores) - y * scores).mean()


def counts(x):
    return (x.exp() - 3 * x).sum()


class Counted:
    """Value and gradient, with the number of calls."""

    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, x):
        self.calls += 1
        x = x.detach().requires_grad_()
        value = self.f(x)
        return value.item(), torch.autograd.grad(value, x)[0]


CASES = [
    (rosenbrock, torch.tensor([-1.2, 1.0])),
    (rosenbrock, torch.zeros(20)),
    (bowl, torch.ones(10)),
    (logistic, torch.zeros(5)),
    (counts, torch.full((3,), -20.0)),
    (counts, torch.full((3,), 20.0)),
]


@pytest.mark.parametrize(("f", "start"), CASES)
def test_it_ends_where_scipy_does_with_about_as_many_evaluations(f, start) -> None:
    counted = Counted(f)
    start = start.double()
    found = minimise(counted, start, 300)

    def peer(x):
        value, gradient = Counted(f)(torch.tensor(x))
        return value, gradient.numpy()

    options = {"maxcor": 20, "gtol": 1e-9, "ftol": 0, "maxiter": 300}
    theirs = minimize(peer, start.numpy(), jac=True, method="L-BFGS-B", options=options)
    torch.testing.assert_close(found, torch.tensor(theirs.x), rtol=1e-5, atol=1e-6)
    assert float(f(found)) <= theirs.fun + 1e-14
    assert counted.calls <= 1.5 * theirs.nfev + 5


@pytest.mark.parametrize(("f", "start"), CASES)
def test_single_precision(f, start) -> None:
    found = minimise(Counted(f), start.float(), 300)
    assert found.dtype == torch.float32
    least = float(f(minimise(Counted(f), start.double(), 300)))
    assert float(f(found.double())) <= least + 1e-6 * max(1.0, abs(least))


def test_a_value_that_ends_is_approached_and_not_passed() -> None:
    def f(x):
        return -x.sum() + torch.where((x > 5).any(), math.inf, 0.0)

    found = minimise(Counted(f), torch.zeros(2, dtype=torch.float64), 100)
    torch.testing.assert_close(found, torch.full((2,), 5.0, dtype=torch.float64))


def test_a_start_without_a_value_stays() -> None:
    start = torch.tensor([-1.0], dtype=torch.float64)
    assert minimise(Counted(lambda x: x.log().sum()), start, 10) is start


def test_a_coordinate_at_infinity_without_a_slope_stays() -> None:
    def f(x):
        value, gradient = Counted(lambda y: (y - 3).square().sum())(x[1:])
        return value, torch.cat([torch.zeros(1, dtype=x.dtype), gradient])

    found = minimise(f, torch.tensor([-math.inf, 0.0], dtype=torch.float64), 20)
    torch.testing.assert_close(found, torch.tensor([-math.inf, 3.0], dtype=torch.float64))


def test_slopes_decide_where_values_are_rounded() -> None:
    def f(x):
        value, gradient = Counted(logistic)(x)
        return round(value, 6), gradient  # far coarser than doubles

    found = minimise(f, torch.full((5,), 2.0, dtype=torch.float64), 100)
    best = minimise(Counted(logistic), torch.zeros(5, dtype=torch.float64), 100)
    torch.testing.assert_close(found, best, rtol=0, atol=5e-4)  # values alone: 1e-3


def test_steps_are_limited() -> None:
    counted = Counted(rosenbrock)
    minimise(counted, torch.zeros(20, dtype=torch.float64), 5)
    assert counted.calls <= 16
