"""What a step costs beside its E-step and M-step: things that are looked at once."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM


def model(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=C.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def test_the_rounding_of_a_graph_is_looked_up_once() -> None:
    program = ExactPosteriorEM(model)._ready((torch.randn(5),), {})
    graph = program.graph  # type: ignore[union-attr]
    assert graph.eps is graph.eps
