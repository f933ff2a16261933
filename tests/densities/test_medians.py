"""Laplace components by weighted medians in chunks of rows: numpy, tables, ties, weights, chains."""

from __future__ import annotations

from collections.abc import Callable

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
    where = medians.Argument((3, 2), ("", (3, 2), torch.float64))
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


# ---------------------------------------------------------------- shared, masked, known, with priors


def one_scale(x: Tensor) -> None:
    """Of all components and numbers."""
    w, at, _ = parameters(x, LOC, SCALE)
    scale = pyro.param("common", x.new_tensor(0.8), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Laplace(at[z], scale).to_event(1), obs=x)


def scale_of_a_number(x: Tensor) -> None:
    w, at, _ = parameters(x, LOC, SCALE)
    scale = pyro.param("common", SCALE[0].to(x), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Laplace(at[z], scale).to_event(1), obs=x)


def scale_of_a_component(x: Tensor) -> None:
    w, at, _ = parameters(x, LOC, SCALE)
    scale = pyro.param("common", SCALE[0].to(x), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Laplace(at[z], scale[z].unsqueeze(-1)).to_event(1), obs=x)


def known_scale(x: Tensor) -> None:
    w, at, _ = parameters(x, LOC, SCALE)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Laplace(at[z], 0.7).to_event(1), obs=x)


def masked_rows(x: Tensor) -> None:
    w, at, scale = parameters(x, LOC, SCALE)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        with poutine.mask(mask=torch.arange(len(x)) % 4 != 1):
            pyro.sample("x", dist.Laplace(at[z], scale[z]).to_event(1), obs=x)


def masked_entries(x: Tensor) -> None:
    w, at, scale = parameters(x, LOC, SCALE)
    seen = (torch.arange(x.numel()) % 5 != 3).reshape(x.shape)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Laplace(at[z], scale[z]).mask(seen).to_event(1), obs=x)


def with_a_prior(x: Tensor) -> None:
    w, at, _ = parameters(x, LOC, SCALE)
    with pyro.plate("k", 2):
        scale = pyro.sample("b", dist.InverseGamma(x.new_full((2,), 3.0), 1.5).to_event(1))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Laplace(at[z], scale[z]).to_event(1), obs=x)


def prior_of_one_scale(x: Tensor) -> None:
    w, at, _ = parameters(x, LOC, SCALE)
    scale = pyro.sample("b", dist.InverseGamma(x.new_tensor(3.0), 1.5))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Laplace(at[z], scale).to_event(1), obs=x)


ALL = (
    one_scale,
    scale_of_a_number,
    scale_of_a_component,
    known_scale,
    masked_rows,
    masked_entries,
    with_a_prior,
    prior_of_one_scale,
)


@pytest.mark.parametrize("model", ALL)
def test_kinds_of_arguments_take_the_steps_of_tables(
    model: Callable[[Tensor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evidence of each step, with priors, and all parameters; the kernel to its end."""
    x, guide = data(83, 1e-9), "map" if "prior" in model.__name__ else None
    ends = []
    for chunk in (5, None):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        if chunk is None:
            monkeypatch.setattr("pyro_em.densities.layout.as_laplace", lambda *_: None)
        else:
            monkeypatch.setattr(medians, "_CELLS", 2 * chunk)
            monkeypatch.setattr(medians, "_FEWEST", chunk)
        em = ExactPosteriorEM(model, guide)
        words = "contraction" if chunk is None else "mixture"
        assert em.plan(x).kernel == words
        found = em.fit(x, max_steps=5, tol=0)
        ends.append(([*found.history, found.log_evidence], dict(found.params)))
    np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=1e-11)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("model", [masked_entries, with_a_prior])
def test_kinds_of_arguments_as_blocks(model: Callable[[Tensor], None]) -> None:
    guide = "map" if model is with_a_prior else None
    check_block(Mixture, model, data(13, 0.25), states=1, guide=guide)


def test_a_scale_in_common_against_numpy() -> None:
    x = data(211, 1e-9)
    pyro.clear_param_store()
    found = ExactPosteriorEM(one_scale).fit(x, max_steps=4, tol=0)
    y, w, loc, b, evidence = x.numpy(), W.numpy(), LOC.numpy(), 0.8, []
    for _ in range(5):
        each = (-np.abs(y[:, None] - loc) / b - np.log(2 * b)).sum(-1)
        total = np.logaddexp.reduce(np.log(w) + each, 1)
        evidence.append(total.sum())
        r = np.exp(np.log(w) + each - total[:, None])
        for k, i in np.ndindex(*loc.shape):
            order = np.argsort(y[:, i], kind="stable")
            sums = np.cumsum(r[order, k])
            loc = loc.copy()
            loc[k, i] = y[order, i][np.flatnonzero(sums >= sums[-1] / 2)[0]]
        b = (r[:, :, None] * np.abs(y[:, None] - loc)).sum() / (2 * r.sum())
        w = r.sum(0) / r.sum()
    np.testing.assert_allclose(found.history[:5], evidence[: len(found.history[:5])], rtol=1e-11)
