"""Models whose autograd graph does not tell all: no bindings, no wrong closed form."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, Gradient, PyroEMWarning
from tests.updates.test_m_step import REAL, run

C = constraints


HIDDEN = {
    "detach": lambda mu: (mu[0], 0.5 + mu.detach()[1].abs()),
    "item": lambda mu: (mu[0], 0.5 + abs(mu[1].item())),
    "clamp": lambda mu: (mu[0].clamp(min=-0.5), 1.0),
    "relu": lambda mu: (mu[0].relu(), 1.0),
    "sort": lambda mu: (mu.sort().values[0], 1.0),
    "branch": lambda mu: (mu[0], 1.0 if bool(mu[1] < 1.4) else 0.7),
}


def hidden(how):
    def model(x):
        mu = pyro.param("mu", torch.tensor([0.2, 1.0]))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            loc, scale = HIDDEN[how](mu)
            pyro.sample("x", dist.Normal(torch.stack([loc, mu[1]])[z], scale), obs=x)

    def evidence(mu):
        loc, scale = HIDDEN[how](mu)
        log_p = dist.Normal(torch.stack([loc, mu[1]]), scale).log_prob(REAL[:, None])
        return (log_p.logsumexp(-1) - np.log(2)).sum()

    return model, evidence


@pytest.mark.parametrize("how", [n for n in HIDDEN if n != "branch"])
def test_hidden_dependences_get_no_closed_form(how):
    """What hides a number of a parameter is run at each step; other operations are done again."""
    model, evidence = hidden(how)
    em = ExactPosteriorEM(model)
    plan = em.plan(REAL)
    assert plan.compiled == (how not in ("detach", "item"))
    assert type(plan.updates["mu"].update) is Gradient
    result = em.fit(REAL, max_steps=20, tol=0)
    path = np.array([*result.history, result.log_evidence])
    assert path[0] == pytest.approx(float(evidence(torch.tensor([0.2, 1.0]))))
    assert result.log_evidence == pytest.approx(float(evidence(result.params["mu"])), rel=1e-9)
    assert path[-1] > path[0]
    if how not in ("detach", "item"):  # whose gradients are not the function's
        assert np.all(np.diff(path) > -1e-9 * np.abs(path[1:]))


def test_a_branch_that_flips_on_the_way_hands_over_to_the_contraction():
    """`mu[1]` crosses the threshold: from there on the scale is another.

    The evidence jumps there, so that a monotone ascent may end at the edge; what is reported is the
    model's own evidence all the way, not that of the kernel.
    """
    model, evidence = hidden("branch")
    with pytest.warns(
        PyroEMWarning,
        match=r"site 'x', argument 'scale'.*the mixture kernel computed.*contraction takes",
    ):
        result = ExactPosteriorEM(model).fit(REAL, tol=1e-9)
    assert not result.plan.compiled
    path = [*result.history, result.log_evidence]
    assert np.all(np.diff(path) > -1e-9)
    assert path[-1] == pytest.approx(float(evidence(result.params["mu"])), rel=1e-9)


def test_a_symmetric_matrix_is_no_closed_form():
    y = [0, 1, 1, 0, 2, 2, 1, 0]
    E = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])

    def model():
        a = pyro.param("a", torch.tensor([0.7, 0.3, 0.5]), constraint=C.positive)
        A = a[torch.tensor([[0, 1], [1, 2]])]
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z{t}", dist.Categorical(A[z]))
            pyro.sample(f"y{t}", dist.Categorical(E[z]), obs=torch.tensor(y[t]))

    em = ExactPosteriorEM(model)
    assert type(em.plan().updates["a"].update) is Gradient
    q = em.posterior()
    counts = sum(q.joint(f"z{t - 1}", f"z{t}") for t in range(1, len(y)))
    counts = counts + torch.stack([q.probs("z0"), torch.zeros(2)])
    em.step()
    a = pyro.param("a").detach().clone().requires_grad_()
    A = a[torch.tensor([[0, 1], [1, 2]])]
    (gradient,) = torch.autograd.grad((counts * (A / A.sum(-1, keepdim=True)).log()).sum(), a)
    assert float((a.detach() * gradient).abs().max()) < 1e-6
    run(model)
