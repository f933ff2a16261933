"""Random chains of discrete latents: several per step, longer histories, inputs, gaps, weights."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from tests.graph.vectorized_models import Loop


class RandomSteps:
    """A chain that is made by a seed.

    Each of one to three latents of a step reads itself at no, one or two steps back, maybe others of
    the step before or of the same step, maybe a known input. What is seen reads some of them, and maybe
    the state before; it is masked in places, and counted with weights.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def below(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        self.generator = generator
        self.T, self.plates = 5 + below(2), below(2)
        self.sizes = [2 + below(2) for _ in range(1 + below(3))]
        self.history = 1 + (below(3) == 0)
        self.reads: list[list[tuple[int, int]]] = []
        for c in range(len(self.sizes)):
            own = [(c, lag + 1) for lag in range(self.history if c == 0 else 1)]
            own = own if c == 0 or below(4) else []
            others = [(d, 1) for d in range(len(self.sizes)) if d != c and below(4) == 0]
            now = [(d, 0) for d in range(c) if below(3) == 0]
            self.reads.append(own + others + now)
        self.inputs = [below(3) == 0 for _ in self.sizes]
        self.seen = [c for c in range(len(self.sizes)) if c == 0 or below(2)]
        self.both_ends, self.kind = below(4) == 0, below(2)
        self.masks, self.weighted = below(3), below(3) == 0
        shape = (self.T, 2) if self.plates else (self.T,)
        self.x = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.u = torch.randint(2, shape, generator=generator)
        self.ok = torch.rand(shape, generator=generator) < 0.7
        self.lengths = torch.tensor([self.T, self.T - 2])
        self.w = torch.tensor([2.0, 0.5], dtype=torch.float64)
        self.starts = torch.rand(4096, generator=generator, dtype=torch.float64)

    def _rows(self, name: str, *shape: int) -> Tensor:
        begin = sum(map(ord, name)) % 512
        rows = 0.2 + self.starts[begin : begin + torch.Size(shape).numel()].reshape(shape)
        value = rows / rows.sum(-1, keepdim=True)
        out: Tensor = pyro.param(name, value, constraint=constraints.simplex)
        return out

    def __call__(self, loop: Loop) -> None:
        """Run the model."""
        if self.plates:
            scale = self.w if self.weighted else 1.0
            with pyro.plate("rows", 2), poutine.scale(scale=scale):
                self._steps(loop)
        else:
            with poutine.scale(scale=2.0 if self.weighted else 1.0):
                self._steps(loop)

    def _steps(self, loop: Loop) -> None:
        past: list[dict[int, Any]] = []
        for t in loop("time", self.T, history=self.history):
            counts: Any = True
            if self.masks == 1 and self.plates:
                counts = t < self.lengths
            with poutine.mask(mask=counts):
                now: dict[int, Any] = {}
                for c, size in enumerate(self.sizes):
                    read = [
                        (now if lag == 0 else past[-lag])[d]
                        for d, lag in self.reads[c]
                        if lag <= len(past)
                    ]
                    sizes = [self.sizes[d] for d, lag in self.reads[c] if lag <= len(past)]
                    table = self._rows(f"A{c}{len(sizes)}", 2, *sizes, size)
                    first = self.u[t] if self.inputs[c] else 0
                    p = Vindex(table)[(first, *read)] if read else table[first]
                    now[c] = pyro.sample(f"z{c}_{t}", dist.Categorical(p))
                self._observe(t, now, past)
            past = [*past, now][-self.history :]

    def _observe(self, t: Any, now: dict[int, Any], past: list[dict[int, Any]]) -> None:
        read, sizes = [now[c] for c in self.seen], [self.sizes[c] for c in self.seen]
        if self.both_ends and past:
            read.append(past[-1][0])
            sizes.append(self.sizes[0])
        name = f"B{len(read)}"
        seen: Any
        if self.kind:
            begin = sum(map(ord, name))
            start = 3 * self.starts[begin : begin + torch.Size(sizes).numel()].reshape(sizes) - 1.5
            seen = dist.Normal(Vindex(pyro.param(name, start))[tuple(read)], 1.0)
            value = self.x[t]
        else:
            seen = dist.Categorical(Vindex(self._rows(name, *sizes, 3))[tuple(read)])
            value = (self.x[t].abs() * 2).long().clamp(max=2)
        seen = seen.mask(self.ok[t]) if self.masks == 2 else seen
        pyro.sample(f"x_{t}", seen, obs=value)
