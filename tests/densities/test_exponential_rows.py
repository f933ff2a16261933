"""Densities in linear form as rows of kernels: against the joint table, and a plain numpy EM."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM
from pyro_em.posteriors.chains.chain import Chain
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.testing import check_block
from pyro_em.updates.sums.newton_on_sums import NewtonSolver
from tests.benchmarks.exponential import gamma_steps, negative_binomial_steps


def positive(name: str, value: Tensor) -> Tensor:
    return pyro.param(name, value.clone(), constraint=C.positive)


W = torch.tensor([0.4, 0.6], dtype=torch.float64)
A = torch.tensor([[1.0, 2.0], [4.0, 3.0]], dtype=torch.float64)


def rows(x: Tensor, seen: Tensor) -> None:
    """Two numbers per row with a rate for both, some masked; shares; angles; two counts."""
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    a, b = positive("a", A), positive("b", W)
    p = pyro.param("p", W.clone(), constraint=C.unit_interval)
    c, k = positive("c", A.mT), positive("k", 3 * W)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        gamma = dist.Gamma(a[z], b[z].unsqueeze(-1)).mask(seen).to_event(1)
        pyro.sample("x", gamma, obs=x)
        pyro.sample("share", dist.Dirichlet(c[z]), obs=x / x.sum(-1, keepdim=True))
        counts = dist.NegativeBinomial(a[z], p[z].unsqueeze(-1)).mask(seen).to_event(1)
        pyro.sample("counts", counts, obs=x.round())
        pyro.sample("angle", dist.VonMises(torch.zeros(()).double(), k[z]), obs=x[:, 0] - 2)


def chain(x: Tensor, seen: Tensor) -> None:
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    P = pyro.param("P", torch.stack([W, W.flip(0)]), constraint=C.simplex)
    a, b = positive("a", A), positive("b", W)
    p = pyro.param("p", W.clone(), constraint=C.unit_interval)
    z = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(w if z is None else P[z]))
        gamma = dist.Gamma(a[z], b[z].unsqueeze(-1)).to_event(1).mask(seen[t])
        pyro.sample(f"x_{t}", gamma, obs=x[t])
        pyro.sample(f"y_{t}", dist.NegativeBinomial(a[z, 0], p[z]), obs=x[t, 0].round())


def test_blocks() -> None:
    torch.manual_seed(0)
    x = dist.Gamma(A.repeat(3, 1), 1.0).sample()
    seen = torch.rand(6, 2) > 0.3
    check_block(Mixture, rows, x, seen, states=1)
    check_block(Chain, chain, x[:5], seen.any(-1)[:5], states=1)


def test_against_numpy() -> None:
    torch.manual_seed(1)
    x = dist.Gamma(A[:, 1], torch.tensor([2.0, 0.5]).double()).sample((40,)).reshape(-1)
    start = {"w": W, "a": A[0], "b": torch.tensor([1.0, 0.5]).double()}

    def model(x: Tensor, weight: Tensor) -> None:
        w = pyro.param("w", W.clone(), constraint=C.simplex)
        a, b = positive("a", start["a"]), positive("b", start["b"])
        with pyro.plate("n", len(x)), pyro.poutine.scale(scale=weight):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Gamma(a[z], b[z]), obs=x)

    # A row of weight two is two rows.
    weight = torch.ones(80).double().index_fill_(0, torch.arange(30), 2.0)
    result = ExactPosteriorEM(model).fit(x, weight, max_steps=6, tol=0)
    assert result.plan.kernel == "mixture"
    x = torch.cat([x, x[:30]])
    evidence, values = gamma_steps(x.numpy(), {n: t.numpy() for n, t in start.items()}, 6)
    assert list(result.history) == pytest.approx(evidence, rel=1e-11)
    for name, value in values.items():
        assert result.params[name].tolist() == pytest.approx(value.tolist(), rel=1e-8)


def test_counts_against_numpy() -> None:
    torch.manual_seed(2)
    p = torch.tensor([0.7, 0.9], dtype=torch.float64)
    x = dist.NegativeBinomial(A[0], p).sample((60,)).reshape(-1)
    start = {"w": W, "r": A[1], "p": W}

    def model(x: Tensor) -> None:
        w = pyro.param("w", W.clone(), constraint=C.simplex)
        r, p = positive("r", start["r"]), pyro.param("p", W.clone(), constraint=C.unit_interval)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.NegativeBinomial(r[z], p[z]), obs=x)

    result = ExactPosteriorEM(model).fit(x, max_steps=6, tol=0)
    assert result.plan.kernel == "mixture"
    evidence, values = negative_binomial_steps(
        x.numpy(), {n: t.numpy() for n, t in start.items()}, 6
    )
    assert list(result.history) == pytest.approx(evidence, rel=1e-10)
    for name, value in values.items():
        assert result.params[name].tolist() == pytest.approx(value.tolist(), rel=1e-6)
    pyro.clear_param_store()
    parts = ExactPosteriorEM(model).fit(Chunks(x, rows=50), max_steps=6, tol=0)
    assert list(parts.history) == pytest.approx(evidence, rel=1e-10)


def counts_of_two_kinds(x: Tensor) -> None:
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    r = positive("r", torch.tensor([1.5, 2.5], dtype=torch.float64))
    start = torch.tensor([0.5, 0.9999], dtype=torch.float64)
    p = pyro.param("p", start, constraint=C.unit_interval)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.NegativeBinomial(r[z], p[z]), obs=x)


def test_large_counts_are_no_table() -> None:
    """A number for each count below the largest would fill the memory where counts are populations."""
    x = torch.tensor([3.0, 40000.0, 16385.0, 0.0, 25000.0], dtype=torch.float64)
    em = ExactPosteriorEM(counts_of_two_kinds)
    assert em.plan(x).kernel == "contraction"
    assert em.posterior(x).log_evidence == pytest.approx(-39.17037302334481)  # scipy 1.17


def test_a_component_of_zeros_alone_ends_its_newton_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its density tends to one at zero and never gets there: a step gains e⁻¹ of the one before."""
    taken, search = [], NewtonSolver._searched

    def counted(self: NewtonSolver, *args: Any) -> Any:
        taken.append(1)
        return search(self, *args)

    monkeypatch.setattr(NewtonSolver, "_searched", counted)
    x = torch.tensor([0.0, 0.0, 0.0, 3000.0, 2500.0, 4000.0], dtype=torch.float64)
    result = ExactPosteriorEM(counts_of_two_kinds).fit(x, max_steps=5, tol=0)
    assert len(taken) < 120
    assert result.log_evidence == pytest.approx(-27.6405406443, abs=1e-9)  # scipy 1.17
