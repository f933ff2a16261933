"""Parameters at which the support of the data ends: the plan says so, and a fit names them."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM, Fixed, PyroEMWarning

X = torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0, 4.5], dtype=torch.float64)


def uniforms(x: Tensor) -> None:
    high = pyro.param("high", torch.tensor([3.0, 6.0]))
    low = pyro.param("low", torch.tensor([0.0, 1.0]))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Uniform(low[z], high[z]), obs=x)


def test_bounds_of_a_uniform_are_named_with_the_reason() -> None:
    em = ExactPosteriorEM(uniforms)
    plan = em.plan(X)
    for name in ("low", "high"):
        assert "the support of Uniform at 'x' ends at it" in plan.updates[name].reason
        assert any(f"parameter '{name}'" in n and "ends at it" in n for n in plan.notes)
    with pytest.warns(PyroEMWarning, match="ends at it"):
        result = em.fit(X, progress=False)
    assert not result.converged and "the support of site 'x' ends at it" in result.message
    held = ExactPosteriorEM(uniforms, updates={"*": Fixed()}).plan(X)
    assert not any("ends at it" in n for n in held.notes)
