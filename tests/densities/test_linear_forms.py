"""Linear forms that are remembered from fit to fit: those of other data are others."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM


def counts(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    rate = pyro.param("rate", torch.tensor([1.0, 4.0]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Poisson(rate[z]), obs=x)


def evidence(x: Tensor, w: Tensor, rate: Tensor) -> float:
    table = w.log() + dist.Poisson(rate).log_prob(x.unsqueeze(-1))
    return float(table.logsumexp(-1).sum())


def test_fits_of_one_model_to_other_data_are_those_of_a_fresh_model() -> None:
    torch.manual_seed(0)
    em = ExactPosteriorEM(counts)
    for seed in range(4):  # few rows: their linear form is small enough to be remembered
        x = torch.poisson(torch.full((12,), 1.0 + seed))
        pyro.clear_param_store()
        found = em.fit(x, max_steps=3, tol=0, progress=False)
        assert found.plan.kernel == "mixture"
        w, rate = torch.tensor([0.4, 0.6]), torch.tensor([1.0, 4.0])
        for entering in found.history.entering:
            assert abs(entering - evidence(x, w, rate)) < 1e-4
            q = (w.log() + dist.Poisson(rate).log_prob(x.unsqueeze(-1))).softmax(-1)
            w, rate = q.mean(0), (q * x.unsqueeze(-1)).sum(0) / q.sum(0)
        assert torch.allclose(found.params["w"], w, atol=1e-4)
        assert torch.allclose(found.params["rate"], rate, rtol=1e-4)
