"""Gaussian latents of each row, read from a few rows: fits of all rows at once, and dense Normals."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.errors import ModelError
from pyro_em.fitting.results import identified
from pyro_em.graph.many_rows import slices
from pyro_em.plan.agreement import disagreements_of
from pyro_em.plan.program import Program
from pyro_em.posteriors.continuous import collapsed
from pyro_em.posteriors.gaussians import gaussian
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock

N, D, Q = 201, 4, 2
GENERATOR = torch.Generator().manual_seed(0)
W = torch.randn(D, Q, generator=GENERATOR, dtype=torch.float64)
T = torch.randn(N, 2, generator=GENERATOR, dtype=torch.float64)
T[17, 0] = 3.0
X = torch.randn(N, Q, generator=GENERATOR, dtype=torch.float64) @ W.T
X = X + torch.randn(N, D, generator=GENERATOR, dtype=torch.float64)
ZERO = torch.zeros(Q, dtype=torch.float64)

Model = Callable[[Tensor, Tensor], None]


def _parameters() -> tuple[Tensor, Tensor, Tensor]:
    w = pyro.param("w", W + 0.3)
    mu = pyro.param("mu", W[:, 0].clone())
    return w, mu, pyro.param("s", W[:, 1].exp(), constraint=C.positive)


def factors(x: Tensor, t: Tensor) -> None:
    w, mu, s = _parameters()
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(ZERO, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(h @ w.T + mu, s).to_event(1), obs=x)


def two_sites(x: Tensor, t: Tensor) -> None:
    w, mu, s = _parameters()
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(ZERO, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(h @ w[:2].T + mu[:2], s[:2]).to_event(1), obs=x[:, :2])
        pyro.sample("y", dist.Normal(h @ w[2:].T + mu[2:], s[0]).to_event(1), obs=x[:, 2:])


def slopes(x: Tensor, t: Tensor) -> None:
    """Coefficients and offsets are made of the row's covariates."""
    _, mu, s = _parameters()
    with pyro.plate("n", len(x)):
        u = pyro.sample("u", dist.Normal(ZERO, s[1:3]).to_event(1))
        loc = t @ mu[:2] + u[:, 0] + u[:, 1] * t[:, 0]
        pyro.sample("x", dist.Normal(loc, s[0]), obs=x[:, 0])


def bent(x: Tensor, t: Tensor) -> None:
    """One row, none of the few, has other covariates than the arguments'."""
    slopes(x, t.clamp(max=2.9))


def centred(x: Tensor, t: Tensor) -> None:
    """What is said of a row depends on those beside it."""
    factors(x - x.mean(0), t)


def neighbours(x: Tensor, t: Tensor) -> None:
    """Rows read the latents of others."""
    w, mu, s = _parameters()
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(0.0 * mu[0], 1.0))
    with pyro.plate("m", len(x)):
        pyro.sample("x", dist.Normal(h.flip(0) * w[0, 0] + mu[0], s[0]), obs=x[:, 0])


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Lets data be read in slices of 100 rows, or all at once."""

    def switch(on: bool) -> None:
        rows = 100 if on else 2**60
        monkeypatch.setattr(slices, "GAUSSIAN_ROWS", rows)
        monkeypatch.setattr(gaussian, "MANY", rows)
        monkeypatch.setattr(slices, "_CELLS", 100)
        monkeypatch.setattr(collapsed, "_ROWS", rows)
        pyro.clear_param_store()

    return switch


@pytest.mark.parametrize(
    ("model", "parted"),
    [
        (factors, "n"),
        (two_sites, "n"),
        (slopes, "n"),
        (bent, "n"),
        (centred, ""),
        (neighbours, ""),
    ],
)
def test_a_fit_is_that_of_all_rows(
    model: Model, parted: str, sliced: Callable[[bool], None]
) -> None:
    found = []
    for on, expected in ((False, ""), (True, parted)):
        sliced(on)
        em = ExactPosteriorEM(model)
        result = em.fit(X, T, max_steps=2, tol=0)
        read = em._ready((X, T), {})
        assert isinstance(read, Program)
        assert read.graph.parted == expected
        looked = [(u.count, u.parameters) for u in identified.undetermined(read)]
        latent = next(iter(read.bare.latents)) if read.bare is not None else ""
        mean = em.posterior(X, T).mean(latent)
        plan = str(em.plan(X, T))
        found.append((list(result.history), result.params, looked, mean, plan))
    whole, parts = found
    assert whole[0] == pytest.approx(parts[0], rel=1e-12)
    assert whole[2] == parts[2]
    assert torch.allclose(whole[3], parts[3], atol=1e-9)
    assert whole[4] == parts[4]
    for name, value in whole[1].items():
        assert torch.allclose(value, parts[1][name], rtol=1e-8, atol=1e-10)


def test_the_evidence_is_that_of_dense_normals(sliced: Callable[[bool], None]) -> None:
    sliced(True)
    em = ExactPosteriorEM(slopes)
    found = em.score(X, T)
    _, mu, s = (p.detach() for p in _parameters())
    variance = s[1] ** 2 + s[2] ** 2 * T[:, 0] ** 2 + s[0] ** 2
    expected = torch.distributions.Normal(T @ mu[:2], variance.sqrt()).log_prob(X[:, 0]).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    found = em.fit(X, T, max_steps=1, tol=0).history[0]
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_a_row_that_is_not_linear_is_seen(sliced: Callable[[bool], None]) -> None:
    """No row of those that are read by themselves is so."""

    def model(x: Tensor, t: Tensor) -> None:
        w, mu, s = _parameters()
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0 * mu[0], 1.0))
            odd = torch.arange(len(x)) == 17
            g = torch.where(odd, h.detach() ** 2, h) if len(x) > 64 else h
            pyro.sample("x", dist.Normal(g * w[0, 0] + mu[0], s[0]), obs=x[:, 0])

    sliced(True)
    with pytest.raises(ModelError, match=r"outside autograd \(detach\)"):
        ExactPosteriorEM(model).fit(X, T, max_steps=1)


def test_what_later_verifications_see_is_of_all_rows(sliced: Callable[[bool], None]) -> None:
    """From some run on one row has another mean: its parameters go by gradient then."""
    sliced(True)
    wrong = [False]

    def model(x: Tensor, t: Tensor) -> None:
        w, mu, s = _parameters()
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0 * mu[0], 1.0))
            more = (x[:, 1] == X[117, 1]) * float(wrong[0])
            pyro.sample("x", dist.Normal((1 + more) * h * w[0, 0] + mu[0], s[0]), obs=x[:, 0])

    em = ExactPosteriorEM(model)
    read = em._ready((X, T), {})
    assert isinstance(read, Program) and read.graph.parted == "n"
    assert not disagreements_of(read)
    wrong[0] = True
    assert disagreements_of(read).places == (("x", "loc"),)


def test_rows_of_their_own_have_no_places_of_each(sliced: Callable[[bool], None]) -> None:
    """How the unknowns of a row lie is found once, and means are held once for all rows."""
    sliced(True)
    em = ExactPosteriorEM(factors)
    em.fit(X, T, max_steps=2, tol=0)
    read = em._ready((X, T), {})
    assert isinstance(read, Program)
    block = read.graph.groups[0].nested
    assert isinstance(block, GaussianBlock)
    assert "_dense" not in vars(block)
    assert block.cost == N * Q**2
    assert all(t.shape[1] == 1 for t in block.groups[1].arguments.values())
    assert block.groups[1].value.data_ptr() == X.data_ptr()
