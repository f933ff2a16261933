"""The budget is of what is held at once: data whose table is above it are gone through in chunks."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM
from pyro_em.errors import ModelError

_X = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2.0
_SHIFT = 0.1 * torch.arange(40.0, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_em.fitting.parts.within_budget._FEWEST", 1)


def mixture(x: Tensor, shift: Tensor, known: float) -> None:
    w = pyro.param("w", torch.tensor([0.2, 0.3, 0.5]), constraint=constraints.simplex)
    m = pyro.param("m", torch.tensor([-1.0, 0.0, 2.0]))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(m[z], known), obs=x - shift)


def _em(max_enumeration: int = 2**27) -> ExactPosteriorEM:
    pyro.clear_param_store()
    return ExactPosteriorEM(mixture, max_enumeration=max_enumeration)


def test_a_fit_above_the_budget_takes_the_steps_of_one_below() -> None:
    data = (_X, _SHIFT, 1.5)
    whole = _em().fit(*data, max_steps=4, tol=0.0, progress=False)
    parts = _em(50).fit(*data, max_steps=4, tol=0.0, progress=False)
    torch.testing.assert_close(
        torch.tensor(parts.history.entering),
        torch.tensor(whole.history.entering),
        rtol=1e-12,
        atol=0,
    )
    torch.testing.assert_close(parts.params["m"], whole.params["m"], rtol=1e-12, atol=1e-14)
    assert parts.num_rows == 40 and any("in chunks" in n for n in parts.plan.notes)


def test_the_score_and_the_loss_add_up() -> None:
    data = (_X, _SHIFT, 1.5)
    assert _em(50).score(*data) == pytest.approx(_em().score(*data), rel=1e-13)
    assert _em(50).evaluate_loss(*data) == pytest.approx(_em().evaluate_loss(*data), rel=1e-13)


def test_the_plan_is_that_of_the_first_chunk_and_says_so() -> None:
    plan = str(_em(50).plan(_X, _SHIFT, 1.5))
    assert "a table of all 40 rows would be above max_enumeration" in plan
    assert "chunks of 16 rows" in plan and "none" not in plan.split("Parameters")[0]


def test_a_posterior_of_all_rows_is_that_table_and_is_refused() -> None:
    with pytest.raises(ModelError, match="a table of 120 cells; the budget is max_enumeration=50"):
        _em(50).posterior(_X, _SHIFT, 1.5)


def test_what_no_chunk_helps_is_refused_as_before() -> None:
    def one_for_all(x: Tensor) -> None:
        m = pyro.param("m", torch.tensor([-1.0, 0.0, 2.0]))
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(m[z], 1.0), obs=x)

    pyro.clear_param_store()
    em = ExactPosteriorEM(one_for_all, max_enumeration=50)
    with pytest.raises(ModelError, match="a table of 120 cells; the budget is max_enumeration=50"):
        em.fit(_X, progress=False)
    with pytest.raises(ModelError, match="the budget is max_enumeration=2"):
        _em(2).fit(_X, _SHIFT, 1.5, progress=False)


def test_chunks_of_few_rows_are_no_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_em.fitting.parts.within_budget._FEWEST", 1000)
    with pytest.raises(ModelError, match="the budget is max_enumeration=50"):
        _em(50).fit(_X, _SHIFT, 1.5, progress=False)
