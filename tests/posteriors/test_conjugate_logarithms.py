"""Conjugate latents that are read through their logarithms or their log odds."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate as si
import scipy.stats as st
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM

COUNTS = torch.tensor([0.0, 2.0, 5.0, 1.0, 3.0], dtype=torch.float64)
WORDS = torch.tensor([0, 2, 1, 2, 2, 0])
OFFSETS = torch.tensor([0.1, -0.7, 1.0, 0.0, 0.4], dtype=torch.float64)


def test_log_odds_of_a_probability_and_of_one_minus_it() -> None:
    group = torch.tensor([0, 1, 1, 0, 1])

    def model(a: float = 1.5) -> None:
        a = pyro.param("a", torch.tensor(a, dtype=torch.float64), constraint=constraints.positive)
        with pyro.plate("groups", 2):
            p = pyro.sample("p", dist.Beta(a, 0.7))
        q = p[group]
        with pyro.plate("rows", 5):
            pyro.sample("x", dist.Binomial(6.0, logits=torch.logit(p)[group]), obs=COUNTS)
            pyro.sample("g", dist.Geometric(logits=(1 - q).log() - q.log()), obs=COUNTS)
            pyro.sample("n", dist.NegativeBinomial(2.5, logits=(q / (1 - q)).log()), obs=COUNTS)
            pyro.sample("b", dist.Bernoulli(logits=-torch.logit(1 - q)), obs=(COUNTS > 1).double())

    q = ExactPosteriorEM(model).posterior()
    x, evidence = COUNTS.numpy(), 0.0
    for g in range(2):
        own = x[group.numpy() == g]

        def joint(p: float, own: np.ndarray = own) -> float:
            each = st.binom.pmf(own, 6, p) * st.geom.pmf(own + 1, 1 - p)
            each = each * st.nbinom.pmf(own, 2.5, 1 - p) * st.bernoulli.pmf((own > 1) * 1, p)
            return float(st.beta.pdf(p, 1.5, 0.7) * each.prod())

        total = si.quad(joint, 0, 1, epsabs=0, epsrel=1e-11)[0]
        mean = si.quad(lambda p: p * joint(p), 0, 1, epsabs=0, epsrel=1e-11)[0] / total
        evidence += np.log(total)
        assert float(q.mean("p")[g]) == pytest.approx(mean, abs=1e-9)
    assert q.log_evidence == pytest.approx(evidence, abs=1e-8)


def test_logarithms_of_a_simplex_that_is_read_by_a_latent() -> None:
    """Topics of words: `theta.log()` in logits, indexed by an enumerated latent."""
    alpha = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    shares = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def model(words: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(shares[1]))
        a = torch.where(z.unsqueeze(-1) > 0, alpha, alpha.flip(-1))
        theta = pyro.sample("theta", dist.Dirichlet(a))
        with pyro.plate("words", len(words)):
            pyro.sample("w", dist.Categorical(logits=theta.log()[..., [2, 0, 1]]), obs=words)
        pyro.sample("n", dist.Multinomial(7, logits=theta.log()), obs=alpha * 2)

    em = ExactPosteriorEM(model)
    q = em.posterior(WORDS)
    own = torch.bincount(WORDS, minlength=3)[[1, 2, 0]].numpy()
    n = 2 * alpha.numpy()
    parts = []
    for a in (alpha.flip(-1), alpha):
        both = st.dirichlet_multinomial.logpmf(own + n, a.numpy(), int((own + n).sum()))
        parts.append(both - _coefficient(own + n) + _coefficient(n))
    expected = np.logaddexp(*(np.log(shares.numpy()) + parts))
    assert q.log_evidence == pytest.approx(expected, abs=1e-11)


def _coefficient(n: np.ndarray) -> float:
    return float(
        st.multinomial.logpmf(n, int(n.sum()), n / n.sum())
        - (n[n > 0] * np.log(n[n > 0] / n.sum())).sum()
    )


def test_a_log_rate_with_offsets_is_a_rate_with_exposures() -> None:
    def model(a: float = 1.5) -> None:
        a = pyro.param("a", torch.tensor(a, dtype=torch.float64), constraint=constraints.positive)
        b = pyro.param("b", torch.zeros((), dtype=torch.float64))
        with pyro.plate("rows", 5):
            rate = pyro.sample("rate", dist.Gamma(a, 0.7))
            pyro.sample("x", dist.Poisson((OFFSETS + b + rate.log()).exp()), obs=COUNTS)
            scale = (0.2 - 0.5 * rate.log()).exp()
            pyro.sample("y", dist.Normal(0.1, scale), obs=OFFSETS)

    em = ExactPosteriorEM(model)
    result = em.fit(max_steps=3, tol=0.0)
    assert min(np.diff(result.history)) > 0
    a, b = (float(result.params[n]) for n in ("a", "b"))
    expected = 0.0
    for x, u in zip(COUNTS.numpy(), OFFSETS.numpy(), strict=True):

        def joint(v: float, x: float = x, u: float = u) -> float:
            child = st.poisson.pmf(x, np.exp(u + b) * v) * st.norm.pdf(u, 0.1, np.exp(0.2) / v**0.5)
            return float(child * st.gamma.pdf(v, a, scale=1 / 0.7))

        expected += np.log(si.quad(joint, 0, np.inf, epsabs=0, epsrel=1e-10)[0])
    assert em.posterior().log_evidence == pytest.approx(expected, abs=1e-7)
