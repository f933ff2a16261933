"""Discrete latents beside Gaussian ones, against enumeration by hand and marginals with a name."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, Hard, ModelError, UsageError

K, D = 3, 4
FLIPS = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> None:
    """Each case begins with an empty param store, in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loadings() -> tuple[Tensor, Tensor, Tensor]:
    w = pyro.param("W", lambda: numbers(K, D, 2, seed=1))
    mu = pyro.param("mu", lambda: 2 * numbers(K, D, seed=2))
    s = pyro.param("s", lambda: torch.ones(K, D), constraint=constraints.positive)
    return w, mu, s


def analysers(x: Tensor) -> None:
    w, mu, s = loadings()
    pi = pyro.param("pi", lambda: torch.ones(K) / K, constraint=constraints.simplex)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = (w[z] @ h.unsqueeze(-1)).squeeze(-1) + mu[z]
        pyro.sample("x", dist.Normal(mean, s[z]).to_event(1), obs=x)


def marginal_analysers(x: Tensor) -> None:
    w, mu, s = loadings()
    pi = pyro.param("pi", lambda: torch.ones(K) / K, constraint=constraints.simplex)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("x", dist.LowRankMultivariateNormal(mu[z], w[z], s[z] ** 2), obs=x)


def steps_of_factors(x: Tensor, named: bool) -> None:
    w, _, s = loadings()
    z = torch.tensor(0)
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(FLIPS[z]))
        if named:
            fn = dist.LowRankMultivariateNormal(torch.zeros(D), w[z], s[0] ** 2)
        else:
            h = pyro.sample(f"h_{t}", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            fn = dist.Normal((w[z] @ h.unsqueeze(-1)).squeeze(-1), s[0]).to_event(1)
        pyro.sample(f"x_{t}", fn, obs=x[t])


def test_a_mixture_of_factor_analysers_is_one_of_low_rank_normals() -> None:
    x = numbers(40, D) + 2 * numbers(K, D, seed=5)[torch.arange(40) % K]
    ours, named = ExactPosteriorEM(analysers), ExactPosteriorEM(marginal_analysers)
    assert {r.site: r.route for r in ours.plan(x).routes} == {"z": "enumerate", "h": "Gaussian"}
    for _ in range(3):
        q, p = ours.posterior(x), named.posterior(x)
        assert q.log_evidence == pytest.approx(p.log_evidence, rel=1e-12)
        torch.testing.assert_close(q.probs("z"), p.probs("z"), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(q.pointwise, p.pointwise, rtol=1e-10, atol=1e-10)
        history = ours.fit(x, max_steps=4, tol=0).history
        assert min(torch.as_tensor(history).diff()) > -1e-9


def test_a_hidden_markov_model_of_factors() -> None:
    x = numbers(12, D)
    ours = ExactPosteriorEM(steps_of_factors).posterior(x, False)
    named = ExactPosteriorEM(steps_of_factors).posterior(x, True)
    assert ours.log_evidence == pytest.approx(named.log_evidence, rel=1e-12)
    torch.testing.assert_close(ours.probs("z_*"), named.probs("z_*"), rtol=1e-9, atol=1e-12)


def causes(y: Tensor, g: Tensor) -> None:
    m = pyro.param("m", torch.tensor([-1.0, 1.0]))
    between = pyro.param("between", torch.tensor([1.0, 0.5]), constraint=constraints.positive)
    within = pyro.param("within", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("groups", 6):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        u = pyro.sample("u", dist.Normal(m[z], between[z]))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(u[g], within), obs=y)


def evidence_of_causes(y: Tensor, g: Tensor, m: Tensor, between: Tensor, within: Tensor) -> Tensor:
    total = y.new_zeros(())
    for k in range(6):
        own = y[g == k]
        n = len(own)
        parts = [
            dist.MultivariateNormal(
                m[z].expand(n), between[z] ** 2 * torch.ones(n, n) + within**2 * torch.eye(n)
            ).log_prob(own)
            + torch.tensor([0.4, 0.6])[z].log()
            for z in range(2)
        ]
        total = total + torch.logsumexp(torch.stack(parts), 0)
    return total


def test_a_discrete_cause_of_a_group_mean() -> None:
    """Rows that read by index weigh as their group does; EM ends where the gradient vanishes."""
    g = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 0, 2, 4, 5, 5, 4])
    y = torch.tensor([-3.0, -1.0, 2.5, 0.5, -2.0, 1.0])[g] + 0.5 * numbers(16, seed=9)
    start = torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 0.5]), torch.tensor(1.0)
    em = ExactPosteriorEM(causes)
    assert em.elbo(y, g).log_evidence == pytest.approx(
        float(evidence_of_causes(y, g, *start)), rel=1e-12
    )
    result = em.fit(y, g, max_steps=150, tol=1e-12)
    assert min(torch.as_tensor(result.history).diff()) > -1e-9
    at = [result.params[n].clone().requires_grad_() for n in ("m", "between", "within")]
    by_hand = evidence_of_causes(y, g, *at)
    assert result.log_evidence == pytest.approx(by_hand.item(), rel=1e-12)
    for slope in torch.autograd.grad(by_hand, at):
        assert slope.abs().max() < 1e-4


def switching(y: Tensor) -> None:
    a = pyro.param("a", torch.tensor([0.9, 0.2]))
    z, h = torch.tensor(0), torch.tensor(0.0)
    for t in range(len(y)):
        z = pyro.sample(f"z_{t}", dist.Categorical(FLIPS[z]))
        h = pyro.sample(f"h_{t}", dist.Normal(a[z] * h, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(h, 0.5), obs=y[t])


def test_a_short_switching_chain_is_a_mixture_of_gaussians() -> None:
    y, a = numbers(4), torch.tensor([0.9, 0.2])
    parts, joint = [], torch.zeros(4, 2)
    for path in itertools.product(range(2), repeat=4):
        weight, row, rows, before = torch.zeros(()), torch.zeros(4), [], 0
        for t, z in enumerate(path):
            weight = weight + FLIPS[before, z].log()
            row = a[z] * row + torch.eye(4)[t]
            rows.append(row)
            before = z
        low = torch.stack(rows)
        covariance = low @ low.T + 0.25 * torch.eye(4)
        parts.append(weight + dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(y))
    total = torch.logsumexp(torch.stack(parts), 0)
    for path, part in zip(itertools.product(range(2), repeat=4), parts, strict=True):
        joint[torch.arange(4), torch.tensor(path)] += (part - total).exp()
    q = ExactPosteriorEM(switching).posterior(y)
    assert q.log_evidence == pytest.approx(float(total), rel=1e-12)
    torch.testing.assert_close(q.probs("z_*"), joint, rtol=1e-9, atol=1e-12)


def crossing(y: Tensor, g: Tensor) -> None:
    with pyro.plate("groups", 4):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("y", dist.Normal(u[g] + z, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        (crossing, (numbers(9), torch.arange(9) % 4), "a mixture of 2 to the power of the plate's"),
        (switching, (numbers(30),), "a mixture of 2^30 = 1,073,741,824 Gaussians"),
    ],
)
def test_what_couples_too_many_cases_is_refused_with_the_number(
    model: Callable[..., None], args: tuple, words: str
) -> None:
    em = ExactPosteriorEM(model)
    with pytest.raises(ModelError) as caught:
        em.posterior(*args)
    assert words in str(caught.value) and "give a guide" in str(caught.value)


def test_an_e_step_on_cells_is_refused_beside_gaussian_latents() -> None:
    with pytest.raises(
        UsageError, match="'h' is a Gaussian latent, and this E-step is one of sums"
    ):
        ExactPosteriorEM(analysers, strategy=Hard()).fit(numbers(20, D))
