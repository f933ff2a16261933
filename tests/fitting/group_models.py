"""Models whose rows processes share out, and what their fits are compared by."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributions import constraints

from pyro_em.fitting.result import EMResult


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
