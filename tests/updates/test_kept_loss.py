"""A gradient M-step runs the user's model once at each point where it looks."""

from __future__ import annotations

from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM, Gradient, ModelError
from pyro_em.updates.gradients.kept_loss import KeptLoss

X = torch.tensor([-1.2, -0.7, 0.4, 1.9, 2.3], dtype=torch.float64)


def test_no_point_is_visited_twice_in_a_row() -> None:
    """Start, climb, curvature, end and the look for a runaway share what they find."""
    seen: list[tuple[float, ...]] = []

    def model() -> None:
        loc = pyro.param("loc", torch.tensor([0.0, 1.0]))
        seen.append(tuple(loc.tolist()))
        with pyro.plate("n", len(X)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.StudentT(4.0, loc.sinh().asinh()[z], 1.0), obs=X)

    em = ExactPosteriorEM(model, updates={"loc": Gradient(steps=20)})
    q = em.posterior()
    em.plan()
    seen.clear()
    em.m_step(q)
    at_points = [p for p in seen if p != (0.0, 1.0)]  # q is checked where it was computed
    assert len(at_points) > 3
    assert all(a != b for a, b in pairwise(at_points))


@pytest.fixture
def counted() -> tuple[Tensor, list[float], KeptLoss]:
    x, runs = torch.tensor([2.0, 3.0], requires_grad=True), []

    def cubes() -> Tensor:
        runs.append(float(x.detach().sum()))
        if float(x[0].detach()) < 0:
            raise ModelError("no value here")
        return (x**3).sum()

    return x, runs, KeptLoss([x], cubes, curved=True)


def test_one_evaluation_gives_value_slope_and_curvature(
    counted: tuple[Tensor, list[float], KeptLoss],
) -> None:
    x, runs, loss = counted
    assert loss.value_with_graph() == 35.0
    assert loss.gradients()[0].tolist() == [12.0, 27.0]
    (slope,) = torch.autograd.grad(loss.tensor(), [x], create_graph=True)
    assert torch.autograd.grad(slope.sum(), [x])[0].tolist() == [12.0, 18.0]
    assert loss.value() == 35.0 and runs == [5.0]


def test_a_write_is_seen(counted: tuple[Tensor, list[float], KeptLoss]) -> None:
    x, runs, loss = counted
    assert loss.value() == 35.0
    with torch.no_grad():
        x.copy_(torch.tensor([1.0, 2.0]))
    assert loss.gradients()[0].tolist() == [3.0, 12.0]
    assert loss.value() == 9.0 and runs == [5.0, 3.0]


def test_where_the_model_cannot_run_the_loss_is_infinite_and_is_not_kept(
    counted: tuple[Tensor, list[float], KeptLoss],
) -> None:
    x, _, loss = counted
    with torch.no_grad():
        x.copy_(torch.tensor([-1.0, 2.0]))
    assert loss.value() == loss.value_with_graph() == float("inf")
    with pytest.raises(ModelError, match="no value here"):
        loss.gradients()
    with torch.no_grad():
        x.copy_(torch.tensor([1.0, 0.0]))
    assert loss.value() == 1.0
