"""Conjugate latents of a million rows: time and memory of whole fits, beside statsmodels.

``python -m tests.benchmarks.conjugates``; each model in a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from tests.benchmarks.growth import peak

ROWS = 1_000_000
STEPS = 20


def _positive(name: str, value: float = 1.0) -> Tensor:
    return pyro.param(name, torch.tensor(value).double(), constraint=C.positive)


def counts(x: Tensor, units: Tensor | float = 1.0) -> None:
    """A rate of each row: a negative binomial."""
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(_positive("a"), _positive("b")))
        pyro.sample("x", dist.Poisson(rate * units), obs=x)


def litters(x: Tensor, n: Tensor) -> None:
    """A probability of each litter: a beta-binomial."""
    with pyro.plate("litters", len(x)):
        p = pyro.sample("p", dist.Beta(_positive("a"), _positive("b")))
        pyro.sample("x", dist.Binomial(n, p), obs=x)


def groups(x: Tensor, group: Tensor, size: int) -> None:
    """A rate of each group of rows."""
    with pyro.plate("groups", size):
        rate = pyro.sample("rate", dist.Gamma(_positive("a"), _positive("b")))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Poisson(rate[group]), obs=x)


def tails(x: Tensor) -> None:
    """A scale of each row: Student's t."""
    nu, m = _positive("nu", 5.0), pyro.param("m", torch.tensor(0.0).double())
    with pyro.plate("rows", len(x)):
        w = pyro.sample("w", dist.Gamma(nu / 2, nu / 2))
        pyro.sample("x", dist.Normal(m, _positive("s") * w.rsqrt()), obs=x)


def data(kind: str, rows: int) -> tuple[Any, ...]:
    """The arguments of a model."""
    torch.manual_seed(0)
    gamma = torch.distributions.Gamma(torch.tensor(2.0).double(), 1.0)
    if kind == "litters":
        n = torch.randint(5, 15, (rows,)).double()
        p = torch.distributions.Beta(torch.tensor(2.0).double(), 3.0).sample((rows,))
        return torch.binomial(n, p), n
    if kind == "tails":
        return (torch.randn(rows).double() / (gamma.sample((rows,)) / 2).sqrt(),)
    if kind.startswith("groups"):
        size = int(kind.split()[1])
        group = torch.randint(size, (rows,))
        return torch.poisson(gamma.sample((size,))[group]), group, size
    units = torch.rand(rows).double() + 0.5
    if kind == "exposures":
        return torch.poisson(gamma.sample((rows,)) * units), units
    return (torch.poisson(gamma.sample((rows,))),)


MODELS: dict[str, tuple[str, Callable[..., None]]] = {
    "counts": ("Gamma-Poisson", counts),
    "exposures": ("Gamma-Poisson with exposures", counts),
    "litters": ("beta-binomial", litters),
    "tails": ("Student by scales", tails),
    "groups 1000": ("1,000 groups' rates", groups),
    "groups 100000": ("100,000 groups' rates", groups),
}


def statsmodels(kind: str, given: tuple[Any, ...]) -> float:
    """Processor time of the peer's fit of the same data; not a number where it has no such model."""
    if kind not in ("counts", "exposures"):
        return float("nan")
    from statsmodels.discrete.discrete_model import NegativeBinomial

    x, exposure = given[0].numpy(), given[1].numpy() if len(given) > 1 else None
    begin = time.process_time()
    NegativeBinomial(x, np.ones((len(x), 1)), exposure=exposure).fit(disp=0)
    return time.process_time() - begin


def fresh() -> float:
    """Peak memory in bytes, begun anew once what was freed has gone back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Processor time of a call, and the peak of memory in bytes."""
    fresh()
    begin = time.process_time()
    run()
    return time.process_time() - begin, peak()


def measure(kind: str, rows: int = ROWS) -> list[float]:
    """In this process: one run of the model, its reading, a fit, and the peer's fit."""
    torch.set_num_threads(1)
    model = MODELS[kind][1]
    ExactPosteriorEM(model).fit(*data(kind.replace("100000", "1000"), 2000), max_steps=2)
    pyro.clear_param_store()
    given = data(kind, rows)
    base = fresh()
    _, floor = timed(lambda: pyro.poutine.trace(model).get_trace(*given))
    pyro.clear_param_store()
    em = ExactPosteriorEM(model)
    reading, held = timed(lambda: em.plan(*given))
    fit, most = timed(lambda: em.fit(*given, max_steps=STEPS, tol=0.0, progress=False))
    peaks = [at - base for at in (floor, held, most)]
    return [*peaks, reading, fit, statsmodels(kind, given)]


def table() -> list[str]:
    """All models in Markdown."""
    out = [
        "",
        f"Conjugate latents, {ROWS:,} rows in float64, whose vector is {8 * ROWS / 2**20:.0f} MiB: "
        f"reading the model, then a fit of {STEPS} steps, by processor time of one thread, and their "
        "peaks of memory above the data beside that of one plain run of the model:",
        "",
        "| model | reading | fit | statsmodels | a run's peak | peak of reading | peak of the fit |",
        "|---" * 7 + "|",
    ]
    for kind, (name, _) in MODELS.items():
        command = [sys.executable, "-m", "tests.benchmarks.conjugates", kind]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        floor, held, most, reading, fit, theirs = json.loads(found.stdout.splitlines()[-1])
        peer = "-" if theirs != theirs else f"{theirs:.2f} s"
        mib = " | ".join(f"{b / 2**20:.0f} MiB" for b in (floor, held, most))
        out.append(f"| {name} | {reading:.2f} s | {fit:.2f} s | {peer} | {mib} |")
    return out


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])) if len(sys.argv) > 1 else "\n".join(table()))
