"""Data that take few values: read once for each value, to the same numbers as for each datum."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, vectorized_markov
from pyro_em.densities import symbols
from pyro_em.densities.linear import linear
from pyro_em.densities.tying import collapsed
from pyro_em.graph.factors import Group
from pyro_em.plan.program import Program

A = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).double()
E = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.5, 0.1]]).double()


def emission(what: str, x: Tensor) -> Callable[[Tensor], dist.Distribution]:
    if what == "symbols":
        E_ = pyro.param("E", E, constraint=C.simplex)
        return lambda z: dist.Categorical(E_[z])
    if what == "counts":
        rate = pyro.param("rate", torch.tensor([1.0, 3.0]).double(), constraint=C.positive)
        return lambda z: dist.Poisson(rate[z])
    p = pyro.param("p", torch.tensor([0.2, 0.6]).double(), constraint=C.unit_interval)
    total = x.new_tensor(4)
    return lambda z: dist.Binomial(total, p[z])


def chain(x: Tensor, what: str) -> None:
    """# x: (T, B)"""
    A_, of = pyro.param("A", A, constraint=C.simplex), emission(what, x)
    z = None
    with pyro.plate("sequences", x.shape[1]):
        for t in vectorized_markov("t", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A_[0] if z is None else A_[z]))
            pyro.sample(f"x_{t}", of(z), obs=x[t])


def data(what: str, B: int) -> Tensor:
    x = torch.tensor([0, 1, 4, 1, 0, 0, 4, 3, 3, 1, 3, 3, 4, 0]).repeat(2)  # no 2
    x = torch.stack([x.roll(3 * b) for b in range(B)], 1)
    return x if what == "symbols" else x.double()


def fitted(what: str, x: Tensor) -> tuple[list[float], Mapping[str, Tensor]]:
    pyro.clear_param_store()
    r = ExactPosteriorEM(chain).fit(x, what, max_steps=3, tol=0, progress=False)
    assert r.log_evidence is not None
    return [*r.history, r.log_evidence], r.params


def observed(what: str, x: Tensor) -> Group:
    """The sites x_0, x_1, … of all steps."""
    pyro.clear_param_store()
    program = ExactPosteriorEM(chain)._ready((x, what), {})
    assert isinstance(program, Program)
    (group,) = (g for g in collapsed(program.graph).groups if g.observed)
    return group


@pytest.mark.parametrize("B", [1, 40])  # 40: sequences are the last dimension in memory
@pytest.mark.parametrize("what", ["symbols", "counts", "successes"])
def test_values_once_give_what_each_datum_gives(
    what: str, B: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = data(what, B)
    each = linear(observed(what, x))
    assert each is not None and each.codes is None
    history, params = fitted(what, x)
    monkeypatch.setattr(symbols, "_MANY", 1)
    monkeypatch.setattr(symbols, "_OFTEN", 1)
    once = linear(observed(what, x))
    assert once is not None and once.codes is not None and len(once.n) == 4  # there is no 2
    assert torch.equal(once.codes.reshape(x.shape), x.long() - (x > 2).long())
    found, again = fitted(what, x)
    assert found == pytest.approx(history, rel=1e-13)
    for name, value in params.items():
        torch.testing.assert_close(again[name], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "value", [0.5, -torch.inf, torch.nan, 1e9, 3 + 2**-30], ids=lambda v: f"{v:g}"
)
def test_other_numbers_are_read_one_by_one(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbols, "_MANY", 1)
    monkeypatch.setattr(symbols, "_OFTEN", 1)
    group = observed("counts", data("counts", 1))
    assert symbols.with_values_once(group) is not None
    group.value[5] = value
    assert symbols.with_values_once(group) is None
