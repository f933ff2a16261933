"""``em.predictive`` against closed forms and Pyro's Predictive; ``log_partition`` by brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_em import ExactPosteriorEM, PyroEMError, UsageError, log_partition

X = torch.tensor([0.0, 3.0, 8.0]).double()
MU, W, SIGMA = torch.tensor([1.0, 6.0]).double(), torch.tensor([0.3, 0.7]).double(), 2.0


def mixture(x: Tensor) -> None:
    """Two Gaussians that overlap."""
    mu = pyro.param("mu", MU)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(W))
        pyro.sample("x", dist.Normal(mu[z], SIGMA), obs=x)


def responsibilities(x: Tensor) -> Tensor:
    """p(z | x) of the mixture, from Bayes' rule."""
    return (W.log() - 0.5 * ((x[:, None] - MU) / SIGMA) ** 2).softmax(-1)


def assert_mean(draws: Tensor, mean: Tensor | float, variance: Tensor | float) -> None:
    """Mean and variance over the first axis, each within five of its standard errors."""
    x, n = draws.double(), len(draws)
    mean, variance = torch.as_tensor(mean), torch.as_tensor(variance)
    assert bool(((x.mean(0) - mean).abs() <= 5 * (variance / n).sqrt()).all())
    square = (x - mean) ** 2
    error = (square.var(0) / n).sqrt()
    assert bool(((square.mean(0) - variance).abs() <= 5 * error + 5 / n).all())


# ---------------------------------------------------------------------- predictive


def test_mixture() -> None:
    """Latents have the posterior's proportions, new observations the mixture's mean and variance."""
    draws = ExactPosteriorEM(mixture).predictive(X, num_samples=1000, seed=1)
    r = responsibilities(X)
    assert_mean(draws["z"][:, 1], r[1, 1], r[1, 1] * (1 - r[1, 1]))
    mean = r @ MU
    assert_mean(draws["x"], mean, r @ (MU**2 + SIGMA**2) - mean**2)
    # z and x of one draw belong together
    own = draws["x"] - MU[draws["z"]]
    assert_mean(own, 0.0, SIGMA**2)


def test_observations_are_kept_on_request() -> None:
    """keep_observed with nothing missing: the data in every draw."""
    draws = ExactPosteriorEM(mixture).predictive(X, num_samples=5, keep_observed=True)
    torch.testing.assert_close(draws["x"], X.expand(5, 3))


def hmm(x: Tensor, known: Tensor) -> None:
    """Steps whose observation may be missing; the last is the future."""
    A = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    z = torch.tensor(0)
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z{t}", dist.Categorical(A[z]))
        pyro.sample(f"x{t}", dist.Normal(MU[z], SIGMA), obs=x[t], obs_mask=known[t])


def test_hmm_next_observation() -> None:
    """Against the forward recursion: p(z_T | x_1 … x_{T-1}) = filtered · A."""
    x, known = torch.tensor([0.5, 7.0, 6.5, 0.0]), torch.tensor([True, True, True, False])
    A = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    state = torch.tensor([1.0, 0.0]) @ A
    for value in x[:3]:
        state = state * torch.exp(-0.5 * ((value - MU) / SIGMA) ** 2)
        state = (state / state.sum()) @ A
    em = ExactPosteriorEM(hmm)
    draws = em.predictive(x, known, num_samples=1000, seed=0, keep_observed=True)
    mean = state @ MU
    assert_mean(draws["z3"], state[1], state[1] * state[0])
    assert_mean(draws["x3"], mean, state @ (MU**2 + SIGMA**2) - mean**2)
    torch.testing.assert_close(draws["x1"], x[1].expand(1000))
    assert not {n for n in draws if n.endswith(("_observed", "_unobserved"))}


def test_map_guide() -> None:
    """Draws at the point estimate (α − 1 + Σx) / (α + β − 2 + n) of a Beta prior."""

    def model(x: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(3.0, 2.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    x = torch.tensor([1.0, 1.0, 0.0, 1.0])
    em = ExactPosteriorEM(model, "map")
    em.fit(x, progress=False)
    p = (3 - 1 + 3) / (3 + 2 - 2 + 4)
    draws = em.predictive(x, num_samples=1000, seed=0)
    assert_mean(draws["x"], p, p * (1 - p))
    torch.testing.assert_close(draws["p"], torch.full((1000,), p), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_autonormal_guide() -> None:
    """Draws over the guide: N(m, s² + 1) for a unit normal around a mean with q = N(m, s²)."""

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(mean + 4 * z, 1.0), obs=x)

    x = torch.tensor([1.0, 6.0])
    em = ExactPosteriorEM(model, partial(AutoNormal, init_scale=2.0))
    em.fit(x, max_steps=3, seed=0, progress=False)
    with torch.no_grad():
        m, s = float(em.guide.locs.mean), float(em.guide.scales.mean)
    draws = em.predictive(x, num_samples=400, seed=0)
    assert_mean(draws["mean"], m, s**2)
    assert_mean(draws["x"] - draws["mean"][:, None] - 4 * draws["z"], 0.0, 1.0)
    # p(z | mean, x) under each draw, averaged over the same normal by quadrature
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    mean = m + s * torch.as_tensor(nodes)[:, None]
    p = torch.sigmoid(4 * (x - mean) - 8)
    share = torch.as_tensor(weights / weights.sum()) @ p
    assert_mean(draws["z"], share, share * (1 - share))


def test_discrete_imputations_have_the_posterior_s_probabilities() -> None:
    """obs_mask: what is missing follows probs, what is known stays."""

    def model(y: Tensor, x: Tensor, known: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(W))
            pyro.sample("y", dist.Normal(MU[z], SIGMA), obs=y)
            table = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
            pyro.sample("x", dist.Categorical(table[z]), obs=x, obs_mask=known)

    x, known = torch.tensor([2, 0, 0]), torch.tensor([True, False, False])
    em = ExactPosteriorEM(model)
    draws = em.predictive(X, x, known, num_samples=1000, seed=0, keep_observed=True)
    assert bool((draws["x"][:, 0] == 2).all())
    probs = em.posterior(X, x, known).probs("x")
    table = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    torch.testing.assert_close(probs[1:], responsibilities(X)[1:] @ table)
    share = torch.nn.functional.one_hot(draws["x"].long(), 3)[:, 1:]
    assert_mean(share, probs[1:], probs[1:] * (1 - probs[1:]))


def test_continuous_imputations_have_conditional_means() -> None:
    """E[x_missing | y] = Σ_k p(z = k | y) ν_k."""
    nu = torch.tensor([-5.0, 5.0])

    def model(y: Tensor, x: Tensor, known: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(W))
            pyro.sample("y", dist.Normal(MU[z], SIGMA), obs=y)
            pyro.sample("x", dist.Normal(nu[z], 1.0), obs=x, obs_mask=known)

    x, known = torch.tensor([-5.0, torch.nan, torch.nan]), torch.tensor([True, False, False])
    draws = ExactPosteriorEM(model).predictive(
        X, x, known, num_samples=1000, seed=0, keep_observed=True
    )
    assert bool((draws["x"][:, 0] == -5).all())
    r = responsibilities(X)[1]
    mean = r @ nu
    assert_mean(draws["x"][:, 1], mean, r @ (nu**2 + 1) - mean**2)
    torch.testing.assert_close(draws["y"], X.expand(1000, 3))


def test_shapes() -> None:
    """(num_samples, *plates, *event); deterministic sites are there, factors are not."""

    def model(x: Tensor) -> None:
        with pyro.plate("columns", 2, dim=-1):
            u = pyro.sample("u", dist.Bernoulli(0.5))
            with pyro.plate("rows", 5, dim=-2):
                z = pyro.sample("z", dist.Categorical(W))
                mean = pyro.deterministic("mean", MU[z] + u)
                unit = dist.Normal(mean[..., None], torch.ones(3)).to_event(1)
                pyro.sample("x", unit, obs=x)
        pyro.factor("nothing", torch.tensor(0.0))

    draws = ExactPosteriorEM(model).predictive(torch.zeros(5, 2, 3), num_samples=4, seed=0)
    assert {n: tuple(v.shape) for n, v in draws.items()} == {
        "u": (4, 2),
        "z": (4, 5, 2),
        "mean": (4, 5, 2),
        "x": (4, 5, 2, 3),
    }
    torch.testing.assert_close(draws["mean"], MU[draws["z"]] + draws["u"][:, None])


def test_seeds_and_what_stays_untouched() -> None:
    """One seed, one result; torch's state and the parameters are as before."""
    em = ExactPosteriorEM(mixture)
    em.fit(X, max_steps=2, progress=False)
    before, state = pyro.param("mu").detach().clone(), torch.get_rng_state()
    first = em.predictive(X, num_samples=20, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pyro.param("mu"), before) and set(pyro.get_param_store()) == {"mu"}
    assert not any(v.requires_grad for v in first.values())
    again, other = (em.predictive(X, num_samples=20, seed=s) for s in (3, 4))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["x"], other["x"])
    torch.manual_seed(7)
    unseeded = em.predictive(X, num_samples=20)
    torch.manual_seed(7)
    assert torch.equal(em.predictive(X, num_samples=20)["x"], unseeded["x"])
    assert not torch.equal(em.predictive(X, num_samples=20)["x"], unseeded["x"])


def test_pyro_s_predictive_without_latents() -> None:
    """Same model, no latents: two samples of one distribution."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", 3):
            first = pyro.sample("first", dist.Gamma(torch.tensor([1.0, 2.0, 3.0]), 1.0), obs=x)
            pyro.sample("second", dist.Normal(first, 0.5), obs=x)

    def unconditioned() -> None:
        pyro.poutine.uncondition(model)(torch.ones(3))

    n = 1000
    ours = ExactPosteriorEM(model).predictive(torch.ones(3), num_samples=n, seed=0)
    pyros = Predictive(unconditioned, num_samples=n)()
    for name in ("first", "second"):
        a, b = ours[name], pyros[name].reshape(n, 3)
        error = ((a.var(0) + b.var(0)) / n).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() < 5 * error).all())
    # what is drawn from what: second follows the first that was drawn, not the data
    assert_mean(ours["second"] - ours["first"], 0.0, 0.25)


def test_predictive_refusals() -> None:
    """Sentences for what is no number of draws, and for latents without a route."""
    with pytest.raises(UsageError, match="num_samples=0 is no number of draws"):
        ExactPosteriorEM(mixture).predictive(X, num_samples=0)

    def continuous(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mean.exp(), 1.0), obs=x)

    with pytest.raises(PyroEMError, match="'mean'"):
        ExactPosteriorEM(continuous).predictive(torch.tensor(0.0))


# ---------------------------------------------------------------------- log_partition


def random_field(seed: int) -> tuple[Callable[..., None], list[tuple[int, ...]], list[Tensor]]:
    """Pairs and one triple over six variables of two or three states.

    Returns:
        The field as a function of its log potentials, its cliques, and log potentials.
    """
    g = np.random.default_rng(seed)
    sizes = [int(k) for k in g.integers(2, 4, 6)]
    cliques = [c for c in itertools.combinations(range(6), 2) if g.random() < 0.4]
    cliques.append(tuple(sorted(int(i) for i in g.choice(6, 3, replace=False))))
    tables = [torch.as_tensor(g.standard_normal([sizes[i] for i in c])) for c in cliques]
    own = [torch.as_tensor(g.dirichlet(np.ones(k))) for k in sizes]

    def field(tables: list[Tensor]) -> None:
        v = [pyro.sample(f"v{i}", dist.Categorical(p)) for i, p in enumerate(own)]
        for c, table in zip(cliques, tables, strict=True):
            pyro.factor("psi" + "".join(map(str, c)), table[tuple(v[i] for i in c)])

    field.own = own  # type: ignore[attr-defined]
    return field, cliques, tables


def brute(
    cliques: list[tuple[int, ...]], tables: list[Tensor], own: list[Tensor], base: str
) -> Tensor:
    """log Z over the whole table."""
    sizes = [len(p) for p in own]
    total = torch.zeros(sizes)
    for c, table in zip(cliques, tables, strict=True):
        total = total + table.reshape([sizes[i] if i in c else 1 for i in range(len(sizes))])
    if base == "model":
        for i, p in enumerate(own):
            total = total + p.log().reshape([-1 if i == j else 1 for j in range(len(sizes))])
    return total.logsumexp(tuple(range(len(sizes))))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("base", ["counting", "model"])
def test_log_partition_is_the_sum_over_all_states(seed: int, base: str) -> None:
    """Value against brute force; gradients against brute force and finite differences."""
    field, cliques, tables = random_field(seed)
    own = field.own  # type: ignore[attr-defined]
    leaves = [t.clone().requires_grad_() for t in tables]
    value = log_partition(field, leaves, base=base)  # type: ignore[arg-type]
    assert value.shape == () and value.dtype == torch.float64
    expected = brute(cliques, leaves, own, base)
    torch.testing.assert_close(value, expected)
    ours = torch.autograd.grad(value, leaves)
    theirs = torch.autograd.grad(expected, leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        assert float(a.sum()) == pytest.approx(1.0)  # the clique's marginals
    step = 1e-5
    ends = []
    for sign in (1, -1):
        moved = [t.clone() for t in tables]
        moved[-1].view(-1)[1] += sign * step
        ends.append(float(log_partition(field, moved, base=base)))  # type: ignore[arg-type]
    slope = (ends[0] - ends[1]) / (2 * step)
    assert slope == pytest.approx(float(ours[-1].reshape(-1)[1]), abs=1e-8)


def test_log_partition_with_plates() -> None:
    """N copies under a shared variable: Z = Σ_s φ(s) Π_n Σ_z ψ_n(s, z)."""
    psi, phi = torch.randn(4, 2, 3), torch.randn(2)

    def field() -> None:
        s = pyro.sample("s", dist.Categorical(torch.ones(2)))
        pyro.factor("phi", phi[s])
        with pyro.plate("n", 4):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            pyro.factor("psi", psi[torch.arange(4), s, z])

    expected = (phi + psi.logsumexp(-1).sum(0)).logsumexp(0)
    torch.testing.assert_close(log_partition(field), expected)
    with_densities = expected - torch.tensor(2.0).log() - 4 * torch.tensor(3.0).log()
    torch.testing.assert_close(log_partition(field, base="model"), with_densities)


def test_log_partition_inside_a_model() -> None:
    """Fitted pairs: the saturated field reaches the observed frequencies and their evidence."""
    rows = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [1, 1], [0, 0], [0, 0]])

    def field(theta: Tensor, rows: Tensor | None = None) -> None:
        coin = dist.Categorical(torch.ones(2))
        a = pyro.sample("a", coin, obs=None if rows is None else rows[:, 0])
        b = pyro.sample("b", coin, obs=None if rows is None else rows[:, 1])
        pyro.factor("ab", theta[a, b])

    def model(rows: Tensor) -> None:
        theta = pyro.param("theta", torch.zeros(2, 2))
        with pyro.plate("rows", len(rows)):
            field(theta, rows)
        pyro.factor("normaliser", -len(rows) * log_partition(field, theta, base="model"))

    result = ExactPosteriorEM(model).fit(rows, progress=False)
    share = torch.tensor([[3.0, 1.0], [1.0, 2.0]]) / 7
    found = result.params["theta"].reshape(-1).softmax(0).reshape(2, 2)
    torch.testing.assert_close(found, share, atol=1e-5, rtol=0)
    assert result.log_evidence == pytest.approx(float((7 * share * share.log()).sum()), abs=1e-8)


def test_log_partition_leaves_the_random_state_and_param_store() -> None:
    """It draws nothing that anyone sees."""
    field, _, tables = random_field(0)
    state = torch.get_rng_state()
    log_partition(field, tables)
    assert torch.equal(torch.get_rng_state(), state)
    assert not set(pyro.get_param_store())


def test_log_partition_refusals() -> None:
    """An unknown base, a sum past the budget, a variable that cannot be summed."""
    field, _, tables = random_field(0)
    with pytest.raises(UsageError, match="base='uniform' is not known"):
        log_partition(field, tables, base="uniform")  # type: ignore[arg-type]
    with pytest.raises(
        PyroEMError, match=r"needs a table of \d+ cells; the budget is max_enumeration=4\."
    ):
        log_partition(field, tables, max_enumeration=4)

    def continuous() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("psi", -(x**2))

    with pytest.raises(PyroEMError, match="'x'"):
        log_partition(continuous)
