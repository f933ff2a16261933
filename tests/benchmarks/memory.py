"""Peak memory of whole fits of a million rows, above their data: models in one table of N x K.

``python -m tests.benchmarks.memory``; each model in a process of its own, after small fits of the same
model that load what loads late.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from tests.benchmarks.conjugates import data, fresh, tails
from tests.benchmarks.growth import peak
from tests.benchmarks.regressions import logistic, logistic_data

ROWS, COMPONENTS, WIDTH = 1_000_000, 16, 8
_GROUPS = 12
TABLE = 8 * ROWS * COMPONENTS / 2**20  # MiB


def _weights(K: int) -> Tensor:
    return pyro.param("p", torch.full((K,), 1 / K).double(), constraint=C.simplex)


def gaussians(x: Tensor, start: Tensor) -> None:
    """Full covariances."""
    K, D = start.shape
    p, mu = _weights(K), pyro.param("mu", start.clone())
    S = pyro.param("S", torch.eye(D).double().repeat(K, 1, 1), constraint=C.positive_definite)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)


def lines(x: Tensor, y: Tensor, start: Tensor) -> None:
    """Linear regressions with an intercept of their own."""
    p, w = _weights(len(start)), pyro.param("w", start.clone())
    b = pyro.param("b", torch.zeros(len(start)).double())
    s = pyro.param("s", torch.ones(len(start)).double(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("y", dist.Normal(b[z] + (x * w[z]).sum(-1), s[z]), obs=y)


def additive(x: Tensor, start: Tensor) -> None:
    """Two latents of four values, whose means add up."""
    p = _weights(4)
    a, b = pyro.param("a", start[:4].clone()), pyro.param("b", start[4:8].clone())
    s = pyro.param("s", torch.ones(start.shape[1]).double(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z, v = pyro.sample("z", dist.Categorical(p)), pyro.sample("v", dist.Categorical(p))
        pyro.sample("x", dist.Normal(a[z] + b[v], s).to_event(1), obs=x)


def students(x: Tensor, start: Tensor) -> None:
    """Student distributions by conjugate scales, one of each row."""
    p, mu = _weights(len(start)), pyro.param("mu", start.clone())
    s = pyro.param("s", torch.ones_like(start), constraint=C.positive)
    nu = pyro.param("nu", torch.full_like(start, 5.0), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        w = pyro.sample("w", dist.Gamma(nu[z] / 2, nu[z] / 2))
        pyro.sample("x", dist.Normal(mu[z], s[z] / w.sqrt()), obs=x)


def rates(x: Tensor, start: Tensor) -> None:
    """Poisson counts whose rates are conjugate latents, one of each row."""
    p, a = _weights(len(start)), pyro.param("a", start.clone(), constraint=C.positive)
    b = pyro.param("b", torch.ones_like(start), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        rate = pyro.sample("rate", dist.Gamma(a[z], b[z]))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def betas(x: Tensor, start: Tensor) -> None:
    """Beta distributions."""
    p, a = _weights(len(start)), pyro.param("a", start.clone(), constraint=C.positive)
    b = pyro.param("b", start.flip(0), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.Beta(a[z], b[z]), obs=x)


def laplaces(x: Tensor, start: Tensor) -> None:
    """Laplace distributions."""
    p, a = _weights(len(start)), pyro.param("a", start.clone())
    b = pyro.param("b", torch.full_like(start, 2.0), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.Laplace(a[z], b[z]), obs=x)


def vectors(x: Tensor, start: Tensor) -> None:
    """Student vectors with full matrices."""
    K, D = start.shape
    p, mu = _weights(K), pyro.param("mu", start.clone())
    nu = pyro.param("nu", torch.full((K,), 5.0).double(), constraint=C.positive)
    L = pyro.param("L", torch.eye(D).double().repeat(K, 1, 1), constraint=C.lower_cholesky)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.MultivariateStudentT(nu[z], mu[z], L[z]), obs=x)


def weibulls(x: Tensor, start: Tensor) -> None:
    """Weibull distributions."""
    p, a = _weights(len(start)), pyro.param("a", start.clone(), constraint=C.positive)
    b = pyro.param("b", torch.full_like(start, 2.0), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.Weibull(a[z], b[z]), obs=x)


def weighed(x: Tensor, weights: Tensor, start: Tensor) -> None:
    """Gaussians with diagonal covariances, rows with weights of their own."""
    p, mu = _weights(len(start)), pyro.param("mu", start.clone())
    s = pyro.param("s", torch.ones_like(start), constraint=C.positive)
    with pyro.plate("n", len(x)), pyro.poutine.scale(scale=weights):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.Normal(mu[z], s[z]).to_event(1), obs=x)


def labelled(x: Tensor, z: Tensor, seen: Tensor, start: Tensor) -> None:
    """Labels that are seen in a tenth of the rows."""
    p, mu = _weights(len(start)), pyro.param("mu", start.clone())
    s = pyro.param("s", torch.ones_like(start), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p), obs=z, obs_mask=seen)
        pyro.sample("x", dist.Normal(mu[z], s[z]).to_event(1), obs=x)


def grouped(x: Tensor, g: Tensor, start: Tensor) -> None:
    """Weights by a known group of each row."""
    p = pyro.param("p", torch.full((_GROUPS, len(start)), 1 / len(start)).double(), C.simplex)
    mu = pyro.param("mu", start.clone())
    s = pyro.param("s", torch.ones_like(start), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p[g]))
        pyro.sample("x", dist.Normal(mu[z], s[z]).to_event(1), obs=x)


def means(x: Tensor, g: Tensor, start: Tensor) -> None:
    """Means by a known group of each row."""
    p, mu = _weights(len(start)), pyro.param("mu", start[:, 0].repeat(_GROUPS, 1))
    s = pyro.param("s", torch.ones_like(start[:, 0]), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.Normal(mu[g, z], s[z]), obs=x[:, 0])


def factors(x: Tensor, start: Tensor) -> None:
    """Factor analysis."""
    D, q = start.shape
    W, mu = pyro.param("W", start.clone()), pyro.param("mu", torch.zeros(D).double())
    s = pyro.param("s", torch.ones(D).double(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, torch.ones(q).double()).to_event(1))
        pyro.sample("x", dist.Normal(h @ W.T + mu, s).to_event(1), obs=x)


def mixed(x: Tensor, y: Tensor, v: Tensor, start: Tensor) -> None:
    """A number, a yes or no, and one of three symbols."""
    K = len(start)
    p, mu = _weights(K), pyro.param("mu", start[:, 0].clone())
    s = pyro.param("s", torch.ones(K).double(), constraint=C.positive)
    b = pyro.param("b", torch.linspace(0.1, 0.9, K).double(), constraint=C.unit_interval)
    q = pyro.param("q", torch.full((K, 3), 1 / 3).double(), constraint=C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)
        pyro.sample("y", dist.Bernoulli(b[z]), obs=y)
        pyro.sample("v", dist.Categorical(q[z]), obs=v)


def counts(x: Tensor, start: Tensor) -> None:
    """Poisson counts, several in a row."""
    p, r = _weights(len(start)), pyro.param("r", start.clone(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.Poisson(r[z]).to_event(1), obs=x)


def observed(x: Tensor, start: Tensor) -> None:
    """An observed mixture of Normals, without a latent of its own."""
    p, mu = _weights(len(start)), pyro.param("mu", start[:, 0].clone())
    s = pyro.param("s", torch.ones(len(start)).double(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(p), dist.Normal(mu, s)), obs=x)


def _mixed_data(rows: int) -> tuple[Tensor, ...]:
    x, start = _clusters(rows)
    yes = torch.bernoulli(torch.full((rows,), 0.4).double())
    return x[:, 0].contiguous(), yes, torch.randint(3, (rows,)), start


def _counts_data(rows: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    rates = 1 + 20 * torch.rand(COMPONENTS, WIDTH).double()
    return torch.poisson(rates[torch.randint(COMPONENTS, (rows,))]), 1.1 * rates


def _observed_data(rows: int) -> tuple[Tensor, ...]:
    x, start = _clusters(rows)
    return x[:, 0].contiguous(), start


def experts(x: Tensor, y: Tensor, start: Tensor) -> None:
    """Linear regressions whose weights read the covariates, too."""
    v, w = pyro.param("v", 0.1 * start), pyro.param("w", start.clone())
    s = pyro.param("s", torch.ones(len(start)).double(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=x @ v.T))
        pyro.sample("y", dist.Normal((x * w[z]).sum(-1), s[z]), obs=y)


def classes(x: Tensor, y: Tensor, start: Tensor) -> None:
    """Ten binary items, and covariates that say of which class a row is."""
    v = pyro.param("v", torch.zeros(len(start), x.shape[1]).double())
    q = pyro.param("q", start.clone(), constraint=C.unit_interval)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=x @ v.T))
        pyro.sample("y", dist.Bernoulli(q[z]).to_event(1), obs=y)


def _classes_data(rows: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q = torch.rand(COMPONENTS, 10).double()
    y = torch.bernoulli(q[torch.randint(COMPONENTS, (rows,))])
    return torch.randn(rows, 4).double(), y, 0.1 + 0.8 * q


def _spread(kind: str) -> Callable[[int], tuple[Tensor, ...]]:
    """Data of one number in a row, of components that lie apart, and a start."""

    def drawn(rows: int) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        level = torch.linspace(1, 60, COMPONENTS).double()
        own = level[torch.randint(COMPONENTS, (rows,))]
        if kind == "students":
            five = torch.tensor(5.0).double()
            noise = torch.distributions.StudentT(five).sample((rows,))
            return own + noise, level + 0.3
        if kind == "rates":
            return torch.poisson(torch.distributions.Gamma(own, 1.0).sample()), 1.1 * level
        if kind == "laplaces":
            return torch.distributions.Laplace(own, 1.0).sample(), level + 0.3
        if kind == "betas":
            a = own / 8 + 0.5
            x = torch.distributions.Beta(a, 8.5 - a).sample()
            return x.clamp_(1e-6, 1 - 1e-6), level / 8 + 0.5
        return torch.distributions.Weibull(own, 3.0 + 0 * own).sample(), 1.1 * level

    return drawn


def _grouped_data(rows: int) -> tuple[Tensor, ...]:
    x, start = _clusters(rows)
    return x, torch.randint(_GROUPS, (rows,)), start


def _factor_data(rows: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    W = torch.randn(WIDTH, 4).double()
    x = torch.randn(rows, 4).double() @ W.T
    x += torch.randn(rows, WIDTH).double()
    return x, W + 0.3


def _gaps_data(rows: int) -> tuple[Tensor, ...]:
    x, start = _factor_data(rows)
    return x.masked_fill_(torch.rand(rows, WIDTH) < 0.1, torch.nan), start


def _labelled_data(rows: int) -> tuple[Tensor, ...]:
    x, start = _clusters(rows)
    return x, torch.randint(COMPONENTS, (rows,)), torch.rand(rows) < 0.1, start


def _weighed_data(rows: int) -> tuple[Tensor, ...]:
    x, start = _clusters(rows)
    return x, torch.rand(rows).double() + 0.5, start


def _clusters(rows: int, missing: float = 0.0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    centres = 3 * torch.randn(COMPONENTS, WIDTH).double()
    x = torch.randn(rows, WIDTH).double()
    x += centres[torch.randint(COMPONENTS, (rows,))]
    if missing:
        x[torch.rand(rows, WIDTH) < missing] = torch.nan
    return x, centres + 0.3


def _regressed(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    x, _, start = logistic_data(rows, WIDTH, COMPONENTS)
    return x, x @ start[0] + torch.randn(rows).double(), start


MODELS: dict[str, tuple[str, Callable[..., None], Callable[[int], Any], dict[str, Any]]] = {
    "full": ("Gaussians, full", gaussians, _clusters, {}),
    "missing": (
        "Gaussians, full, a tenth missing",
        gaussians,
        lambda rows: _clusters(rows, 0.1),
        {"missing": "nan"},
    ),
    "additive": ("two latents, additive means", additive, _clusters, {}),
    "lines": ("linear regressions, own intercept", lines, _regressed, {}),
    "logistic": (
        "logistic regressions",
        logistic,
        lambda rows: logistic_data(rows, WIDTH, COMPONENTS),
        {},
    ),
    "tails": ("Student by conjugate scales", tails, lambda rows: data("tails", rows), {}),
    "students": ("the same in a mixture", students, _spread("students"), {}),
    "vectors": ("Student vectors, full", vectors, _clusters, {}),
    "rates": ("Poisson with conjugate rates", rates, _spread("rates"), {}),
    "betas": ("Beta", betas, _spread("betas"), {}),
    "laplaces": ("Laplace", laplaces, _spread("laplaces"), {}),
    "weibulls": ("Weibull", weibulls, _spread("weibulls"), {}),
    "labelled": ("Gaussians, diagonal, labels seen in part", labelled, _labelled_data, {}),
    "grouped": ("Gaussians, weights by group", grouped, _grouped_data, {}),
    "means": ("Gaussians of one number, means by group", means, _grouped_data, {}),
    "factors": ("factor analysis, 4 factors", factors, _factor_data, {}),
    "gaps": ("factor analysis, a tenth missing", factors, _gaps_data, {"missing": "nan"}),
    "experts": ("experts, weights read covariates", experts, _regressed, {}),
    "experts-again": ("the same, fitted once more on the same data", experts, _regressed, {}),
    "classes": ("latent classes with covariates", classes, _classes_data, {}),
    "weighed": ("Gaussians, diagonal, rows with weights", weighed, _weighed_data, {}),
    "mixed": ("a number, a yes or no, a symbol", mixed, _mixed_data, {}),
    "counts": ("eight Poisson counts", counts, _counts_data, {}),
    "observed": ("MixtureSameFamily", observed, _observed_data, {}),
}


def measure(kind: str) -> tuple[float, float]:
    """In this process: MiB above the data, and processor time, of a fit of three steps.

    Args:
        kind: The model; of one that ends in ``-again`` that of a second fit on the same data.
    """
    torch.set_num_threads(1)
    _, model, make, options = MODELS[kind]
    for rows in (2000, 150_000):
        ExactPosteriorEM(model, **options).fit(*make(rows), max_steps=2, tol=0, progress=False)
        pyro.clear_param_store()
    given, em = make(ROWS), ExactPosteriorEM(model, **options)
    if kind.endswith("-again"):
        em.fit(*given, max_steps=3, tol=0, progress=False)
    base, begin = fresh(), time.process_time()
    em.fit(*given, max_steps=3, tol=0, progress=False)
    return (peak() - base) / 2**20, time.process_time() - begin


def table() -> list[str]:
    """All models in Markdown."""
    out = [
        "",
        f"Peak memory above the data of whole fits of three steps, {ROWS:,} rows and {COMPONENTS} "
        f"components, float64; a table of N x K is {TABLE:.0f} MiB (at most 1):",
        "",
        "| model | peak | tables | processor time |",
        "|---" * 4 + "|",
    ]
    for kind, (name, *_) in MODELS.items():
        command = [sys.executable, "-m", "tests.benchmarks.memory", kind]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        above, seconds = map(float, found.stdout.split()[-2:])
        out.append(f"| {name} | {above:.0f} MiB | {above / TABLE:.2f} | {seconds:.1f} s |")
    return out


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(*measure(sys.argv[1]))
    else:
        print("\n".join(table()))
