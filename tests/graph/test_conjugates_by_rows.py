"""What rows read of conjugate latents, read some rows at a time, is what a look at all rows shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_em.graph.conjugate_children.conjugates_by_rows as by_rows
from pyro_em import ExactPosteriorEM
from pyro_em.plan.program import Program

N = 50
X = torch.poisson(3 * torch.rand(N, 3, generator=(g := torch.Generator().manual_seed(4))), g)
GROUP = torch.arange(N) * 7 % 11
UNITS = 1.0 + torch.arange(N) / N
A, B = torch.tensor(1.5), torch.tensor(0.7)

Model = Callable[..., None]


def own(x: Tensor, units: Tensor, b: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(A, b))
        pyro.sample("x", dist.Poisson(rate * units), obs=x[:, 0])


def inner(x: Tensor, units: Tensor, b: Tensor) -> None:
    """Columns are outside of rows, and a latent belongs to both."""
    with pyro.plate("rows", len(x), dim=-1), pyro.plate("columns", 3, dim=-2):
        p = pyro.sample("p", dist.Beta(A, b).mask(True))
        pyro.sample("x", dist.NegativeBinomial(2.0, p), obs=x.T)


def turned(x: Tensor, units: Tensor, b: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        p = pyro.sample("p", dist.Beta(A, b))
        q = torch.where(x[:, 2] > 1, p, 1 - p)
        pyro.sample("x", dist.Bernoulli(q), obs=(x[:, 0] > 1).float())


def of_groups(x: Tensor, group: Tensor, b: Tensor) -> None:
    with pyro.plate("groups", 11):
        theta = pyro.sample("theta", dist.Dirichlet(b * torch.ones(3)))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Categorical(theta[group]), obs=x[:, 1].long().clamp(max=2))


def rolled(x: Tensor, units: Tensor, b: Tensor) -> None:
    """A row reads the latent of the one before."""
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(A, b))
        pyro.sample("x", dist.Poisson(rate.roll(1)), obs=x[:, 0])


@pytest.mark.parametrize(
    ("model", "data", "parted"),
    [
        (own, (X, UNITS, B), True),
        (inner, (X, UNITS, B), True),
        (turned, (X, UNITS, B), True),
        (of_groups, (X, GROUP, B), True),
        (rolled, (X, UNITS, B), False),
    ],
)
def test_rows_read_what_a_look_at_all_of_them_shows(
    model: Model, data: tuple[Any, ...], parted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_rows, "_SLICE", 20)
    monkeypatch.setattr(by_rows, "_FEW", 7)
    monkeypatch.setattr(by_rows, "_LATER", 9)
    found = []
    for many in (2**60, 1):
        monkeypatch.setattr(by_rows, "_MANY", many)
        em = ExactPosteriorEM(model)
        program = em._session.planner.look(data, {})
        assert isinstance(program, Program) and program.conjugates is not None
        assert program.conjugates.by_rows is (parted and many == 1)
        found.append((program.conjugates.reads["x"], em.score(*data)))
        run = data, {}, program.structure, None
        assert not program.conjugates.differing(*run)
    (one, evidence), (two, other) = found
    assert torch.equal(one.elements, two.elements)
    assert (one.latent, one.pair, one.power) == (two.latent, two.pair, two.power)
    assert (one.order is None) == (two.order is None) == (model is not turned)
    if one.order is not None and two.order is not None:
        assert torch.equal(one.order, two.order)
    assert other == pytest.approx(evidence, rel=1e-12)


def test_rows_that_read_otherwise_at_other_parameters_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(by_rows, "_MANY", 1)
    monkeypatch.setattr(by_rows, "_LATER", 9)
    b = pyro.param("b", torch.tensor(0.7))

    def bent(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            rate = pyro.sample("rate", dist.Gamma(A, pyro.param("b")))
            rate = rate if float(pyro.param("b").detach()) > 0 else rate.detach() * rate
            pyro.sample("x", dist.Poisson(rate), obs=x)

    program = ExactPosteriorEM(bent)._ready((X[:, 0],), {})
    assert isinstance(program, Program) and program.conjugates is not None
    assert program.conjugates.by_rows
    run = (X[:, 0],), {}, program.structure
    assert not program.conjugates.differing(*run, {"b": b.detach()})
    assert program.conjugates.differing(*run, {"b": -b.detach()}) == [("x", "rate")]
