"""Random models whose Gaussian latents follow each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints


class RandomChain:
    """A model of several series of latents over steps, made by a seed.

    Each series is a number or a vector, in a plate or not, and reads itself at one or two lags, other
    series of the step before or of the same step, inputs, and parameters in linear places. Data read
    any of them, now or a step before, are masked in places, counted with weights, or not there.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def below(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        self.steps = 8 + below(4)
        self.people = 2 + below(2)
        self.series = [(below(3) == 0, below(2) * 2, 1 + below(2)) for _ in range(1 + below(2))]
        if len({own for own, _, _ in self.series}) > 1:  # a plate reads what is outside, not back
            self.series.sort()
        self.same_step, self.lagged, self.inputs = below(2), below(2), below(2)
        self.masks, self.weights, self.every = below(2), below(3) == 0, 1 + below(2)
        shape = self.steps, self.people
        self.y = torch.randn(shape, generator=generator, dtype=torch.float64).cumsum(0)
        self.u = torch.randn(self.steps, generator=generator, dtype=torch.float64)
        self.ok = torch.rand(shape, generator=generator) > 0.3
        self.w = 0.5 + torch.rand(self.steps, generator=generator, dtype=torch.float64)
        self.values = torch.rand(64, generator=generator, dtype=torch.float64)

    def __call__(self) -> None:
        """Run the model."""
        plate = pyro.plate("people", self.people)
        before: list[list[Tensor]] = [[] for _ in self.series]
        for t in range(self.steps):
            now: list[Tensor] = []
            for k, (own, width, history) in enumerate(self.series):
                with plate if own else poutine.block(hide=[]):
                    now.append(self._latent(k, own, width, history, t, now, before))
            self._observed(t, now, before, plate)
            for past, h in zip(before, now, strict=True):
                past.append(h)

    def _parameter(self, name: str, *shape: int, positive: bool = False) -> Tensor:
        begin = sum(map(ord, name)) % 40
        start = self.values[begin : begin + torch.Size(shape).numel()].reshape(shape)
        constraint = constraints.positive if positive else constraints.real
        out: Tensor = pyro.param(name, 0.3 + 0.5 * start, constraint=constraint)
        return out

    def _latent(
        self,
        k: int,
        own: bool,
        width: int,
        history: int,
        t: int,
        now: list[Tensor],
        before: list[list[Tensor]],
    ) -> Tensor:
        event = (width,) if width else ()
        mean = torch.zeros((self.people, *event) if own else event, dtype=torch.float64)
        for lag in range(1, min(history, t) + 1):
            past = before[k][t - lag]
            if width:
                A = self._parameter(f"A{k}{lag}", width, width) * 0.6
                mean = mean + (A @ past.unsqueeze(-1)).squeeze(-1)
            else:
                mean = mean + self._parameter(f"rho{k}{lag}") * past
        others = now if self.same_step else [before[j][t - 1] for j in range(k)] if t else []
        for j, other in enumerate(others):
            shared = other if not self.series[j][1] else other.sum(-1)
            if self.series[j][0] and not own:
                continue
            mean = mean + self._parameter(f"c{k}{j}") * (
                shared.unsqueeze(-1) if width and shared.dim() == len(mean.shape) - 1 else shared
            )
        if self.inputs:
            mean = mean + self._parameter(f"g{k}") * self.u[t]
        spread = self._parameter(f"q{k}", *event, positive=True)
        noise = dist.Normal(mean, spread)
        out: Tensor = pyro.sample(f"h{k}_{t}", noise.to_event(1) if width else noise)
        return out

    def _observed(self, t: int, now: list[Tensor], before: list[list[Tensor]], plate: Any) -> None:
        if t % self.every:
            return
        mean = torch.zeros(self.people, dtype=torch.float64)
        for k, (own, width, _) in enumerate(self.series):
            for lag in range(1 + (self.lagged and t > 0)):
                h = now[k] if not lag else before[k][t - 1]
                part = (h * self._parameter(f"w{k}{lag}", width)).sum(-1) if width else h
                weight = self._parameter(f"v{k}{lag}", self.people)
                mean = mean + (part if own and lag == 0 else weight * part)
        with plate:
            noise = dist.Normal(mean, self._parameter("r", positive=True))
            seen = noise.mask(self.ok[t]) if self.masks else noise
            with poutine.scale(scale=float(self.w[t]) if self.weights else 1.0):
                pyro.sample(f"y_{t}", seen, obs=self.y[t])


def random_chain(seed: int) -> Callable[[], None]:
    """The model of a seed."""
    return RandomChain(seed)
