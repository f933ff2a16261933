"""Models whose Gaussian latents follow each other, each with its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

Case = tuple[Callable[..., None], tuple[Any, ...]]


def number(name: str, value: Any, constraint: Any = constraints.real) -> Tensor:
    """A parameter in double precision."""
    out: Tensor = pyro.param(name, torch.tensor(value).double(), constraint=constraint)
    return out


def positive(name: str, value: Any) -> Tensor:
    """A positive parameter."""
    return number(name, value, constraints.positive)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Random walks with noise."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(shape, generator=generator, dtype=torch.float64).cumsum(0)
    return walk + torch.randn(shape, generator=generator, dtype=torch.float64)


def local_level() -> Case:
    """A random walk with noise."""

    def model(y: Tensor) -> None:
        level = number("start", 0.3)
        spread = positive("first", 2.0)
        for t in pyro.markov(range(len(y))):
            level = pyro.sample(f"h_{t}", dist.Normal(level, spread))
            spread = positive("step", 0.7)
            pyro.sample(f"y_{t}", dist.Normal(level, positive("noise", 0.9)), obs=y[t])

    return model, (noise(12),)


def trend() -> Case:
    """Two latents of one step, one of which reads the other."""

    def model(y: Tensor) -> None:
        slope = pyro.sample("slope_0", dist.Normal(0.0, 1.0))
        level = pyro.sample("level_0", dist.Normal(slope, 3.0))
        for t, value in enumerate(y):
            if t:
                slope = pyro.sample(f"slope_{t}", dist.Normal(slope, positive("a", 0.2)))
                level = pyro.sample(f"level_{t}", dist.Normal(level + slope, positive("b", 0.5)))
            pyro.sample(f"y_{t}", dist.Normal(level, positive("c", 1.1)), obs=value)

    return model, (noise(14, seed=1),)


def second_order() -> Case:
    """An autoregression of history two, latents first and data afterwards; gaps in the middle."""

    def model(y: Tensor, ok: Tensor) -> None:
        phi = number("phi", [0.6, 0.2])
        h: list[Tensor] = []
        for t in range(len(y)):
            mean = sum((phi[k] * h[t - 1 - k] for k in range(min(2, t))), torch.zeros(()).double())
            h.append(pyro.sample(f"h_{t}", dist.Normal(mean, positive("s", 0.8))))
        for t in range(len(y)):
            seen = dist.Normal(h[t] + number("m", 0.1), positive("r", 0.6)).mask(ok[t])
            pyro.sample(f"y_{t}", seen, obs=y[t])

    ok = torch.ones(15, dtype=torch.bool)
    ok[5:8] = False
    return model, (noise(15, seed=2), ok)


def dynamic_factor() -> Case:
    """Two factors below a plate of series, with inputs and missing coordinates."""

    def model(y: Tensor, u: Tensor, ok: Tensor) -> None:
        A, W = (
            number("A", [[0.8, 0.1], [-0.2, 0.7]]),
            number("W", [[1.0, 0.2], [0.5, 1.0], [0.3, -1.0]]),
        )
        b = number("b", [0.1, -0.3])
        series = pyro.plate("series", 3)
        h = pyro.sample(
            "h_0", dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
        )
        for t in pyro.markov(range(len(y))):
            if t:
                mean = A @ h + b * u[t]
                h = pyro.sample(
                    f"h_{t}",
                    dist.MultivariateNormal(
                        mean,
                        scale_tril=number(
                            "L", [[0.5, 0.0], [0.2, 0.6]], constraints.lower_cholesky
                        ),
                    ),
                )
            with series:
                seen = dist.Normal(W @ h, positive("r", [0.5, 0.7, 0.9])).mask(ok[t])
                pyro.sample(f"y_{t}", seen, obs=y[t])

    generator = torch.Generator().manual_seed(5)
    ok = torch.rand(11, 3, generator=generator) > 0.3
    return model, (noise(11, 3, seed=3), noise(11, seed=4), ok)


def panel() -> Case:
    """Series of unequal lengths in a plate, with a loading of their own each."""

    def model(y: Tensor, lengths: Tensor, z: Tensor) -> None:
        with pyro.plate("people", y.shape[1]):
            h = pyro.sample("h_0", dist.Normal(0.0, positive("first", 1.5)))
            for t in pyro.markov(range(len(y))):
                if t:
                    h = pyro.sample(
                        f"h_{t}", dist.Normal(number("rho", 0.8) * h, positive("q", 0.5))
                    )
                with pyro.poutine.mask(mask=t < lengths):
                    mean = z[t] * h + number("m", 0.2)
                    pyro.sample(f"y_{t}", dist.Normal(mean, positive("r", 0.6)), obs=y[t])

    return model, (noise(10, 4, seed=6), torch.tensor([10, 4, 7, 10]), noise(10, 4, seed=7))


def alike() -> Case:
    """Many series whose numbers are all the same."""

    def model(y: Tensor) -> None:
        with pyro.plate("people", y.shape[1]):
            h = torch.zeros(()).double()
            for t in range(len(y)):
                h = pyro.sample(f"h_{t}", dist.Normal(number("rho", 0.8) * h, positive("q", 0.5)))
                pyro.sample(f"y_{t}", dist.Normal(h, positive("r", 0.6)), obs=y[t])

    return model, (noise(8, 20, seed=13),)


def vectors() -> Case:
    """A state with a companion matrix, observed as a correlated vector."""

    def model(y: Tensor) -> None:
        phi, one = number("phi", [0.5, 0.3]), torch.ones(1).double()
        shift = torch.cat([torch.eye(1, 2).double()])
        H = torch.tensor([[1.0, 0.0], [0.4, 0.5]]).double()
        spread = torch.diag_embed(torch.stack([positive("q", 0.7), 1e-9 * one[0]]))
        h = pyro.sample(
            "h_0", dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
        )
        for t in pyro.markov(range(len(y))):
            if t:
                A = torch.cat([phi.unsqueeze(0), shift])
                h = pyro.sample(f"h_{t}", dist.MultivariateNormal(A @ h, scale_tril=spread))
            R = number("R", [[1.0, 0.3], [0.3, 0.8]], constraints.positive_definite)
            pyro.sample(f"y_{t}", dist.MultivariateNormal(H @ h, R), obs=y[t])

    return model, (noise(9, 2, seed=8),)


def classes() -> Case:
    """A discrete class of each series decides its noise."""

    def model(y: Tensor) -> None:
        pi = number("pi", [0.4, 0.6], constraints.simplex)
        with pyro.plate("series", y.shape[1]):
            z = pyro.sample("z", dist.Categorical(pi))
            h = torch.zeros(()).double()
            for t in range(len(y)):
                h = pyro.sample(f"h_{t}", dist.Normal(h, positive("q", [0.3, 1.2])[z]))
                pyro.sample(f"y_{t}", dist.Normal(h, positive("r", 0.5)), obs=y[t])

    return model, (noise(9, 3, seed=9),)


def weighted() -> Case:
    """Observations that count more than once, and one step with two of them."""

    def model(y: Tensor, w: Tensor) -> None:
        h = torch.zeros(()).double()
        for t in range(len(y)):
            h = pyro.sample(f"h_{t}", dist.Normal(0.9 * h, positive("q", 0.6)))
            with pyro.poutine.scale(scale=w[t]):
                pyro.sample(f"x_{t}", dist.Normal(h, positive("r", 0.5)), obs=y[t])
            if t % 3 == 0:
                pyro.sample(f"w_{t}", dist.Normal(2 * h + 1, positive("s", 0.8)), obs=y[t] + 0.3)

    return model, (noise(10, seed=10), torch.tensor([1.0, 2.0] * 5).double())


def late() -> Case:
    """Observations of the state of the step before as well, and shocks that last one step."""

    def model(y: Tensor) -> None:
        h = before = pyro.sample("h_0", dist.Normal(0.0, 1.0))
        for t in range(len(y)):
            if t:
                before, h = h, pyro.sample(f"h_{t}", dist.Normal(h, positive("q", 0.6)))
            u = pyro.sample(f"u_{t}", dist.Normal(0.0, positive("s", 0.4)))
            mean = h + number("c", 0.5) * before + u
            pyro.sample(f"y_{t}", dist.Normal(mean, 0.3), obs=y[t])

    return model, (noise(11, seed=11),)


def decay() -> Case:
    """A coefficient that is no linear function of its parameter."""

    def model(y: Tensor) -> None:
        h = pyro.sample("h_0", dist.Normal(0.0, 1.0))
        for t in range(len(y)):
            if t:
                rho = torch.exp(-positive("tau", 0.4))
                h = pyro.sample(f"h_{t}", dist.Normal(rho * h, (1 - rho**2).sqrt()))
            pyro.sample(f"y_{t}", dist.Normal(h, positive("r", 0.5)), obs=y[t])

    return model, (noise(8, seed=12),)


def seasonal() -> Case:
    """A level with a season that begins with as many latents as it has, before any datum; a gap."""

    def model(y: Tensor, ok: Tensor) -> None:
        level = pyro.sample("level_0", dist.Normal(0.0, 3.0))
        season = [pyro.sample(f"s_{k}", dist.Normal(0.0, 1.0)) for k in range(3)]
        for t in range(len(y)):
            if t:
                level = pyro.sample(f"level_{t}", dist.Normal(level, positive("a", 0.4)))
                mean = -sum(season[-3:], torch.zeros(()).double())
                season.append(pyro.sample(f"s_{t + 2}", dist.Normal(mean, positive("w", 0.3))))
            seen = dist.Normal(level + season[-1], positive("r", 0.7)).mask(ok[t])
            pyro.sample(f"y_{t}", seen, obs=y[t])

    ok = torch.ones(12, dtype=torch.bool)
    ok[4] = False
    return model, (noise(12, seed=14), ok)


def lasting() -> Case:
    """A drift and two coefficients with distributions, which all steps read, each at its turn."""

    def model(y: Tensor, x: Tensor) -> None:
        drift = pyro.sample("drift", dist.Normal(number("m", 0.2), positive("d", 0.5)))
        b = pyro.sample("b", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        h = torch.zeros(()).double()
        for t in range(len(y)):
            h = pyro.sample(f"h_{t}", dist.Normal(h + drift, positive("q", 0.5)))
            mean = h + number("c", 0.7) * (x[t] * b).sum()
            pyro.sample(f"y_{t}", dist.Normal(mean, positive("r", 1.0)), obs=y[t])

    return model, (noise(13, seed=21), noise(13, 2, seed=15))


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        local_level,
        trend,
        second_order,
        dynamic_factor,
        panel,
        alike,
        vectors,
        classes,
        weighted,
        late,
        decay,
        seasonal,
        lasting,
    )
}
