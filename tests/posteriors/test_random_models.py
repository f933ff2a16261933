"""Random parametrised models against brute force; see `tests.posteriors.random_models`."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from torch.distributions import constraints

from pyro_em import DegenerateError, ExactPosteriorEM
from tests.posteriors.random_models import (
    determined,
    evidence_and_posterior,
    m_step_maximises,
    monotone_and_compiled_as_generic,
    random_model,
    seeds,
    short_gradients,
)


@hypothesis_settings(max_examples=60)
@given(seed=seeds)
def test_evidence_and_posterior(seed: int) -> None:
    evidence_and_posterior(*random_model(seed))


@hypothesis_settings(max_examples=30)
@given(seed=seeds)
def test_monotone_and_compiled_as_generic(seed: int) -> None:
    monotone_and_compiled_as_generic(random_model(seed)[0])


@hypothesis_settings(max_examples=30)
@given(seed=seeds)
def test_m_step_maximises(seed: int) -> None:
    """The expected log joint, summed by brute force, rises to a maximum in every exact update."""
    m_step_maximises(*random_model(seed), seed)


@pytest.mark.slow
@hypothesis_settings(max_examples=15)
@given(seed=seeds)
def test_weights_equal_replication(seed: int) -> None:
    """Two EM steps with weighted rows and with repeated rows reach the same parameters."""
    model, _, _ = random_model(seed)
    model.weighted = True
    paths = []
    for one in (model, model.replicated()):
        with pyro.get_param_store().scope():
            em = ExactPosteriorEM(one)
            updates = em.plan().updates
            gradient = short_gradients(updates)
            if gradient:
                em = ExactPosteriorEM(one, updates=gradient)
            try:
                losses = [em.step() for _ in range(1 if gradient else 2)]
            except DegenerateError:
                losses = [math.nan]
            store = {} if gradient else {n: v.detach() for n, v in pyro.get_param_store().items()}
            store = determined(updates, store)
            paths.append((losses[:1] if gradient else losses, store))
    assert paths[0][0] == pytest.approx(paths[1][0], rel=1e-9, nan_ok=True), model
    torch.testing.assert_close(paths[0][1], paths[1][1], rtol=1e-8, atol=1e-9, msg=f"{model}")


def mixture_of_two(scale: float) -> None:
    """Two coupled latents under one sample weight."""
    with pyro.plate("n", 2), pyro.poutine.scale(scale=torch.tensor([scale, scale])):
        a = pyro.sample("a", dist.Categorical(torch.tensor([0.3, 0.7])))
        b = pyro.sample("b", dist.Categorical(torch.tensor([[0.2, 0.8], [0.5, 0.5]])[a]))
        loc = torch.tensor([[0.0, 1.0], [2.0, 3.0]])[a, b]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([0.5, 2.0]))


def test_weights_with_two_coupled_latents() -> None:
    one = ExactPosteriorEM(lambda: mixture_of_two(1.0)).posterior().log_evidence
    two = ExactPosteriorEM(lambda: mixture_of_two(2.0)).posterior().log_evidence
    assert one is not None
    assert two == pytest.approx(2 * one, rel=1e-12)


@pytest.mark.parametrize("family", ["Geometric", "Exponential", "Laplace"])
def test_holes_in_two_plates(family: str) -> None:
    def model() -> None:
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            p = torch.tensor([0.2, 0.6])[z]
            fn = dist.Laplace(p, 1.0) if family == "Laplace" else getattr(dist, family)(p)
            known = torch.arange(12).reshape(4, 3) > 5
            pyro.sample("x", fn, obs=torch.ones(4, 3), obs_mask=known)

    assert ExactPosteriorEM(model).posterior().log_evidence is not None


def two_data_sites() -> None:
    mu, nu = pyro.param("mu", torch.tensor([0.0, 1.0])), pyro.param("nu", torch.tensor([1.0, 2.0]))
    with pyro.plate("n", 3):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=torch.tensor([0.1, 0.5, 2.0]))
        pyro.sample("y", dist.Normal(nu[z], 1.0), obs=torch.tensor([1.0, 0.0, 2.0]))


@pytest.mark.parametrize("call", ["m_step", "elbo"])
def test_a_posterior_of_one_call_is_q_in_another(call: str) -> None:
    em = ExactPosteriorEM(two_data_sites)
    if call == "m_step":
        em.m_step(em.posterior())
    else:
        em.elbo(q=em.fit(max_steps=2, progress=False).posterior)


def test_a_collapsing_gradient_scale_is_no_stack_trace() -> None:
    def model() -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 1.0]))
        a = pyro.param("a", torch.tensor(1.2), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("n", 1):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.LogNormal(mu[z], a * b), obs=torch.tensor([2.0]))

    assert ExactPosteriorEM(model).fit(max_steps=30, progress=False).log_evidence > -math.inf
