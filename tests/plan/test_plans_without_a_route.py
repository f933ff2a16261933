"""A latent without a route: the plan says so and answers questions, and everything else raises."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import networkx
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_em import DataError, ExactPosteriorEM, Fixed, ModelError, PyroEMError, UsageError

X = torch.tensor([0.5, -1.0, 2.0, 0.1])
FLIPS = torch.tensor([[0.9, 0.1], [0.2, 0.8]])


def continuous(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor(0.3))
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(h.tanh(), 1.0), obs=x)


def mixed(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        y = pyro.sample("y", dist.Bernoulli(0.3))
        h = pyro.sample("h", dist.Normal(y, 1.0))
        pyro.sample("x", dist.Normal(h.tanh(), 1.0), obs=x)


def counts(x: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor(2.0))
    with pyro.plate("n", len(x)):
        n = pyro.sample("n_events", dist.Poisson(rate))
        pyro.sample("x", dist.Normal(n, 1.0), obs=x)


def vector(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(3)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def binomials(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Binomial(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def wide(x: Tensor) -> None:
    zs = [pyro.sample(f"z_{i}", dist.Bernoulli(0.4)) for i in range(60)]
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(sum(zs), 1.0), obs=x)


def deep(x: Tensor) -> None:
    z = torch.tensor(0)
    for t in range(70):
        z = pyro.sample(f"z_{t}", dist.Categorical(FLIPS[z]))
        pyro.sample(f"x_{t}", dist.Normal(z.to(x.dtype), 1.0), obs=x[0])


def outside(x: Tensor) -> None:
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x[0])


def crossed(x: Tensor) -> None:
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 4, dim=-1)
    with rows:
        u = pyro.sample("u", dist.Bernoulli(0.3))
    with columns:
        v = pyro.sample("v", dist.Bernoulli(0.3))
    with rows, columns:
        pyro.sample("x", dist.Normal(u + v, 1.0), obs=x.expand(2, 4))


def branching(x: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(1.0 if z else 2.0, 1.0), obs=x)


def out_of_scope(x: Tensor) -> None:
    zs: list[Tensor] = []
    for t in pyro.markov(range(4)):
        zs.append(pyro.sample(f"z_{t}", dist.Categorical(FLIPS[zs[-1] if zs else 0])))
        pyro.sample(f"x_{t}", dist.Normal(zs[max(t - 2, 0)].to(x.dtype), 1.0), obs=x[t])


def half_a_guide(x: Tensor) -> None:
    pyro.param("unused", torch.tensor(1.0))


CASES: dict[str, tuple[Callable[..., None], Any, set[str], str]] = {
    "continuous": (continuous, None, {"h"}, "no exact posterior here"),
    "beside a sum": (mixed, None, {"h"}, "no exact posterior here"),
    "infinite support": (counts, None, {"n_events"}, "infinite support"),
    "infinite support, map": (counts, "map", {"n_events"}, "the guide lacks it"),
    "infinite support, autoguide": (counts, AutoNormal, {"n_events"}, "the guide lacks it"),
    "a guide that does not cover": (mixed, half_a_guide, {"h"}, "the guide lacks it"),
    "a vector": (vector, None, {"z"}, "a latent vector of Bernoulli values"),
    "varying totals": (binomials, None, {"z"}, "total_count varies"),
    "past the budget": (wide, None, {f"z_{i}" for i in range(60)}, "needs a table of 4.61e+18"),
    "too many dimensions": (deep, None, {f"z_{t}" for t in range(70)}, "torch's 64"),
    "read from outside its plate": (outside, None, {"z"}, "from outside that plate"),
    "crossed plates": (crossed, None, {"u", "v"}, "coupled across the plates"),
    "a branch": (branching, None, {"z"}, "branches on a random value"),
    "out of its markov scope": (out_of_scope, None, {"z_0", "z_1"}, "outside that latent's"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_plan_shows_the_finding_and_everything_else_raises_it(case) -> None:
    model, guide, missing, words = case
    em = ExactPosteriorEM(model, guide)
    plan = em.plan(X)
    assert {r.site for r in plan.routes if r.route == "none"} == missing
    for row in plan.routes:
        assert (row.finding is not None) == (row.route == "none")
        if row.finding is not None:
            assert words in row.finding.what and words in row.reason and "\n" not in row.reason
    printed = str(plan)
    assert "Iterations: none" in printed and "none" in printed
    for call in (em.fit, em.step, em.posterior, em.elbo, em.evaluate_loss):
        with pytest.raises(ModelError) as raised:
            call(X)
        assert all(line.strip() in printed for line in str(raised.value).splitlines())
        assert {n for p in raised.value.problems for n in p.latents} == missing
    graph = plan.graph
    assert missing < set(graph.nodes)
    hidden = next(iter(sorted(missing)))
    assert isinstance(graph.markov_blanket(hidden), set)
    assert str(pickle.loads(pickle.dumps(plan))) == printed


def test_latents_with_a_route_keep_it_in_such_a_plan() -> None:
    routes = {r.site: r.route for r in ExactPosteriorEM(mixed).plan(X).routes}
    assert routes == {"y": "enumerate", "h": "none"}

    def drawn(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(0.0, 1.0))

    def two(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            k = pyro.sample("k", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h + k, 1.0), obs=x)

    routes = {
        r.site: r.route for r in ExactPosteriorEM(two, drawn, strategy="guide").plan(X).routes
    }
    assert routes == {"h": "guide", "k": "none"}


def test_parameters_are_listed_without_an_update() -> None:
    plan = ExactPosteriorEM(continuous).plan(X)
    assert list(plan.updates) == ["a"] and "'h' has no route" in plan.updates["a"].reason
    assert "a          none" in str(plan)
    plan = ExactPosteriorEM(continuous, updates={"a": Fixed()}).plan(X)
    assert plan.updates["a"].update == Fixed()
    with pytest.raises(UsageError, match="no parameter matches"):
        ExactPosteriorEM(continuous, updates={"b": Fixed()}).plan(X)


def test_data_that_cannot_be_read_still_raise() -> None:
    bad = X.clone()
    bad[1] = torch.nan
    with pytest.raises(PyroEMError) as raised:
        ExactPosteriorEM(continuous).plan(bad)
    assert "1 of 4 observed values are NaN" in str(raised.value)

    def mixture(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(DataError):
        ExactPosteriorEM(mixture).plan(bad)


@pytest.mark.parametrize("seed", range(6))
def test_the_graph_of_a_gaussian_network_is_that_of_its_precision_matrix(seed: int) -> None:
    """All sites but one are hidden Normals, which are integrated, and independence is known."""
    g = np.random.default_rng(seed)
    n = 6
    weights = np.triu(g.normal(size=(n, n)) * (g.random((n, n)) < 0.45), 1)
    weights[n - 2, n - 1] = 1.0

    def model(x: Tensor) -> None:
        values: list[Tensor] = []
        with pyro.plate("rows", len(x)):
            for j in range(n):
                loc = torch.zeros(len(x))
                for i in np.flatnonzero(weights[:, j]):
                    loc = loc + float(weights[i, j]) * values[i]
                obs = x if j == n - 1 else None
                values.append(pyro.sample(f"v{j}", dist.Normal(loc, 1.0), obs=obs))

    plan = ExactPosteriorEM(model).plan(X)
    barren = {r.site for r in plan.routes if r.route == "integrates to one"}
    assert {r.route for r in plan.routes} <= {"Gaussian", "integrates to one"}
    graph = plan.graph
    dag = networkx.DiGraph([(f"v{i}", f"v{j}") for i, j in zip(*np.nonzero(weights), strict=True)])
    dag.add_nodes_from(f"v{j}" for j in range(n))
    assert set(graph.edges) == set(dag.edges) and barren < set(graph.nodes) | {""}
    inverse = np.eye(n) - weights
    precision = inverse @ inverse.T
    for j in range(n):
        others = {f"v{i}" for i in range(n) if i != j and abs(precision[i, j]) > 1e-12}
        assert graph.markov_blanket(f"v{j}") == others
    covariance = np.linalg.inv(precision)
    for _ in range(20):
        a, b, *rest = g.permutation(n)
        given = [int(i) for i in rest if g.random() < 0.5]
        block = covariance[np.ix_([a, b, *given], [a, b, *given])]
        partial = np.linalg.inv(block)[0, 1]
        names = f"v{a}", f"v{b}", [f"v{i}" for i in given]
        assert graph.is_separated(*names) == (abs(partial) < 1e-9)
