"""Models that are read some rows at a time: the graph and the fit of all rows at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.expanded import once_each
from pyro_em.fitting.results import possible
from pyro_em.graph import trace
from pyro_em.graph.factors import Group
from pyro_em.graph.later_arguments import LaterArguments
from pyro_em.graph.many_rows import given_rows, slices
from pyro_em.plan import agreement
from pyro_em.plan.kept import forget_readings
from pyro_em.plan.program import Program

N, K, D = 301, 3, 4
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, D, generator=GENERATOR, dtype=torch.float64)
Y = (torch.rand(N, generator=GENERATOR) < 0.4).double()
W = torch.randn(K, D, generator=GENERATOR, dtype=torch.float64)

Model = Callable[[Tensor, Tensor], None]


def experts(x: Tensor, y: Tensor) -> None:
    """A gate and the experts that it chooses from read covariates; weights differ by row."""
    w, v = pyro.param("w", W.clone()), pyro.param("v", 0.5 * W.flip(0))
    known = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    with pyro.plate("n", len(x)), pyro.poutine.scale(scale=1.0 + y):
        z = pyro.sample("z", dist.Categorical(logits=x @ v.T))
        logits = (x * w[z]).sum(-1) + known.mean()
        pyro.sample("y", dist.Bernoulli(logits=logits).mask(x[:, 0] < 1.5), obs=y)


def centred(x: Tensor, y: Tensor) -> None:
    """What is said of a row depends on those beside it."""
    experts(x - x.mean(0), y)


def lines(x: Tensor, y: Tensor) -> None:
    w, a = pyro.param("w", W.clone()), pyro.param("a", W[:, 0].clone())
    s = pyro.param("s", W[:, 1].exp(), constraint=C.positive)
    p = pyro.param("p", torch.full((K,), 1 / K, dtype=torch.float64), constraint=C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("y", dist.Normal(a[z] + (x * w[z]).sum(-1), s[z]), obs=y)


def plain(x: Tensor, y: Tensor) -> None:
    """No argument differs from row to row."""
    p = pyro.param("p", W[:, 0].sigmoid(), constraint=C.unit_interval)
    q = pyro.param("q", torch.full((K,), 1 / K, dtype=torch.float64), constraint=C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(q))
        pyro.sample("y", dist.Bernoulli(p[z]), obs=y)


def scaled(x: Tensor, y: Tensor) -> None:
    """A latent at its unit makes a number of each row, the same in all of them."""
    mu, s = pyro.param("mu", W[:, 0].clone()), pyro.param("s", W[:, 1].exp(), constraint=C.positive)
    nu = pyro.param("nu", 3 + W[:, 2].exp(), constraint=C.greater_than(1.0))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.full((K,), 1 / K, dtype=torch.float64)))
        w = pyro.sample("w", dist.Gamma(nu[z] / 2, nu[z] / 2))
        pyro.sample("x", dist.Normal(mu[z], s[z] * w.rsqrt()), obs=x[:, 0])


def exposed(x: Tensor, y: Tensor) -> None:
    """Rows that differ by what the model computes of their data."""
    a = pyro.param("a", W[:, 1].exp(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.full((K,), 1 / K, dtype=torch.float64)))
        rate = pyro.sample("rate", dist.Gamma(a[z], 1.0))
        pyro.sample("y", dist.Poisson(rate * (0.5 + x[:, 1].abs())), obs=y)


def weibulls(x: Tensor, y: Tensor) -> None:
    """A distribution that computes numbers for each row and component when a plate expands it."""
    a = pyro.param("a", W[:, 1].exp(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.full((K,), 1 / K, dtype=torch.float64)))
        pyro.sample("x", dist.Weibull(a[z], 2.0), obs=x[:, 0].abs())


def classes(x: Tensor, y: Tensor) -> None:
    """Covariates say of which class a row is, and nothing else differs from row to row."""
    v = pyro.param("v", 0.5 * W.flip(0))
    q = pyro.param("q", W[:, 0].sigmoid(), constraint=C.unit_interval)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=x @ v.T))
        pyro.sample("y", dist.Bernoulli(q[z]), obs=y)


def chosen(x: Tensor, y: Tensor) -> None:
    """A known group of each row, one of which is rare, chooses weights and means."""
    weights = W[:, :K].abs()
    p = pyro.param("p", weights / weights.sum(1, keepdim=True), constraint=C.simplex)
    mu = pyro.param("mu", W[:, :K].clone())
    g = y.long() + 2 * ((x[:, 1] > 2) & (y == 0)).long()
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p[g]))
        pyro.sample("x", dist.Normal(mu[g, z], 1.0), obs=x[:, 0])


def waits(x: Tensor, y: Tensor) -> None:
    """Covariates that are negated, under a dispersion that stands in the same argument."""
    w, a = pyro.param("w", 0.3 * W), pyro.param("a", W[:, 0].exp(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.full((K,), 1 / K, dtype=torch.float64)))
        mean = (x * w[z]).sum(-1).exp()
        pyro.sample("y", dist.Gamma(a[z], a[z] / mean), obs=y)


def scaled_by_all(x: Tensor, y: Tensor) -> None:
    scaled(x / x.std(0), y)


@pytest.mark.parametrize(
    ("model", "parted"),
    [
        (experts, "n"),
        (lines, "n"),
        (centred, ""),
        (plain, ""),
        (scaled, "n"),
        (exposed, "n"),
        (scaled_by_all, ""),
        (weibulls, "n"),
        (classes, "n"),
        (chosen, "n"),
    ],
)
def test_a_fit_is_that_of_all_rows(
    model: Model, parted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for many, expected in ((2**60, ""), (1, parted)):
        monkeypatch.setattr(slices, "_MANY", many)
        monkeypatch.setattr(slices, "_CELLS", 300)
        pyro.clear_param_store()
        em = ExactPosteriorEM(model)
        plan = em.plan(X, Y)
        result = em.fit(X, Y, max_steps=3, tol=0)
        read = em._ready((X, Y), {})
        assert isinstance(read, Program)
        assert read.graph.parted == expected
        posterior = em.posterior(X, Y).probs("z")
        found.append((plan, list(result.history), result.params, posterior, str(plan.kernel)))
    whole, sliced = found
    assert whole[1] == pytest.approx(sliced[1], rel=1e-12)
    assert whole[4] == sliced[4]
    assert torch.allclose(whole[3], sliced[3], atol=1e-9)
    for name, value in whole[2].items():
        assert torch.allclose(value, sliced[2][name], rtol=1e-7, atol=1e-9)


def test_rows_that_differ_from_the_arguments_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows by themselves show the columns of the arguments; another shows that they err."""
    x = X.clamp(-2.5, 2.5)
    x[17, 2] = 3.0
    evidence = []
    monkeypatch.setattr(agreement, "_FEW", 64)  # which a fresh trace is held against
    for many in (2**60, 1):
        monkeypatch.setattr(slices, "_MANY", many)
        monkeypatch.setattr(slices, "_CELLS", 300)
        pyro.clear_param_store()

        def bent(x: Tensor, y: Tensor) -> None:
            lines(x.clamp(max=2.5), y)

        evidence.append(ExactPosteriorEM(bent).fit(x, Y, max_steps=2, tol=0).log_evidence)
    assert evidence[0] == pytest.approx(evidence[1], rel=1e-12)


def test_what_an_argument_is_made_of_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Covariates lie where the user's do; no number is held for each row and component."""
    monkeypatch.setattr(slices, "_MANY", 1)
    monkeypatch.setattr(slices, "_CELLS", 300)
    pyro.clear_param_store()
    runs = []

    def counted(x: Tensor, y: Tensor) -> None:
        runs.append(len(x))
        lines(x, y)

    read = ExactPosteriorEM(counted)._ready((X, Y), {})
    assert isinstance(read, Program)
    (group,) = (g for g in read.graph.groups if g.observed)
    own = group.bindings["loc"].jacobians
    assert own is not None and own["w"].value.data_ptr() == X.data_ptr()
    assert isinstance(group.arguments, LaterArguments)
    with torch.no_grad():
        told = pyro.param("a") + X @ pyro.param("w").T
    assert torch.allclose(group.arguments["loc"].squeeze(0), told, rtol=1e-13)
    assert sum(runs) < 4 * N + 500  # two plain runs, one in slices, and those of a few rows


def test_negated_columns_are_held_once_for_all_components(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for many in (2**60, 1):
        monkeypatch.setattr(slices, "_MANY", many)
        pyro.clear_param_store()
        em = ExactPosteriorEM(waits)
        found.append(list(em.fit(X, Y + 0.5, max_steps=3, tol=0).history))
    assert found[1] == pytest.approx(found[0], rel=1e-12)
    read = em._ready((X, Y + 0.5), {})
    assert isinstance(read, Program)
    (group,) = (g for g in read.graph.groups if g.members == ("y",))
    jacobians = group.bindings["rate"].jacobians
    assert jacobians is not None
    held = once_each(jacobians["w"].value)
    assert held.numel() == X.numel()
    assert torch.equal(held.reshape(X.shape), -X)


@pytest.mark.parametrize("bent", [False, True])
def test_groups_among_the_arguments_are_found(bent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows show that a group chooses elements; one row, that it is not always this one."""
    g = torch.randint(3, (N,), generator=torch.Generator().manual_seed(2))
    g[17] = 3
    monkeypatch.setattr(slices, "_CELLS", 300)

    def model(x: Tensor, g: Tensor) -> None:
        weights = W.repeat(2, 1)[:4, :K].abs()
        p = pyro.param("p", weights / weights.sum(1, keepdim=True), constraint=C.simplex)
        mu = pyro.param("mu", W[:, 0].clone())
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(p[g.clamp(max=2) if bent else g]))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x[:, 0])

    found = []
    for many in (2**60, 1):
        monkeypatch.setattr(slices, "_MANY", many)
        pyro.clear_param_store()
        em = ExactPosteriorEM(model)
        result = em.fit(X, g, max_steps=3, tol=0)
        found.append((list(result.history), result.params["p"]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-9)
    read = em._ready((X, g), {})
    assert isinstance(read, Program) and read.graph.parted == "n"
    (own,) = (group for group in read.graph.groups if group.observed)
    assert (own.value.data_ptr() == X.data_ptr()) == (not bent)


def test_what_a_group_of_rows_chooses_is_held_by_row_and_by_cell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slices, "_MANY", 1)
    monkeypatch.setattr(slices, "_CELLS", 300)
    pyro.clear_param_store()
    read = ExactPosteriorEM(chosen)._ready((X, Y), {})
    assert isinstance(read, Program)
    for group in read.graph.groups:
        for binding in group.bindings.values():
            for chosen_by in binding.selections:
                held = [once_each(t).numel() for t in chosen_by.parts]
                assert sorted(held) == [K, N]
                with torch.no_grad():
                    there = pyro.param(chosen_by.param).reshape(-1)[chosen_by.index]
                assert torch.equal(chosen_by.forward(pyro.param(chosen_by.param)), there)
                assert torch.equal(
                    chosen_by.mapped(lambda t: t[:, 5:9]).index, chosen_by.index[:, 5:9]
                )
                whole = replace(chosen_by, factor=None)
                assert torch.equal(whole.index, chosen_by.index)
                assert torch.equal(chosen_by.alone.index[0], chosen_by.index)


def test_no_table_of_all_rows_shows_that_each_class_is_possible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Parameters are counted from some rows at a time; a class that is excluded takes its own along."""
    monkeypatch.setattr(slices, "_MANY", 1)
    monkeypatch.setattr(possible, "_CELLS", 100)
    looked: list[int] = []

    def counted(group: Group, rows: slice) -> Group:
        looked.append(rows.stop - rows.start)
        return given_rows.slice_of(group, rows)

    monkeypatch.setattr(possible, "slice_of", counted)
    pyro.clear_param_store()
    result = ExactPosteriorEM(classes).fit(X, Y, max_steps=1, tol=0)
    assert sum(looked) == N and max(looked) <= 100 // K + 1
    assert result.num_free_parameters == K * D + K

    def excluded(x: Tensor, y: Tensor) -> None:
        p = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64)
        p = pyro.param("p", p, constraint=C.simplex)
        m = pyro.param("m", W[:, 2].clone())
        with pyro.plate("n", len(x)):
            u = pyro.sample("u", dist.Categorical(p))
            pyro.sample("x", dist.Normal(m[u], 1.0), obs=x[:, 0])
            v = pyro.param("v", 0.5 * W.flip(0))
            q = pyro.param("q", W[:, 0].sigmoid(), constraint=C.unit_interval)
            z = pyro.sample("z", dist.Categorical(logits=x @ v.T))
            pyro.sample("y", dist.Bernoulli(q[z]), obs=y)

    pyro.clear_param_store()
    with pytest.warns(UserWarning, match="component 0 of parameter 'm'"):
        result = ExactPosteriorEM(excluded).fit(X, Y, max_steps=1, tol=0)
    assert result.num_free_parameters == (K * D + K) + (K - 1) + 1  # of m, and of p


def test_the_budget_is_of_the_cells_that_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One operation on all rows would make N x K x D numbers, more than the budget of N x K."""
    big = torch.randn(2**17, 9, generator=GENERATOR)
    y = (torch.rand(len(big), generator=GENERATOR) < 0.4).float()

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.param("w", torch.randn(2, 9, generator=torch.Generator().manual_seed(0)))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("y", dist.Bernoulli(logits=(x * w[z]).sum(-1)), obs=y)

    monkeypatch.setattr(slices, "_MANY", 2**18)
    monkeypatch.setattr(slices, "_CELLS", 2**15)
    pyro.clear_param_store()
    em = ExactPosteriorEM(model, max_enumeration=2**18)
    result = em.fit(big, y, max_steps=1, tol=0)
    assert result.plan.kernel == "mixture"


def test_data_that_change_are_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "_MANY", 1)
    monkeypatch.setattr(slices, "_CELLS", 300)
    pyro.clear_param_store()
    em, x = ExactPosteriorEM(lines), X.clone()
    em.fit(x, Y, max_steps=1, tol=0)
    x[5:9] += 1.0
    pyro.clear_param_store()
    changed = em.fit(x, Y, max_steps=1, tol=0).history[0]
    pyro.clear_param_store()
    assert changed == ExactPosteriorEM(lines).fit(x, Y, max_steps=1, tol=0).history[0]


def test_a_later_call_compares_all_rows_in_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read serves again where no row differs; one that nothing else shows is seen."""
    monkeypatch.setattr(slices, "_MANY", 1)
    monkeypatch.setattr(slices, "_CELLS", 300)
    monkeypatch.setattr(slices, "_NOTED", 16)
    pyro.clear_param_store()
    runs, most = list[int](), tmp_path / "most"
    most.write_text("9.0")
    noted_run = trace.noted_run

    def noted(model: Model, args: tuple, *others: Any, **how: Any) -> Any:
        runs.append(len(args[0]))
        return noted_run(model, args, *others, **how)

    monkeypatch.setattr(trace, "noted_run", noted)

    def model(x: Tensor, y: Tensor) -> None:
        w, v = pyro.param("w", W.clone()), pyro.param("v", 0.5 * W.flip(0))
        below = torch.as_tensor(x.numpy().clip(max=float(most.read_text())))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=x @ v.T))
            pyro.sample("y", dist.Bernoulli(logits=(below * w[z]).sum(-1)), obs=y)

    em = ExactPosteriorEM(model)
    em.fit(X, Y, max_steps=2, tol=0)
    before = em.score(X, Y)
    runs.clear()
    assert em.score(X, Y) == before
    assert sum(runs) == N + 16 and max(runs) < 100  # once in slices, and the rows that are noted
    most.write_text(repr(float(X[:16].max())))  # the first rows are as before
    after = em.score(X, Y)
    assert after != before
    forget_readings()
    assert after == pytest.approx(ExactPosteriorEM(model).score(X, Y), rel=1e-12)
