"""Latents that look conjugate and are not: each is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_em import ExactPosteriorEM, ModelError

A, B = torch.tensor(1.5), torch.tensor(0.7)
COUNTS = torch.tensor([0.0, 2.0, 5.0, 1.0, 3.0])
REALS = torch.tensor([0.3, -1.2, 2.5, 0.1, 0.8])
SHARES = torch.tensor([0.4, 0.6])


def _two_powers() -> None:
    rate = pyro.sample("v", dist.Gamma(A, B))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Poisson(rate), obs=COUNTS)
        pyro.sample("y", dist.Poisson(rate.sqrt()), obs=COUNTS)


def _mirrored() -> None:
    p = pyro.sample("v", dist.Beta(A, B))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Geometric(1 - p), obs=COUNTS)
        pyro.sample("y", dist.Geometric(1 - p / 2), obs=COUNTS)


def _product() -> None:
    a = pyro.sample("v", dist.Gamma(A, B))
    b = pyro.sample("u", dist.Gamma(A, B))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Poisson(a * b), obs=COUNTS)


def _shifted() -> None:
    rate = pyro.sample("v", dist.Gamma(A, B))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Poisson(rate + 1.0), obs=COUNTS)


def _cut() -> None:
    p = pyro.sample("v", dist.Dirichlet(torch.ones(7)))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Categorical(p.flip(-1)), obs=COUNTS.long())
        pyro.sample("y", dist.Categorical(p[:6]), obs=COUNTS.long())


def _twice() -> None:
    p = pyro.sample("v", dist.Dirichlet(torch.ones(6)))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Categorical(p[[0, 1, 2, 3, 4, 4]]), obs=COUNTS.long())


def _in_part() -> None:
    with pyro.plate("rows", 5):
        rate = pyro.sample("v", dist.Gamma(A, B), obs=COUNTS + 1, obs_mask=COUNTS > 2)
        pyro.sample("x", dist.Poisson(rate), obs=COUNTS)


def _branched() -> None:
    rate = pyro.sample("v", dist.Gamma(A, B))
    factor = 2.0 if rate > 1 else 1.0
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Poisson(rate * factor), obs=COUNTS)


def _detached() -> None:
    rate = pyro.sample("v", dist.Gamma(A, B))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Poisson(rate * rate.detach()), obs=COUNTS)


def _two_levels() -> None:
    above = pyro.sample("v", dist.Gamma(A, B))
    with pyro.plate("rows", 5):
        rate = pyro.sample("rate", dist.Gamma(A, above))
        pyro.sample("x", dist.Poisson(rate), obs=COUNTS)


def _both_arguments() -> None:
    level = pyro.sample("u", dist.Normal(0.0, 1.0))
    precision = pyro.sample("v", dist.Gamma(A, B))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Normal(level, precision.rsqrt()), obs=REALS)


def _by_class() -> None:
    with pyro.plate("classes", 2):
        rate = pyro.sample("v", dist.Gamma(A, B))
    with pyro.plate("rows", 5):
        z = pyro.sample("z", dist.Categorical(SHARES))
        pyro.sample("x", dist.Poisson(rate[z]), obs=COUNTS)


def _twice_the_log_odds() -> None:
    p = pyro.sample("v", dist.Beta(A, B))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Geometric(logits=2 * torch.logit(p)), obs=COUNTS)


def _clamped_log_odds() -> None:
    p = pyro.sample("v", dist.Beta(A, B))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Geometric(logits=torch.logit(p, eps=1e-3)), obs=COUNTS)


def _tempered() -> None:
    p = pyro.sample("v", dist.Dirichlet(torch.ones(6)))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Categorical(logits=p.log() / 2), obs=COUNTS.long())


def _of_two_logarithms() -> None:
    rate = pyro.sample("v", dist.Gamma(A, B))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Poisson((rate.log() + rate.log()).exp()), obs=COUNTS)


def _to_a_learned_power() -> None:
    power = pyro.param("power", torch.tensor(1.0))
    rate = pyro.sample("v", dist.Gamma(A, B))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.Poisson((power * rate.log()).exp()), obs=COUNTS)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (_twice_the_log_odds, "Geometric.logits of 'v' is not the latent itself: it is neither"),
        (_clamped_log_odds, r"an operation that makes no log odds reaches it \(logit\)"),
        (_tempered, "Categorical.logits of 'v' is not the latent itself: a factor"),
        (_of_two_logarithms, r"no product reaches it \(add\)"),
        (_to_a_learned_power, r"no product reaches it \(mul\)"),
        (_two_powers, "Poisson.rate of 'v', its power 0.5"),
        (_mirrored, r"Geometric.probs of 'v' is not the latent itself: it is neither an element"),
        (_product, "it reads 'v' and 'u'"),
        (_shifted, r"an operation that is no product reaches it \(add\)"),
        (_cut, "its elements are cut, or in another order"),
        (_twice, "its elements are cut, or in another order"),
        (_in_part, r"it is observed in part \(obs_mask\)"),
        (_branched, r"outside autograd \(gt\)"),
        (_detached, r"outside autograd \(detach\)"),
        (_two_levels, "the prior of 'rate' depends on 'v'"),
        (_both_arguments, "it reads Gaussian 'u' and 'v'"),
        (_by_class, "a mixture of 2 to the power of the plate's size"),
    ],
)
def test_near_misses_are_refused_by_name(model: Callable[[], None], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        ExactPosteriorEM(model).posterior()
