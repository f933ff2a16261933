"""Chunks whose rows read parameters by an index: each has cells of its own, and sums are of all."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM

_DRAWN = torch.Generator().manual_seed(0)
N = 40
X = torch.randn(N, generator=_DRAWN, dtype=torch.float64).exp()
G = torch.randint(0, 3, (N,), generator=_DRAWN)
W = torch.tensor([0.3, 0.7], dtype=torch.float64)


def _positive(name: str, *shape: int) -> Tensor:
    start = torch.linspace(0.5, 2.0, torch.Size(shape).numel(), dtype=torch.float64)
    return pyro.param(name, start.reshape(shape), constraint=C.positive)


def rates(x: Tensor, g: Tensor) -> None:
    a, b = _positive("a", 3), _positive("b", 3, 2)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(W))
        pyro.sample("x", dist.Gamma(a[g], b[g, z]), obs=x)


def counts(x: Tensor, g: Tensor) -> None:
    r = _positive("r", 3)
    p = pyro.param("p", torch.tensor([0.3, 0.6]).double(), constraint=C.unit_interval)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(W))
        pyro.sample("x", dist.NegativeBinomial(r[g], p[z]), obs=(5 * x).floor())


def heavy(x: Tensor, g: Tensor) -> None:
    m, s = pyro.param("m", torch.zeros(3).double()), _positive("s", 2)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(W))
        pyro.sample("x", dist.StudentT(4.0, m[g], s[z]), obs=x)


@pytest.mark.parametrize("rows", [20, 39])  # of one size, and a last one of a single row
@pytest.mark.parametrize("model", [rates, counts, heavy])
def test_steps_are_those_on_all_data(model: Callable[[Tensor, Tensor], None], rows: int) -> None:
    found = []
    for data in ((X, G), (Chunks(X, G, rows=rows),)):
        with pyro.get_param_store().scope():
            em = ExactPosteriorEM(model)
            found.append(em.fit(*data, max_steps=2, tol=0, progress=False))
    torch.testing.assert_close(list(found[1].history), list(found[0].history), rtol=1e-9, atol=0)
    assert found[1].log_evidence == pytest.approx(found[0].log_evidence, rel=1e-9)


def test_a_step_ends_where_the_expected_log_joint_has_no_slope() -> None:
    with pyro.get_param_store().scope():
        rates(X, G)
        a, b = _positive("a"), _positive("b")
        log = dist.Gamma(a[G].unsqueeze(-1), b[G]).log_prob(X.unsqueeze(-1)) + W.log()
        q = log.softmax(-1).detach()
        ExactPosteriorEM(rates).fit(Chunks(X, G, rows=20), max_steps=1, progress=False)
        a, b = (pyro.get_param_store()[n].detach().requires_grad_() for n in "ab")
        expected = (q * dist.Gamma(a[G].unsqueeze(-1), b[G]).log_prob(X.unsqueeze(-1))).sum()
        for slope in torch.autograd.grad(expected, [a, b]):
            assert float(slope.abs().max()) < 1e-8
