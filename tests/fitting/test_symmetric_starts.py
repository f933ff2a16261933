"""Equal starts: the warning comes where EM stays on the saddle, and not where something parts them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import EMStatus, ExactPosteriorEM, Fixed, PyroEMWarning

X = torch.tensor([-2.9, -2.3, -2.0, -1.7, -1.2, 1.1, 1.8, 2.0, 2.4], dtype=torch.float64)


def mixture(x: Tensor, means: Tensor, scales: Tensor | float = 1.0) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        scale = scales[z] if isinstance(scales, Tensor) else scales
        pyro.sample("x", dist.Normal(means[z], scale), obs=x)


def own_priors(x: Tensor) -> None:
    with pyro.plate("k", 2):
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0))
    mixture(x, mu)


def one_prior(x: Tensor) -> None:
    with pyro.plate("k", 2):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    mixture(x, mu)


def equal_start(x: Tensor) -> None:
    with pyro.plate("k", 2):
        pyro.sample("mu", dist.Delta(pyro.param("m", torch.zeros(2))))


def own_rows(x: Tensor) -> None:
    rows = dist.Dirichlet(torch.tensor([[5.0, 2.0], [2.0, 5.0]])).to_event(1)
    A = pyro.sample("A", rows)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Categorical(A[z]), obs=(x > 0).long())


def equal_rows(x: Tensor) -> None:
    A = pyro.param("a", torch.ones(2, 2) / 2, constraint=C.simplex)
    pyro.sample("A", dist.Delta(A, event_dim=2))


def beside_a_constant(x: Tensor) -> None:
    mixture(x, torch.stack([torch.tensor(1.0), pyro.param("m", torch.tensor(1.0))]))


def beside_another(x: Tensor) -> None:
    mixture(
        x, torch.stack([pyro.param("m0", torch.tensor(1.0)), pyro.param("m", torch.tensor(1.0))])
    )


def own_constraint(x: Tensor) -> None:
    low = pyro.param("m0", torch.tensor(1.0), constraint=C.interval(0.5, 2.0))
    mixture(x, torch.stack([low, pyro.param("m", torch.tensor(1.0))]))


def own_scale(x: Tensor) -> None:
    free = pyro.param("s", torch.tensor(1.0), constraint=C.positive)
    mixture(x, pyro.param("mu", torch.zeros(2)), torch.stack([torch.tensor(1.0), free]))


def plain(x: Tensor) -> None:
    mixture(x, pyro.param("mu", torch.zeros(2)))


LEAVES: dict[str, tuple[Callable[..., None], Any, dict[str, Any]]] = {
    "priors": (own_priors, equal_start, {}),
    "rows": (own_rows, equal_rows, {}),
    "constant": (beside_a_constant, None, {}),
    "fixed": (beside_another, None, {"updates": {"m0": Fixed()}}),
    "constraint": (own_constraint, None, {}),
    "scale": (own_scale, None, {}),
}


@pytest.mark.parametrize("case", LEAVES.values(), ids=list(LEAVES))
def test_components_that_something_tells_apart_leave_the_saddle_without_a_warning(case) -> None:
    model, guide, more = case
    with warnings.catch_warnings():
        warnings.simplefilter("error", PyroEMWarning)
        result = ExactPosteriorEM(model, guide, **more).fit(X, progress=False)
    assert result.status is not EMStatus.SYMMETRIC
    q = result.posterior.probs("z")
    assert float((q - 0.5).abs().max()) > 0.2


@pytest.mark.parametrize("max_steps", [1, 1000])
@pytest.mark.parametrize(
    ("model", "guide"), [(plain, None), (one_prior, equal_start), (beside_another, None)]
)
def test_components_that_nothing_tells_apart_stay_and_it_is_said(model, guide, max_steps) -> None:
    with pytest.warns(PyroEMWarning, match="EM cannot leave such a saddle"):
        result = ExactPosteriorEM(model, guide).fit(X, max_steps=max_steps, progress=False)
    assert (result.status is EMStatus.SYMMETRIC) == (max_steps > 1)
    torch.testing.assert_close(result.posterior.probs("z"), torch.full((len(X), 2), 0.5))
