"""Chains that share their matrices and miss the same data, as arrays that compiled loops read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.posteriors.filters.state_space import StateSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Which = NDArray[np.int32]


class Group(NamedTuple):
    """Chains that are solved together: see `pyro_em.posteriors.filters.state_space`.

    Attributes:
        s: # (V, D)
        A: # (U, n, n)
        G: # (U, n, k)
        H: # (V, D, n)
        w: 1/s. # (V, D)
        dynamics: # (T,)
        measurement: # (T,)
        seen: # (T|1, D)
        value: # (M, T, D)
        drift: # (M|1, T, n)
    """

    s: Floats
    A: Floats
    G: Floats
    H: Floats
    w: Floats
    dynamics: Ints
    measurement: Ints
    seen: Bools
    value: Floats
    drift: Floats


@lru_cache(64)
def all_seen(D: int) -> Bools:
    """What is seen where nothing is missing; loops only read it. # (1, D)"""
    return np.ones((1, D), np.bool_)


def only_group(space: StateSpace) -> Group | None:
    """All chains as one group; None where there are more.

    Args:
        space: The chains, on the CPU.
    """
    own = (space.transition, space.noise, space.loading, space.deviation, space.dynamics)
    rest = (space.measurement, space.value, space.drift)
    return _together([numbers(x) for x in (*own, *rest)], space)


def group_at_hand(space: StateSpace) -> Group | None:
    """The same without a question to each tensor; None also where one is elsewhere or has derivatives.

    Args:
        space: The chains.
    """
    own = (space.transition, space.noise, space.loading, space.deviation, space.dynamics)
    rest = (space.measurement, space.value, space.drift)
    try:
        return _together([x.numpy() for x in (*own, *rest)], space)
    except (RuntimeError, TypeError):  # what `Tensor.numpy` says of such tensors
        return None


def _together(arrays: list[Any], space: StateSpace) -> Group | None:
    """A group of the numbers of all tensors but what is seen."""
    A, G, H, s, dynamics, measurement, value, drift = map(np.ascontiguousarray, arrays)
    if len(A) > 1 or len(G) > 1 or len(H) > 1 or len(s) > 1:
        return None
    if space.seen is None:
        seen = all_seen(value.shape[-1])
    else:
        seen = numbers(space.seen)
        if len(seen) > 1:
            return None
        seen = seen[0]
    s = s[0]
    return Group(s, A[0], G[0], H[0], 1.0 / s, dynamics, measurement, seen, value, drift)


@dataclass(frozen=True, eq=False)
class Groups:
    """All groups.

    Attributes:
        space: The chains.
        count: How many groups there are.
        of: The group of each chain; None if there is one. # (chains,)
        seen: # (chains|1, T|1, D)
    """

    space: StateSpace
    count: int
    of: Ints | None
    seen: Bools

    @staticmethod
    def of_space(space: StateSpace) -> Groups:
        """Those of a state-space model."""
        D = space.value.shape[-1]
        seen = all_seen(D)[None] if space.seen is None else space.seen.numpy()
        if any(len(x) > 1 for x in (space.transition, space.noise, space.loading, space.deviation)):
            return Groups(space, space.chains, np.arange(space.chains), seen)
        if len(seen) == 1:
            return Groups(space, 1, None, seen)
        patterns, of = np.unique(
            np.packbits(seen.reshape(len(seen), -1), 1), axis=0, return_inverse=True
        )
        return Groups(space, len(patterns), of, seen)

    def each(self) -> Iterator[tuple[Ints | slice, Group]]:
        """One after the other: which chains they are, and their numbers."""
        space = self.space
        only = only_group(space)
        if only is not None:
            yield slice(None), only
            return
        own = (space.transition, space.noise, space.loading, space.deviation)
        matrices = [numbers(x) for x in own]
        dynamics, measurement = numbers(space.dynamics), numbers(space.measurement)
        value, drift = numbers(space.value), numbers(space.drift)
        for b in range(self.count):
            chains = np.flatnonzero(self.of == b)
            first = int(chains[0])
            seen = np.ascontiguousarray(self.seen[first % len(self.seen)])
            places = [first % len(x) for x in matrices]
            A, G, H, s = (x[i] for x, i in zip(matrices, places, strict=True))
            its = value[chains], drift if len(drift) == 1 else drift[chains]
            yield chains, Group(s, A, G, H, 1.0 / s, dynamics, measurement, seen, *its)

    def together(self, parts: Sequence[tuple[Floats, ...]]) -> list[Tensor]:
        """Numbers of the chains of each group as those of all chains."""
        if self.of is None:
            return [torch.from_numpy(x) for x in parts[0]]
        back = np.argsort(np.argsort(self.of, kind="stable"), kind="stable")
        return [torch.from_numpy(np.concatenate(x)[back]) for x in zip(*parts, strict=True)]

    def of_chains(self, x: Floats | Which) -> Tensor:
        """Numbers of each group as those of each chain, or of all."""
        return torch.from_numpy(x if self.of is None else x[self.of])


def numbers(x: Tensor) -> Any:
    """The numbers of a tensor on the CPU one after the other; its own memory if they are so there."""
    return np.ascontiguousarray((x.detach() if x.requires_grad else x).numpy())
