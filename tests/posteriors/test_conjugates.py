"""Conjugate latents, against compound distributions of torch and scipy, quadrature, and a numpy EM."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special as sp
import scipy.stats as st
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_em import Chunks, DataError, ExactPosteriorEM, ModelError, UsageError


def tensor(values: Any) -> Tensor:
    out = torch.as_tensor(np.asarray(values))
    return out.to(torch.float64) if out.is_floating_point() else out


A, B = tensor(1.5), tensor(0.7)
COUNTS = tensor([0.0, 2.0, 5.0, 1.0, 3.0])
UNITS = tensor([1.0, 2.0, 0.5, 3.0, 1.0])
REALS = tensor([0.3, -1.2, 2.5, 0.1, 0.8])


def negative_binomial(x: Tensor, a: Any, b: Any, units: Any = 1.0) -> Tensor:
    """log ∫ Poisson(x | units λ) Gamma(λ | a, b) dλ, by torch."""
    return torch.distributions.NegativeBinomial(a, probs=units / (units + b)).log_prob(x)


def per_row(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(A, B))
        pyro.sample("x", dist.Poisson(UNITS * rate), obs=x)


def in_part(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(A, B).expand([2]).to_event(1))
        seen = torch.stack([x != 5, x != 0], -1)
        pyro.sample("x", dist.Poisson(rate).mask(seen).to_event(1), obs=torch.stack([x, x + 1], -1))


def in_loops(x: Tensor) -> None:
    for i in range(3):
        rate = pyro.sample(f"rate_{i}", dist.Gamma(A, B))
        pyro.sample(f"x_{i}", dist.Poisson(2 * rate), obs=x[i])


def litters(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        p = pyro.sample("p", dist.Beta(A, B))
        pyro.sample("x", dist.Binomial(10.0, p), obs=x)


def robust(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        w = pyro.sample("w", dist.Gamma(2.0, 2.0))
        pyro.sample("x", dist.Normal(0.5, 1.5 / w.sqrt()), obs=x)


def inflated(x: Tensor) -> None:
    """A rate that one value of a discrete latent reads, and the other one does not."""
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(A, B))
        z = pyro.sample("z", dist.Bernoulli(tensor(0.3)))
        pyro.sample("x", dist.Poisson(torch.where(z > 0, rate, 0.1)), obs=x)


SHAPES, RATES, SHARES = tensor([1.0, 4.0]), tensor([1.0, 0.5]), tensor([0.4, 0.6])


def mixture(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(SHARES))
        rate = pyro.sample("rate", dist.Gamma(SHAPES[z], RATES[z]))
        pyro.sample("x", dist.Poisson(rate), obs=x)


MOVES = tensor([[0.9, 0.1], [0.3, 0.7]])


def chain(x: Tensor) -> None:
    z: Any = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(MOVES[z]))
        rate = pyro.sample(f"rate_{t}", dist.Gamma(SHAPES[z], RATES[z]))
        pyro.sample(f"x_{t}", dist.Poisson(rate), obs=x[t])


def probabilities(x: Tensor) -> None:
    """A summed latent below a simplex of its own."""
    with pyro.plate("rows", len(x)):
        p = pyro.sample("p", dist.Dirichlet(tensor([1.0, 2.0, 3.0])))
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.Poisson(tensor([1.0, 3.0, 6.0])[z]), obs=x)


def forward(x: Tensor) -> Tensor:
    alpha = MOVES[0] * negative_binomial(x[0], SHAPES, RATES).exp()
    for t in range(1, len(x)):
        alpha = (alpha @ MOVES) * negative_binomial(x[t], SHAPES, RATES).exp()
    return alpha.sum().log()


def _mixed(log_p: Tensor, shares: Tensor) -> float:
    return float((log_p + shares.log()).logsumexp(-1).sum())


def _poisson(x: Tensor, rates: Tensor) -> Tensor:
    return torch.distributions.Poisson(rates).log_prob(x.unsqueeze(-1))


def _in_part(x: Tensor) -> float:
    every = negative_binomial(torch.stack([x, x + 1], -1), A, B)
    return float(every[torch.stack([x != 5, x != 0], -1)].sum())


COMPOUND: dict[str, tuple[Callable[[Tensor], None], Tensor, Callable[[Tensor], Any]]] = {
    "rate per row": (per_row, COUNTS, lambda x: negative_binomial(x, A, B, UNITS).sum()),
    "events seen in part": (in_part, COUNTS, _in_part),
    "loops": (in_loops, COUNTS, lambda x: negative_binomial(x[:3], A, B, 2.0).sum()),
    "beta-binomial": (litters, COUNTS, lambda x: st.betabinom.logpmf(x, 10, 1.5, 0.7).sum()),
    "Student's t": (robust, REALS, lambda x: st.t.logpdf(x, 4, 0.5, 1.5).sum()),
    "read by one state": (
        inflated,
        COUNTS,
        lambda x: _mixed(
            torch.stack([negative_binomial(x, A, B), _poisson(x, tensor([0.1]))[:, 0]], -1),
            tensor([0.3, 0.7]),
        ),
    ),
    "mixture": (
        mixture,
        COUNTS,
        lambda x: _mixed(negative_binomial(x.unsqueeze(-1), SHAPES, RATES), SHARES),
    ),
    "chain": (chain, COUNTS, forward),
    "Dirichlet above a summed latent": (
        probabilities,
        COUNTS,
        lambda x: _mixed(_poisson(x, tensor([1.0, 3.0, 6.0])), tensor([1.0, 2.0, 3.0]) / 6),
    ),
}


@pytest.mark.parametrize("case", COMPOUND)
def test_evidence_is_that_of_the_compound_distribution(case: str) -> None:
    model, x, expected = COMPOUND[case]
    em = ExactPosteriorEM(model)
    q = em.posterior(x)
    assert q.log_evidence == pytest.approx(float(expected(x)), abs=1e-11)
    terms = em.elbo(x, q=pickle.loads(pickle.dumps(q)))
    assert terms.value == pytest.approx(q.log_evidence, abs=1e-10)


# One global latent, and the log density of its prior and of its children, at values (n, 1).
def _global_rate() -> None:
    rate = pyro.sample("v", dist.Gamma(A, B))
    with pyro.plate("rows", 5), pyro.poutine.scale(scale=UNITS):
        pyro.sample("x", dist.Poisson(UNITS * rate), obs=COUNTS)
    with pyro.plate("others", 3):
        pyro.sample("w", dist.Exponential(2 * rate), obs=tensor([0.2, 0.9, 1.4]))
        pyro.sample("g", dist.Gamma(3.0, rate / 2), obs=tensor([2.0, 0.9, 1.1]))
        pyro.sample("y", dist.Normal(0.2, (3 * rate) ** -0.5), obs=tensor([0.4, 0.1, -1.0]))
        pyro.sample("l", dist.Laplace(0.2, 2 / rate), obs=tensor([0.4, 0.1, -1.0]))
        pyro.sample("i", dist.InverseGamma(1.2, rate), obs=tensor([0.4, 0.7, 1.0]))
        pyro.sample("m", dist.LogNormal(0.1, rate.rsqrt()), obs=tensor([0.4, 0.7, 1.6]))


def _of_rate(v: Any) -> Any:
    y, units = [0.4, 0.1, -1.0], UNITS.numpy()
    total = (units * st.poisson.logpmf(COUNTS.numpy(), units * v)).sum(-1)
    total += st.expon.logpdf([0.2, 0.9, 1.4], scale=1 / (2 * v)).sum(-1)
    total += st.gamma.logpdf([2.0, 0.9, 1.1], 3, scale=2 / v).sum(-1)
    total += st.norm.logpdf(y, 0.2, (3 * v) ** -0.5).sum(-1)
    total += st.laplace.logpdf(y, 0.2, 2 / v).sum(-1)
    total += st.invgamma.logpdf([0.4, 0.7, 1.0], 1.2, scale=v).sum(-1)
    total += st.lognorm.logpdf([0.4, 0.7, 1.6], v**-0.5, scale=math.exp(0.1)).sum(-1)
    return total + st.gamma.logpdf(v, 1.5, scale=1 / 0.7)[..., 0]


def _global_probability() -> None:
    p = pyro.sample("v", dist.Beta(A, B))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Bernoulli(p), obs=(COUNTS > 1).to(COUNTS))
        pyro.sample("g", dist.Geometric(p), obs=COUNTS)
        pyro.sample("n", dist.NegativeBinomial(2.5, p), obs=COUNTS)


def _of_probability(v: Any) -> Any:
    x = COUNTS.numpy()
    total = st.bernoulli.logpmf((x > 1).astype(int), v) + st.geom.logpmf(x + 1, v)
    total = (total + st.nbinom.logpmf(x, 2.5, 1 - v)).sum(-1)
    return total + st.beta.logpdf(v, 1.5, 0.7)[..., 0]


def _global_variance() -> None:
    v = pyro.sample("v", dist.InverseGamma(A, B))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Normal(0.1, v.sqrt()), obs=REALS)
        pyro.sample("p", dist.Exponential(1 / v), obs=COUNTS + 1)


def _of_variance(v: Any) -> Any:
    normal = st.norm.logpdf(REALS.numpy(), 0.1, v**0.5).sum(-1)
    waiting = st.expon.logpdf(COUNTS.numpy() + 1, scale=v).sum(-1)
    return normal + waiting + st.invgamma.logpdf(v, 1.5, scale=0.7)[..., 0]


@pytest.mark.parametrize(
    ("model", "log_joint", "end"),
    [
        (_global_rate, _of_rate, 30.0),
        (_global_probability, _of_probability, 1.0),
        (_global_variance, _of_variance, 60.0),
    ],
    ids=["rate", "probability", "variance"],
)
def test_several_children_against_quadrature(
    model: Callable[[], None], log_joint: Callable[[Any], Any], end: float
) -> None:
    q = ExactPosteriorEM(model).posterior()
    nodes, weights = np.polynomial.legendre.leggauss(800)
    v, w = end * ((nodes + 1) / 2) ** 2, weights * end * (nodes + 1) / 2
    joint = np.exp(log_joint(v[:, None]))
    evidence = float(w @ joint)
    assert q.log_evidence == pytest.approx(math.log(evidence), abs=1e-8)
    assert float(q.mean("v")) == pytest.approx(float(w @ (v * joint)) / evidence, abs=1e-8)
    own = q.marginal("v").log_prob(tensor(v[300])).exp()
    assert float(own) == pytest.approx(joint[300] / evidence, rel=1e-8)


def test_rates_that_are_read_by_index_and_in_nested_plates() -> None:
    group = tensor([0, 0, 1, 2, 2])

    def model() -> None:
        with pyro.plate("groups", 3):
            rate = pyro.sample("rate", dist.Gamma(A, B))
        with pyro.plate("rows", 5):
            pyro.sample("x", dist.Poisson(UNITS * rate[group]), obs=COUNTS)
        with pyro.plate("outer", 2, dim=-2):
            theta = pyro.sample("theta", dist.Dirichlet(tensor([1.0, 2.0, 0.5])))
            with pyro.plate("inner", 4, dim=-1):
                pyro.sample("z", dist.Categorical(theta), obs=words)

    words = tensor([[0, 1, 2, 1], [2, 2, 0, 2]])
    q = ExactPosteriorEM(model).posterior()
    expected = (COUNTS * UNITS.log() - (COUNTS + 1).lgamma()).sum()
    for g in range(3):
        own = group == g
        a, b = A + COUNTS[own].sum(), B + UNITS[own].sum()
        expected += a.lgamma() - a * b.log() - A.lgamma() + A * B.log()
        assert float(q.mean("rate")[g]) == pytest.approx(float(a / b), abs=1e-12)
    for row in words.numpy():
        counts = np.bincount(row, minlength=3)
        term = st.dirichlet_multinomial.logpmf(counts, [1.0, 2.0, 0.5], 4)
        expected += (
            term
            - st.multinomial.logpmf(counts, 4, counts / 4)
            + (counts[counts > 0] * np.log(counts[counts > 0] / 4)).sum()
        )
    assert q.log_evidence == pytest.approx(float(expected), abs=1e-11)
    assert q.marginal("theta").batch_shape == (2, 1)


def test_gaussian_latents_beside_conjugate_ones() -> None:
    group = tensor([0, 0, 1, 2, 2])

    def model() -> None:
        with pyro.plate("groups", 3):
            level = pyro.sample("level", dist.Normal(0.0, 0.8))
            rate = pyro.sample("rate", dist.Gamma(A, B))
        with pyro.plate("rows", 5):
            pyro.sample("y", dist.Normal(level[group], 1.0), obs=REALS)
            pyro.sample("x", dist.Poisson(rate[group]), obs=COUNTS)

    em = ExactPosteriorEM(model)
    q = em.posterior()
    member = torch.eye(3)[group]
    joint = dist.MultivariateNormal(torch.zeros(5), 0.64 * member @ member.T + torch.eye(5))
    expected = joint.log_prob(REALS) - (COUNTS + 1).lgamma().sum()
    for g in range(3):
        a, b = A + COUNTS[group == g].sum(), B + (group == g).sum()
        expected += a.lgamma() - a * b.log() - A.lgamma() + A * B.log()
    assert q.log_evidence == pytest.approx(float(expected), abs=1e-11)
    assert set(q.sample(2, seed=0)) == {"level", "rate"}
    assert em.elbo(q=q).gap == pytest.approx(0.0, abs=1e-10)
    assert [r.route for r in em.plan().routes] == ["Gaussian", "conjugate"]


def test_counts_and_choices_below_one_simplex() -> None:
    alpha, counts = tensor([1.0, 2.0, 0.5]), tensor([[2.0, 1.0, 1.0], [0.0, 3.0, 1.0]])

    def model() -> None:
        theta = pyro.sample("theta", dist.Dirichlet(alpha))
        with pyro.plate("rows", 2):
            pyro.sample("x", dist.Multinomial(4, theta), obs=counts)
            pyro.sample("y", dist.OneHotCategorical(theta), obs=torch.eye(3)[[2, 0]])

    q = ExactPosteriorEM(model).posterior()
    total = counts.sum(0) + tensor([1.0, 0.0, 1.0])
    expected = (alpha + total).lgamma().sum() - (alpha + total).sum().lgamma()
    expected += alpha.sum().lgamma() - alpha.lgamma().sum()
    expected += ((counts.sum(-1) + 1).lgamma() - (counts + 1).lgamma().sum(-1)).sum()
    assert q.log_evidence == pytest.approx(float(expected), abs=1e-11)
    assert torch.allclose(q.marginal("theta").concentration, alpha + total)


def over_dispersed(x: Tensor, a: float = 1.0, b: float = 1.0) -> None:
    a = pyro.param("a", tensor(a), constraint=constraints.positive)
    b = pyro.param("b", tensor(b), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(a, b))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def test_hyperparameters_take_the_published_path() -> None:
    """Accidents of 647 workers (Greenwood and Yule 1920)."""
    x = torch.repeat_interleave(torch.arange(6.0), tensor([447, 132, 42, 21, 3, 2]))
    em = ExactPosteriorEM(over_dispersed)
    path = [-657.1035271708, -614.6249015555, -601.0622736451]
    assert list(em.fit(x, tol=0.0, max_steps=3).history)[:3] == pytest.approx(path, abs=1e-9)
    pyro.clear_param_store()
    result = em.fit(x, 0.8651158199, 1.8595678920, tol=0.0, max_steps=2)
    assert result.log_evidence == pytest.approx(-592.2670972304, abs=1e-6)
    at = torch.stack([result.params["a"], result.params["b"]])

    def loss(at: Tensor) -> Tensor:
        return -negative_binomial(x, at[0], at[1]).sum()

    hessian = torch.autograd.functional.hessian(loss, at)
    errors = result.standard_errors()
    expected = torch.linalg.inv(hessian).diagonal().sqrt()
    assert torch.allclose(torch.stack([errors["a"], errors["b"]]), expected, rtol=1e-6)
    assert result.bic == pytest.approx(-2 * result.log_evidence + 2 * math.log(647))
    other = em.posterior(x[:9])  # other data, other sizes
    assert other.log_evidence == pytest.approx(float(negative_binomial(x[:9], *at).sum()))
    given = em.elbo(x, q={"rate": dist.Gamma(at[0] + x, at[1] + 1)})
    assert given.gap == pytest.approx(0.0, abs=1e-9)
    assert em.elbo(x, q={"rate": dist.Gamma(1 + x, 2.0)}).gap > 1
    point = em.elbo(x, q={"rate": dist.Delta(1 + x)})
    log_joint = dist.Gamma(*at).log_prob(1 + x) + dist.Poisson(1 + x).log_prob(x)
    assert point.expected_log_joint == pytest.approx(float(log_joint.sum()), abs=1e-9)
    assert point.gap == math.inf
    with pytest.raises(UsageError, match="no Gamma"):
        em.elbo(x, q={"rate": dist.LogNormal(x, 1.0)})


def test_robust_regression_takes_the_steps_of_em() -> None:
    """Student's t as a scale mixture, against iterations written in numpy."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 2))
    y = x @ [1.0, -2.0] + 0.3 * rng.normal(size=12)
    y[0] += 5

    def model(x: Tensor, y: Tensor) -> None:
        b = pyro.param("b", torch.zeros(2))
        s = pyro.param("s", tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            w = pyro.sample("w", dist.Gamma(2.0, 2.0))
            pyro.sample("y", dist.Normal(x @ b, s * w.rsqrt()), obs=y)

    result = ExactPosteriorEM(model).fit(tensor(x), tensor(y), max_steps=5, tol=0.0)
    b, s, path = np.zeros(2), 1.0, []
    for _ in range(5):
        r = (y - x @ b) / s
        path.append(st.t.logpdf(r, 4).sum() - 12 * math.log(s))
        w = 2.5 / (2 + r**2 / 2)
        b = np.linalg.solve(x.T @ (w[:, None] * x), x.T @ (w * y))
        s = math.sqrt((w * (y - x @ b) ** 2).mean())
    assert list(result.history)[:5] == pytest.approx(path, abs=1e-9)
    assert np.allclose(result.params["b"].numpy(), b, atol=1e-10)
    assert float(result.params["s"]) == pytest.approx(s, abs=1e-10)


def test_a_mixture_of_counts_climbs_and_answers() -> None:
    x = torch.cat([COUNTS, COUNTS + 7])

    def model(x: Tensor) -> None:
        shares = pyro.param("shares", SHARES, constraint=constraints.simplex)
        a = pyro.param("a", SHAPES.clone(), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(shares))
            rate = pyro.sample("rate", dist.Gamma(a[z], RATES[z]))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    em = ExactPosteriorEM(model)
    result = em.fit(x, max_steps=25)
    assert min(np.diff(result.history)) > -1e-9
    a, shares = result.params["a"], result.params["shares"]
    joint = negative_binomial(x.unsqueeze(-1), a, RATES) + shares.log()
    assert result.log_evidence == pytest.approx(float(joint.logsumexp(-1).sum()), abs=1e-9)
    q = result.posterior
    means = ((a + x.unsqueeze(-1)) / (RATES + 1) * joint.softmax(-1)).sum(-1)
    assert torch.allclose(q.mean("rate"), means)
    assert torch.allclose(q.marginal("rate").mean, means)
    draws = q.sample(4000, seed=0)["rate"]
    assert torch.allclose(draws.mean(0), means, rtol=0.1)
    assert q.entropy() == pytest.approx(q.entropy_value + _conditional_entropy(q, a, x), abs=1e-9)


def _conditional_entropy(q: Any, a: Tensor, x: Tensor) -> float:
    each = dist.Gamma(a + x.unsqueeze(-1), RATES + 1).entropy()
    return float((q.probs("z") * each).sum())


def test_a_reading_is_kept_and_an_index_that_the_model_finds_elsewhere_is_seen() -> None:
    """Asked a third time, the model is run three times; with another index it is read anew."""
    groups, runs = [tensor([0, 0, 1, 2, 2])], itertools.count()

    def model(x: Tensor) -> None:
        next(runs)
        a = pyro.param("a", A.clone(), constraint=constraints.positive)
        with pyro.plate("groups", 3):
            rate = pyro.sample("rate", dist.Gamma(a, B))
            mean = pyro.sample("mean", dist.Normal(0.0, rate.rsqrt()))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Poisson(rate[groups[0]]), obs=x)
            pyro.sample("y", dist.Normal(mean[groups[0]], rate[groups[0]].rsqrt()), obs=x)

    em = ExactPosteriorEM(model)
    em.fit(COUNTS, max_steps=1)
    shape = float(pyro.param("a").detach())

    def expected(x: Tensor) -> Tensor:
        out = []
        for g in range(3):
            own = x[groups[0] == g]
            n, total = len(own), own.sum()
            rest = own.square().sum() - total**2 / (n + 1)
            out.append((shape + total + n / 2) / (B + n + rest / 2))
        return torch.stack(out)

    em.posterior(COUNTS)  # which settles how runs of this form are noted
    before = next(runs)
    assert torch.allclose(em.posterior(COUNTS).mean("rate"), expected(COUNTS))
    assert next(runs) - before <= 4
    before, other = next(runs), COUNTS + 1
    assert torch.allclose(em.posterior(other).mean("rate"), expected(other))
    assert next(runs) - before <= 7
    groups[0] = tensor([0, 1, 1, 2, 1])
    assert torch.allclose(em.posterior(COUNTS).mean("rate"), expected(COUNTS))
    groups[0] = tensor([2, 1, 1, 0, 1])
    assert torch.allclose(em.posterior(other).mean("rate"), expected(other))


def test_rates_of_the_steps_of_a_loop_are_one_block_and_each_can_be_given() -> None:
    em = ExactPosteriorEM(in_loops)
    q = em.posterior(COUNTS)
    assert [len(g.members) for g in q.graph.groups] == [3]
    assert torch.allclose(q.mean("rate_*"), (A + COUNTS[:3]) / (B + 2))
    shape, rate = A + COUNTS[1], B + 2
    given = em.elbo(COUNTS, q={"rate_1": dist.Gamma(shape, 2 * rate)})
    # KL of two Gammas of one shape.
    assert given.gap == pytest.approx(float(shape * (math.log(2) - 0.5)), abs=1e-10)
    point = em.elbo(COUNTS, q={"rate_1": dist.Delta(tensor(0.8))})
    rest = em.elbo(COUNTS, q=q)
    own = dist.Gamma(A, B).log_prob(tensor(0.8)) + dist.Poisson(1.6).log_prob(COUNTS[1])
    t = shape.digamma() - rate.log(), shape / rate
    mean = A * B.log() - A.lgamma() + (A - 1) * t[0] - B * t[1] - 2 * t[1]
    mean += COUNTS[1] * (math.log(2) + t[0]) - (COUNTS[1] + 1).lgamma()
    difference = point.expected_log_joint - rest.expected_log_joint
    assert difference == pytest.approx(float(own - mean), abs=1e-10)
    assert point.entropy == -math.inf


def test_what_is_known_so_far_of_a_chain_of_counts() -> None:
    q = ExactPosteriorEM(chain).posterior(COUNTS)
    alpha = MOVES[0] * negative_binomial(COUNTS[0], SHAPES, RATES).exp()
    assert torch.allclose(q.filtered("z_*")[0], alpha / alpha.sum())
    assert q.mean("rate_*").shape == (5,)
    assert q.marginal("rate_*").batch_shape == (5,)
    assert q.sample(3, seed=0)["rate_*"].shape == (5, 3)


@pytest.mark.parametrize("beside", [False, True])
def test_weighted_rows_are_rows_that_are_there_so_often(beside: bool) -> None:
    def model(x: Tensor, weight: Tensor) -> None:
        a = pyro.param("a", tensor([1.0, 2.0]), constraint=constraints.positive)
        with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=weight):
            z = pyro.sample("z", dist.Categorical(SHARES)) if beside else 0
            rate = pyro.sample("rate", dist.Gamma(a[z], 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    weight = tensor([1.0, 2.0, 3.0, 1.0, 2.0])
    often = torch.repeat_interleave(COUNTS, weight.long())
    found = []
    for data in ((COUNTS, weight), (often, torch.ones(9))):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model)
        q, result = em.posterior(*data), em.fit(*data, max_steps=3, tol=0.0)
        terms = em.elbo(*data, q=q)
        found.append([q.entropy(), terms.expected_log_joint, result.log_evidence, result.bic])
    assert found[0] == pytest.approx(found[1], abs=1e-10)


def test_other_weights_than_those_of_the_latent_are_refused() -> None:
    def model() -> None:
        with pyro.plate("rows", 5):
            with pyro.poutine.scale(scale=UNITS):
                rate = pyro.sample("rate", dist.Gamma(A, B))
            pyro.sample("x", dist.Poisson(rate), obs=COUNTS)

    with pytest.raises(ModelError, match="weighs it otherwise than 'rate'"):
        ExactPosteriorEM(model).posterior()


def test_chunks_add_up_and_values_are_a_start() -> None:
    path = ExactPosteriorEM(over_dispersed).fit(COUNTS, max_steps=3, tol=0.0).history
    pyro.clear_param_store()
    parts = ExactPosteriorEM(over_dispersed).fit(Chunks(COUNTS, rows=2), max_steps=3, tol=0.0)
    assert list(parts.history) == pytest.approx(list(path), abs=1e-10)
    pyro.clear_param_store()
    rates = tensor([0.5, 1.5, 3.0, 1.0, 2.0])
    result = ExactPosteriorEM(over_dispersed).fit(
        COUNTS, init={"rate": rates}, max_steps=1, tol=0.0
    )
    shape, _, scale = st.gamma.fit(rates.numpy(), floc=0)
    start = float(negative_binomial(COUNTS, shape, 1 / scale).sum())
    assert result.history[0] == pytest.approx(start, abs=1e-6)
    q = ExactPosteriorEM(over_dispersed).posterior(COUNTS)
    with pytest.raises(UsageError, match="'rate' is a conjugate latent"):
        q.probs("rate")
    with pytest.raises(UsageError, match="those are: 'rate'"):
        q.mean("other")


@pytest.mark.parametrize("of_its_own", [False, True])
def test_elements_that_are_alike_are_computed_once(of_its_own: bool) -> None:
    """Whole posteriors, or shapes alone where each row has an exposure of its own."""
    x = torch.arange(3000.0) % 5
    units = 1 + (torch.arange(3000.0) / 999 if of_its_own else torch.arange(3000.0) % 2)

    def model() -> None:
        a = pyro.param("a", A.clone(), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            rate = pyro.sample("rate", dist.Gamma(a, B))
            pyro.sample("x", dist.Poisson(units * rate), obs=x)

    result = ExactPosteriorEM(model).fit(max_steps=2, tol=0.0)
    a, q = result.params["a"], result.posterior
    for at, value in ((A, result.history[0]), (a, result.log_evidence)):
        expected = float(negative_binomial(x, at, B, units).sum())
        assert value == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(q.mean("rate"), (a + x) / (B + units), rtol=1e-12)
    (solution,) = q.solved.values()
    assert len(solution.added) == (3000 if of_its_own else 10)
    assert (len(solution.few.first) == 5) if of_its_own else solution.few is None


def test_a_class_of_each_group_whose_rows_read_it_by_index() -> None:
    group = tensor([0, 0, 1, 2, 1])

    def model() -> None:
        with pyro.plate("groups", 3):
            z = pyro.sample("z", dist.Categorical(SHARES))
            rate = pyro.sample("rate", dist.Gamma(SHAPES[z], RATES[z]))
        with pyro.plate("rows", 5):
            # Enumerated dimensions of a rate, if any, are on the left of its groups.
            pyro.sample("x", dist.Poisson(rate[..., group]), obs=COUNTS)

    q = ExactPosteriorEM(model).posterior()
    own = torch.eye(3)[group]
    a, b = SHAPES + (own.T @ COUNTS).unsqueeze(-1), RATES + own.sum(0).unsqueeze(-1)
    each = a.lgamma() - a * b.log() - SHAPES.lgamma() + SHAPES * RATES.log() + SHARES.log()
    expected = each.logsumexp(-1).sum() - (COUNTS + 1).lgamma().sum()
    assert q.log_evidence == pytest.approx(float(expected), abs=1e-11)
    assert torch.allclose(q.probs("z"), each.softmax(-1))
    assert torch.allclose(q.mean("rate"), (each.softmax(-1) * a / b).sum(-1))


def test_covariances_of_simplexes_that_are_one_event() -> None:
    def model(z: Tensor) -> None:
        pick = pyro.sample("pick", dist.Bernoulli(tensor(0.3)))
        alpha = torch.where(
            pick.unsqueeze(-1).unsqueeze(-1) > 0, tensor([1.0, 2.0]), tensor([5.0, 1.0])
        )
        theta = pyro.sample(
            "theta", dist.Dirichlet(alpha.expand(*alpha.shape[:-2], 2, 2)).to_event(1)
        )
        with pyro.plate("rows", len(z)):
            pyro.sample("z", dist.Categorical(theta[..., 1, :]), obs=z)

    q = ExactPosteriorEM(model).posterior(tensor([0, 1, 1]))
    draws = q.sample(40_000, seed=0)["theta"].flatten(1)
    assert torch.allclose(q.covariance("theta"), draws.T.cov(), atol=3e-3)
    assert q.mean("theta").shape == (2, 2)


def test_negative_binomial_regression_stays_at_the_optimum_of_statsmodels() -> None:
    # What statsmodels 0.15 printed for these rows: sm.NegativeBinomial(y, X).fit(gtol=1e-10).
    coefficients, dispersion = [0.5347507184902526, 0.7542581386626742], 0.5578311740005526
    log_likelihood, spreads = -149.92280966864487, [0.12952116883978815, 0.1277523620419954]
    rng = np.random.default_rng(0)
    X = np.stack([np.ones(80), rng.normal(size=80)], 1)
    y = rng.poisson(np.exp(X @ [0.5, 0.7]) * rng.gamma(2.0, 0.5, size=80))
    assert y.sum() == 194

    def model(X: Tensor, y: Tensor) -> None:
        b = pyro.param("b", tensor(coefficients))
        k = pyro.param("k", tensor(1 / dispersion), constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            u = pyro.sample("u", dist.Gamma(k, k))
            pyro.sample("y", dist.Poisson((X @ b).exp() * u), obs=y)

    result = ExactPosteriorEM(model).fit(tensor(X), tensor(y).double(), max_steps=2, tol=0.0)
    assert result.history[0] == pytest.approx(log_likelihood, abs=1e-8)
    assert result.params["b"].tolist() == pytest.approx(coefficients, abs=1e-4)
    errors = result.standard_errors()["b"].tolist()
    assert errors == pytest.approx(spreads, rel=1e-3)
    assert "Newton" in str(result.plan)


def test_a_guide_keeps_no_conjugate_latent_of_its_own_factor() -> None:
    def guide(x: Tensor) -> None:
        shape = pyro.param("shape", torch.ones(5), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("rate", dist.Gamma(shape, 2.0))

    expected = float(negative_binomial(COUNTS, 1.0, 1.0).sum())

    def routed(guide: Any, **how: Any) -> tuple[str, Any]:
        pyro.clear_param_store()
        em = ExactPosteriorEM(over_dispersed, guide, **how)
        return em.plan(COUNTS).routes[0].route, em.elbo(COUNTS)

    for own in (guide, AutoNormal):
        route, terms = routed(own)
        assert route == "conjugate"
        assert terms.value == pytest.approx(expected, abs=1e-11)
    for own, how in ((AutoMultivariateNormal, {}), (guide, {"strategy": "guide"})):
        route, terms = routed(own, **how)
        assert route == "guide"
        assert terms.log_evidence == pytest.approx(expected, abs=1e-11)
    assert routed("map")[0] == "point estimate"


def test_the_plan_says_how() -> None:
    plan = str(ExactPosteriorEM(over_dispersed).plan(COUNTS))
    assert "conjugate  conjugate to rate of 'x'" in plan
    assert "Iterations: conjugate latents" in plan


def test_probabilities_read_the_other_way_round_and_simplexes_in_another_order() -> None:
    """Counts of what each statistic stands for, and the divergence of two posteriors."""
    order, chosen = torch.tensor([[2, 0, 1], [1, 2, 0]]), torch.tensor([[0, 1], [2, 2], [1, 0]])

    def model(a: float, alpha: float) -> None:
        p = pyro.sample("p", dist.Beta(tensor(a), B))
        theta = pyro.sample("theta", dist.Dirichlet(tensor([1.0, alpha, 0.5])))
        with pyro.plate("rows", 5):
            pyro.sample(
                "x", dist.Bernoulli(torch.where(COUNTS > 2, 1 - p, p)), obs=COUNTS.clamp(max=1)
            )
            pyro.sample("g", dist.Geometric(1 - p), obs=COUNTS)
        with pyro.plate("two", 2, dim=-1), pyro.plate("draws", 3, dim=-2):
            pyro.sample("z", dist.Categorical(theta[order]), obs=chosen)

    counts = np.bincount(order.gather(1, chosen.mT).reshape(-1), minlength=3)
    em = ExactPosteriorEM(model)
    before, q = em.posterior(2.0, 0.7), em.posterior(1.5, 2.0)
    chis = [np.array([a + 2 + 11, 0.7 + 3 + 5]) for a in (2.0, 1.5)]
    alphas = [np.array([1.0, alpha, 0.5]) + counts for alpha in (0.7, 2.0)]
    expected = _log_beta(chis[1]) - _log_beta(np.array([1.5, 0.7]))
    expected += _log_beta(alphas[1]) - _log_beta(np.array([1.0, 2.0, 0.5]))
    assert q.log_evidence == pytest.approx(expected, abs=1e-11)
    gap = _divergence(*chis) + _divergence(*alphas)
    assert em.elbo(1.5, 2.0, q=before).gap == pytest.approx(gap, abs=1e-10)


def _log_beta(chi: Any) -> float:
    return float(sp.gammaln(chi).sum() - sp.gammaln(chi.sum()))


def _divergence(chi: Any, other: Any) -> float:
    logs = sp.digamma(chi) - sp.digamma(chi.sum())
    return _log_beta(other) - _log_beta(chi) + float(((chi - other) * logs).sum())


def test_data_that_no_child_can_have_are_named_alone() -> None:
    """The latent would be integrated: nothing is said of it beside the number that is wrong."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            rate = pyro.sample("rate", dist.Gamma(A, B))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    with pytest.raises(DataError, match=r"^site 'x': 1 of 5 observed values are outside"):
        ExactPosteriorEM(model).fit(tensor([0.0, 2.0, -5.0, 1.0, 3.0]))
