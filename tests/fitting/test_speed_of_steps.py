"""What a step costs beside its E-step and M-step: things that are looked at once."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.fitting.steps.em_on_sums import OnSums


def model(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=C.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def test_the_rounding_of_a_graph_is_looked_up_once() -> None:
    program = ExactPosteriorEM(model)._ready((torch.randn(5),), {})
    graph = program.graph  # type: ignore[union-attr]
    assert graph.eps is graph.eps


def test_a_fit_makes_one_e_step_more_than_it_has_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of its last step is made at what the param store holds, and is the result's."""
    pyro.clear_param_store()
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    em = ExactPosteriorEM(model)
    em.plan(x)
    e_steps = []
    for name in ("e_step", "step"):
        own = getattr(OnSums, name)

        def counted(self: OnSums, *args: object, own: object = own) -> object:
            e_steps.append(None)
            return own(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(OnSums, name, counted)
    result = em.fit(x, max_steps=4, tol=0)
    assert len(e_steps) == 5
    mu, w = pyro.param("mu").detach(), pyro.param("w").detach()
    terms = dist.Normal(mu, 1.0).log_prob(x[:, None]) + w.log()
    assert result.log_evidence == pytest.approx(float(terms.logsumexp(-1).sum()), rel=1e-6)
    assert len(result.history) == 4 and result.history[-1] < result.log_evidence
    pyro.clear_param_store()
