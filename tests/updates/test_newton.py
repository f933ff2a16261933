"""Linear predictors by Newton's method: stationarity by autograd of torch's own densities, numpy EM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import (
    Chunks,
    ExactPosteriorEM,
    Fixed,
    Gradient,
    Newton,
    PyroEMWarning,
    vectorized_markov,
)
from pyro_em.graph.bindings.autograd import bind
from pyro_em.graph.bindings.useful import Useful
from pyro_em.updates.regressions.curved import Curved
from pyro_em.updates.regressions.newton import climb

N = 40
RNG = np.random.default_rng(8)


def tensor(a: Any) -> Tensor:
    return torch.as_tensor(np.array(a), dtype=torch.float64)


X = tensor(np.column_stack([np.ones(N), RNG.normal(size=(N, 2))]))
SIDE = tensor(RNG.normal(size=(N, 2)))
SIGN = np.where(np.arange(N) % 2, 1.5, -1.0)
ODDS = tensor(RNG.random(N) < 1 / (1 + np.exp(-SIGN * X[:, 1].numpy() - 0.3)))
TRIALS = tensor(RNG.integers(3, 9, N))
WINS = tensor(RNG.binomial(TRIALS.numpy().astype(int), 1 / (1 + np.exp(-SIGN * X[:, 1].numpy()))))
EXPOSURE = tensor(RNG.uniform(0.5, 3.0, N))
EVENTS = tensor(RNG.poisson(EXPOSURE.numpy() * np.exp(0.4 + 0.5 * SIGN * X[:, 1].numpy())))
WAITS = tensor(RNG.exponential(np.exp(-0.5 * SIGN * X[:, 2].numpy())))
WORDS = torch.tensor(RNG.integers(0, 3, N))
COUNTS = tensor(RNG.multinomial(6, [0.2, 0.3, 0.5], N))
REAL = tensor(SIGN + 0.5 * RNG.normal(size=N))
W = RNG.normal(size=(2, 3)) * 0.3
V = RNG.normal(size=(2, 3, 3)) * 0.3
ZERO = torch.zeros(N, 1, dtype=torch.float64)


def line(w: Tensor, x: Tensor = X) -> Tensor:
    return (x * w).sum(-1)


def rows(V: Tensor, x: Tensor = X) -> Tensor:
    return (V * x.unsqueeze(-2)).sum(-1)


def padded(eta: Tensor) -> Tensor:
    return torch.cat([eta, torch.zeros_like(eta[..., :1])], -1)


Emission = Callable[[Any, Tensor], Any]
CASES: dict[str, tuple[Tensor, Emission, dict[str, Any]]] = {
    "bernoulli": (ODDS, lambda P, z: dist.Bernoulli(logits=line(P.w[z]) + P.b), {"w": W, "b": 0.2}),
    "one covariate": (ODDS, lambda P, z: dist.Bernoulli(logits=P.b[z] * EXPOSURE), {"b": W[:, 0]}),
    "sigmoid": (
        WINS,
        lambda P, z: dist.Binomial(TRIALS, probs=torch.sigmoid(line(P.w[z]) + SIDE[:, 0])),
        {"w": W},
    ),
    "exposure": (
        EVENTS,
        lambda P, z: dist.Poisson(EXPOSURE * torch.exp(P.b[z] + line(P.w, SIDE))),
        {"b": W[:, 0], "w": W[0, :2]},
    ),
    "waits": (WAITS, lambda P, z: dist.Exponential(line(P.w[z]).exp()), {"w": W}),
    "gamma": (WAITS, lambda P, z: dist.Gamma(1.5, rate=line(P.w[z]).exp()), {"w": W}),
    "overdispersed": (
        EVENTS,
        lambda P, z: dist.NegativeBinomial(1.0 + z, logits=line(P.w[z])),
        {"w": W},
    ),
    "gamma poisson": (
        EVENTS,
        lambda P, z: dist.GammaPoisson(2.0, EXPOSURE * line(P.w[z]).exp()),
        {"w": W},
    ),
    "geometric": (EVENTS, lambda P, z: dist.Geometric(logits=line(P.w[z])), {"w": W}),
    "words": (WORDS, lambda P, z: dist.Categorical(logits=rows(P.V[z])), {"V": V}),
    "reference": (
        WORDS,
        lambda P, z: dist.Categorical(logits=padded(rows(P.V, SIDE) + P.c[z])),
        {"V": V[0, :2, :2], "c": V[:, :2, 0]},
    ),
    "softmax": (
        COUNTS,
        lambda P, z: dist.Multinomial(6, probs=rows(P.V[z]).softmax(-1)),
        {"V": V},
    ),
}


def mixture(name: str, x: Tensor | None = None) -> None:
    values, emission, start = CASES[name]
    P = SimpleNamespace(**{n: pyro.param(n, tensor(v)) for n, v in start.items()})
    with pyro.plate("n", N):
        p = pyro.param("p", tensor([0.45, 0.55]), constraint=C.simplex)
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("y", emission(P, z), obs=values)


def log_densities(name: str, values: dict[str, Tensor]) -> Tensor:
    """By torch's own densities, one component at a time. # (N, 2)"""
    data, emission, _ = CASES[name]
    P = SimpleNamespace(**values)
    each = [emission(P, torch.full((N,), k)).log_prob(data) for k in range(2)]
    return torch.stack(each, -1)


def flat_at(of: Callable[[dict[str, Tensor]], Tensor], values: dict[str, Tensor]) -> float:
    """The largest derivative of a function of parameters, in nats."""
    leaves = {n: v.clone().requires_grad_() for n, v in values.items()}
    return max(float(g.abs().max()) for g in torch.autograd.grad(of(leaves), list(leaves.values())))


@pytest.mark.parametrize("name", CASES)
def test_an_m_step_ends_where_the_expected_log_joint_is_flat(name: str) -> None:
    em = ExactPosteriorEM(partial(mixture, name))
    start = {n: tensor(v) for n, v in CASES[name][2].items()}
    plan = em.plan()
    assert plan.compiled and all(isinstance(plan.updates[n].update, Newton) for n in start)
    log_p = log_densities(name, start)
    joint = log_p + tensor([0.45, 0.55]).log()
    r = joint.softmax(-1)
    result = em.fit(max_steps=1, tol=0)
    found = {n: result.params[n] for n in start}
    assert float(result.history[0]) == pytest.approx(float(joint.logsumexp(-1).sum()), rel=1e-12)
    assert flat_at(lambda P: (r * log_densities(name, P)).sum(), start) > 0.1
    assert flat_at(lambda P: (r * log_densities(name, P)).sum(), found) < 1e-9
    history = em.fit(max_steps=3, tol=0).history
    assert all(b >= a - 1e-9 for a, b in pairwise(history))


@settings(max_examples=5, deadline=None, database=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(-3, 3))
def test_random_designs_against_iteratively_reweighted_least_squares(
    seed: int, d: int, wide: float
) -> None:
    pyro.clear_param_store()
    rng = np.random.default_rng(seed)
    x = np.column_stack([np.ones(50), rng.normal(size=(50, d)) * 10.0**wide])
    y, w = rng.integers(0, 2, 50).astype(float), rng.uniform(0.1, 3.0, 50)

    def model() -> None:
        b = pyro.param("b", torch.zeros(d + 1, dtype=torch.float64))
        with pyro.plate("n", 50), pyro.poutine.scale(scale=tensor(w)):
            pyro.sample("y", dist.Bernoulli(logits=tensor(x) @ b), obs=tensor(y))

    b = np.zeros(d + 1)
    for _ in range(25):
        p = 1 / (1 + np.exp(-x @ b))
        b = b + np.linalg.solve((x * (w * p * (1 - p))[:, None]).T @ x, x.T @ (w * (y - p)))
    if np.abs(x @ b).max() > 15:  # separated, or nearly so
        return
    found = ExactPosteriorEM(model).fit(max_steps=1, tol=0).params["b"].numpy()
    np.testing.assert_allclose(found, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())


def experts(x: Tensor, y: Tensor) -> None:
    """A mixture of experts: the gate and the experts read the covariates."""
    V0, w = pyro.param("V", tensor(V[0, :, :2])), pyro.param("w", tensor(W))
    s = pyro.param("s", tensor([0.8, 1.1]), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=x @ V0))
        pyro.sample("y", dist.Normal((x * w[z]).sum(-1), s[z]), obs=y)


def test_a_mixture_of_experts_in_one_piece_and_in_chunks() -> None:
    history, gate = [], V[0, :, :2]
    w, s, x, y = W.copy(), np.array([0.8, 1.1]), X.numpy(), REAL.numpy()
    for _ in range(5):
        log_pi = x @ gate - logsumexp(x @ gate, 1, keepdims=True)
        log_l = -0.5 * ((y[:, None] - x @ w.T) / s) ** 2 - np.log(s) - 0.5 * np.log(2 * np.pi)
        history.append(logsumexp(log_pi + log_l, 1).sum())
        r = np.exp(log_pi + log_l - logsumexp(log_pi + log_l, 1, keepdims=True))
        b = gate[:, 1] - gate[:, 0]  # two classes: one logistic regression
        for _ in range(30):
            p = 1 / (1 + np.exp(-x @ b))
            b = b + np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x, x.T @ (r[:, 1] - p))
        gate = np.stack([np.zeros(3), b], 1)
        for k in range(2):
            w[k] = np.linalg.solve((x * r[:, k, None]).T @ x, x.T @ (r[:, k] * y))
            s[k] = np.sqrt(np.average((y - x @ w[k]) ** 2, weights=r[:, k]))
    result = ExactPosteriorEM(experts).fit(X, REAL, max_steps=5, tol=0)
    np.testing.assert_allclose([float(h) for h in result.history], history, rtol=1e-11)
    found = result.params["V"].numpy()
    np.testing.assert_allclose(found[:, 1] - found[:, 0], gate[:, 1], rtol=1e-9)
    # What no data determine stays: the sum of both.
    np.testing.assert_allclose(found.sum(1), V[0, :, :2].sum(1), rtol=1e-9)
    pyro.clear_param_store()
    parts = ExactPosteriorEM(experts).fit(Chunks(X, REAL, rows=15), max_steps=5, tol=0)
    np.testing.assert_allclose([float(h) for h in parts.history], history, rtol=1e-10)


def driven(x: Tensor, y: Tensor, *, loop: bool) -> None:
    """A hidden Markov model whose transitions read a covariate; coefficients with a prior."""
    V0 = pyro.sample("V", dist.Normal(tensor(np.zeros((2, 2, 3))), 2.0).to_event(3))
    mu = pyro.param("mu", tensor([-0.8, 1.2]))
    z: Any = None
    steps = pyro.markov(range(len(y))) if loop else vectorized_markov("t", len(y), dim=-1)
    for t in steps:
        first = dist.Categorical(tensor([0.5, 0.5]))
        u = x[t].unsqueeze(-2)
        z = pyro.sample(
            f"z_{t}", first if z is None else dist.Categorical(logits=(V0[z] @ u.mT).squeeze(-1))
        )
        pyro.sample(f"y_{t}", dist.Normal(mu[z], 0.7), obs=y[t])


def smoothed(log_l: np.ndarray, log_A: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Marginals and pairs of neighbours of a chain that begins with even odds."""
    n = len(log_l)
    a, b = np.zeros((n, 2)), np.zeros((n, 2))
    a[0] = np.log(0.5) + log_l[0]
    for t in range(1, n):
        a[t] = logsumexp(a[t - 1][:, None] + log_A[t], axis=0) + log_l[t]
    for t in reversed(range(n - 1)):
        b[t] = logsumexp(log_A[t + 1] + log_l[t + 1] + b[t + 1], axis=1)
    evidence = float(logsumexp(a[-1]))
    pairs = np.exp(a[:-1, :, None] + log_A[1:] + (log_l[1:] + b[1:])[:, None] - evidence)
    return np.exp(a + b - evidence), pairs, evidence


@pytest.mark.parametrize("loop", [True, False])
def test_transitions_that_read_a_covariate_take_the_steps_of_numpy(loop: bool) -> None:
    n, mu, history = 15, np.array([-0.8, 1.2]), []
    x, y = X[:n].numpy(), REAL[:n].numpy()
    em = ExactPosteriorEM(partial(driven, loop=loop), guide="map")
    assert "Newton" in str(em.plan(X[:n], REAL[:n]))
    (name,) = (k for k in pyro.get_param_store() if "V" in k)
    V0 = pyro.param(name).detach().numpy().copy()
    for _ in range(4):
        eta = np.einsum("kjd,td->tkj", V0, x)
        log_A = eta - logsumexp(eta, -1, keepdims=True)
        log_l = -0.5 * ((y[:, None] - mu) / 0.7) ** 2 - np.log(0.7) - 0.5 * np.log(2 * np.pi)
        gamma, pairs, evidence = smoothed(log_l, log_A)
        prior = (-0.5 * (V0 / 2) ** 2 - np.log(2) - 0.5 * np.log(2 * np.pi)).sum()
        history.append(evidence + prior)
        mu = (gamma * y[:, None]).sum(0) / gamma.sum(0)
        for k in range(2):
            for _ in range(20):
                p = np.exp(x[1:] @ V0[k].T)
                p /= p.sum(1, keepdims=True)
                size = pairs[:, k].sum(1)
                slope = np.einsum("tj,td->jd", pairs[:, k] - size[:, None] * p, x[1:]) - V0[k] / 4
                each = [np.diag(q) - np.outer(q, q) for q in p]
                curve = sum(
                    s * np.kron(e, np.outer(u, u))
                    for s, e, u in zip(size, each, x[1:], strict=True)
                )
                step = np.linalg.solve(curve + np.eye(6) / 4, slope.reshape(-1))
                V0[k] += step.reshape(2, 3)
    result = em.fit(X[:n], REAL[:n], max_steps=4, tol=0)
    np.testing.assert_allclose([float(h) for h in result.history], history, rtol=1e-10)
    np.testing.assert_allclose(result.params[name], V0, rtol=1e-7, atol=1e-9)


def test_separated_data_are_said_once_by_site_and_parameter() -> None:
    def model() -> None:
        w = pyro.param("w", torch.zeros(2, dtype=torch.float64))
        with pyro.plate("n", N):
            pyro.sample("y", dist.Bernoulli(logits=X[:, :2] @ w), obs=(X[:, 1] > 0.1).double())

    em = ExactPosteriorEM(model)
    with pytest.warns(PyroEMWarning) as told:
        result = em.fit(max_steps=6, tol=0)
    texts = [str(w.message) for w in told]
    assert len(texts) == 1 and "parameter 'w'" in texts[0] and "site 'y'" in texts[0]
    assert "guide='map'" in texts[0] and all(b >= a - 1e-9 for a, b in pairwise(result.history))
    assert -1e-6 < float(result.log_evidence) <= 0
    assert isinstance(ExactPosteriorEM(model).plan().updates["w"].update, Newton)  # read there, too


def test_counts_of_zero_and_empty_components() -> None:
    def model() -> None:
        w = pyro.param("w", tensor(W))
        with pyro.plate("n", N):
            z = pyro.sample("z", dist.Categorical(tensor([1.0, 0.0])))
            pyro.sample("y", dist.Poisson(line(w[z]).exp()), obs=EVENTS)

    result = ExactPosteriorEM(model).fit(max_steps=2, tol=0)
    np.testing.assert_array_equal(result.params["w"][1], W[1])


def test_wishes_and_held_coefficients() -> None:
    name = "bernoulli"
    for wish, kind in ((Gradient(), Gradient), (Newton(), Newton), (Fixed(), Fixed)):
        em = ExactPosteriorEM(partial(mixture, name), updates={"w": wish})
        updates = em.plan().updates
        assert isinstance(updates["w"].update, kind) and isinstance(updates["b"].update, Newton)
    result = em.fit(max_steps=1, tol=0)
    start = {n: tensor(v) for n, v in CASES[name][2].items()}
    r = (log_densities(name, start) + tensor([0.45, 0.55]).log()).softmax(-1)

    def of(P: dict[str, Tensor]) -> Tensor:
        return (r * log_densities(name, {"w": tensor(W), **P})).sum()

    assert (
        torch.equal(result.params["w"], tensor(W)) and flat_at(of, {"b": result.params["b"]}) < 1e-9
    )


def test_a_softmax_across_rows_is_no_predictor() -> None:
    v = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v.requires_grad_()
    for dim, how in ((-1, "affine"), (0, "opaque")):
        probs = dist.Categorical(probs=(X @ v).softmax(dim)).probs
        how_found = bind(
            probs, {"v": v}, Useful(affine=True, link="softmax", normalised="probs")
        ).how
        logits = dist.Categorical(logits=(X @ v).log_softmax(dim)).logits
        assert how_found == how
        assert bind(logits, {"v": v}, Useful(affine=True, normalised="logits")).how == how


@pytest.mark.parametrize("unit", ["years", "1e8"])
def test_a_start_in_another_unit_is_left(unit: str) -> None:
    """Where every prediction is certain no row is curved, and the slope says where to go."""
    x = torch.linspace(-2, 2, 14, dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.float64)
    here = 2000 + 10 * x if unit == "years" else 1e8 * x

    def model() -> None:
        a = pyro.param("a", torch.zeros((), dtype=torch.float64))
        b = pyro.param("b", torch.tensor(0.3, dtype=torch.float64))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=a + b * here), obs=y)

    theta, X = np.zeros(2), np.stack([np.ones(14), x.numpy()], -1)
    for _ in range(30):  # Newton's method from zero, for the same covariate standardised
        p = 1 / (1 + np.exp(-X @ theta))
        theta += np.linalg.solve((X.T * (p * (1 - p))) @ X, X.T @ (y.numpy() - p))
    expected = float(np.sum(np.where(y.numpy() > 0, np.log(p), np.log1p(-p))))
    result = ExactPosteriorEM(model).fit(max_steps=10)
    assert result.log_evidence == pytest.approx(expected, rel=1e-9)
    scale = 10.0 if unit == "years" else 1e8
    assert float(result.params["b"]) * scale == pytest.approx(theta[1], rel=1e-6)


@pytest.mark.parametrize("start", [2.0, 12.0])
def test_a_climb_ends_in_the_rounding_of_values(start: float) -> None:
    """A slope that never ends, of values that are rounded by 1e-5 nats, as those of float32 are."""
    places = []

    def of(x: Tensor) -> Curved:
        places.append(float(x))
        left = (-x).exp()
        return Curved(-1e-5 * (1e5 * left.sum()).round(), left, torch.diag(left))

    end = climb(of, tensor([start])).place
    assert len(places) < 100
    assert float((-end).exp()) < 1e-5
