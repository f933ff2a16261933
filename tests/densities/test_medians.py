"""Laplace components by weighted medians in chunks of rows: numpy, tables, ties, weights, chains."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, PyroEMWarning
from pyro_em.densities import medians
from pyro_em.families.forms import Median
from pyro_em.posteriors.chains.chain import Chain
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.posteriors.mixtures.row_factors import Collected
from pyro_em.testing import check_block

W = torch.tensor([0.4, 0.6], dtype=torch.float64)
LOC = torch.tensor([[0.0, 1.0], [3.0, -1.0]], dtype=torch.float64)
SCALE = torch.tensor([[1.0, 0.5], [0.7, 2.0]], dtype=torch.float64)


def parameters(like: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    w = pyro.param("w", W.to(like), constraint=C.simplex)
    at = pyro.param("loc", loc.to(like))
    return w, at, pyro.param("scale", scale.to(like), constraint=C.positive)


def mixture(x: Tensor, often: Tensor | None = None, loc: Tensor = LOC) -> None:
    """Two numbers per row; rows count as often as is said."""
    w, at, scale = parameters(x, loc, SCALE)
    with pyro.plate("n", len(x)), poutine.scale(scale=1.0 if often is None else often):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Laplace(at[z], scale[z]).to_event(1), obs=x)


def chain(x: Tensor) -> None:
    w, at, scale = parameters(x, LOC[:, 0], SCALE[:, 0])
    P = pyro.param("P", torch.stack([W, W.flip(0)]), constraint=C.simplex)
    z = None
    for i in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{i}", dist.Categorical(w if z is None else P[z]))
        pyro.sample(f"x_{i}", dist.Laplace(at[z], scale[z]), obs=x[i])


def data(n: int, steps: float) -> Tensor:
    """Data in multiples of some step, so that values occur again and again."""
    torch.manual_seed(2)
    z = torch.distributions.Categorical(W).sample((n,))
    return (dist.Laplace(LOC[z], SCALE[z]).sample() / steps).round() * steps


def by_numpy(x: np.ndarray, often: np.ndarray, steps: int) -> tuple[list[float], list[np.ndarray]]:
    """EM for the mixture, each median the first value at which half of the weight is reached."""
    w, loc, scale = W.numpy(), LOC.numpy(), SCALE.numpy()
    evidence = []
    for _ in range(steps):
        each = -np.abs(x[:, None] - loc) / scale - np.log(2 * scale)
        joint = np.log(w) + each.sum(-1)
        total = np.logaddexp.reduce(joint, 1)
        evidence.append(float(often @ total))
        r = np.exp(joint - total[:, None]) * often[:, None]
        loc = np.empty_like(loc)
        for k, i in np.ndindex(*loc.shape):
            order = np.argsort(x[:, i], kind="stable")
            sums = np.cumsum(r[order, k])
            loc[k, i] = x[order, i][np.flatnonzero(sums >= sums[-1] / 2)[0]]
        scale = np.einsum("nk,nki->ki", r, np.abs(x[:, None] - loc)) / r.sum(0)[:, None]
        w = r.sum(0) / r.sum()
    return evidence, [w, loc, scale]


@pytest.mark.parametrize("ties", [1e-9, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_numpy(ties: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights, in chunks of few rows; never through tables."""
    monkeypatch.setattr(medians, "_CELLS", 8)
    monkeypatch.setattr(medians, "_FEWEST", 7)
    x = data(211, ties).to(dtype)
    often = torch.arange(len(x)).remainder(4).add(1).to(dtype) / 2
    kept: list[int | str] = []
    keep = Collected.keep

    def noted(self: Collected, key: int | str, part: Tensor, rows: slice) -> None:
        kept.append(key)
        keep(self, key, part, rows)

    monkeypatch.setattr(Collected, "keep", noted)
    evidence, (w, loc, scale) = by_numpy(x.double().numpy(), often.double().numpy(), 6)
    pyro.clear_param_store()
    found = ExactPosteriorEM(mixture).fit(x, often, max_steps=6, tol=1e-30)
    assert len(kept) >= 5
    store = pyro.get_param_store()
    near = 1e-9 if dtype == torch.float64 else 2e-5
    np.testing.assert_allclose(found.history[:6], evidence, rtol=near)
    np.testing.assert_array_equal(store["loc"].detach().double().numpy(), loc)
    np.testing.assert_allclose(store["scale"].detach().numpy(), scale, rtol=near)
    np.testing.assert_allclose(store["w"].detach().numpy(), w, rtol=near)


def test_blocks() -> None:
    """Against tables and the enumeration of all latents; also in a chain."""
    x = data(7, 0.25)
    check_block(Mixture, mixture, x, states=1)
    check_block(Chain, chain, data(9, 0.25)[:, 0], states=1)


@pytest.mark.parametrize("seed", range(3))
def test_rule_of_a_median(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value that all data at once give, where half of the weight falls between two data too."""
    monkeypatch.setattr(medians, "_CELLS", 6)
    monkeypatch.setattr(medians, "_FEWEST", 1)
    torch.manual_seed(seed)
    x = torch.randint(0, 12, (50, 2)).double()
    weights = torch.randint(0, 3, (3, 50)).double()
    where = ("", (3, 2), torch.float64)
    rows = medians.LaplaceRows(x, None, 3, 2, (2,), where, where)
    for i, own in enumerate(rows._medians(weights)):
        for k in range(3):
            assert own[k] == Median().of_data(x[:, i], weights[k])


def test_collapse() -> None:
    """A component that is left with one value, again and again, is named, as through tables."""
    x = torch.cat([data(40, 1e-9), torch.full((40, 2), 9.0, dtype=torch.float64)])
    near = torch.tensor([[0.0, 1.0], [9.5, 9.5]], dtype=torch.float64)
    pyro.clear_param_store()
    with pytest.warns(PyroEMWarning, match="scale.* its variance collapses"):
        ExactPosteriorEM(mixture).fit(x, None, near, max_steps=30)
