"""The E-step of few rows of Gaussian components: numpy's, and what the mixture says in chunks."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.errors import Handover
from pyro_em.posteriors.mixtures import few_rows
from pyro_em.posteriors.mixtures.mixture import Mixture


def mixture(x: Tensor, start: Tensor) -> None:
    """Full covariances. # x: (N, 2), start: (K, 2)"""
    K = len(start)
    weights, cov = torch.arange(1, K + 1).to(start), 0.7 * torch.eye(2).to(start)
    w = pyro.param("w", weights / weights.sum(), constraint=C.simplex)
    mu = pyro.param("mu", start.clone())
    S = pyro.param("S", cov.repeat(K, 1, 1), constraint=C.positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)


def block_of(x: Tensor, start: Tensor) -> Mixture:
    """The kernel of a mixture."""
    pyro.clear_param_store()
    block = ExactPosteriorEM(mixture)._session.look((x, start), {}).kernel.block  # type: ignore[union-attr]
    assert isinstance(block, Mixture)
    return block


def data(N: int, K: int, apart: float) -> tuple[Tensor, Tensor]:
    """Rows about K centres, and the centres."""
    g = torch.Generator().manual_seed(N + K)
    start = apart * torch.randn(K, 2, generator=g).double()
    return start[torch.arange(N) % K] + torch.randn(N, 2, generator=g).double(), start


def by_numpy(x: Tensor, start: Tensor) -> tuple[float, np.ndarray, np.ndarray]:
    """Evidence, masses and first moments, row by row."""
    X, mu, K = x.numpy(), start.numpy(), len(start)
    d2 = ((X[:, None] - mu) ** 2).sum(-1) / 0.7
    pi = np.arange(1, K + 1) / (K * (K + 1) / 2)
    joint = np.log(pi) - 0.5 * d2 - math.log(2 * math.pi) - math.log(0.7)
    log_p = np.logaddexp.reduce(joint, axis=1)
    r = np.exp(joint - log_p[:, None])
    return float(log_p.sum()), r.sum(0), r.T @ X


@pytest.mark.parametrize(("N", "K", "apart"), [(50, 2, 1.0), (50, 3, 60.0), (3000, 4, 2.0)])
def test_few_rows_are_solved_as_in_chunks_and_as_numpy_solves_them(
    N: int, K: int, apart: float
) -> None:
    x, start = data(N, K, apart)
    block = block_of(x, start)
    steps = block.steps(block.theta)
    assert isinstance(steps, few_rows.FewRows)
    assert (N * K > few_rows.FEW_CELLS) == (N == 3000)
    at = block.theta.enter({"w": pyro.param("w"), "mu": start, "S": pyro.param("S")})
    few = steps.e_step(at)
    evidence, mass, first = by_numpy(x, start)
    assert few.log_evidence == pytest.approx(evidence, rel=1e-12)
    (g,) = (key for key in few.sums if isinstance(key, int))
    assert torch.allclose(few.sums[g]["mass"], torch.as_tensor(mass), rtol=1e-10, atol=1e-12)
    centre = x.mean(0)
    moved = torch.as_tensor(first) - few.sums[g]["mass"].unsqueeze(-1) * centre
    assert torch.allclose(few.sums[g]["moments"][:, :2], moved, rtol=1e-9, atol=1e-9)
    chunks = block.e_step(at)
    assert few.log_evidence == pytest.approx(chunks.log_evidence, rel=1e-13)
    assert few.noise == pytest.approx(chunks.noise, rel=1e-12)
    for key, named in chunks.sums.items():
        for name, value in named.items():
            assert torch.allclose(few.sums[key][name], value, rtol=1e-11, atol=1e-12)


def test_few_rows_in_single_precision_are_corrected_for_rounded_coefficients() -> None:
    x, start = (t.float() for t in data(50, 3, 2.0))
    block = block_of(x, start)
    steps = block.steps(block.theta)
    assert isinstance(steps, few_rows.FewRows)
    at = block.theta.enter({"w": pyro.param("w"), "mu": start, "S": pyro.param("S")})
    assert all(p.lost is not None for p in at.prepared.values())
    few = steps.e_step(at)
    evidence, mass, _ = by_numpy(x.double(), start.double())
    assert few.log_evidence == pytest.approx(evidence, abs=2e-5)
    chunks = block.e_step(at)
    assert few.log_evidence == pytest.approx(chunks.log_evidence, abs=2e-5)
    assert torch.allclose(few.sums["natural"]["features"], torch.as_tensor(mass), rtol=1e-5)


def test_rows_that_no_component_explains_are_left_to_the_sound_step() -> None:
    x, start = data(50, 2, 1.0)
    block = block_of(x, start)
    values = {"mu": start, "S": pyro.param("S")}
    steps = block.steps(block.theta)
    assert isinstance(steps, few_rows.FewRows)
    at = block.theta.enter({**values, "w": torch.tensor([0.0, 1.0]).double()})
    assert float(steps.e_step(at).sums["natural"]["features"][0]) == 0.0
    with pytest.raises(Handover):
        steps.e_step(block.theta.enter({**values, "w": torch.tensor([math.nan, 1.0]).double()}))
    narrow = {**values, "w": pyro.param("w"), "S": 1e-9 * pyro.param("S").detach()}
    at = block.theta.enter(narrow)
    assert steps.e_step(at).log_evidence == block.e_step(at).log_evidence
