"""Corners of steps on sums where numbers once went wrong: steps through tables, or by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, Fixed
from pyro_em.plan import program as programs
from pyro_em.plan.eligibility import Kernel

Model = Callable[..., None]
HOW: dict[str, Any] = {"progress": False, "max_steps": 3, "tol": 0}


def both(monkeypatch: pytest.MonkeyPatch, model: Model, **updates: Any) -> list[Any]:
    """The same fit by steps on sums and through tables."""
    out = []
    for compiled in (True, False):
        pyro.clear_param_store()
        if not compiled:
            monkeypatch.setattr(programs, "kernel_of", lambda *a: Kernel("contraction"))
        out.append(ExactPosteriorEM(model, updates=updates or None).fit(**HOW))
    return out


def test_a_sequence_without_steps_adds_nothing() -> None:
    """Its states sum to one; a table that is masked to zeros would add log K."""
    x = torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 1]])
    seen = torch.tensor([[True] * 4, [False] * 4])

    def model(B: int) -> None:
        pi = pyro.param("pi", torch.tensor([0.4, 0.6]), constraint=C.simplex)
        A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=C.simplex)
        p = pyro.param("p", torch.tensor([0.3, 0.7]), constraint=C.unit_interval)
        with pyro.plate("sequences", B, dim=-1):
            z: Any = None
            for t in pyro.markov(range(4)):
                with pyro.poutine.mask(mask=seen[:B, t]):
                    z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                    pyro.sample(f"x_{t}", dist.Bernoulli(p[z]), obs=x[:B, t])

    found = []
    for B in (1, 2):
        pyro.clear_param_store()
        found.append(ExactPosteriorEM(model).fit(B, **HOW))
    assert list(found[1].history) == pytest.approx(list(found[0].history), rel=1e-12)
    assert found[1].log_evidence == pytest.approx(found[0].log_evidence, rel=1e-12)


@pytest.mark.parametrize("missing", [math.nan, 99.0])
def test_masked_rows_may_have_no_density(monkeypatch: pytest.MonkeyPatch, missing: float) -> None:
    """What stands for a masked count may be more than the row's trials: log h is not a number."""
    n, x = torch.tensor([9.0, 3, 8, 6]), torch.tensor([7.0, missing, 2, 3])
    seen = torch.tensor([True, False, True, True])

    def model() -> None:
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=C.simplex)
        p = pyro.param("p", torch.tensor([0.3, 0.7]), constraint=C.unit_interval)
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Categorical(w))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("x", dist.Binomial(n, p[z]), obs=x)

    quick, full = both(monkeypatch, model)
    assert list(quick.history) == pytest.approx(list(full.history), rel=1e-12)


FIXED: dict[str, tuple[list[Any], Callable[[Tensor], Any]]] = {
    "Categorical": ([[1.0, 2, 5], [0, 4, 1]], lambda a: dist.Categorical(logits=a)),
    "Bernoulli": ([20.0, -1.3], lambda a: dist.Bernoulli(logits=a)),
    "Poisson": ([0.1, 1.3], lambda a: dist.Poisson(a.exp())),
}


@pytest.mark.parametrize("family", FIXED)
def test_fixed_parameters_keep_every_bit(family: str) -> None:
    """What is fixed is not written, whatever form the step computes with."""
    start, made = FIXED[family]
    x = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1])

    def model() -> None:
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=C.simplex)
        a = pyro.param("a", torch.tensor(start))
        with pyro.plate("data", 8):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", made(a[z]), obs=x if family == "Categorical" else x.double())

    result = ExactPosteriorEM(model, updates={"a": Fixed()}).fit(**HOW)
    assert torch.equal(result.params["a"], torch.tensor(start))
    assert torch.equal(pyro.param("a").detach(), torch.tensor(start))


@pytest.mark.parametrize("logit", [20.0, 30.0, 36.0, 40.0])
def test_large_logits_are_not_certain(logit: float) -> None:
    """log p(x = 0) is about −40 at a logit of 40, where 1 − p is zero in float64."""
    x, v = torch.tensor([0.0, 1, 1, 1]), torch.tensor([0.0, 0, 0, 12])

    def model() -> None:
        a = pyro.param("a", torch.tensor([logit, 0.0]))
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=C.simplex)
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Bernoulli(logits=a[z]), obs=x)
            pyro.sample("v", dist.Normal(torch.tensor([0.0, 12.0])[z], 1.0), obs=v)

    terms = torch.stack(
        [
            dist.Bernoulli(logits=torch.tensor(a)).log_prob(x)
            + dist.Normal(mu, 1.0).log_prob(v)
            + math.log(w)
            for a, mu, w in ((logit, 0.0, 0.4), (0.0, 12.0, 0.6))
        ]
    )
    result = ExactPosteriorEM(model).fit(**HOW)
    assert result.history[0] == pytest.approx(float(terms.logsumexp(0).sum()), rel=1e-12)


def test_float32_probabilities_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A complement that float32 rounds away leaves −1e30 times what is left of its mass."""
    x = torch.tensor([[1.0, 1], [1, 1], [1, 1], [1, 0], [0, 0], [0, 1], [0, 0], [0, 0]]).float()
    v = torch.tensor([6.0] * 4 + [-6.0] * 4).float()

    def model() -> None:
        w = pyro.param("w", torch.tensor([0.4, 0.6]).float(), constraint=C.simplex)
        p = pyro.param(
            "p", torch.tensor([[0.3, 0.4], [0.7, 0.6]]).float(), constraint=C.unit_interval
        )
        with pyro.plate("data", 8):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Bernoulli(p[z]).to_event(1), obs=x)
            pyro.sample("v", dist.Normal(torch.tensor([-2.0, 2.0]).float()[z], 1.0), obs=v)

    quick, full = both(monkeypatch, model)
    after = list(quick.history.after_m_step)
    assert after == pytest.approx(list(full.history.after_m_step), rel=1e-5)


def test_a_parameter_that_begins_as_a_view_of_the_data() -> None:
    """Writing to it does not change the data, and is not taken for that."""
    x = torch.cat([torch.randn(30), torch.randn(30) + 4])
    before = x.clone()

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=C.simplex)
        mu = pyro.param("mu", x[:2])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    result = ExactPosteriorEM(model).fit(x, **HOW)
    assert torch.equal(x, before)
    assert result.posterior.probs("z").shape == (60, 2)


def _two(x: Tensor, scale: Tensor | None = None) -> None:
    w = pyro.param("w", torch.ones(2) / 2, constraint=C.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    s = pyro.param("s", torch.tensor([3.0, 3.0]), constraint=C.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)


def _watched(
    monkeypatch: pytest.MonkeyPatch, callback: Callable[..., Any], **how: Any
) -> list[Any]:
    """The same watched fit by steps on sums and through tables, each on data of its own."""
    out = []
    for compiled in (True, False):
        pyro.clear_param_store()
        g = torch.Generator().manual_seed(0)
        x = torch.cat([torch.randn(300, generator=g) - 1, torch.randn(300, generator=g) + 3])
        if not compiled:
            monkeypatch.setattr(programs, "kernel_of", lambda *a: Kernel("contraction"))
        em = ExactPosteriorEM(_two, updates=how.get("given"))
        given = {k: v for k, v in how.items() if k != "given"}
        out.append(
            em.fit(x, progress=False, callbacks=lambda s, x=x: callback(s, x), **given)  # type: ignore[misc]
        )
    return out


def _same(results: list[Any]) -> None:
    quick, full = results
    assert quick.status is full.status and quick.num_steps == full.num_steps
    torch.testing.assert_close(
        torch.tensor(quick.history), torch.tensor(full.history), rtol=1e-9, atol=0
    )
    for name, value in full.params.items():
        torch.testing.assert_close(quick.params[name], value, rtol=1e-7, atol=1e-9)


def test_squarem_may_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    results = _watched(
        monkeypatch, lambda s, x: seen.append(s.index), max_steps=30, tol=0, acceleration="squarem"
    )
    _same(results)
    assert seen == list(range(30)) * 2


def test_data_that_a_watcher_changes_count() -> None:
    x = torch.randn(600, generator=torch.Generator().manual_seed(0)) * 2 + 1

    def shrink(step: Any) -> None:
        if step.index == 1:
            x.mul_(0.5)

    em = ExactPosteriorEM(_two)
    result = em.fit(x, max_steps=6, tol=0, progress=False, callbacks=shrink)
    assert result.num_steps == 6
    assert result.log_evidence == pytest.approx(-em.evaluate_loss(x), rel=1e-12)
    pyro.clear_param_store()
    before = ExactPosteriorEM(_two).fit(2 * x, max_steps=6, tol=0, progress=False)
    assert float(result.params["s"].max()) < 0.7 * float(before.params["s"].max())


def test_a_write_that_no_version_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def widen(step: Any, x: Tensor) -> None:
        pyro.get_param_store()._params["s"].data.add_(-0.01)

    _same(_watched(monkeypatch, widen, max_steps=4, tol=0, given={"s": Fixed()}))


def test_a_write_after_a_step_that_was_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty component hands each step over; what a callback writes then is still seen."""

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.5, 0.5, 0.0]), constraint=C.simplex)
        p = pyro.param("p", torch.tensor([0.3, 0.6, 0.5]), constraint=C.unit_interval)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("a", dist.Bernoulli(p[z]), obs=x)
            pyro.sample("b", dist.Bernoulli(p[z]), obs=1 - x)

    def lift(step: Any) -> None:
        if step.index == 0:
            with torch.no_grad():
                pyro.get_param_store()._params["p"].add_(1.0)

    out = []
    for compiled in (True, False):
        pyro.clear_param_store()
        if not compiled:
            monkeypatch.setattr(programs, "kernel_of", lambda *a: Kernel("contraction"))
        x = (torch.arange(10.0) % 3 == 0).to(torch.float64)
        out.append(ExactPosteriorEM(model).fit(x, **HOW, callbacks=lift))
    _same(out)
