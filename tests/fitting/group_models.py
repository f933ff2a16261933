"""Models whose rows processes share out, and what their fits are compared by."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributions import constraints

from pyro_em.fitting.results.result import EMResult


def shard_of(x: Tensor, sizes: list[int]) -> Tensor:
    """The rows of this rank."""
    return x.split(sizes)[torch_dist.get_rank()]


def numbers_of(result: EMResult) -> dict[str, Any]:
    """What is compared between ranks, and with one process."""
    return {
        "params": {n: v.detach().clone() for n, v in result.params.items()},
        "elbo": result.elbo,
        "rows": result.num_rows,
        "steps": result.num_steps,
        "status": result.status.name,
        "path": tuple(result.history),
    }


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Of parameters, relative to their size."""
    pairs = [(a["params"][n], b["params"][n]) for n in a["params"]]
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-8)) for x, y in pairs)


def are_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether parameters and paths are the same, bit by bit."""
    same = all(torch.equal(a["params"][n], b["params"][n]) for n in a["params"])
    return same and a["path"] == b["path"] and a["elbo"] == b["elbo"]


def clicks(x: Tensor, noise: Tensor) -> None:
    """A location that all rows share, with a prior and a guide."""
    loc = pyro.sample("loc", dist.StudentT(3.0, 0.0, 10.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc.exp(), scale * noise), obs=x)


def guide_of_clicks(x: Tensor, noise: Tensor) -> None:
    m = pyro.param("m", lambda: torch.randn(()))
    s = pyro.param("s", torch.tensor(0.1), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(m, s))


def rates(x: Tensor, noise: Tensor) -> None:
    """The same with a latent in each row, which the guide draws from the row's own datum."""
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    tau = pyro.param("tau", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.LogNormal(loc, tau))
        pyro.sample("x", dist.Normal(rate, noise), obs=x)


def guide_of_rates(x: Tensor, noise: Tensor) -> None:
    guide_of_clicks(x, noise)
    a, b = pyro.param("a", torch.tensor(0.1)), pyro.param("b", torch.tensor(0.3))
    with pyro.plate("rows", len(x)):
        pyro.sample("rate", dist.LogNormal(a * x + b, 0.3))


def rows_of_guide(x: Tensor, noise: Tensor) -> None:
    guide_of_clicks(x, noise)
    a = pyro.param("a", torch.zeros(len(x)))
    with pyro.plate("rows", len(x)):
        pyro.sample("rate", dist.LogNormal(a, 0.3))


# ---------------------------------------------------------------- exact


def table() -> Tensor:
    """Two columns of 24 rows in two clusters."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(24, 2, generator=g, dtype=torch.float64)
    return x + 2.0 * torch.randint(2, (24, 1), generator=g)


def two_weights() -> Tensor:
    return pyro.param("w", torch.ones(2) / 2, constraint=constraints.simplex)


def mixture(x: Tensor) -> None:
    """Closed forms of locations and covariances; initial values that need the rows."""
    mu = pyro.param("mu", lambda: x[:2].clone())
    S = pyro.param("S", torch.eye(2).repeat(2, 1, 1), constraint=constraints.positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(two_weights()))
        pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)


def chain(x: Tensor) -> None:
    """Each row is a short series."""
    A = pyro.param("A", torch.tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("rows", len(x)):
        z = torch.tensor(0)
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[:, t])


def lines(x: Tensor) -> None:
    """Least squares."""
    b = pyro.param("b", torch.tensor([[0.5, 1.0], [-0.5, 0.3]]))
    s = pyro.param("s", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(two_weights()))
        pyro.sample("y", dist.Normal(b[z, 0] + b[z, 1] * x[:, 0], s[z]), obs=x[:, 1])


def shapes(x: Tensor) -> None:
    """Newton's steps in the shape of a Gamma."""
    a = pyro.param("a", torch.tensor([1.5, 2.5]), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(two_weights()))
        pyro.sample("y", dist.Gamma(a[z], 1.0), obs=x[:, 1].abs() + 0.1)


def slopes(x: Tensor) -> None:
    """L-BFGS in coefficients that the weights of two classes depend on."""
    b = pyro.param("b", torch.tensor([0.1, 0.2]))
    p = pyro.param("p", torch.tensor([0.3, 0.6]), constraint=constraints.unit_interval)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=b[0] + b[1] * x[:, 0]))
        pyro.sample("y", dist.Bernoulli(p[z.long()]), obs=(x[:, 1] > 0).double())


def factors(x: Tensor) -> None:
    """A Gaussian latent in each row."""
    W = pyro.param("W", torch.tensor([0.5, 0.7]))
    s = pyro.param("s", torch.ones(2), constraint=constraints.positive)
    m = pyro.param("m", torch.zeros(2))
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(m + h[..., None] * W, s).to_event(1), obs=x)


def outside(x: Tensor) -> None:
    """A point estimate with a prior and an observation, both outside the rows."""
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    pyro.sample("extra", dist.Binomial(10, p), obs=torch.tensor(7.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(p)).long()
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x[:, 0])


def guide_of_outside(x: Tensor) -> None:
    p = pyro.param("at", torch.tensor(0.4), constraint=constraints.unit_interval)
    pyro.sample("p", dist.Delta(p))


def levels(x: Tensor) -> None:
    """Rows read elements of their own: a process may have none of one."""
    m, b = pyro.param("m", torch.zeros(2)), pyro.param("b", torch.tensor([0.5, -0.5]))
    level = (x[:, 0] > 1).long()
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(two_weights()))
        pyro.sample("y", dist.Normal(m[level] + b[z] * x[:, 0], 1.0), obs=x[:, 1])


def shared(x: Tensor) -> None:
    """Precisions of two groups, of which all processes have rows."""
    a = pyro.param("a", torch.tensor(2.0), constraint=constraints.positive)
    b = pyro.param("b", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("groups", 2):
        precision = pyro.sample("precision", dist.Gamma(a, b))
    with pyro.plate("rows", len(x)):
        scale = precision[(x[:, 0] > 1).long()].rsqrt()
        pyro.sample("y", dist.Normal(0.5, scale), obs=x[:, 1])


def centred(x: Tensor) -> None:
    """Each process would take away another mean."""
    lines(x - x.mean(0))


_ALL = (mixture, chain, lines, shapes, slopes, factors, outside, levels, shared)
EXACT = {f.__name__: f for f in _ALL}
REFUSED = {"centred": centred}
GUIDES = {"outside": guide_of_outside}
