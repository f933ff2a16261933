"""An oracle that shares no code with the library: the joint table, cell by cell."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch


@dataclass(frozen=True)
class Network:
    """A random discrete network: nodes in topological order, each with a table over its parents."""

    sizes: tuple[int, ...]
    parents: tuple[tuple[int, ...], ...]
    tables: tuple[np.ndarray, ...]  # (*parent sizes, size)
    observed: dict[int, int]

    @property
    def latents(self) -> list[int]:
        return [i for i in range(len(self.sizes)) if i not in self.observed]

    def model(self):
        values: dict[int, torch.Tensor] = {}
        for i in range(len(self.sizes)):
            table = torch.tensor(self.tables[i])
            if self.parents[i]:
                table = table[tuple(values[p] for p in self.parents[i])]
            obs = torch.tensor(self.observed[i]) if i in self.observed else None
            values[i] = pyro.sample(f"v{i}", dist.Categorical(table), obs=obs)

    def joint(self) -> np.ndarray:
        """p(latents, observed), over the latents' axes in order."""
        latents = self.latents
        out = np.zeros([self.sizes[i] for i in latents])
        for cell in itertools.product(*(range(self.sizes[i]) for i in latents)):
            value = dict(self.observed) | dict(zip(latents, cell, strict=True))
            out[cell] = math.prod(
                float(self.tables[i][(*(value[p] for p in self.parents[i]), value[i])])
                for i in range(len(self.sizes))
            )
        return out


def random_network(seed: int, *, zeros: bool, tiny: bool) -> Network:
    rng = np.random.default_rng(seed)
    n_latent, n_observed = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    n = n_latent + n_observed
    order = rng.permutation(n)
    is_latent = {int(i) for i in order[:n_latent]}
    sizes, parents, tables = [], [], []
    for i in range(n):
        sizes.append(int(rng.integers(2, 4)))
        possible = list(range(i))
        k = min(len(possible), int(rng.integers(0, 4)))
        parents.append(
            tuple(sorted(int(p) for p in rng.choice(possible, k, replace=False))) if k else ()
        )
        shape = [sizes[p] for p in parents[i]] + [sizes[i]]
        table = rng.dirichlet(np.ones(sizes[i]), size=shape[:-1] or None)
        if tiny:
            table = table * 10.0 ** -rng.integers(0, 13, size=shape)
        if zeros:
            keep = rng.random(shape) > 0.25
            keep[..., 0] |= ~keep.any(-1)
            table = table * keep
        tables.append(table / table.sum(-1, keepdims=True))
    # Draw the observed values from the network itself, so that they are possible.
    values: list[int] = []
    for i in range(n):
        row = tables[i][tuple(values[p] for p in parents[i])]
        values.append(int(rng.choice(sizes[i], p=row)))
    observed = {i: values[i] for i in range(n) if i not in is_latent}
    return Network(tuple(sizes), tuple(parents), tuple(tables), observed)
