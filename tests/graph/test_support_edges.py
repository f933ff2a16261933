"""Parameters at which the support of the data ends: bounds of a Uniform, and others."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import (
    Chunks,
    ClosedForm,
    EMStatus,
    ExactPosteriorEM,
    Fixed,
    Gradient,
    PyroEMWarning,
)

X = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0, 4.5], dtype=torch.float64)
LOW, HIGH = torch.tensor([0.0, 1.0]).double(), torch.tensor([3.2, 6.0]).double()


def uniforms(x: Tensor) -> None:
    high = pyro.param("high", HIGH)
    low = pyro.param("low", LOW)
    w = pyro.param("w", torch.tensor([0.5, 0.5]).double(), constraint=C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Uniform(low[z], high[z]), obs=x)


def by_hand(x: np.ndarray, steps: int) -> tuple[list[float], np.ndarray, np.ndarray, np.ndarray]:
    """Evidences of EM steps, and what they end with."""
    low, high, w, path = LOW.numpy().copy(), HIGH.numpy().copy(), np.array([0.5, 0.5]), []
    for _ in range(steps):
        p = w / (high - low) * ((low <= x[:, None]) & (x[:, None] <= high))
        path.append(float(np.log(p.sum(1)).sum()))
        q = p / p.sum(1, keepdims=True)
        for k in range(2):
            low[k], high[k] = x[q[:, k] > 0].min(), x[q[:, k] > 0].max()
        w = q.mean(0)
    return path, low, high, w


@pytest.mark.parametrize("constraint", [C.real, C.positive, C.interval(-3.0, 70.0)])
def test_bounds_are_the_outermost_data(constraint: C.Constraint) -> None:
    def model(x: Tensor) -> None:
        low = pyro.param("low", torch.tensor(0.1).double(), constraint=constraint)
        high = pyro.param("high", torch.tensor(9.0).double(), constraint=constraint)
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Uniform(low, high), obs=x)

    result = ExactPosteriorEM(model).fit(X, progress=False, max_steps=1)
    assert {type(u.update) for u in result.plan.updates.values()} == {ClosedForm}
    found = [float(result.params[n]) for n in ("low", "high")]
    assert found == pytest.approx([0.5, 4.5], abs=1e-12) and found[0] <= 0.5 < 4.5 < found[1]
    assert result.log_evidence == pytest.approx(-len(X) * math.log(4.0), abs=1e-10)


@pytest.mark.parametrize("data", [X, Chunks(X, rows=2)], ids=["whole", "chunks"])
def test_a_mixture_of_uniforms_moves_its_bounds_inwards(data: Tensor | Chunks) -> None:
    result = ExactPosteriorEM(uniforms).fit(data, progress=False, max_steps=12, tol=0)
    path, low, high, w = by_hand(X.numpy(), 12)
    assert list(result.history) == pytest.approx(path, abs=1e-10)
    assert all(b >= a - 1e-12 for a, b in pairwise(result.history))
    for name, expected in (("low", low), ("high", high), ("w", w)):
        np.testing.assert_allclose(result.params[name].numpy(), expected, rtol=1e-12)
    assert any("never outwards" in n for n in result.plan.notes)
    errors = result.standard_errors()
    assert list(errors) == ["w"] and bool((errors["w"] > 0).all())


def test_rows_that_are_masked_do_not_count() -> None:
    def model(x: Tensor, seen: Tensor) -> None:
        high = pyro.param("high", torch.tensor([9.0, 8.0]).double())
        with pyro.plate("n", len(x)), pyro.poutine.mask(mask=seen):
            pyro.sample("x", dist.Uniform(0.0, high[torch.tensor([0, 0, 0, 1, 1, 1])]), obs=x)

    seen = torch.tensor([True, True, False, True, True, False])
    result = ExactPosteriorEM(model).fit(X, seen, progress=False)
    np.testing.assert_allclose(result.params["high"].numpy(), [1.0, 4.0], rtol=1e-12)


def test_an_interval_of_one_datum_is_named() -> None:
    def model(x: Tensor) -> None:
        low = pyro.param("low", torch.tensor([0.0, 2.5]).double())
        high = pyro.param("high", torch.tensor([6.0, 3.5]).double())
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2).double() / 2))
            pyro.sample("x", dist.Uniform(low[z], high[z]), obs=x)

    with pytest.warns(PyroEMWarning, match="its interval collapses"):
        result = ExactPosteriorEM(model).fit(X, progress=False)
    assert result.status is EMStatus.DEGENERATE and "component 1" in result.message


def test_a_known_factor_keeps_the_closed_form() -> None:
    def model(x: Tensor) -> None:
        half = pyro.param("half", torch.tensor(3.0).double())
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Uniform(0.0, 2 * half), obs=x)

    result = ExactPosteriorEM(model).fit(X, progress=False)
    assert float(result.params["half"]) == pytest.approx(2.25, abs=1e-12)


def test_bounds_that_are_left_to_gradients_are_named_with_the_reason() -> None:
    def shifted(x: Tensor) -> None:
        width = pyro.param("width", torch.tensor(6.0).double())
        low = pyro.param("low", torch.tensor(0.0).double())
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Uniform(low, (low + width).clamp(max=99.0)), obs=x)

    plan = ExactPosteriorEM(shifted).plan(X)
    for name in ("low", "width"):
        assert "the support of Uniform at 'x' ends at it" in plan.updates[name].reason
        assert any(f"parameter '{name}'" in n and "ends at it" in n for n in plan.notes)
    held = ExactPosteriorEM(shifted, updates={"*": Fixed()}).plan(X)
    assert not any("ends at it" in n for n in held.notes)
    pyro.clear_param_store()
    em = ExactPosteriorEM(uniforms, updates={"low": Gradient(), "high": Gradient()})
    with pytest.warns(PyroEMWarning, match="ends at it"):
        result = em.fit(X, progress=False)
    assert not result.converged and "the support of site 'x' ends at it" in result.message
