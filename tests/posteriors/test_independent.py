"""Components of latents side by side, each by its block: the joint table, and one contraction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.densities.tying import collapsed
from pyro_em.errors import Finding
from pyro_em.plan import program as programs
from pyro_em.plan.eligibility import BLOCKS, Kernel
from pyro_em.posteriors.block import Component
from pyro_em.posteriors.independent import Independent
from pyro_em.testing import check_block
from pyro_em.testing.blocks import joint_table
from pyro_em.tracing.parameters import values_of

X = torch.tensor([-1.3, 0.2, 0.9, 2.5], dtype=torch.float64)
Y = torch.tensor([0.4, -0.7, 1.6, -2.1], dtype=torch.float64)
S = torch.tensor([0, 1, 1, 2])


class SideBySide(Independent):
    """With the kernels that plans know."""

    kinds = BLOCKS


def simplex(name: str, *rows: float | list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return pyro.param(name, torch.tensor(rows, dtype=dtype), constraint=C.simplex)


def real(name: str, *values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return pyro.param(name, torch.tensor(values, dtype=dtype))


def positive(name: str, *values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return pyro.param(name, torch.tensor(values, dtype=dtype), constraint=C.positive)


def rows(name: str, x: Tensor, w: Tensor, mu: Tensor, sigma: Any = 1.0) -> None:
    """A mixture over the rows of a plate of its own."""
    with pyro.plate(f"rows_{name}", len(x)):
        z = pyro.sample(name, dist.Categorical(w))
        scale = sigma[z] if isinstance(sigma, Tensor) else sigma
        pyro.sample(f"x_{name}", dist.Normal(mu[z], scale), obs=x)


def steps(name: str, x: Tensor, w: Tensor, A: Tensor, emit: Callable[[Tensor], Any]) -> None:
    """A chain."""
    z = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"{name}_{t}", dist.Categorical(w if z is None else A[z]))
        pyro.sample(f"x_{name}_{t}", emit(z), obs=x[t])


# ------------------------------------------------------------------ models


def two_plates() -> None:
    """Two mixtures that share nothing but their weights."""
    w = simplex("w", 0.3, 0.7)
    rows("a", X, w, real("mu", -1.0, 1.0), positive("sigma", 0.8).expand(2))
    rows("b", Y[:3], w, real("nu", -0.5, 1.5), positive("tau", 0.9).expand(2))


def one_plate() -> None:
    """Two mixtures over the same rows whose sites are stacked, and share every parameter."""
    w, mu, sigma = simplex("w", 0.3, 0.7), real("mu", -1.0, 1.0), positive("sigma", 0.8, 1.1)
    with pyro.plate("n", 3):
        a = pyro.sample("a", dist.Categorical(w))
        b = pyro.sample("b", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[a], sigma[a]), obs=X[1:])
        pyro.sample("y", dist.Normal(mu[b], sigma[b]), obs=Y[1:])


def of_different_sizes() -> None:
    """Two and three components, one mean for both mixtures."""
    mu = real("mu", -1.0, 0.5, 1.0)
    rows("a", X, simplex("w", 0.3, 0.7), mu[:2])
    rows("b", Y[:3], simplex("v", 0.3, 0.3, 0.4), mu)


def mixture_beside_chain(dtype: torch.dtype = torch.float64) -> None:
    """Weights, means and a spread of both."""
    w, mu = simplex("w", 0.3, 0.7, dtype=dtype), real("mu", -1.0, 1.0, dtype=dtype)
    sigma = positive("sigma", 0.9, dtype=dtype)
    rows("a", X[:3].to(dtype), w, mu, sigma.expand(2))
    A = simplex("A", [0.8, 0.2], [0.3, 0.7], dtype=dtype)
    steps("z", Y[:3].to(dtype), w, A, lambda z: dist.Normal(mu[z], sigma))


def two_chains() -> None:
    """Chains of equal form, whose sites are stacked; one of them has transitions of its own."""
    w, mu = simplex("w", 0.3, 0.7), real("mu", -1.0, 1.0)
    A, B = (simplex(n, [0.8, 0.2], [0.3, 0.7]) for n in "AB")
    steps("z", X, w, A, lambda z: dist.Normal(mu[z], 1.0))
    steps("u", Y, w, A, lambda z: dist.Normal(mu[z], 1.0))
    steps("v", Y[:3], w, B, lambda z: dist.Normal(mu[z], 1.0))


def tied_rows() -> None:
    """Two chains that read different rows of one table of transitions and one of emissions."""
    A = simplex("A", [0.8, 0.2], [0.3, 0.7], [0.5, 0.5], [0.1, 0.9])
    E = simplex("E", [0.6, 0.3, 0.1], [0.1, 0.3, 0.6])
    steps("z", S, A[2], A[:2], lambda z: dist.Categorical(E[z]))
    steps("u", S.flip(0), A[3], A[2:], lambda z: dist.Categorical(E[z]))


def kernel_beside_none() -> None:
    """A mixture beside a latent above the latents of rows, with one spread for both."""
    w, sigma = simplex("w", 0.3, 0.7), positive("sigma", 0.9)
    rows("a", X, w, real("mu", -1.0, 1.0), sigma.expand(2))
    nu = real("nu", [-1.0, 0.0], [0.5, 2.0])
    c = pyro.sample("c", dist.Categorical(simplex("v", 0.6, 0.4)))
    with pyro.plate("pairs", 2):
        b = pyro.sample("b", dist.Categorical(w))
        pyro.sample("y", dist.Normal(nu[b, c], sigma), obs=Y[:2])


def pairs_of_latents() -> None:
    """A mixture beside two latents per row, all of equal form, with parameters that both read."""
    w, sigma, mu = simplex("w", 0.3, 0.7), positive("sigma", 0.9), real("mu", -1.0, 1.0)
    rows("a", X[:3], w, mu, sigma.expand(2))
    nu = real("nu", -0.5, 2.0)
    with pyro.plate("pairs", 3):
        b = pyro.sample("b", dist.Categorical(w))
        c = pyro.sample("c", dist.Categorical(simplex("v", [0.6, 0.4], [0.3, 0.7])[b]))
        pyro.sample("y", dist.Normal(mu[b], sigma), obs=Y[:3])
        pyro.sample("u", dist.Normal(nu[c], sigma), obs=X[:3])


def single_latents() -> None:
    """A chain beside latents in no plate, which are contracted together."""
    w, mu = simplex("w", 0.3, 0.7), real("mu", -1.0, 1.0)
    steps("z", X[:3], w, simplex("A", [0.8, 0.2], [0.3, 0.7]), lambda z: dist.Normal(mu[z], 1.0))
    for i in range(3):
        u = pyro.sample(f"u{i}", dist.Categorical(w))
        pyro.sample(f"y{i}", dist.Normal(mu[u], 1.0), obs=Y[i])


def known_sites() -> None:
    """Sites that read no latent, with parameters that mixtures read too."""
    w, mu, nu = simplex("w", 0.3, 0.7), real("mu", -1.0, 1.0), real("nu", -0.5, 1.0)
    rows("a", X[:3], w, mu)
    rows("b", Y[:3], w, nu)
    pyro.sample("c", dist.Categorical(w), obs=torch.tensor(1))
    with pyro.plate("m", 3):
        pyro.sample("d", dist.Normal(mu[0], 1.5), obs=Y[:3])


def weighted_known_sites() -> None:
    """A site that reads no latent and counts twice, which no kernel takes."""
    w, mu = simplex("w", 0.3, 0.7), real("mu", -1.0, 1.0)
    rows("a", X, w, mu)
    rows("b", Y, w, real("nu", -0.5, 1.0))
    with pyro.plate("m", 3), pyro.poutine.scale(scale=2.0):
        pyro.sample("d", dist.Normal(mu[0], 1.5), obs=Y[:3])


def masked() -> None:
    """Rows and steps that are masked."""
    w, mu = simplex("w", 0.3, 0.7), real("mu", -1.0, 1.0)
    with pyro.plate("n", len(X)):
        a = pyro.sample("a", dist.Categorical(w))
        ok = torch.tensor([True, False, True, True])
        pyro.sample("x", dist.Normal(mu[a], 1.0).mask(ok), obs=X)
    A, z = simplex("A", [0.8, 0.2], [0.3, 0.7]), None
    for t in range(4):
        z = pyro.sample(f"z_{t}", dist.Categorical(w if z is None else A[z]))
        pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0).mask(torch.tensor(t != 1)), obs=Y[t])


def lines() -> None:
    """A mixture of regressions beside repeated symbols and rates."""
    a, b = real("a", 0.0, 0.5), real("b", 1.0, -1.0)
    w = simplex("w", 0.3, 0.7)
    with pyro.plate("n", len(X)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(a[z] + b[z] * X, positive("sigma", 0.7)), obs=Y)
    E, rate = simplex("E", [0.6, 0.3, 0.1], [0.1, 0.3, 0.6]), positive("rate", 0.5, 2.0)
    with pyro.plate("m", 5):
        u = pyro.sample("u", dist.Categorical(w))
        pyro.sample("s", dist.Categorical(E[u]), obs=torch.tensor([0, 1, 1, 1, 2]))
        pyro.sample("k", dist.Poisson(rate[u]), obs=torch.tensor([0.0, 2.0, 2.0, 2.0, 1.0]))


CASES: dict[str, tuple[Callable[..., None], set[str]]] = {
    "two plates": (two_plates, {"mixture"}),
    "one plate": (one_plate, {"mixture"}),
    "different sizes": (of_different_sizes, {"mixture"}),
    "a mixture beside a chain": (mixture_beside_chain, {"mixture", "chain"}),
    "tied rows": (tied_rows, {"chain"}),
    "a kernel beside none": (kernel_beside_none, {"mixture", "contraction"}),
    "pairs of latents": (pairs_of_latents, {"mixture"}),
    "single latents": (single_latents, {"chain", "contraction"}),
    "known sites": (known_sites, {"mixture"}),
    "masked": (masked, {"mixture", "chain"}),
    "lines": (lines, {"mixture"}),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_joint_table(case: str) -> None:
    check_block(SideBySide, CASES[case][0], states=1 + (case == "a mixture beside a chain"))


def test_in_float32() -> None:
    check_block(SideBySide, mixture_beside_chain, torch.float32)


def test_without_kernels_it_is_a_contraction() -> None:
    check_block(Independent, one_plate)


def test_marginals_are_joined() -> None:
    found = ExactPosteriorEM(kernel_beside_none)._ready((), {})
    graph, values = found.graph, values_of(found.graph.parameters)  # type: ignore[union-attr]
    component = Component(collapsed(graph), found.updates, values, tuple(graph.latents))  # type: ignore[union-attr]
    block = SideBySide.match(component)
    assert not isinstance(block, Finding)
    marginals, joint = block.marginals(values), joint_table(found)  # type: ignore[arg-type]
    assert tuple(marginals) == ("a", "c", "b")
    for name, p in marginals.items():
        own, i = graph.group_of(name)
        torch.testing.assert_close(p, joint.cells[list(graph.groups).index(own)][i])


# ------------------------------------------------------------------ EM


def paths(
    model: Callable[..., None], monkeypatch: pytest.MonkeyPatch, guide: Any = None
) -> tuple[Any, Any]:
    """The same fit by the blocks and by one contraction of everything."""
    out = []
    for quick in (True, False):
        with monkeypatch.context() as patch, pyro.get_param_store().scope():
            pyro.set_rng_seed(0)  # a point estimate begins at a draw
            if not quick:
                patch.setattr(programs, "kernel_of", lambda *a: Kernel("contraction"))
            out.append(ExactPosteriorEM(model, guide).fit(max_steps=6, tol=0, progress=False))
    return out[0], out[1]


def same(a: Any, b: Any) -> None:
    assert list(a.history) == pytest.approx(list(b.history), rel=1e-10)
    for name, value in b.params.items():
        torch.testing.assert_close(a.params[name], value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", [*CASES, "two chains", "weighted known sites"])
def test_every_step_is_that_of_one_contraction(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {
        "two chains": (two_chains, {"chain"}),
        "weighted known sites": (weighted_known_sites, {"mixture"}),
    }
    model, names = {**CASES, **more}[case]
    a, b = paths(model, monkeypatch)
    same(a, b)
    assert set(a.plan.kernel.values()) == names
    for latents, name in a.plan.kernel.items():
        assert (a.plan.kernel_reason[latents] is None) == (name != "contraction")
    with pyro.get_param_store().scope():
        assert (
            str(ExactPosteriorEM(model).plan()).split("Iterations")[1]
            == str(a.plan).split("Iterations")[1]
        )


def test_priors_of_shared_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.tensor([2.0, 3.0]).double()))
        with pyro.plate("k", 2):
            mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 3.0))
        rows("a", X, w, mu)
        steps("z", Y, w, simplex("A", [0.8, 0.2], [0.3, 0.7]), lambda z: dist.Normal(mu[z], 1.0))

    a, b = paths(model, monkeypatch, "map")
    same(a, b)
    assert set(a.plan.kernel.values()) == {"mixture", "chain"}


def test_weights_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def model() -> None:
        w, mu = simplex("w", 0.3, 0.7), real("mu", -1.0, 1.0)
        with pyro.poutine.scale(scale=torch.tensor([1.0, 2.0, 0.5, 3.0]).double()):
            rows("a", X, w, mu)
        rows("b", Y, w, mu)

    a, b = paths(model, monkeypatch)
    same(a, b)
    assert set(a.plan.kernel.values()) == {"mixture"}


def test_what_needs_more_than_sums_is_contracted() -> None:
    def model() -> None:
        w = simplex("w", 0.3, 0.7)
        rows("a", X, w, real("mu", -1.0, 1.0))
        nu = real("nu", -1.0, 1.0)
        rows("b", Y, w, nu.sin() if float(nu.detach()[0]) < 5 else nu)

    plan = ExactPosteriorEM(model).plan()
    assert set(plan.kernel.values()) == {"contraction"}  # type: ignore[union-attr]
    assert "Iterations: contraction, the model is run again at each (loc of 'x_b'" in str(plan)


def test_impossible_data_are_named() -> None:
    def model(possible: bool) -> None:
        E = simplex("E", [0.6, 0.4, 0.0], [0.3, 0.7, 0.0])
        w = simplex("w", 0.3, 0.7)
        rows("a", X, w, real("mu", -1.0, 1.0))
        for i in range(2):
            u = pyro.sample(f"u{i}", dist.Categorical(w))
            pyro.sample(f"s{i}", dist.Categorical(E[u]), obs=torch.tensor(1 if possible else 2))

    em = ExactPosteriorEM(model)
    assert set(em.plan(True).kernel.values()) == {"mixture", "contraction"}  # type: ignore[union-attr]
    with pytest.raises(Exception, match=r"site 's0'.*impossible"):
        em.fit(False, max_steps=3, progress=False)


@pytest.mark.parametrize("where", ["chain", "contraction"])
def test_a_fresh_trace_confirms_all_of_them(where: str) -> None:
    """A branch far from the start, in one of two components: the first M-step crosses it."""

    def model() -> None:
        w, mu = simplex("w", 0.3, 0.7), real("mu", 0.0, 1.0)
        loc = mu if float(mu.detach()[1]) < 5 else mu.flip(0)
        rows("a", X, w, real("nu", -1.0, 1.0))
        z = None
        for t in range(8):
            A = simplex("A", [0.8, 0.2], [0.3, 0.7])
            chained = where == "chain" and z is not None
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z] if chained else w))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=Y[t % 4] + (20.0 if t > 3 else 0.0))

    stepped = "mixture kernel and " + ("chain kernel" if where == "chain" else "contraction")
    words = f"argument 'loc': it is not what the {stepped} computed.*contraction takes over"
    with pytest.warns(Warning, match=words):
        result = ExactPosteriorEM(model).fit(max_steps=2, progress=False)
    assert not result.plan.compiled
    again = ExactPosteriorEM(model).elbo().log_evidence
    assert result.log_evidence == pytest.approx(again, rel=1e-10)
