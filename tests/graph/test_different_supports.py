"""A latent that chooses among distributions of different supports: density zero is no error."""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, PyroEMError

X = tensor([-1.0, 0.2, 1.5, -0.3, 3.0, 0.7], dtype=torch.float64)
COUNTS = tensor([0.0, 0.0, 1.0, 4.0, 0.0, 2.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> None:
    """Each case begins with an empty param store."""


def positive(name: str, value: float) -> Tensor:
    return pyro.param(name, tensor(value), constraint=constraints.positive)


def weight() -> Tensor:
    return pyro.param("w", tensor(0.4), constraint=constraints.unit_interval)


def two(first: Any, second: Any, event: bool = False) -> Any:
    """A model in which a coin chooses between two distributions."""

    def model(x: Tensor) -> None:
        a, b, w = first(), second(), weight()
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Bernoulli(w)).bool()
            if event:
                z = z.unsqueeze(-1)
            one = dist.MaskedMixture(z, a, b)
            pyro.sample("x", one.to_event(1) if event else one, obs=x)

    return model


def by_hand(a: Any, b: Any, w: Any, x: Tensor) -> Tensor:
    parts = []
    for fn, p in ((a, 1 - w), (b, w)):
        inside = fn.support.check(x)
        safe = torch.where(inside, x, torch.ones_like(x))
        log_p = torch.where(inside, fn.log_prob(safe), -torch.inf)
        parts.append(torch.as_tensor(p).log() + (log_p.sum(-1) if x.dim() > 1 else log_p))
    return torch.logaddexp(*parts).sum()


CASES: dict[str, tuple[Any, Any, Tensor]] = {
    "real and positive": (
        lambda: dist.Normal(0.0, positive("s", 1.0)),
        lambda: dist.LogNormal(pyro.param("m", tensor(0.3)), 0.8),
        X,
    ),
    "positive and real": (
        lambda: dist.Gamma(positive("s", 1.5), 1.0),
        lambda: dist.Normal(pyro.param("m", tensor(0.3)), 1.0),
        X,
    ),
    "point and counts": (
        lambda: dist.Poisson(positive("s", 1.5)),
        lambda: dist.Delta(tensor(0.0)),
        COUNTS,
    ),
    "one support": (
        lambda: dist.Normal(0.0, positive("s", 1.0)),
        lambda: dist.StudentT(3.0, pyro.param("m", tensor(0.3)), 0.8),
        X,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_evidence_is_that_by_hand_and_rises(case: str) -> None:
    first, second, x = CASES[case]
    em = ExactPosteriorEM(two(first, second))
    got = em.elbo(x).log_evidence
    torch.testing.assert_close(tensor(got), by_hand(first(), second(), weight(), x).detach())
    probs = em.posterior(x).probs("z")
    if case == "real and positive":
        assert bool((probs[x < 0, 1] == 0).all()) and bool((probs[x > 0, 1] > 0).all())
    result = em.fit(x, max_steps=20)
    path = [*result.history, result.log_evidence]
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(path))
    torch.testing.assert_close(
        tensor(result.log_evidence), by_hand(first(), second(), weight(), x).detach()
    )
    assert all(bool(p.isfinite().all()) for p in result.params.values())


def test_rows_of_several_entries() -> None:
    x = torch.stack([X.abs(), X.abs() + 1, X], -1)
    first = lambda: dist.Normal(torch.zeros(3), positive("s", 1.0))  # noqa: E731
    second = lambda: dist.LogNormal(torch.zeros(3), 0.8)  # noqa: E731
    em = ExactPosteriorEM(two(first, second, event=True))
    torch.testing.assert_close(
        tensor(em.elbo(x).log_evidence), by_hand(first(), second(), weight(), x).detach()
    )


def test_a_bound_that_a_latent_chooses() -> None:
    low = tensor([0.5, 2.0])

    def model(x: Tensor) -> None:
        alpha = positive("alpha", 1.5)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(tensor([0.3, 0.7])))
            pyro.sample("x", dist.Pareto(low[z], alpha), obs=x)

    x = tensor([0.6, 1.9, 2.5, 7.0])
    result = ExactPosteriorEM(model).fit(x, max_steps=5)
    pareto = dist.Pareto(low, result.params["alpha"], validate_args=False)
    log_p = torch.where(x[:, None] >= low, pareto.log_prob(x[:, None]), -torch.inf)
    expected = (log_p + tensor([0.3, 0.7]).log()).logsumexp(-1).sum()
    torch.testing.assert_close(tensor(result.log_evidence), expected)


def test_what_no_component_can_produce_is_said_without_a_guide() -> None:
    def model(x: Tensor) -> None:
        s = positive("s", 1.0)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5)).bool()
            fn = dist.MaskedMixture(z, dist.Gamma(s, 1.0), dist.LogNormal(0.0, s))
            pyro.sample("x", fn, obs=x)

    with pytest.raises(PyroEMError) as caught:
        ExactPosteriorEM(model).fit(X)
    text = str(caught.value)
    assert "'x'" in text and "guide" not in text and "invalid values:" not in text, text
