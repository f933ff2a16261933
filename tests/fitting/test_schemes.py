"""Schemes of extrapolation on maps whose fixed point is known, and against the published formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_em.fitting.steps.schemes import QuasiNewton, Secant, Squarem, Triple

FIXED = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def linear(rates: list[float]) -> Tensor:
    """A matrix with these eigenvalues, as the derivative of an EM map is: not symmetric."""
    g = torch.Generator().manual_seed(1)
    p = torch.randn(len(rates), len(rates), generator=g)
    return p @ torch.diag(torch.tensor(rates)) @ torch.linalg.inv(p)


def chase(J: Tensor, cycles: int, limit: float) -> tuple[Triple, list[Secant]]:
    """Cycles of the linear map u → u* + J (u − u*) along proposals, and their secants."""
    fixed, secants = FIXED[: len(J)], list[Secant]()
    u = torch.zeros_like(fixed)
    for k in range(cycles):
        u1 = fixed + J @ (u - fixed)
        at = Triple(u, u1, fixed + J @ (u1 - fixed))
        secants.insert(0, at.secant())
        if k < cycles - 1:
            u = QuasiNewton().proposals(at, secants, limit).points[0]
    return at, secants


@pytest.mark.parametrize(
    ("rates", "cycles"), [([0.999], 1), ([0.999, 0.3], 2), ([0.99, 0.9, 0.1], 3)]
)
def test_as_many_secants_as_parameters_find_the_fixed_point_of_a_linear_map(
    rates: list[float], cycles: int
) -> None:
    at, secants = chase(linear(rates), cycles, 1e9)
    found = QuasiNewton().proposals(at, secants, 1e9).points[0]
    torch.testing.assert_close(found, FIXED[: len(rates)], rtol=1e-8, atol=1e-8)


def test_two_secants_are_the_published_update() -> None:
    """F(x) − V (UᵀU − UᵀV)⁻¹ Uᵀ (x − F(x)), equation (9) of Zhou, Alexander and Lange."""
    at, secants = chase(linear([0.9, 0.6, 0.3, 0.1]), 2, 1e9)
    x, Fx = at.u0.numpy(), at.u1.numpy()
    U = np.stack([s.d.numpy() for s in secants], 1)
    V = np.stack([s.v.numpy() for s in secants], 1)
    published = Fx - V @ np.linalg.solve(U.T @ U - U.T @ V, U.T @ (x - Fx))
    found = QuasiNewton().proposals(at, secants, 1e9).points[0]
    np.testing.assert_allclose(found.numpy(), published, rtol=1e-9)


@pytest.mark.parametrize("rate", [0.99, 1.0, 1.5])
def test_no_step_is_longer_than_the_limit_and_none_goes_back(rate: float) -> None:
    u = torch.tensor([0.0, 7.0])
    step = torch.tensor([1.0, 0.0])
    at = Triple(u, u + step, u + step + rate * step)
    found = QuasiNewton().proposals(at, [at.secant()], 8.0)
    torch.testing.assert_close(found.points[0] - at.u2, 8 * rate * step)
    assert (found.kept, found.rejected) == (32.0, 4.0)


def test_secants_that_say_nothing_new_are_left_out() -> None:
    at, secants = chase(linear([0.9, 0.5]), 1, 1e9)
    one = QuasiNewton().proposals(at, secants, 1e9).points[0]
    again = QuasiNewton().proposals(at, [secants[0], secants[0]], 1e9).points[0]
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    rotation = Triple(torch.zeros(2), torch.tensor([1.0, 0]), torch.tensor([1.0, 1]))
    turned = Secant(torch.tensor([0.0, 1]), torch.tensor([-1.0, 0]))
    first = rotation.secant()
    spun = QuasiNewton().proposals(rotation, [first, turned], 1e9).points[0]
    alone = QuasiNewton().proposals(rotation, [first], 1e9).points[0]
    torch.testing.assert_close(spun, alone, rtol=0, atol=0)
    still = Triple(FIXED, FIXED, FIXED)
    assert not QuasiNewton().proposals(still, [still.secant()], 1.0).points


@pytest.mark.parametrize("scheme", [QuasiNewton(), Squarem()])
def test_coordinates_that_are_not_finite_are_those_of_em(scheme: QuasiNewton | Squarem) -> None:
    u = torch.tensor([0.0, -math.inf])
    step = torch.tensor([1.0, 0.0])
    at = Triple(u, u + step, u + 1.9 * step)
    for point in scheme.proposals(at, [at.secant()], 100.0).points:
        assert point[1] == -math.inf and point[0] > 1.9


def test_squarem_is_the_published_scheme() -> None:
    """One rate: α = −1 / (1 − rate), and the fixed point is found."""
    at, secants = chase(linear([0.9]), 1, 1e9)
    found = Squarem().proposals(at, secants, 1e9).points
    torch.testing.assert_close(found[0], FIXED[:1])
    assert len(found) == 2
