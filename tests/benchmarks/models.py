"""The models of the table, as ordinary Pyro programs, and our EM iterations on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, vectorized_markov
from pyro_em.fitting.steps.em_map import ByTracing
from pyro_em.fitting.steps.em_on_sums import on_sums
from pyro_em.plan.program import Program
from pyro_em.tracing.parameters import values_of
from tests.benchmarks.timing import Steps


def mixture(x: Tensor, K: int, start: Tensor | None = None) -> None:
    """Gaussian mixture with full covariances, which begins at other rows where given. # x: (N, D)"""
    start = x if start is None else start
    w = pyro.param("w", x.new_ones(K) / K, constraint=C.simplex)
    mu = pyro.param("mu", start[:K].clone())
    S = pyro.param("S", torch.cov(start[:5000].T).repeat(K, 1, 1), constraint=C.positive_definite)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)


def symbols_chain(x: Tensor, K: int, S: int, start: dict[str, Tensor]) -> None:
    """Hidden Markov model with categorical emissions. # x: (T,)"""
    pi = pyro.param("pi", start["pi"], constraint=C.simplex)
    A = pyro.param("A", start["A"], constraint=C.simplex)
    E = pyro.param("E", start["E"], constraint=C.simplex)
    z = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"x_{t}", dist.Categorical(E[z]), obs=x[t])


def vectorized_symbols(x: Tensor, K: int, S: int, start: dict[str, Tensor]) -> None:
    """The same without a loop. # x: (T,)"""
    pi = pyro.param("pi", start["pi"], constraint=C.simplex)
    A = pyro.param("A", start["A"], constraint=C.simplex)
    E = pyro.param("E", start["E"], constraint=C.simplex)
    z = None
    for t in vectorized_markov("t", len(x), dim=-1):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        pyro.sample(f"x_{t}", dist.Categorical(E[z]), obs=x[t])


def gaussian_chains(x: Tensor, K: int, start: dict[str, Tensor]) -> None:
    """Hidden Markov model with diagonal Gaussian emissions. # x: (B, T, D)"""
    pi = pyro.param("pi", start["pi"], constraint=C.simplex)
    A = pyro.param("A", start["A"], constraint=C.simplex)
    mu = pyro.param("mu", start["mu"].clone())
    s = pyro.param("s", start["s"], constraint=C.positive)
    z = None
    with pyro.plate("sequences", len(x)):
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], s[z]).to_event(1), obs=x[:, t])


def latent_class(x: Tensor, K: int) -> None:
    """Binary items given a class. # x: (N, J)"""
    w = pyro.param("w", torch.ones(K) / K, constraint=C.simplex)
    p = pyro.param(
        "p", torch.linspace(0.2, 0.8, K * x.shape[1]).reshape(K, -1), constraint=C.unit_interval
    )
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Bernoulli(p[z]).to_event(1), obs=x)


def regressions(X: Tensor, y: Tensor, K: int) -> None:
    """A mixture of linear regressions. # X: (N, D), y: (N,)"""
    D = X.shape[1]
    w = pyro.param("w", X.new_ones(K) / K, constraint=C.simplex)
    B = pyro.param("B", torch.linspace(-1, 1, K * D).reshape(K, D).to(X))
    s = pyro.param("s", X.new_ones(K), constraint=C.positive)
    with pyro.plate("data", len(X)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal((B[z] * X).sum(-1), s[z]), obs=y)


def hidden_cause(x: Tensor) -> None:
    """A hidden binary node with five binary children. # x: (N, 5)"""
    p = pyro.param("p", torch.tensor(0.4), constraint=C.unit_interval)
    tables = [
        pyro.param(f"t{j}", torch.tensor([0.3, 0.6]), constraint=C.unit_interval) for j in range(5)
    ]
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(p)).long()
        for j, t in enumerate(tables):
            pyro.sample(f"x{j}", dist.Bernoulli(t[z]), obs=x[:, j])


def factors(x: Tensor, q: int) -> None:
    D = x.shape[-1]
    start = torch.randn(D, q, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    w = pyro.param("W", start)
    mu = pyro.param("mu", torch.zeros(D, dtype=x.dtype))
    s = pyro.param("s", torch.ones(D, dtype=x.dtype), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(x.new_zeros(q), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(h @ w.T + mu, s).to_event(1), obs=x)


def iterations(model: Callable[..., None], *args: Any) -> Steps:
    """Our EM iterations on a model, planned once: compiled steps where there are any."""
    pyro.clear_param_store()
    program = ExactPosteriorEM(model)._ready(args, {})
    assert isinstance(program, Program)
    values = values_of(program.graph.parameters)
    sound, em = ByTracing(program), on_sums(program)
    store = pyro.get_param_store().get_state()

    def compiled(steps: int) -> None:
        assert em is not None
        at = em.e_step(values)
        for _ in range(steps):
            at = em.step(at)[0]

    def full(steps: int) -> None:
        pyro.get_param_store().set_state(store)
        at = sound.e_step()
        for i in range(steps):
            at = sound.step(at, i)[0]

    return full if em is None else compiled
