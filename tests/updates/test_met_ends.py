"""Both ends of a Uniform made of two parameters: the same steps as where each end is one."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, DegenerateError, ExactPosteriorEM, Fixed, Gradient
from pyro_em.updates.update import ClosedForm

Ends = Callable[[Tensor], dist.TorchDistribution]


def real(name: str, *values: float) -> Tensor:
    return pyro.param(name, torch.tensor(values, dtype=torch.float64))


def positive(name: str, *values: float) -> Tensor:
    return pyro.param(name, torch.tensor(values, dtype=torch.float64), constraint=C.positive)


def plain(z: Tensor) -> dist.TorchDistribution:
    return dist.Uniform(real("low", 0.0, 3.0)[z], real("high", 5.0, 10.0)[z])


def width(z: Tensor) -> dist.TorchDistribution:
    low = real("low", 0.0, 3.0)[z]
    return dist.Uniform(low, low + positive("width", 5.0, 7.0)[z])


def centre(z: Tensor) -> dist.TorchDistribution:
    c, h = real("c", 2.5, 6.5)[z], positive("h", 2.5, 3.5)[z]
    return dist.Uniform(c - h, c + h)


def share(z: Tensor) -> dist.TorchDistribution:
    """Ends that are not linear in their parameters."""
    c = positive("c", 2.5, 6.5)[z]
    h = pyro.param("h", torch.tensor([1 - 1e-9, 7 / 13]).double(), constraint=C.unit_interval)[z]
    return dist.Uniform(c * (1 - h), c * (1 + h))


def one_width(z: Tensor) -> dist.TorchDistribution:
    low = real("low", 0.0, 3.0)[z]
    return dist.Uniform(low, low + positive("width", 7.0)[0])


def model(x: Tensor, ends: Ends) -> None:
    w = pyro.param("w", torch.full((2,), 0.5, dtype=torch.float64), constraint=C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", ends(z), obs=x)


def data() -> Tensor:
    torch.manual_seed(0)
    return torch.cat([torch.rand(40) * 3 + 1, torch.rand(40) * 5 + 4]).double()


@pytest.mark.filterwarnings("ignore:parameter")
@pytest.mark.parametrize("ends", [width, centre, share])
def test_the_same_steps_as_by_the_ends(ends: Ends) -> None:
    x = data()
    expected = ExactPosteriorEM(model).fit(x, plain, max_steps=4, tol=0)
    assert min(torch.tensor(list(expected.history)).diff()) > 0
    for given in (x, Chunks(x, rows=30)):
        pyro.clear_param_store()
        em = ExactPosteriorEM(lambda x: model(x, ends))
        found = em.fit(given, max_steps=4, tol=0)
        assert all(isinstance(u.update, ClosedForm) for u in em.plan(x).updates.values())
        assert list(found.history) == pytest.approx(list(expected.history), rel=1e-9)
        with torch.no_grad():
            interval = ends(torch.arange(2))
        assert interval.low.tolist() == pytest.approx(expected.params["low"].tolist(), abs=1e-12)
        assert interval.high.tolist() == pytest.approx(expected.params["high"].tolist(), abs=1e-12)
        inside = (x.unsqueeze(-1) >= interval.low) & (x.unsqueeze(-1) < interval.high)
        assert bool(inside.any(-1).all())


def test_other_intervals_are_as_they_were() -> None:
    """A width of two intervals, or one that is held, makes none that follows from its ends."""
    x = data()
    updates = ExactPosteriorEM(model).plan(x, one_width).updates
    assert isinstance(updates["width"].update, Gradient)
    pyro.clear_param_store()
    held = ExactPosteriorEM(model, updates={"low": Fixed()})
    assert isinstance(held.plan(x, width).updates["width"].update, Gradient)


@pytest.mark.filterwarnings("ignore:parameter")
def test_equal_data_have_no_interval() -> None:
    with pytest.raises(
        DegenerateError, match=r"parameter '\w+', component \d: its interval collapses"
    ):
        ExactPosteriorEM(model).step(torch.full((5,), 4.0).double(), centre)
