"""A loop over index tensors is run over them whenever its form was seen before, not step by step."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM, vectorized_markov

runs: list[int] = []


def model(x: Tensor) -> None:
    A = pyro.param("A", torch.tensor([[0.9, 0.1], [0.3, 0.7]]), constraint=dist.constraints.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    z = torch.tensor(0)
    for t in vectorized_markov("t", len(x)):
        runs.append(1)
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


def test_no_later_call_runs_the_body_at_each_step() -> None:
    x, steps = torch.linspace(-2.0, 2.0, 200), []
    pyro.clear_param_store()
    for data in (x, x, x.flip(0), x[:150]):
        runs.clear()
        ExactPosteriorEM(model).plan(data)
        steps.append(len(runs))
    assert max(steps) < 30, steps
