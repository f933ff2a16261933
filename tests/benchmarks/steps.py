"""E-steps until the evidence is within 1e-6 nats of the optimum: plain EM and its accelerations."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from tests.data_sets import LONDON_COUNTS

HOWS = (None, "squarem", "quasi-newton", "auto")
HEAD = "| E-steps to 1e-6 nats | plain | squarem | quasi-newton | auto | asked of quasi-newton |"


def poissons(x: Tensor, days: Tensor) -> None:
    """Two Poisson components of counted values."""
    pi = pyro.param("pi", torch.tensor([0.3, 0.7]).double(), constraint=C.simplex)
    rate = pyro.param("rate", torch.tensor([1.0, 2.5]).double(), constraint=C.positive)
    with pyro.plate("counts", len(x)), pyro.poutine.scale(scale=days):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("x", dist.Poisson(rate[z]), obs=x)


def gaussians(x: Tensor, means: Tensor) -> None:
    """Two Normal components with all parameters of their own."""
    pi = pyro.param("pi", x.new_tensor([0.5, 0.5]), constraint=C.simplex)
    loc = pyro.param("loc", means)
    scale = pyro.param("scale", x.std().repeat(2), constraint=C.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(pi))
        pyro.sample("x", dist.Normal(loc[z], scale[z]), obs=x)


def gaussian_starts(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Data of two Gaussians 1.5 standard deviations apart, and two of them as means, ten times."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(500, generator=g, dtype=torch.float64)
    x = x + 1.5 * torch.randint(0, 2, (500,), generator=g)
    return [(x, x[torch.randperm(500, generator=g)[:2]]) for _ in range(10)]


def steps_of(model: Callable[..., Any], args: tuple) -> list[int]:
    """E-steps of each way from one start."""
    found = []
    for how in HOWS:
        pyro.clear_param_store()
        found.append(
            ExactPosteriorEM(model).fit(
                *args, max_steps=30_000, tol=1e-8, progress=False, acceleration=how
            )
        )
    best = max(r.log_evidence or -torch.inf for r in found)
    never = 30_000  # another, lower maximum
    return [next((i for i, v in enumerate(r.history) if v > best - 1e-6), never) for r in found]


def table() -> list[str]:
    """The lines of the report."""
    london = steps_of(poissons, (torch.arange(10.0).double(), LONDON_COUNTS.double()))
    rows = [("London Times, two Poissons", [london], 30.0)]
    for seed in (0, 1):
        each = [steps_of(gaussians, args) for args in gaussian_starts(seed)]
        rows.append((f"two Gaussians 1.5 apart, N=500, ten starts, data {seed}", each, 7.0))
    lines = ["", HEAD, "|---" * 6 + "|"]
    for name, each, times in rows:
        plain, *fast = (statistics.median(column) for column in zip(*each, strict=True))
        numbers = " | ".join(f"{v:,.0f}" for v in (plain, *fast))
        reached = "" if fast[1] <= min(plain / times, fast[0]) else ", below target"
        lines.append(f"| {name} | {numbers} | {plain / times:,.0f}{reached} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
