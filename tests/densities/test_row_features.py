"""Features of rows: what is the same in all rows is held once, and the evidence is that by hand."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.densities import linear
from pyro_em.plan.program import Program
from pyro_em.posteriors.mixtures.mixture import Mixture

N, K, D = 2100, 3, 2  # so many rows that data of few values are read by these
DRAWN = torch.Generator().manual_seed(4)
X = torch.poisson(1e4 * torch.rand(N, D, generator=DRAWN, dtype=torch.float64), DRAWN)
Y = torch.poisson(3 * torch.rand(N, generator=DRAWN, dtype=torch.float64), DRAWN)
V = torch.randint(4, (N,), generator=DRAWN)
RATES = 5e3 + 100 * torch.arange(K * D, dtype=torch.float64).reshape(K, D)
Q = torch.tensor([[4.0, 3, 2, 1], [1, 1, 1, 1], [1, 2, 3, 4]], dtype=torch.float64)


def counts_and_symbols(x: Tensor, y: Tensor, v: Tensor) -> None:
    p = pyro.param("p", torch.full((K,), 1 / K).double(), constraint=C.simplex)
    r = pyro.param("r", RATES.clone(), constraint=C.positive)
    s = pyro.param("s", torch.tensor([1.0, 2, 3]).double(), constraint=C.positive)
    q = pyro.param("q", Q / Q.sum(-1, keepdim=True), constraint=C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.Poisson(r[z]).to_event(1), obs=x)
        pyro.sample("y", dist.Poisson(s[z]), obs=y)
        pyro.sample("v", dist.Categorical(q[z]), obs=v)


@pytest.mark.parametrize("cells", [linear._CELLS, 300])
def test_what_all_rows_share_is_held_once(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_CELLS", cells)
    em = ExactPosteriorEM(counts_and_symbols)
    step = em.fit(X, Y, V, max_steps=1, tol=0, progress=False)
    program = em._ready((X, Y, V), {})
    assert isinstance(program, Program) and isinstance(program.kernel.block, Mixture)
    (factors,) = program.kernel.block.factors
    assert factors.linear is not None
    # Two counts, one of few values, and four symbols; one exposure for each count.
    assert factors.linear.phi.shape == (D + 1 + 4, N) and len(factors.linear.fixed) == D + 1

    q, s = Q / Q.sum(-1, keepdim=True), torch.tensor([1.0, 2, 3]).double()
    joint = (
        torch.distributions.Poisson(RATES).log_prob(X.unsqueeze(1)).sum(-1) - torch.tensor(K).log()
    )
    joint = joint + torch.distributions.Poisson(s).log_prob(Y.unsqueeze(1)) + q.log()[:, V].T
    assert abs(step.history[0] - float(joint.logsumexp(1).sum())) < 1e-9 * N

    r = (joint - joint.logsumexp(1, keepdim=True)).exp()
    mass = r.sum(0)
    torch.testing.assert_close(step.params["r"], r.T @ X / mass.unsqueeze(-1), rtol=1e-10, atol=0)
    torch.testing.assert_close(step.params["s"], r.T @ Y / mass, rtol=1e-10, atol=0)
    hot = torch.nn.functional.one_hot(V, 4).double()
    torch.testing.assert_close(
        step.params["q"], r.T @ hot / mass.unsqueeze(-1), rtol=1e-10, atol=1e-14
    )
