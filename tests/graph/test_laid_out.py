"""A run that is shown to do what was done is laid out as the earlier one was, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM
from pyro_em.graph.laid_out import LaidOut


def items(x: Tensor) -> None:
    """Vectors of independent Normals and a binary item, one latent per row."""
    w = pyro.param("w", torch.full((3,), 1 / 3), constraint=constraints.simplex)
    m = pyro.param("m", torch.arange(6.0).reshape(3, 2))
    p = pyro.param("p", torch.tensor([0.2, 0.5, 0.7]), constraint=constraints.unit_interval)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(m[z], 1.0).to_event(1), obs=x)
        pyro.sample("b", dist.Bernoulli(p[z]), obs=(x[:, 0] > 0).to(x.dtype))


def several(x: Tensor) -> None:
    """A latent for all, one per group and one per row; counts in single precision."""
    r = pyro.param("r", torch.rand(2, 2, 3) * 5, constraint=constraints.positive)
    c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
    with pyro.plate("g", 2, dim=-2):
        y = pyro.sample("y", dist.Bernoulli(0.3))
        with pyro.plate("n", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            rate = Vindex(r)[c, y.long(), z]
            pyro.sample("x", dist.Poisson(rate), obs=x.T.abs().round().float())


@pytest.fixture(autouse=True)
def _clear() -> Iterator[None]:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that are laid out as earlier ones were."""
    found: list[Any] = []
    made = LaidOut.graph

    def graph(self: LaidOut, *args: Any) -> Any:
        found.append(made(self, *args))
        return found[-1]

    monkeypatch.setattr(LaidOut, "graph", graph)
    return found


@pytest.mark.parametrize("model", [items, several])
def test_other_data_say_what_a_first_look_at_them_says(
    model: Callable[[Tensor], None], laid_out: list[Any]
) -> None:
    rows = torch.randn(4, 12, 2, generator=torch.Generator().manual_seed(0))
    em = ExactPosteriorEM(model)
    for x in rows:
        seen = em.score(x), em.posterior(x).probs("z")
        fresh = ExactPosteriorEM(lambda x: model(x))
        assert (fresh.score(x), True) == (
            seen[0],
            torch.equal(fresh.posterior(x).probs("z"), seen[1]),
        )
    assert len(laid_out) > 4


def test_the_evidence_takes_no_groups_and_is_that_of_the_posterior(laid_out: list[Any]) -> None:
    rows = torch.randn(5, 12, 2, generator=torch.Generator().manual_seed(2))  # of one memory
    em = ExactPosteriorEM(items)
    found = [em.score(x) for x in rows]
    later = [g.groups for g in laid_out[1:]]  # the first is held against one that was made
    assert len(later) > 2
    assert not any("value" in vars(groups._later) for groups in later)
    assert found == [pytest.approx(em.posterior(x).log_evidence, rel=1e-6) for x in rows]


now: ContextVar[str] = ContextVar("now", default="")  # which no name of a model stands for


def test_what_changes_the_layout_is_noticed(laid_out: list[Any]) -> None:
    def model(x: Tensor) -> None:
        change = now.get()
        m = pyro.param("m", torch.tensor([-1.0, 1.0]))
        with pyro.plate("n", len(x)), poutine.scale(scale=2.0 if change == "scale" else 1.0):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            fn = dist.Normal(m[z], 1.0)
            if change == "mask":
                fn = fn.mask(x > 0)
            if change == "wide":
                fn = dist.Normal(m[z].unsqueeze(-1).expand(*z.shape, 2), 1.0).to_event(1)
                x = torch.stack([x, x], -1)
            pyro.sample("x", fn, obs=x)

    x = torch.randn(12, generator=torch.Generator().manual_seed(1))
    log_p = dist.Normal(torch.tensor([[-1.0], [1.0]]), 1.0).log_prob(x)
    prior = torch.tensor([[0.4], [0.6]]).log()
    em = ExactPosteriorEM(model)
    for change, right in (
        ("scale", 2 * (prior + log_p).logsumexp(0).sum()),
        ("mask", (prior + log_p * (x > 0)).logsumexp(0).sum()),
        ("wide", (prior + 2 * log_p).logsumexp(0).sum()),
    ):
        now.set("")
        laid_out.clear()
        for _ in range(3):
            em.score(x.clone())
        assert laid_out
        now.set(change)
        assert em.score(x) == pytest.approx(float(right), rel=1e-5)
