"""Models of the textbooks, step by step against programs written from the textbook here."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from scipy.optimize import minimize
from scipy.special import expit, logsumexp
from scipy.stats import norm, poisson
from torch.distributions import constraints

from pyro_em import ClosedForm, ExactPosteriorEM, Gradient, LeastSquares, Newton
from tests.updates.test_m_step import (
    COUNTS,
    LINE,
    PREDICTORS,
    REAL,
    RESPONSE,
    N,
    close,
    responsibilities,
    run,
)

C = constraints


def mixture_of_regressions(x, y):
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=C.simplex)
    a = pyro.param("a", torch.tensor([0.5, -0.5]))
    B = pyro.param("B", torch.tensor([[1.0, 0.0], [-1.0, 0.3]]))
    s = pyro.param("s", torch.tensor([1.0, 1.0]), constraint=C.positive)
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(a[z] + (B[z] * x).sum(-1), s[z]), obs=y)


class Regressions(PyroModule):
    """The same, as a module: buffers of its own, plain and Pyro parameters."""

    def __init__(self):
        super().__init__()
        self.w = PyroParam(torch.tensor([0.5, 0.5]), C.simplex)
        self.a = torch.nn.Parameter(torch.tensor([0.5, -0.5]))
        self.B = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [-1.0, 0.3]]))
        self.s = PyroParam(torch.tensor([1.0, 1.0]), C.positive)

    def forward(self, x, y):
        a, B, s = self.a, self.B, self.s
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(self.w))
            pyro.sample("y", dist.Normal(a[z] + (B[z] * x).sum(-1), s[z]), obs=y)


@pytest.mark.parametrize("form", ["function", "module", "module-local"])
def test_mixture_of_regressions_step_by_step(form):
    x, y = PREDICTORS, RESPONSE
    D = np.column_stack([np.ones(N), x])
    w, s = np.array([0.5, 0.5]), np.ones(2)
    beta = np.array([[0.5, 1.0, 0.0], [-0.5, -1.0, 0.3]])
    path = []
    for _ in range(25):
        r, evidence = responsibilities(np.log(w) + norm.logpdf(y[:, None], D @ beta.T, s))
        path.append(evidence)
        w = r.mean(0)
        for k in range(2):
            root = np.sqrt(r[:, k])
            beta[k] = np.linalg.lstsq(D * root[:, None], np.asarray(y) * root, rcond=None)[0]
            s[k] = np.sqrt(r[:, k] @ (np.asarray(y) - D @ beta[k]) ** 2 / r[:, k].sum())
    with pyro.settings.context(module_local_params=form == "module-local"):
        model = mixture_of_regressions if form == "function" else Regressions()
        result = run(model, x, y, steps=25)
        np.testing.assert_allclose(list(result.history), path, rtol=1e-9)
        for name, value in {"a": beta[:, 0], "B": beta[:, 1:], "s": s, "w": w}.items():
            close(result.params[name], value)
            if form != "function":
                close(getattr(model, name), value)
    assert result.plan.compiled


def test_a_shared_mean_with_free_scales_converges_to_the_optimum():
    """One conditional maximisation after another: each step is exact given the other argument."""

    def model(x):
        mu = pyro.param("mu", torch.tensor(0.0))
        s = pyro.param("s", torch.tensor([0.5, 2.0]), constraint=C.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(mu, s[z]), obs=x)

    def loss(v):
        log_p = norm.logpdf(REAL.numpy()[:, None], v[0], np.exp(v[1:])) + np.log(0.5)
        return -logsumexp(log_p, axis=1).sum()

    best = minimize(loss, [0.0, np.log(0.5), np.log(2.0)], options={"gtol": 1e-8})
    result = run(model, REAL, steps=400)
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-7)


def test_float32_stays_float32_and_agrees():
    x, y = PREDICTORS, RESPONSE
    expected = run(mixture_of_regressions, x, y, steps=10).params
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()
    em = ExactPosteriorEM(mixture_of_regressions)
    found = em.fit(x.float(), y.float(), max_steps=10, tol=0).params
    for name, value in found.items():
        assert value.dtype == torch.float32
        close(value.double(), expected[name], rtol=1e-3, atol=1e-4)


def hmm(y, lengths):
    pi = pyro.param("pi", torch.tensor([0.6, 0.4]), constraint=C.simplex)
    A = pyro.param("A", torch.tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=C.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    s = pyro.param("s", torch.tensor([1.0, 1.5]), constraint=C.positive)
    with pyro.plate("sequences", len(y), dim=-1):
        z = None
        for t in pyro.markov(range(y.shape[1])):
            with pyro.poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                pyro.sample(f"y_{t}", dist.Normal(mu[z], s[z]), obs=y[:, t])


def forward_backward(pi, A, B):
    """Posterior states, summed posterior transitions and evidence of one sequence."""
    alpha, scale, beta = np.zeros_like(B), np.zeros(len(B)), np.ones_like(B)
    for t in range(len(B)):
        alpha[t] = (pi if t == 0 else alpha[t - 1] @ A) * B[t]
        scale[t] = alpha[t].sum()
        alpha[t] /= scale[t]
    for t in range(len(B) - 2, -1, -1):
        beta[t] = A @ (B[t + 1] * beta[t + 1]) / scale[t + 1]
    pairs = alpha[:-1].T @ (B[1:] * beta[1:] / scale[1:, None]) * A
    return alpha * beta, pairs, np.log(scale).sum()


def test_padded_and_masked_sequences_equal_unpadded_baum_welch():
    rng = np.random.default_rng(4)
    lengths = np.array([7, 3, 1, 5])
    y = rng.normal(size=(4, 7)) + np.sign(rng.normal(size=(4, 7))) * 2
    pi, A = np.array([0.6, 0.4]), np.array([[0.7, 0.3], [0.4, 0.6]])
    mu, s, path = np.array([-1.0, 1.0]), np.array([1.0, 1.5]), []
    for _ in range(20):
        runs = [
            forward_backward(pi, A, norm.pdf(y[n, : lengths[n], None], mu, s)) for n in range(4)
        ]
        path.append(sum(r[2] for r in runs))
        gamma = np.concatenate([r[0] for r in runs])
        flat = np.concatenate([y[n, : lengths[n]] for n in range(4)])[:, None]
        pi = np.mean([r[0][0] for r in runs], 0)
        A = sum(r[1] for r in runs)
        A = A / A.sum(1, keepdims=True)
        mu = (gamma * flat).sum(0) / gamma.sum(0)
        s = np.sqrt((gamma * (flat - mu) ** 2).sum(0) / gamma.sum(0))
    for padding in (0.0, float("nan")):
        padded = np.where(np.arange(7) < lengths[:, None], y, padding)
        result = run(hmm, torch.tensor(padded), torch.tensor(lengths), steps=20)
        np.testing.assert_allclose(list(result.history), path, rtol=1e-9)
        for name, value in {"pi": pi, "A": A, "mu": mu, "s": s}.items():
            close(result.params[name], value)


def test_autoregressive_hmm_with_a_tied_spread_is_stationary():
    y, T_ = LINE[:12], 12

    def model():
        A = pyro.param("A", torch.tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=C.simplex)
        c = pyro.param("c", torch.tensor([-0.5, 0.5]))
        phi = pyro.param("phi", torch.tensor([0.1, 0.2]))
        s = pyro.param("s", torch.tensor(1.0), constraint=C.positive)
        z = torch.tensor(0)
        for t in pyro.markov(range(T_)):
            z = pyro.sample(f"z{t}", dist.Categorical(A[z]))
            before = y[t - 1] if t else torch.tensor(0.0)
            pyro.sample(f"y{t}", dist.Normal(c[z] + phi[z] * before, s), obs=y[t])

    em = ExactPosteriorEM(model)
    plan = em.plan()
    assert plan.compiled and type(plan.updates["phi"].update) is LeastSquares
    assert type(plan.updates["s"].update) is ClosedForm
    q = em.posterior()
    gamma = torch.stack([q.probs(f"z{t}") for t in range(T_)])
    pairs = sum(q.joint(f"z{t - 1}", f"z{t}") for t in range(1, T_))
    em.step()
    P = {n: pyro.param(n).detach().clone().requires_grad_() for n in ("c", "phi", "s")}
    lag = torch.cat([torch.zeros(1), y[:-1]])
    emission = dist.Normal(P["c"] + lag[:, None] * P["phi"], P["s"])
    gradients = torch.autograd.grad((gamma * emission.log_prob(y[:, None])).sum(), list(P.values()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-9
    counts = pairs + torch.stack([gamma[0], torch.zeros(2)])
    close(pyro.param("A"), counts / counts.sum(-1, keepdim=True))
    run(model)


def test_one_matrix_for_two_chains_and_the_first_state():
    """A row of the transition matrix is the initial distribution too, over two chains."""
    E = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    data = {"a": [0, 0, 1, 2, 2, 2], "b": [2, 1, 0, 0]}

    def model():
        A = pyro.param("A", torch.tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=C.simplex)
        for name, x in data.items():
            z = torch.tensor(0)
            for t in pyro.markov(range(len(x))):
                z = pyro.sample(f"{name}z{t}", dist.Categorical(A[z]))
                pyro.sample(f"{name}x{t}", dist.Categorical(E[z]), obs=torch.tensor(x[t]))

    A = np.array([[0.7, 0.3], [0.4, 0.6]])
    for _ in range(10):
        counts = np.zeros((2, 2))
        for x in data.values():
            gamma, pairs, _ = forward_backward(A[0], A, E.numpy()[:, x].T)
            counts += pairs
            counts[0] += gamma[0]
        A = counts / counts.sum(1, keepdims=True)
    close(run(model, steps=10).params["A"], A)


def test_semi_supervised_labels():
    labels = (REAL > 0).long()
    known = torch.arange(N) % 3 == 0

    def model(x):
        w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=C.simplex)
        mu = pyro.param("mu", torch.tensor([-0.5, 0.5]))
        s = pyro.param("s", torch.tensor(1.0), constraint=C.positive)
        with pyro.plate("n", N):
            z = pyro.sample("z", dist.Categorical(w), obs=labels, obs_mask=known)
            pyro.sample("x", dist.Normal(mu[z], s), obs=x)

    x, hot, seen = REAL.numpy(), np.eye(2)[labels], known.numpy()[:, None]
    w, mu, s = np.array([0.5, 0.5]), np.array([-0.5, 0.5]), 1.0
    for _ in range(15):
        r, _ = responsibilities(np.log(w) + norm.logpdf(x[:, None], mu, s))
        r = np.where(seen, hot, r)
        w, mu = r.mean(0), x @ r / r.sum(0)
        s = np.sqrt((r * (x[:, None] - mu) ** 2).sum() / N)
    result = run(model, REAL, steps=15)
    for name, value in {"w": w, "mu": mu, "s": s}.items():
        close(result.params[name], value)


@pytest.mark.parametrize("route", ["stack of a constant", "exposure of zero"])
def test_zero_inflation(route):
    x = torch.tensor(np.where(np.arange(N) % 3 == 0, 0, COUNTS))

    def model(x):
        p = pyro.param("p", torch.tensor(0.5), constraint=C.unit_interval)
        lam = pyro.param("lam", torch.tensor(2.0), constraint=C.positive)
        with pyro.plate("n", N):
            z = pyro.sample("z", dist.Bernoulli(p)).long()
            if route == "stack of a constant":
                rate = torch.stack([torch.tensor(0.0), lam])[z]
            else:
                rate = lam * torch.tensor([0.0, 1.0])[z]
            pyro.sample("x", dist.Poisson(rate), obs=x)

    assert type(ExactPosteriorEM(model).plan(x).updates["lam"].update) is ClosedForm
    p, lam, zero = 0.5, 2.0, x.numpy() == 0
    for _ in range(20):
        on = p * poisson.pmf(x, lam)
        r = on / (on + (1 - p) * zero)
        p, lam = r.mean(), r @ x.numpy() / r.sum()
    result = run(model, x, steps=20)
    close(result.params["p"], p)
    close(result.params["lam"], lam)


def test_rasch_model_on_a_quadrature_grid():
    """Against scipy's maximiser of the marginal likelihood over a fixed grid of abilities."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    weights = weights / weights.sum()
    rng = np.random.default_rng(2)
    x = rng.normal(size=(60, 1)) > np.array([-1.0, -0.2, 0.3, 1.1]) + rng.logistic(size=(60, 4))
    x = x.astype(float)

    def model(x):
        b = pyro.param("b", torch.zeros(4))
        with pyro.plate("people", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor(weights)))
            ability = torch.tensor(nodes)[z].unsqueeze(-1)
            pyro.sample("x", dist.Bernoulli(logits=ability - b).to_event(1), obs=x)

    def loss(b):
        p = expit(nodes[:, None] - b)
        each = x @ np.log(p).T + (1 - x) @ np.log1p(-p).T
        return -logsumexp(each + np.log(weights), axis=1).sum()

    result = run(model, torch.tensor(x), steps=80)
    assert type(result.plan.updates["b"].update) is Newton
    best = minimize(loss, np.zeros(4), options={"gtol": 1e-8})
    assert result.log_evidence == pytest.approx(-best.fun, abs=1e-8)
    close(result.params["b"], best.x, atol=1e-4)


def test_a_change_point():
    y = COUNTS
    after = np.arange(N)[None, :] >= np.arange(N)[:, None]  # (change, year)

    def model(y):
        lam = pyro.param("lam", torch.tensor([3.0, 4.0]), constraint=C.positive)
        change = pyro.sample("change", dist.Categorical(torch.ones(N) / N))
        with pyro.plate("years", N):
            z = (torch.arange(N) >= change).long()
            pyro.sample("y", dist.Poisson(lam[z]), obs=y)

    lam = np.array([3.0, 4.0])
    for _ in range(15):
        log_p = poisson.logpmf(y[:, None], lam)
        r, _ = responsibilities(np.where(after, log_p[:, 1], log_p[:, 0]).sum(1))
        late = r @ after
        lam = np.array([(1 - late) @ y.numpy() / (1 - late).sum(), late @ y.numpy() / late.sum()])
    result = run(model, y, steps=15)
    close(result.params["lam"], lam)
    assert result.plan.compiled


def test_weights_equal_replication_under_a_latent_outside_the_plate():
    x = torch.tensor([0.3, -1.0, 2.0, 1.5])
    times = torch.tensor([3.0, 1.0, 2.0, 1.0])

    def model(x, times):
        p = pyro.param("p", torch.tensor([0.3, 0.7]), constraint=C.simplex)
        w = pyro.param("w", torch.tensor([[0.6, 0.4], [0.3, 0.7]]), constraint=C.simplex)
        mu = pyro.param("mu", torch.tensor([[-1.0, 0.5], [0.2, 1.5]]))
        s = pyro.param("s", torch.tensor([1.0, 0.8]), constraint=C.positive)
        g = pyro.sample("g", dist.Categorical(p))
        with pyro.plate("n", len(x)), pyro.poutine.scale(scale=times):
            z = pyro.sample("z", dist.Categorical(w[g]))
            pyro.sample("x", dist.Normal(mu[g, z], s[z]), obs=x)

    short = run(model, x, times, steps=15)
    many = torch.repeat_interleave(x, times.long())
    long = run(model, many, torch.ones(7), steps=15)
    np.testing.assert_allclose(list(short.history), list(long.history), rtol=1e-10)
    for name, value in long.params.items():
        close(short.params[name], value)


def test_structural_zeros_stay_zero_under_gradient_steps_too():
    start = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.0]])
    y = torch.tensor([0.0, 0.2, 0.1, 2.1, 1.9, 4.2, 4.0, 3.9])

    def model(y):
        A = pyro.param("A", start, constraint=C.simplex)
        mu = pyro.param("mu", torch.tensor([0.0, 2.0, 4.0]))
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z{t}", dist.Categorical(A[z]))
            pyro.sample(f"y{t}", dist.Normal(mu[z], 0.5), obs=y[t])

    closed = run(model, y, steps=10)
    by_gradient = run(model, y, steps=10, updates={"A": Gradient()})
    assert bool((by_gradient.params["A"][start == 0] == 0).all())
    close(by_gradient.params["A"], closed.params["A"], rtol=1e-5, atol=1e-7)
