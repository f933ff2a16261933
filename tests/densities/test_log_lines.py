"""Regressions of LogNormal data: those of their logarithms, row by row."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 2, generator=GENERATOR, dtype=torch.float64)
W = torch.tensor([[0.5, -0.3], [-0.8, 0.4]], dtype=torch.float64)
NOISE = 0.3 * torch.randn(60, generator=GENERATOR, dtype=torch.float64)
Y = ((X * W[torch.arange(60) % 2]).sum(-1) + NOISE + 1).exp()


def model(x: Tensor, y: Tensor, log: bool = False) -> None:
    p = pyro.param("p", torch.full((2,), 0.5, dtype=torch.float64), constraint=C.simplex)
    w, s = pyro.param("w", 0.5 * W), pyro.param("s", W[:, 0].abs(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        of = (1 + (x * w[z]).sum(-1), s[z])
        pyro.sample("y", dist.Normal(*of) if log else dist.LogNormal(*of), obs=y)


@pytest.mark.parametrize("rows", [60, 25])
def test_the_steps_are_those_of_logarithms(rows: int) -> None:
    em = ExactPosteriorEM(lambda x, y: model(x, y, log=True))
    of_logs = em.fit(X, Y.log(), max_steps=5, tol=0)
    scores = em.score(X, Y.log())
    pyro.clear_param_store()
    em = ExactPosteriorEM(model)
    data = (X, Y) if rows == 60 else (Chunks(X, Y, rows=rows),)
    result = em.fit(*data, max_steps=5, tol=0)
    assert result.plan.kernel == "mixture"
    base = float(Y.log().sum())
    assert list(result.history) == pytest.approx([e - base for e in of_logs.history], rel=1e-12)
    for name, value in of_logs.params.items():
        assert result.params[name].numpy() == pytest.approx(value.numpy(), rel=1e-10)
    assert float(em.score(X, Y)) == pytest.approx(float(scores) - base, rel=1e-10)
