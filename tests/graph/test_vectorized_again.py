"""A loop over index tensors is run over them whenever its form was seen before, not step by step."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, vectorized_markov

bodies = itertools.count()  # no number that a reading of the model depends on


def model(x: Tensor) -> None:
    pi = pyro.param("pi", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    A = pyro.param("A", torch.tensor([[0.9, 0.1], [0.3, 0.7]]), constraint=constraints.simplex)
    E = pyro.param(
        "E", torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]), constraint=constraints.simplex
    )
    z = None
    for t in vectorized_markov("t", len(x), dim=-1):
        next(bodies)
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"x_{t}", dist.Categorical(E[z]), obs=x[t])


def test_no_later_call_runs_the_body_at_each_step() -> None:
    x, runs = torch.arange(200) % 3, []
    em = ExactPosteriorEM(model)
    for data in (x, x, x, x.flip(0), x[:150]):
        before = next(bodies)
        em.plan(data)
        runs.append(next(bodies) - before - 1)
    assert max(runs) < 30, runs
    assert max(runs[1:4]) < runs[0]  # a form that was seen
