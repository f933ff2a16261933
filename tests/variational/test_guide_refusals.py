"""Refusals of stochastic fits and of what surrounds them; each text was provoked, and is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormalMessenger
from torch.utils.data import DataLoader

from pyro_em import (
    Alternating,
    ClosedForm,
    ExactPosteriorEM,
    Hard,
    LeastSquares,
    MonteCarlo,
    PyroEMError,
    log_partition,
)

EM = ExactPosteriorEM
X = torch.linspace(-1, 1, 8)


def rows(x):
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(h, 1.0), obs=x)


def slopes(x):
    a = pyro.param("a", torch.tensor(0.0))
    with pyro.plate("n", len(x)):
        pyro.sample("h", dist.Normal(a * x, 1.0))


def fixed(x):
    with pyro.plate("n", len(x)):
        pyro.sample("h", dist.Normal(x, 1.0))


def without_parameters(x):
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(h, 1.0), obs=x)


def counted(x):
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Poisson(2.0))
        pyro.sample("x", dist.Normal(h, 1.0), obs=x)


def rates(x):
    rate = pyro.param("rate", torch.tensor(1.0)).expand(len(x))
    with pyro.plate("n", len(x)):
        pyro.sample("h", dist.Poisson(rate))


def looped(x):
    h = pyro.sample("h", dist.Normal(0.0, 1.0))
    for i in range(len(x)):
        pyro.sample(f"x{i}", dist.Normal(h, 1.0), obs=x[i])


def shared(x):
    h = pyro.sample("h", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(h, 1.0), obs=x)


def of_shared(x):
    pyro.sample("h", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))


def subsampled(x):
    with pyro.plate("n", 8, subsample_size=4) as chosen:
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(h, 1.0), obs=x[chosen])


def pair(**settings: Any) -> ExactPosteriorEM:
    return EM(rows, slopes, **{"strategy": "guide", **settings})


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "schedule": (lambda: pair().fit(X, schedule="both"), "schedule='both' | Alternating("),
    "loader": (lambda: pair().fit(DataLoader(X, 4), batch_size=2), "DataLoader | loader makes"),
    "batch": (lambda: pair().fit(X, batch_size=99), "batch_size=99 | 8 rows | from 1 to 8"),
    "arrays": (
        lambda: EM(lambda x, y: rows(x), lambda x, y: slopes(x), strategy="guide").fit(
            X, X[:3], batch_size=2
        ),
        "[3, 8] | same rows",
    ),
    "no plate": (
        lambda: EM(looped, of_shared, strategy="guide").fit(X, batch_size=2),
        "size 2 | pyro.plate(",
    ),
    "least squares": (
        lambda: pair(updates={"mu": LeastSquares()}).fit(X),
        "updates['mu'] | exact fit | ClosedForm(",
    ),
    "nothing": (
        lambda: EM(without_parameters, fixed, strategy="guide").fit(X),
        "neither the model nor the guide",
    ),
    "turns": (
        lambda: EM(rows, fixed, strategy="guide").fit(X, schedule=Alternating()),
        "no parameters of its own",
    ),
    "hard": (lambda: pair(strategy=Hard()).fit(X), "Hard() | draws 'h' | guide='map'"),
    "rough": (
        lambda: EM(counted, rates, strategy=MonteCarlo(3)).fit(X),
        "'h' cannot be reparameterised",
    ),
    "optim": (lambda: pair(optim=0.01), "optim=0.01 | torch.optim.Adam"),
    "step size": (lambda: ClosedForm(step_size=2.0), "step_size=2.0 | (0, 1]"),
    "no turns": (lambda: Alternating(0, 0), "guide_steps=0 | one must be positive"),
    "factory": (
        lambda: EM(rows, lambda model: 3, strategy="guide").fit(X),
        "returned a int, not a guide",
    ),
    "messenger": (lambda: EM(subsampled, AutoNormalMessenger).fit(X), "plate 'n' | subsample"),
    "weights": (
        lambda: EM(shared, of_shared, strategy=MonteCarlo(3)).fit(X, batch_size=4),
        "different scales | without batch_size",
    ),
    "posterior": (
        lambda: pair().estimate_evidence(X, proposal="posterior"),
        "no exact posterior | proposal='guide'",
    ),
    "proposal": (lambda: pair().estimate_evidence(X, proposal="q"), "proposal='q' | 'prior'"),
    "q": (lambda: pair().elbo(X, q={"h": X}), "discrete latents only | the guide is q"),
    "m_step": (lambda: pair().m_step({}, X), "m_step | draws latents | use step or fit"),
    "step": (lambda: pair().step(DataLoader(X, 4)), "one step takes one batch | em.fit(loader"),
    "errors": (
        lambda: pair().fit(X, max_steps=1).standard_errors(),
        "not known: a guide draws | guide's scales",
    ),
    "probs": (lambda: pair().posterior(X).probs("h"), "site 'h' | discrete latents"),
    "base": (lambda: log_partition(rows, X, base="b"), "base='b' | 'counting'"),
    "epochs": (lambda: pair().fit(X, num_epochs=0), "num_epochs=0 | at least 1"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str) -> None:
    call, words = CASES[name]
    with pytest.raises(PyroEMError) as caught:
        call()
    text = str(caught.value)
    assert [w for w in words.split(" | ") if w not in text] == [], text
