"""Parameters that a number of each row multiplies: held as a product, and the fit of all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.expanded import once_each
from pyro_em.graph.many_rows import slices
from pyro_em.plan.kept import forget_readings
from pyro_em.plan.program import Program
from pyro_em.posteriors.continuous import table_rows

N, K = 301, 3
GENERATOR = torch.Generator().manual_seed(3)
E = 0.5 + torch.rand(N, 2, generator=GENERATOR, dtype=torch.float64)
Y = torch.poisson(9 * torch.rand(N, generator=GENERATOR, dtype=torch.float64), GENERATOR)
G = torch.arange(N) * 4 // N  # the same in all rows of each slice

Model = Callable[[Tensor, Tensor, Tensor], None]


def _rates(*shape: int) -> Tensor:
    start = 1.0 + torch.arange(K, dtype=torch.float64).expand(*shape, K) * 3
    return pyro.param("r", start.clone(), constraint=C.positive)


def _component() -> Tensor:
    p = pyro.param("p", torch.full((K,), 1 / K).double(), constraint=C.simplex)
    return pyro.sample("z", dist.Categorical(p))


def exposures(y: Tensor, e: Tensor, g: Tensor) -> None:
    r = _rates()
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Poisson(r[_component()] * e[:, 1]), obs=y)


def divided(y: Tensor, e: Tensor, g: Tensor) -> None:
    """What multiplies the rates is none of the model's arguments."""
    r = _rates()
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Poisson(r[_component()] / e[:, 1]), obs=y)


def spreads(y: Tensor, e: Tensor, g: Tensor) -> None:
    r = _rates()
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(4.0, r[_component()] * e[:, 1]), obs=y)


def of_groups(y: Tensor, e: Tensor, g: Tensor) -> None:
    """Rows read rates of their own."""
    r = _rates(4)
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Poisson(r[g, _component()] * e[:, 1]), obs=y)


def fitted(model: Model, e: Tensor = E, steps: int = 4) -> tuple[ExactPosteriorEM, Any]:
    pyro.clear_param_store()
    forget_readings()
    em = ExactPosteriorEM(model)
    return em, em.fit(Y, e, G, max_steps=steps, tol=0, progress=False)


@pytest.fixture
def by_rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def begin() -> None:
        monkeypatch.setattr(slices, "_MANY", 1)
        monkeypatch.setattr(slices, "_CELLS", 300)
        monkeypatch.setattr(table_rows, "_MANY", 0)
        monkeypatch.setattr(table_rows, "_CELLS", 7 * K)

    return begin


@pytest.mark.parametrize(
    ("model", "argument", "in_parts"),
    [
        (exposures, "rate", True),
        (divided, "rate", True),
        (spreads, "scale", True),
        (of_groups, "rate", False),
    ],
)
def test_a_product_is_held_by_its_factors(
    model: Model, argument: str, in_parts: bool, by_rows: Callable[[], None]
) -> None:
    _, whole = fitted(model)
    by_rows()
    em, parted = fitted(model)
    assert list(parted.history) == pytest.approx(list(whole.history), rel=1e-12)
    for name, value in whole.params.items():
        torch.testing.assert_close(parted.params[name], value, rtol=1e-9, atol=1e-12)
    read = em._ready((Y, E, G), {})
    assert isinstance(read, Program) and read.graph.parted == "n"
    (group,) = (g for g in read.graph.groups if g.observed)
    (selection,) = group.bindings[argument].selections
    assert selection.factor is not None
    assert once_each(selection.factor).numel() == N
    assert once_each(selection.index).numel() == (K if in_parts else N * K)
    assert ("in chunks of rows" in str(parted.plan)) == in_parts
    if model is exposures:
        assert selection.factor.data_ptr() == E[:, 1].data_ptr()


def test_rates_are_counts_by_exposures(by_rows: Callable[[], None]) -> None:
    """r_k = sum_n q_nk y_n / sum_n q_nk e_n, with the posterior of another library's densities."""
    by_rows()
    _, result = fitted(exposures, steps=1)
    start = torch.tensor([1.0, 4.0, 7.0]).numpy()
    density = stats.poisson.pmf(Y.numpy()[:, None], start * E[:, 1:].numpy()) / K
    assert result.history[0] == pytest.approx(float(torch.tensor(density).sum(1).log().sum()))
    q = density / density.sum(1, keepdims=True)
    rates = (q * Y.numpy()[:, None]).sum(0) / (q * E[:, 1:].numpy()).sum(0)
    assert result.params["r"].detach().numpy() == pytest.approx(rates, rel=1e-12)


def test_exposures_that_change_are_read_anew(by_rows: Callable[[], None]) -> None:
    by_rows()
    e = E.clone()
    em, _ = fitted(exposures, e)
    e[7:90] *= 2
    pyro.clear_param_store()
    changed = em.fit(Y, e, G, max_steps=1, tol=0, progress=False).history[0]
    assert changed == fitted(exposures, e.clone(), 1)[1].history[0]


def vectors(y: Tensor, e: Tensor, g: Tensor) -> None:
    """Vectors whose entries share a conjugate scale of their row."""
    start = torch.arange(1.0, K + 1, dtype=torch.float64)
    mu = pyro.param("mu", torch.stack([0.3 * start, 1.5 - 0.4 * start], -1))
    s = pyro.param("s", torch.full((K, 2), 0.3).double(), constraint=C.positive)
    nu = pyro.param("nu", 2 + start, constraint=C.positive)
    with pyro.plate("n", len(y)):
        z = _component()
        w = pyro.sample("w", dist.Gamma(nu[z] / 2, nu[z] / 2))
        pyro.sample("x", dist.Normal(mu[z], s[z] / w.sqrt().unsqueeze(-1)).to_event(1), obs=e)


def test_vectors_under_a_scale_of_their_row_go_in_parts(by_rows: Callable[[], None]) -> None:
    _, whole = fitted(vectors, steps=3)
    by_rows()
    em, parted = fitted(vectors, steps=3)
    assert "in chunks of rows" in str(em.plan(Y, E, G))
    assert list(parted.history) == pytest.approx(list(whole.history), rel=1e-12)
    for name, value in whole.params.items():
        torch.testing.assert_close(parted.params[name], value, rtol=1e-9, atol=1e-12)


def scaled_by_entry(y: Tensor, e: Tensor, g: Tensor) -> None:
    """The factors of a row's entries differ, though not in the first rows."""
    r = _rates(2).T
    with pyro.plate("n", len(y)):
        pyro.sample("x", dist.Normal(1.0, r[_component()] * e).to_event(1), obs=e)


def test_factors_that_differ_between_entries_of_later_rows(by_rows: Callable[[], None]) -> None:
    e = E.clone()
    e[:50, 1] = e[:50, 0]
    _, whole = fitted(scaled_by_entry, e)
    by_rows()
    _, parted = fitted(scaled_by_entry, e)
    assert list(parted.history) == pytest.approx(list(whole.history), rel=1e-12)
