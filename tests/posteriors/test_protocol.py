"""Summed and drawn posteriors have one face."""

from __future__ import annotations

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_em import DrawnPosterior, ExactPosteriorEM, Posterior
from pyro_em.posteriors.answers.protocol import AnyPosterior

METHODS = ("probs", "mode", "sample", "entropy")


def model(x: Tensor, is_drawn: bool) -> None:
    h = pyro.sample("h", dist.Normal(0.0, 1.0)) if is_drawn else torch.tensor(0.0)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(h + z, 1.0), obs=x)


@pytest.mark.parametrize("is_drawn", [False, True])
def test_every_posterior_answers_the_same_questions(is_drawn: bool) -> None:
    x = torch.tensor([0.1, 1.2, 0.7])
    q = ExactPosteriorEM(model, AutoNormal if is_drawn else None).posterior(x, is_drawn)
    assert isinstance(q, DrawnPosterior if is_drawn else Posterior)
    assert isinstance(q, AnyPosterior) and q.exact is not is_drawn
    torch.testing.assert_close(q.probs("z").sum(-1), torch.ones(3))
    assert q.sample(4, seed=0)["z"].shape == (4, 3)


@pytest.mark.parametrize("kind", [Posterior, DrawnPosterior])
@pytest.mark.parametrize("method", METHODS)
def test_signatures_extend_those_of_the_protocol(kind: type, method: str) -> None:
    asked = inspect.signature(getattr(AnyPosterior, method)).parameters
    given = inspect.signature(getattr(kind, method)).parameters
    assert [p for p in given if p in asked] == list(asked)
    more = [p for n, p in given.items() if n not in asked]
    assert all(p.default is not p.empty for p in more)
