"""Steps of a loop share one distribution where nothing tells theirs apart, and not otherwise."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.graph.bindings.shared_distributions import SharedDistributions
from pyro_em.graph.findings.examination import examine
from pyro_em.graph.trace import trace_graph

K = 24


def shared(*fns: Any) -> list[int]:
    """For each distribution the number of the one that stands for it."""
    share, sites = SharedDistributions(), [{"fn": fn} for fn in fns]
    for site in sites:
        share(site, nullcontext())
    return [next(i for i, fn in enumerate(fns) if fn is site["fn"]) for site in sites]


def test_distributions_are_shared_where_nothing_tells_them_apart() -> None:
    A = (torch.rand(K, K, generator=torch.Generator().manual_seed(0)) + 0.1).requires_grad_()
    equal = A.detach().clone().requires_grad_()
    z, y = torch.arange(K), torch.arange(K).reshape(K, 1)
    fns = [
        dist.Categorical(A[z]),
        dist.Categorical(A[z]),
        dist.Categorical(equal[z]),  # another parameter
        dist.Categorical(A[z.flip(0)]),  # other rows
        dist.Categorical(A.detach()[z]),  # no parameter
        dist.Categorical(A[y]),  # laid out otherwise
        dist.Categorical(logits=A[z]),
        dist.Categorical(A[z] * 2),  # equal numbers, another way from the parameter
        dist.Categorical(A[z.clone()]),
        dist.Categorical(equal[z.clone()]),
    ]
    assert shared(*fns) == [0, 0, 2, 3, 4, 5, 6, 7, 0, 2]
    zero = torch.zeros(K * K)
    assert shared(dist.Delta(zero), dist.Delta(-zero), dist.Delta(zero.clone())) == [0, 1, 0]


def test_a_chain_is_run_with_few_tables() -> None:
    seen = torch.tensor([0, 1, 1, 2, 0, 2, 1, 0, 0, 1, 2, 2])

    def model(x: Tensor) -> None:
        A = pyro.param("A", torch.full((K, K), 1 / K), constraint=constraints.simplex)
        B = pyro.param("B", torch.full((K, 30), 1 / 30), constraint=constraints.simplex)
        z = torch.tensor(0)
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=x[t])

    pyro.clear_param_store()
    structure, problems = examine(model, (seen,), {})
    runs: list[Any] = []
    graph = trace_graph(model, (seen,), {}, structure, runs=runs)
    assert not problems and list(graph.latents) == [f"z_{t}" for t in range(12)]
    sites = [s for n, s in runs[0].sites.items() if n in structure.sites]
    assert len(sites) == 24 and len({id(s["fn"]) for s in sites}) == 5  # dimensions alternate
    assert {n for g in graph.groups for n in g.params} == {"A", "B"}
