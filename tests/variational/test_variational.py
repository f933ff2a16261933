"""The guide's bound against quadrature, brute force, analytic gradients, plain torch and Pyro."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from scipy.integrate import quad
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader

from pyro_em import Alternating, DrawnPosterior, ExactPosteriorEM
from pyro_em.analysis.evidence import estimate_from, pareto_k
from pyro_em.variational.bound import Variational
from pyro_em.variational.particle import LogWeights
from tests.data_sets import iris
from tests.even_draws import even_draws

pytestmark = pytest.mark.slow

T = torch.tensor


def estimated(values, proposal):
    """The summary of some log weights without a scale."""
    one = torch.ones((), dtype=torch.float64)
    return estimate_from(LogWeights(values, one, 0 * one), proposal)


def given(mean: float, sd: float, *, transformed: bool = False):
    """A guide for the scalar latent `h`."""

    def guide(*args):
        m = pyro.param("m", T(mean))
        s = pyro.param("s", T(sd), constraint=constraints.positive)
        pyro.sample("h", (dist.LogNormal if transformed else dist.Normal)(m, s))

    return guide


def variational(em: ExactPosteriorEM, *args) -> Variational:
    found = em._look(args, {}, look_only=True)
    assert isinstance(found, Variational)
    return found


def leaf(name: str) -> torch.Tensor:
    return pyro.get_param_store()._params[name]


def gradients(
    v: Variational, names, *args, draws: int, factors=None, baseline: bool = True, losses=None
):
    """Single-draw gradients of the loss, which joins `losses`. # (draws, len(names) flattened)"""
    rows = []
    averages: dict[str, float] = {}
    for _ in range(draws):
        for n in names:
            leaf(n).grad = None
        loss = v.loss(args, {}, 1, factors, averages if baseline else None)
        loss.backward()
        if losses is not None:
            losses.append(loss.detach())
        rows.append(torch.cat([leaf(n).grad.reshape(-1) for n in names]))
    return torch.stack(rows)


def assert_mean(rows: torch.Tensor, want, width: float = 3.5) -> None:
    want = torch.as_tensor(want).reshape(-1)
    error = rows.std(0) / len(rows) ** 0.5
    assert bool(((rows.mean(0) - want).abs() <= width * error + 1e-9).all()), (
        rows.mean(0),
        want,
        error,
    )


# ------------------------------------------------------------------ 1. quadrature


def normal_normal(x):
    h = pyro.sample("h", dist.Normal(0.5, 2.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(h, 0.7), obs=x)


def poisson_rate(x):
    h = pyro.sample("h", dist.LogNormal(0.2, 0.8))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Poisson(h), obs=x)


def discrete_inside(x):
    h = pyro.sample("h", dist.Normal(0.5, 2.0))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(T([0.3, 0.7])))
        pyro.sample("x", dist.Normal(torch.stack([h, -h * h])[z], 0.7), obs=x)


X = [0.3, 1.2, 2.0]
log_normal = scipy.stats.norm.logpdf


def log_likelihood(which: str, h: float) -> float:
    if which == "normal":
        return sum(log_normal(x, h, 0.7) for x in X)
    if which == "poisson":
        return float(sum(scipy.stats.poisson.logpmf(x, h) for x in (1, 0, 4)))
    return float(
        sum(
            np.logaddexp(
                math.log(0.3) + log_normal(x, h, 0.7), math.log(0.7) + log_normal(x, -h * h, 0.7)
            )
            for x in X
        )
    )


CASES = {
    "normal": (normal_normal, X, (0.9, 0.5), False, (0.5, 2.0)),
    "poisson": (poisson_rate, [1.0, 0.0, 4.0], (0.4, 0.5), True, (0.2, 0.8)),
    "discrete": (discrete_inside, X, (0.9, 0.3), False, (0.5, 2.0)),
}


@pytest.mark.parametrize("which", list(CASES))
def test_the_bound_and_its_terms_agree_with_quadrature(which) -> None:
    model, data, (m, s), transformed, (m0, s0) = CASES[which]
    em = ExactPosteriorEM(model, given(m, s, transformed=transformed), strategy="guide")
    # Where nothing is summed under draws, fewer that are even come as near as n at random.
    n, draws = (300, 300) if which == "discrete" else (1000, 64)
    with nullcontext() if which == "discrete" else even_draws(1):
        terms = em.elbo(T(data), num_particles=draws)
    error = terms.standard_error * (draws / n) ** 0.5

    def under_q(f):
        return quad(lambda u: math.exp(log_normal(u, m, s)) * f(u), m - 10 * s, m + 10 * s)[0]

    value = (lambda u: math.exp(u)) if transformed else (lambda u: u)
    likelihood = under_q(lambda u: log_likelihood(which, value(u)))
    kl = under_q(lambda u: log_normal(u, m, s) - log_normal(u, m0, s0))
    entropy = scipy.stats.norm(m, s).entropy() + (m if transformed else 0.0)
    assert not terms.exact and error > 0
    assert abs(terms.value - (likelihood - kl)) < 3.5 * error
    assert terms.value == pytest.approx(terms.expected_log_joint + terms.entropy, abs=1e-9)
    assert terms.value == pytest.approx(terms.reconstruction - terms.kl + terms.log_prior, abs=1e-9)
    if which == "discrete":
        # The split belongs to q(h) p(z | h, x): E_q of its parts, by quadrature.
        def inner(h):
            a = np.array(
                [
                    [
                        math.log(0.3) + log_normal(x, h, 0.7),
                        math.log(0.7) + log_normal(x, -h * h, 0.7),
                    ]
                    for x in X
                ]
            )
            r = np.exp(a - np.logaddexp(a[:, :1], a[:, 1:]))
            data = (r * (a - np.log([0.3, 0.7]))).sum()
            return data, -np.nansum(r * np.log(np.maximum(r, 1e-300)))

        likelihood = under_q(lambda u: inner(u)[0])
        entropy += under_q(lambda u: inner(u)[1])
        kl = likelihood - (under_q(lambda u: log_likelihood(which, u)) - kl)
    # Spreads of one draw of log q and of the likelihood, over sqrt(n).
    spread = {"normal": 3.0, "poisson": 2.5, "discrete": 6.0}[which]
    assert terms.entropy == pytest.approx(entropy, abs=3.5 * 1.5 / n**0.5)
    assert terms.reconstruction == pytest.approx(likelihood, abs=3.5 * spread / n**0.5)
    assert terms.kl == pytest.approx(kl, abs=3.5 * spread / n**0.5)


def test_a_product_of_two_latents() -> None:
    def model(r):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("r", dist.Normal(u * v, 1.0), obs=r)

    def guide(r, su=0.6, sv=0.5):
        pyro.sample("u", dist.Normal(pyro.param("mu", T(1.0)), su))
        pyro.sample("v", dist.Normal(pyro.param("mv", T(0.8)), sv))

    r = T(2.0)
    em = ExactPosteriorEM(model, guide)
    with even_draws(2):
        terms = em.elbo(r, num_particles=256)
        grads = gradients(variational(em, r), ["mu", "mv"], r, draws=256)
        # Wider than the prior, so that the weights are bounded.
        wide = ExactPosteriorEM(model, partial(guide, su=1.2, sv=1.2))
        estimate = wide.estimate_evidence(r, num_particles=512)
    # E (r - uv)^2 by moments; KL by formula.
    second = (1 + 0.36) * (0.64 + 0.25)
    likelihood = -0.5 * math.log(2 * math.pi) - 0.5 * (4 - 4 * 0.8 + second)
    kl = sum(0.5 * (m * m + s * s - 1) - math.log(s) for m, s in ((1.0, 0.6), (0.8, 0.5)))
    as_2000_at_random = terms.standard_error * (256 / 2000) ** 0.5
    assert abs(terms.value - (likelihood - kl)) < 3.5 * as_2000_at_random
    # log p(r) = log of a one-dimensional integral, u summed out: r | v ~ N(0, 1 + v^2).
    evidence = math.log(
        quad(lambda v: math.exp(log_normal(v) + log_normal(2.0, 0, math.sqrt(1 + v * v))), -12, 12)[
            0
        ]
    )
    assert likelihood - kl < evidence
    assert abs(estimate.value - evidence) < 5 * estimate.standard_error * (512 / 3000) ** 0.5
    # d/dmu of the bound: r mv - mu (mv^2 + sv^2) - mu
    want = [-(2 * 0.8 - 1 * 0.89 - 1), -(2 * 1.0 - 0.8 * 1.36 - 0.8)]
    assert_mean(grads, want, width=3.5 * (256 / 750) ** 0.5)


def jacobian_case(guide_class, shift: float):
    x = T([1.0, 0.0, 4.0])

    def model(x):
        h = pyro.sample("h", dist.LogNormal(0.2, 0.8))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Poisson(h), obs=x)

    em = ExactPosteriorEM(model, guide_class)
    em.plan(x)
    name, scale = next(
        (n, n.replace("locs", "scales").replace(".loc", ".scale"))
        for n in pyro.get_param_store()
        if ".loc" in n
    )
    with torch.no_grad():
        leaf(name).fill_(shift)
    s = float(pyro.param(scale))
    want = quad(
        lambda u: (
            math.exp(log_normal(u, shift, s))
            * (
                log_likelihood("poisson", math.exp(u))
                + log_normal(u, 0.2, 0.8)
                - log_normal(u, shift, s)
            )
        ),
        shift - 9 * s,
        shift + 9 * s,
    )[0]
    return em, x, want


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoDiagonalNormal])
def test_an_autoguide_of_a_positive_latent_keeps_its_jacobian(guide_class) -> None:
    em, x, want = jacobian_case(guide_class, 1.0)
    with even_draws(1):
        terms = em.elbo(x, num_particles=64)
    assert abs(terms.value - want) < 3.5 * terms.standard_error * (64 / 400) ** 0.5
    assert abs(terms.value - want) < 0.2


# ------------------------------------------------------------------ 2. wrong enumerated guides


def brute(log_joint: np.ndarray, q: np.ndarray) -> dict[str, float]:
    evidence = np.logaddexp.reduce(log_joint.ravel())
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.nansum(np.where(q > 0, q * (log_joint - np.log(q)), 0.0))
        entropy = -np.nansum(np.where(q > 0, q * np.log(q), 0.0))
    return {"value": value, "evidence": evidence, "entropy": entropy}


def hmm(x):
    p0 = pyro.param("p0", T([0.6, 0.4]))
    A = pyro.param("A", T([[0.7, 0.3], [0.2, 0.8]]))
    mu = pyro.param("mu", T([-1.0, 1.5]))
    with pyro.plate("n", len(x)):
        z = None
        for t in range(3):
            z = pyro.sample(f"z{t}", dist.Categorical(p0 if z is None else A[z]))
            pyro.sample(f"x{t}", dist.Normal(mu[z], 1.0), obs=x[:, t])


def product_guide(x):
    with pyro.plate("n", len(x)):
        for t in range(3):
            lo = pyro.param(f"lo{t}", lambda: torch.randn(len(x), 2))
            pyro.sample(f"z{t}", dist.Categorical(logits=lo))


def chain_guide(x):
    with pyro.plate("n", len(x)):
        z = None
        for t in range(3):
            lo = pyro.param(f"c{t}", lambda: torch.randn(2, 2))
            row = lo[0].expand(len(x), 2) if z is None else lo[z]
            z = pyro.sample(f"z{t}", dist.Categorical(logits=row))


@pytest.mark.parametrize("guide", [product_guide, chain_guide])
def test_a_wrong_enumerated_guide_to_1e_8(guide) -> None:
    x = torch.randn(4, 3)
    em = ExactPosteriorEM(hmm, guide, strategy="guide")
    terms = em.elbo(x)
    p0, A, mu = (pyro.param(n).detach().numpy() for n in ("p0", "A", "mu"))
    total = dict.fromkeys(("value", "evidence", "entropy", "data"), 0.0)
    for n in range(4):
        joint, likelihood, q = (np.zeros((2, 2, 2)) for _ in range(3))
        for z in itertools.product(range(2), repeat=3):
            likelihood[z] = sum(log_normal(float(x[n, t]), mu[z[t]], 1.0) for t in range(3))
            joint[z] = likelihood[z] + math.log(p0[z[0]] * A[z[0], z[1]] * A[z[1], z[2]])
            if guide is product_guide:
                rows = [torch.softmax(pyro.param(f"lo{t}")[n], -1) for t in range(3)]
            else:
                soft = [torch.softmax(pyro.param(f"c{t}"), -1) for t in range(3)]
                rows = [soft[0][0], soft[1][z[0]], soft[2][z[1]]]
            q[z] = math.prod(float(rows[t][z[t]]) for t in range(3))
        for key, v in brute(joint, q).items():
            total[key] += v
        total["data"] += (q * likelihood).sum()
    assert terms.exact and terms.standard_error == 0.0
    assert terms.value == pytest.approx(total["value"], abs=1e-8)
    assert terms.log_evidence == pytest.approx(total["evidence"], abs=1e-8)
    assert terms.gap == pytest.approx(total["evidence"] - total["value"], abs=1e-8)
    assert terms.entropy == pytest.approx(total["entropy"], abs=1e-8)
    assert terms.reconstruction == pytest.approx(total["data"], abs=1e-8)
    assert terms.kl == pytest.approx(total["data"] - total["value"], abs=1e-8)
    assert terms.expected_log_joint == pytest.approx(total["value"] - total["entropy"], abs=1e-8)
    assert em.evaluate_loss(x) == pytest.approx(-total["value"], abs=1e-8)
    if guide is product_guide:
        q = {f"z{t}": torch.softmax(pyro.param(f"lo{t}"), -1).detach() for t in range(3)}
        assert em.elbo(x, q=q).value == pytest.approx(terms.value, abs=1e-8)


def test_a_point_estimate_beside_an_enumerated_guide() -> None:
    """log_prior is the points' prior, and the gap is KL(q || posterior at the points)."""
    x = T([1.0, 2.0, 8.0])

    def model(x):
        with pyro.plate("k", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(T([0.4, 0.6])))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    def guide(x):
        with pyro.plate("k", 2):
            pyro.sample("mu", dist.Delta(pyro.param("m", T([1.0, 6.0]))))
        lo = pyro.param("lo", T([[1.0, 0.0], [0.3, 0.1], [0.0, 0.5]]))
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Categorical(logits=lo))

    terms = ExactPosteriorEM(model, guide, strategy="guide").elbo(x)
    q = torch.softmax(pyro.param("lo"), -1).detach()
    joint = dist.Normal(T([1.0, 6.0]), 1.0).log_prob(x[:, None]) + T([0.4, 0.6]).log()
    prior = float(dist.Normal(0.0, 5.0).log_prob(T([1.0, 6.0])).sum())
    value = float((q * (joint - q.log())).sum())
    assert terms.value == pytest.approx(value + prior, abs=1e-8)
    assert terms.log_prior == pytest.approx(prior, abs=1e-8)
    assert terms.gap == pytest.approx(float(joint.logsumexp(-1).sum()) - value, abs=1e-8)


# ------------------------------------------------------------------ 3. exact sums under draws


def switching(x, y):
    w = pyro.param("w", T([0.3, 0.7]), constraint=constraints.simplex)
    slope = pyro.param("slope", T([1.0, -2.0]))
    effect = pyro.sample("h", dist.Normal(0.0, 1.5))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(slope[z] * x + effect, 0.5), obs=y)


def test_a_switching_regression_with_a_random_effect_at_the_same_draws() -> None:
    x, y = torch.randn(7), torch.randn(7)
    em = ExactPosteriorEM(switching, given(0.3, 0.6))
    em.plan(x, y)
    for seed in range(3):
        torch.manual_seed(seed)
        got = em.elbo(x, y).value
        torch.manual_seed(seed)
        h = dist.Normal(0.3, 0.6).rsample()
        mean = T([1.0, -2.0]) * x[:, None] + h
        per = (dist.Normal(mean, 0.5).log_prob(y[:, None]) + T([0.3, 0.7]).log()).logsumexp(-1)
        want = per.sum() + dist.Normal(0.0, 1.5).log_prob(h) - dist.Normal(0.3, 0.6).log_prob(h)
        assert got == pytest.approx(float(want), abs=1e-9)


def gmvae(x):
    w = pyro.param("w", T([0.2, 0.5, 0.3]), constraint=constraints.simplex)
    mu = pyro.param("mu", T([[-1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]))
    W = pyro.param("W", T([[1.0, 0.5, -1.0], [0.2, 0.3, 1.0]]))
    with pyro.plate("n", len(x)):
        y = pyro.sample("y", dist.Categorical(w))
        h = pyro.sample("h", dist.Normal(mu[y], 1.0).to_event(1))
        pyro.sample("x", dist.Normal(h @ W, 0.8).to_event(1), obs=x)


def code_guide(x):
    V = pyro.param("V", T([[0.3, 0.1], [0.2, -0.4], [-0.1, 0.5]]))
    s = pyro.param("sd", T([0.5, 0.6]), constraint=constraints.positive)
    with pyro.plate("n", len(x)):
        pyro.sample("h", dist.Normal(x @ V, s).to_event(1))


def gmvae_by_hand(x, h, V, s, mu, w, W):
    prior = dist.Normal(mu, 1.0).log_prob(h[:, None]).sum(-1) + w.log()
    data = dist.Normal(h @ W, 0.8).log_prob(x).sum(-1)
    return prior.logsumexp(-1) + data - dist.Normal(x @ V, s).log_prob(h).sum(-1)


def test_a_mixture_prior_on_a_code_at_the_same_draws_with_its_gradient() -> None:
    x = torch.randn(6, 3)
    em = ExactPosteriorEM(gmvae, code_guide, strategy="guide")
    em.plan(x)
    v = variational(em, x)
    names = ["V", "sd", "mu", "W", "w"]
    torch.manual_seed(3)
    grads = gradients(v, names, x, draws=1)[0]
    torch.manual_seed(3)
    terms = em.elbo(x)
    torch.manual_seed(3)
    noise = torch.randn(6, 2)
    P = {n: pyro.param(n) for n in names}
    h = x @ P["V"] + P["sd"] * noise
    per = gmvae_by_hand(x, h, P["V"], P["sd"], P["mu"], P["w"], P["W"])
    assert terms.value == pytest.approx(float(per.sum()), abs=1e-9)
    assert torch.allclose(terms.pointwise, per.detach(), atol=1e-9)
    want = torch.autograd.grad(-per.sum(), [leaf(n) for n in names])
    assert torch.allclose(grads, torch.cat([g.reshape(-1) for g in want]), atol=1e-9)


# ------------------------------------------------------------------ 4. gradients


def counted_model(x, prior=2.0):
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Poisson(prior))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def counted_guide(x):
    rate = pyro.param("rate", T(1.5))
    with pyro.plate("n", len(x)):
        pyro.sample("z", dist.Poisson(rate))


def counted_gradient(x, rate=1.5, prior=2.0) -> float:
    r = T(rate, requires_grad=True)
    k = torch.arange(60.0)
    log_q = dist.Poisson(r).log_prob(k)
    f = dist.Poisson(prior).log_prob(k) + dist.Normal(k, 1.0).log_prob(x[:, None]) - log_q
    (-(log_q.exp() * f).sum()).backward()
    return float(r.grad)


def test_score_function_of_counts_in_a_plate() -> None:
    x = torch.arange(5.0)
    em = ExactPosteriorEM(counted_model, counted_guide)
    rows = gradients(variational(em, x), ["rate"], x, draws=500)
    assert_mean(rows, counted_gradient(x))


def test_score_function_of_a_batch_that_stands_for_all_data() -> None:
    """The gradient of N / B times a batch's bound is N / B times the gradient, not its square."""
    x = T([2.0, 3.0])
    em = ExactPosteriorEM(counted_model, counted_guide)
    rows = gradients(variational(em, x), ["rate"], x, draws=500, factors={"n": 3.0})
    assert_mean(rows, 3 * counted_gradient(x))


def test_score_function_under_a_scale() -> None:
    x = T([2.0, 3.0])
    model, guide = (pyro.poutine.scale(f, 3.0) for f in (counted_model, counted_guide))
    em = ExactPosteriorEM(model, lambda x: guide(x))
    rows = gradients(variational(em, x), ["rate"], x, draws=500)
    assert_mean(rows, 3 * counted_gradient(x))


def test_score_function_and_exact_sums_of_a_batch() -> None:
    """Poisson draws per row, a label summed inside, rows counted three times."""
    x = T([2.0, 3.0])

    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Poisson(2.0))
            y = pyro.sample("y", dist.Categorical(T([0.4, 0.6])))
            pyro.sample("x", dist.Normal(z * T([1.0, -1.0])[y], 1.0), obs=x)

    def want(scale):
        r = T(1.5, requires_grad=True)
        k = torch.arange(60.0)
        log_q = dist.Poisson(r).log_prob(k)
        data = torch.logaddexp(
            math.log(0.4) + dist.Normal(k, 1.0).log_prob(x[:, None]),
            math.log(0.6) + dist.Normal(-k, 1.0).log_prob(x[:, None]),
        )
        (-scale * (log_q.exp() * (dist.Poisson(2.0).log_prob(k) + data - log_q)).sum()).backward()
        return float(r.grad)

    v = variational(ExactPosteriorEM(model, counted_guide), x)
    assert v.routing.exact == ("y",) and v.routing.drawn == ("z",)
    assert_mean(gradients(v, ["rate"], x, draws=200), want(1.0))
    assert_mean(gradients(v, ["rate"], x, draws=200, factors={"n": 3.0}), want(3.0))


def hierarchy(x):
    """A global Bernoulli, a Categorical per group and a Bernoulli per row; all small."""
    a = pyro.sample("a", dist.Bernoulli(0.4))
    with pyro.plate("g", 2, dim=-2):
        b = pyro.sample("b", dist.Categorical(torch.stack([0.2 + 0.3 * a, 0.8 - 0.3 * a], -1)))
        with pyro.plate("n", x.shape[1], dim=-1):
            c = pyro.sample("c", dist.Bernoulli(0.3 + 0.2 * b))
            pyro.sample("x", dist.Normal(c + b - a, 1.0), obs=x)


def hierarchy_guide(x):
    a = pyro.sample("a", dist.Bernoulli(logits=pyro.param("la", T(0.3))))
    lb = pyro.param("lb", T([[0.4, -0.2], [0.1, 0.6]]))
    lc = pyro.param("lc", T(0.5))
    with pyro.plate("g", 2, dim=-2):
        b = pyro.sample("b", dist.Categorical(logits=lb[:, None, :]))
        with pyro.plate("n", x.shape[1], dim=-1):
            pyro.sample("c", dist.Bernoulli(logits=lc + b - a))


def hierarchy_gradient(x):
    la, lb, lc = (T(v, requires_grad=True) for v in (0.3, [[0.4, -0.2], [0.1, 0.6]], 0.5))
    total = 0.0
    for a in (0.0, 1.0):
        qa = dist.Bernoulli(logits=la).log_prob(T(a))
        inner = dist.Bernoulli(0.4).log_prob(T(a)) - qa
        for g in range(2):
            for b in (0, 1):
                qb = torch.log_softmax(lb[g], -1)[b]
                pb = math.log([0.2 + 0.3 * a, 0.8 - 0.3 * a][b])
                group = pb - qb
                for n in range(x.shape[1]):
                    for c in (0.0, 1.0):
                        qc = dist.Bernoulli(logits=lc + b - a).log_prob(T(c))
                        f = (
                            dist.Bernoulli(0.3 + 0.2 * b).log_prob(T(c))
                            + dist.Normal(c + b - a, 1.0).log_prob(x[g, n])
                            - qc
                        )
                        group = group + qc.exp() * f
                inner = inner + qb.exp() * group
        total = total + qa.exp() * inner
    (-total).backward()
    return float(-total), torch.cat([la.grad.reshape(-1), lb.grad.reshape(-1), lc.grad.reshape(-1)])


def test_score_functions_of_global_and_local_latents_and_their_downstream_costs() -> None:
    x = T([[0.3, 1.0, -0.2], [1.5, 0.1, 2.0]])
    em = ExactPosteriorEM(hierarchy, hierarchy_guide, strategy="guide")
    loss, want = hierarchy_gradient(x)
    v = variational(em, x)
    assert v.routing.enumerated and em.evaluate_loss(x) == pytest.approx(loss, abs=1e-9)
    assert torch.allclose(gradients(v, ["la", "lb", "lc"], x, draws=1)[0], want, atol=1e-8)
    drawn = v.with_draws_only()
    rows = gradients(drawn, ["la", "lb", "lc"], x, draws=750)
    assert_mean(rows, want)


def test_plates_keep_the_variance_from_growing_with_the_square() -> None:
    variance = {}
    for n in (5, 20, 80):
        pyro.clear_param_store()
        x = torch.full((n,), 2.0)
        em = ExactPosteriorEM(counted_model, counted_guide)
        rows = gradients(variational(em, x), ["rate"], x, draws=400)
        variance[n] = float(rows[50:].var())
    assert 2 < variance[20] / variance[5] < 8  # linear: 4
    assert 2 < variance[80] / variance[20] < 8


class ByScore(dist.Normal):
    has_rsample = False


@pytest.mark.parametrize("kind", ["score", "path"])
def test_single_draw_variances_of_both_estimators_of_a_square(kind) -> None:
    """f = log p - log q = x^2: gradient 2 phi; variances phi^4 + 14 phi^2 + 15 and 4."""
    phi, n = 1.0, 1000
    family = ByScore if kind == "score" else dist.Normal

    # Terms that cancel log p and log q of the draw; so that f is x^2 whatever phi is.
    def model(x):
        h = pyro.sample("h", ByScore(0.0, 1.0))
        pyro.factor("f", h**2 - ByScore(0.0, 1.0).log_prob(h))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        m = pyro.param("m", T(phi))
        pyro.sample("h", family(m, 1.0))

    em = ExactPosteriorEM(model, guide)
    v = replace(variational(em, T(0.0)), analytic=frozenset())
    # The entropy is constant; its pathwise gradient is zero draw by draw, its score is not: the
    # cost is x^2 - log q, so that a constant is left where the guide's log q is x-dependent.
    rows = -gradients(v, ["m"], T(0.0), draws=n, baseline=False)[:, 0]
    if kind == "path":
        # -log q contributes e of mean zero... by reparameterisation log q(m + e) is constant in m.
        assert abs(float(rows.var()) - 4.0) < 3.5 * 4 * (2 / len(rows)) ** 0.5
        assert_mean(rows[:, None], 2 * phi)
        return
    # Score: (x^2 + e^2 / 2 + c) e with c = log(2 pi) / 2; moments of e up to the sixth.
    c = 0.5 * math.log(2 * math.pi)
    e = np.polynomial.hermite_e.hermegauss(40)
    cost = (phi + e[0]) ** 2 + e[0] ** 2 / 2 + c
    weights = e[1] / e[1].sum()
    mean = (weights * cost * e[0]).sum()
    want = (weights * (cost * e[0]) ** 2).sum() - mean**2
    assert mean == pytest.approx(2 * phi)
    kurtosis = (weights * (cost * e[0] - mean) ** 4).sum() / want**2
    assert abs(float(rows.var()) / want - 1) < 3.5 * ((kurtosis - 1) / len(rows)) ** 0.5
    # The same with log q cancelled: x^2 alone, by the textbook's numbers.
    square = (phi + e[0]) ** 2 * e[0]
    book = (weights * square**2).sum() - (weights * square).sum() ** 2
    assert book == pytest.approx(phi**4 + 14 * phi**2 + 15)


def test_textbook_variance_of_the_score_function_through_the_library() -> None:
    """log q has no gradient path here: the factor subtracts it at the detached parameter."""
    phi = 1.0

    def model(x):
        h = pyro.sample("h", ByScore(phi, 1.0))  # cancels log q in value
        pyro.factor("f", h**2)
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        pyro.sample("h", ByScore(pyro.param("m", T(phi)), 1.0))

    v = variational(ExactPosteriorEM(model, guide), T(0.0))
    rows = -gradients(v, ["m"], T(0.0), draws=1250, baseline=False)
    assert_mean(rows, 2 * phi)
    want = phi**4 + 14 * phi**2 + 15
    e, w = np.polynomial.hermite_e.hermegauss(40)
    g = (phi + e) ** 2 * e - 2 * phi
    kurtosis = (w * g**4).sum() / w.sum() / want**2
    # the data term -log(2 pi)/2 is independent of h and must not be in its cost
    assert abs(float(rows.var()) / want - 1) < 3.5 * ((kurtosis - 1) / len(rows)) ** 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"use_decaying_avg_baseline": True},
        {"baseline_value": None},
    ],
)
def test_users_baselines_leave_the_gradient_unbiased_from_the_first_step(options) -> None:
    x = T([2.0, 3.0])

    def guide(x):
        rate = pyro.param("rate", T(1.5))
        given = dict(options)
        if "baseline_value" in given:
            given["baseline_value"] = pyro.param("b", T([-3.0, -4.0]))
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Poisson(rate), infer={"baseline": given})

    v = variational(ExactPosteriorEM(counted_model, guide), x)
    rows = gradients(v, ["rate"], x, draws=400, baseline=False)  # each draw is a first one
    assert_mean(rows, counted_gradient(x))


def test_users_baselines_are_used_under_exact_sums() -> None:
    def model(x):
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Poisson(2.0))
            y = pyro.sample("y", dist.Categorical(T([0.4, 0.6])))
            pyro.sample("x", dist.Normal(z * T([1.0, -1.0])[y], 1.0), obs=x)

    def guide(x):
        b = pyro.param("b", torch.zeros(len(x)))
        with pyro.plate("n", len(x)):
            pyro.sample(
                "z",
                dist.Poisson(pyro.param("rate", T(1.5))),
                infer={"baseline": {"baseline_value": b}},
            )

    x = T([2.0, 3.0])
    v = variational(ExactPosteriorEM(model, guide), x)
    v.loss((x,), {}).backward()
    assert leaf("b").grad is not None and bool((leaf("b").grad != 0).all())


# ------------------------------------------------------------------ 5. linear VAE


@pytest.mark.parametrize(("k", "evidence"), [(1, -470.669458), (2, -404.962780)])
def test_a_linear_vae_closes_on_probabilistic_pca(k, evidence) -> None:
    x = iris()
    x = x - x.mean(0)
    n, d = x.shape
    values, vectors = torch.linalg.eigh(x.T @ x / n)
    values, vectors = values.flip(0), vectors.flip(1)
    noise = values[k:].mean()
    W = vectors[:, :k] * (values[:k] - noise).sqrt()
    C = W @ W.T + noise * torch.eye(d)
    want = float(dist.MultivariateNormal(torch.zeros(d), C).log_prob(x).sum())
    if abs(want - evidence) > 1e-3:
        pytest.fail(f"the reference is {want}")
    M = W.T @ W + noise * torch.eye(k)

    def model(x):
        scale = pyro.param("sigma", noise.sqrt().clone(), constraint=constraints.positive)
        loadings = pyro.param("W", W.clone())
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(torch.zeros(k), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(h @ loadings.T, scale).to_event(1), obs=x)

    def guide(x):
        V = pyro.param("V", 0.1 * torch.randn(d, k))
        s = pyro.param("s", 0.5 * torch.ones(k), constraint=constraints.positive)
        with pyro.plate("n", len(x)):
            pyro.sample("h", dist.Normal(x @ V, s).to_event(1))

    em = ExactPosteriorEM(model, guide, lambda p: torch.optim.Adam(p, lr=0.08), strategy="guide")
    start = em.elbo(x, num_particles=50)
    assert start.value < evidence
    em.fit(x, max_steps=250, seed=0, progress=False)
    after = em.elbo(x, num_particles=200)
    assert after.value < evidence + 5 * after.standard_error
    assert evidence - after.value < {1: 3.0, 2: 10.0}[k]  # measured after 250 steps of Adam
    # At the analytic posterior the bound is the evidence (k axes are orthogonal: M is diagonal).
    with torch.no_grad():
        leaf("V").copy_(W @ torch.linalg.inv(M))
        leaf("s").copy_((noise * torch.linalg.inv(M).diagonal()).sqrt().log())
        leaf("W").copy_(W)
        leaf("sigma").copy_(noise.sqrt().log())
    tight = em.elbo(x, num_particles=200)
    assert abs(tight.value - evidence) < 5 * tight.standard_error + 1e-5
    estimate = em.estimate_evidence(x, num_particles=50)
    assert estimate.value == pytest.approx(evidence, abs=1e-5)
    assert estimate.effective_sample_size == pytest.approx(50, abs=1e-4)


# ------------------------------------------------------------------ 6. step by step


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.log_sd = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.mean(x), self.log_sd(x).exp()


def networks(seed: int):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), Encoder()


def vae(decoder, encoder):
    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("n", len(x)):
            m, s = encoder(x)
            pyro.sample("z", dist.Normal(m, s).to_event(1))

    return model, guide


BITS = T([[1.0, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)


def plain_bound(decoder, encoder, x):
    m, s = encoder(x)
    z = m + s * torch.normal(torch.zeros_like(m), torch.ones_like(s))
    kl = 0.5 * (m * m + s * s - 1) - s.log()
    return dist.Bernoulli(logits=decoder(z)).log_prob(x).sum() - kl.sum()


def test_algorithm_1_is_thirty_lines_of_plain_torch() -> None:
    ours, theirs = networks(1), networks(1)
    em = ExactPosteriorEM(*vae(*ours), lambda p: torch.optim.SGD(p, lr=0.03))
    em.plan(BITS)
    schedule = Alternating(2, 3, model_optim=lambda p: torch.optim.Adam(p, lr=0.01))
    result = em.fit(BITS, max_steps=4, schedule=schedule, seed=5, progress=False)
    decoder, encoder = theirs
    inner = torch.optim.SGD(encoder.parameters(), lr=0.03)
    outer = torch.optim.Adam(decoder.parameters(), lr=0.01)
    torch.manual_seed(5)
    torch.randint(2**31, ())  # the order of batches
    bounds = []
    for _ in range(4):
        for optimiser, steps in ((inner, 2), (outer, 3)):
            for i in range(steps):
                optimiser.zero_grad()
                bound = plain_bound(decoder, encoder, BITS)
                (-bound).backward()
                if optimiser is inner and i == 0:
                    bounds.append(float(bound))
                optimiser.step()
    assert list(result.history) == pytest.approx(bounds, abs=1e-9)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-10)


def test_algorithm_1_on_batches_with_several_draws() -> None:
    """B = 2 of five rows (one left over), L = 3 draws, two steps of the guide, one of the model."""
    ours, theirs = networks(1), networks(1)
    em = ExactPosteriorEM(*vae(*ours), lambda p: torch.optim.SGD(p, lr=0.01), num_particles=3)
    em.plan(BITS)
    schedule = Alternating(2, 1, model_optim=lambda p: torch.optim.Adam(p, lr=0.01))
    options = {"schedule": schedule, "seed": 5, "progress": False}
    result = em.fit(BITS, batch_size=2, num_epochs=2, **options)
    decoder, encoder = theirs
    inner = torch.optim.SGD(encoder.parameters(), lr=0.01)
    outer = torch.optim.Adam(decoder.parameters(), lr=0.01)
    torch.manual_seed(5)
    order = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    bounds = []
    for _ in range(2):
        for rows in torch.randperm(5, generator=order).split(2):
            for optimiser, steps in ((inner, 2), (outer, 1)):
                for i in range(steps):
                    optimiser.zero_grad()
                    draws = [plain_bound(decoder, encoder, BITS[rows]) for _ in range(3)]
                    bound = sum(draws) / 3 * 5 / len(rows)
                    (-bound).backward()
                    if optimiser is inner and i == 0:
                        bounds.append(float(bound.detach()))
                    optimiser.step()
    assert list(result.history) == pytest.approx(bounds, abs=1e-9)
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("analytic", [True, False])
@pytest.mark.parametrize("optim", ["pyro", "torch"])
def test_joint_steps_are_those_of_pyro(analytic, optim) -> None:
    ours, theirs = networks(2), networks(2)
    adam = {"lr": 0.02}
    mine = pyro.optim.Adam(adam) if optim == "pyro" else partial(torch.optim.Adam, **adam)
    em = ExactPosteriorEM(*vae(*ours), mine, num_particles=2)
    v = variational(em, BITS)
    assert v.analytic == {"z"}
    em._ready((BITS,), {})
    if not analytic:
        session = em._session
        drawn_only = replace(session.trainer.variational, analytic=frozenset())
        session.trainer = replace(session.trainer, variational=drawn_only)
    torch.manual_seed(0)
    losses = [em.step(BITS) for _ in range(6)]
    pyro.clear_param_store()
    loss = (TraceMeanField_ELBO if analytic else Trace_ELBO)(num_particles=2)
    svi = SVI(*vae(*theirs), pyro.optim.Adam(adam), loss)
    torch.manual_seed(0)
    assert losses == pytest.approx([svi.step(BITS) for _ in range(6)], abs=1e-9)
    for a, b in zip(ours[1].parameters(), theirs[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-10)


# ------------------------------------------------------------------ 7. batches


def global_model(x, total=None, size=None):
    h = pyro.sample("h", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Normal(h, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def global_guide(x):
    pyro.sample("h", dist.Normal(pyro.param("a", T(0.3)), 1e-9))  # nearly no noise
    w = pyro.param("w", T(0.8))
    with pyro.plate("n", len(x)):
        pyro.sample("z", dist.Normal(w * x, 1e-9))


@pytest.mark.parametrize("how", ["batch_size", "loader", "num_data"])
def test_bounds_of_batches_average_to_the_bound_of_all(how) -> None:
    """Draws are noiseless, so that the identity is exact to 1e-5 rather than in expectation."""
    x = torch.randn(12)
    em = ExactPosteriorEM(
        global_model, global_guide, lambda p: torch.optim.SGD(p, lr=0.0), strategy="guide"
    )
    full = em.elbo(x).value
    if how == "batch_size":
        result = em.fit(x, batch_size=3, num_epochs=1, seed=0, progress=False)
    elif how == "loader":
        result = em.fit(DataLoader(x, 3, shuffle=True), num_epochs=1, seed=0, progress=False)
    else:

        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(x)

        result = em.fit(DataLoader(Stream(), 3), num_epochs=1, num_data=12, seed=0, progress=False)
    assert len(result.history) == 4
    assert np.mean(list(result.history)) == pytest.approx(full, abs=1e-4)
    assert result.elbo == pytest.approx(full, abs=1e-4)


def test_unequal_batches_weigh_by_their_rows() -> None:
    x = torch.randn(10)
    em = ExactPosteriorEM(
        global_model, global_guide, lambda p: torch.optim.SGD(p, lr=0.0), strategy="guide"
    )
    full = em.elbo(x).value
    result = em.fit(x, batch_size=4, num_epochs=1, seed=0, validation=x, progress=False)
    weighted = np.average(list(result.history), weights=[4, 4, 2])
    assert weighted == pytest.approx(full, abs=1e-4)
    assert result.elbo == pytest.approx(full, abs=1e-4)
    assert result.history.validation[-1][1] == pytest.approx(full, abs=1e-4)


def test_a_loader_that_drops_its_last_batch_still_estimates_the_bound_of_all() -> None:
    x = torch.full((5,), 1.3)  # all rows alike: any four stand for five
    em = ExactPosteriorEM(
        global_model, global_guide, lambda p: torch.optim.SGD(p, lr=0.0), strategy="guide"
    )
    full = em.elbo(x).value
    loader = DataLoader(x, 2, drop_last=True)
    result = em.fit(loader, num_epochs=1, seed=0, progress=False)
    assert list(result.history) == pytest.approx([full, full], abs=1e-4)
    assert result.elbo == pytest.approx(full, abs=1e-4)


def test_a_plate_that_subsamples_by_itself() -> None:
    x = torch.randn(12)

    def model(x):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x), subsample_size=3) as i:
            z = pyro.sample("z", dist.Normal(h, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[i])

    def guide(x):
        pyro.sample("h", dist.Normal(pyro.param("a", T(0.3)), 1e-9))
        w = pyro.param("w", T(0.8))
        with pyro.plate("n", len(x), subsample_size=3) as i:
            pyro.sample("z", dist.Normal(w * x[i], 1e-9))

    full = ExactPosteriorEM(global_model, global_guide, strategy="guide").elbo(x).value
    pyro.clear_param_store()
    terms = ExactPosteriorEM(model, guide, strategy="guide").elbo(x, num_particles=300)
    assert terms.standard_error > 0.05
    assert abs(terms.value - full) < 3.5 * terms.standard_error


def test_batches_of_a_guide_with_score_functions_leave_the_gradient_unbiased() -> None:
    """The mean over batches of scaled gradients is the gradient of all data."""
    x = torch.arange(6.0)
    v = variational(ExactPosteriorEM(counted_model, counted_guide), x)
    rows = torch.stack(
        [gradients(v, ["rate"], x[i : i + 2], draws=150, factors={"n": 3.0}) for i in (0, 2, 4)]
    ).mean(0)
    assert_mean(rows, counted_gradient(x))


# ------------------------------------------------------------------ 8. the evidence


def local_evidence(x):
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(h * h + z, 0.6), obs=x)


def local_guide(x):
    with pyro.plate("n", len(x)):
        pyro.sample("h", dist.Normal(pyro.param("m", T(0.0)), 1.2))


def local_reference(x: float) -> float:
    def f(h):
        return math.exp(log_normal(h)) * (
            0.7 * math.exp(log_normal(x, h * h, 0.6))
            + 0.3 * math.exp(log_normal(x, h * h + 1, 0.6))
        )

    return math.log(quad(f, -9, 9, limit=200)[0])


@pytest.mark.parametrize("proposal", ["guide", "prior"])
def test_the_importance_weighted_bound_of_local_latents(proposal) -> None:
    x = T([0.5, 2.0, 4.0])
    em = ExactPosteriorEM(local_evidence, local_guide)
    got = em.estimate_evidence(x, num_particles=300, proposal=proposal)
    want = [local_reference(float(v)) for v in x]
    assert got.proposal == proposal and got.pointwise.shape == (3,)
    assert abs(got.value - sum(want)) < 3.5 * got.standard_error
    assert float(got.pointwise.sum()) == pytest.approx(got.value)
    assert torch.allclose(got.pointwise, T(want), atol=3.5 * got.standard_error)
    weights = (got.log_weights - got.log_weights.logsumexp(0)).exp()
    assert got.effective_sample_size == pytest.approx(float((1 / weights.square().sum(0)).min()))


def test_the_importance_weighted_bound_of_global_latents() -> None:
    em = ExactPosteriorEM(poisson_rate, given(0.5, 0.4, transformed=True))
    x = T([1.0, 0.0, 4.0])
    want = math.log(
        quad(
            lambda u: math.exp(log_normal(u, 0.2, 0.8) + log_likelihood("poisson", math.exp(u))),
            -8,
            6,
        )[0]
    )
    for proposal in ("guide", "prior"):
        got = em.estimate_evidence(x, num_particles=300, proposal=proposal)
        assert abs(got.value - want) < 3.5 * got.standard_error
        assert got.pointwise is None


def test_every_proposal_of_a_discrete_model() -> None:
    x = torch.randn(4, 3)
    em = ExactPosteriorEM(hmm, product_guide)
    want = em.posterior(x).log_evidence
    exact = em.estimate_evidence(x, num_particles=40)
    assert exact.proposal == "posterior" and exact.value == pytest.approx(want, abs=1e-8)
    assert exact.effective_sample_size == pytest.approx(40) and exact.pareto_k == -math.inf
    for proposal in ("guide", "prior"):
        got = em.estimate_evidence(x, num_particles=200, proposal=proposal)
        assert abs(got.value - want) < 3.5 * got.standard_error


@pytest.mark.parametrize("k", [0.2, 0.5, 0.7, 1.0])
def test_pareto_k_of_data_of_known_shape(k) -> None:
    rng = np.random.default_rng(0)
    found = [
        pareto_k(torch.tensor(scipy.stats.genpareto.rvs(k, size=4000, random_state=rng)).log())
        for _ in range(20)
    ]
    # 190 tail draws: standard deviation (1 + k) / sqrt(190); the prior pulls to 0.5 by 10 draws.
    want = (k * 189 + 5) / 199
    assert np.mean(found) == pytest.approx(want, abs=5 * (1 + k) / math.sqrt(189 * 20))


def test_pareto_k_and_effective_size_of_constants_and_few_draws() -> None:
    assert pareto_k(torch.full((100,), -3.0)) == -math.inf
    assert math.isnan(pareto_k(torch.randn(10)))
    one = estimated(torch.cat([T([0.0]), torch.full((99,), -200.0)]), "guide")
    assert one.effective_sample_size == pytest.approx(1.0)
    assert not one.is_reliable
    impossible = estimated(torch.full((100,), -math.inf), "prior")
    assert impossible.value == -math.inf


def test_equal_large_weights_beside_impossible_draws_are_no_proof_of_trust() -> None:
    """Half the draws impossible, the others alike: finite variance, so k is small."""
    w = torch.cat([torch.zeros(50), torch.full((50,), -math.inf)])
    got = estimated(w, "prior")
    assert got.value == pytest.approx(math.log(0.5))
    assert got.effective_sample_size == pytest.approx(50)


# ------------------------------------------------------------------ 9. the drawn posterior


def test_a_drawn_posterior() -> None:
    x = torch.randn(6, 3)
    em = ExactPosteriorEM(gmvae, code_guide, strategy="guide")
    q = em.posterior(x)
    assert isinstance(q, DrawnPosterior) and not q.exact and q.log_evidence is None
    draws = q.sample(5, seed=1)
    assert draws["h"].shape == (5, 6, 2) and draws["y"].shape == (5, 6)
    again = q.sample(5, seed=1)
    assert all(torch.equal(draws[n], again[n]) for n in draws)
    state = torch.get_rng_state()
    q.sample(2, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.allclose(q.mean("h"), (x @ pyro.param("V")).detach())
    probs = q.probs("y", num_particles=100)
    assert probs.shape == (6, 3) and torch.allclose(probs.sum(-1), torch.ones(6))
    h = x @ pyro.param("V") + pyro.param("sd") * torch.randn(4000, 6, 2)
    joint = dist.Normal(pyro.param("mu"), 1.0).log_prob(h.unsqueeze(-2)).sum(-1)
    rows = torch.softmax(joint + pyro.param("w").log(), -1).detach()
    error = rows.std(0) * (1 / 100 + 1 / 4000) ** 0.5
    assert bool(((probs - rows.mean(0)).abs() < 5 * error).all())
    drawn = q.sample(150, seed=0)["y"]
    frequencies = torch.stack([(drawn == k).double().mean(0) for k in range(3)], -1)
    assert bool(((frequencies - probs).abs() < 5 * (0.25 / 150) ** 0.5 + 0.02).all())
    assert q.mode()["y"].shape == (6,)


def test_a_drawn_posterior_under_an_enumerated_chain_guide() -> None:
    x = torch.randn(4, 3)
    q = ExactPosteriorEM(hmm, chain_guide, strategy="guide").posterior(x)
    soft = [torch.softmax(pyro.param(f"c{t}"), -1).detach() for t in range(3)]
    marginal = soft[0][0]
    assert torch.allclose(q.probs("z0"), marginal.expand(4, 2))
    marginal = marginal @ soft[1]
    got = q.probs("z1", num_particles=400)
    assert got.shape == (4, 2)
    assert torch.allclose(got, marginal.expand(4, 2), atol=3.5 * 0.5 / 400**0.5)
    assert q.sample(3)["z2"].shape == (3, 4)


def test_a_drawn_posterior_of_counts() -> None:
    q = ExactPosteriorEM(counted_model, counted_guide).posterior(torch.arange(3.0))
    assert torch.allclose(q.mean("z"), torch.full((3,), 1.5))
    assert q.sample(4, seed=0)["z"].shape == (4, 3)


def test_the_mode_of_a_drawn_posterior_of_counts() -> None:
    q = ExactPosteriorEM(counted_model, counted_guide).posterior(torch.arange(3.0))
    assert q.mode()["z"].shape == (3,)


def test_delta_guides_and_log_priors() -> None:
    x = T([0.3, 1.2, 2.0])

    def model(x):
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(h, s), obs=x)

    def guide(x):
        pyro.sample("s", dist.Delta(pyro.param("p", T(1.5))))
        pyro.sample("h", dist.Normal(pyro.param("m", T(0.7)), 0.4))

    terms = ExactPosteriorEM(model, guide, strategy="guide").elbo(x, num_particles=400)
    prior = float(dist.Gamma(2.0, 1.0).log_prob(T(1.5)))
    second = ((x - 0.7) ** 2 + 0.16).sum()
    data = float(-0.5 * 3 * math.log(2 * math.pi * 2.25) - second / 4.5)
    kl = 0.5 * (0.49 + 0.16 - 1) - math.log(0.4)
    assert terms.log_prior == pytest.approx(prior)
    assert abs(terms.value - (prior + data - kl)) < 3.5 * terms.standard_error
    assert terms.kl == pytest.approx(kl, abs=1e-6)
