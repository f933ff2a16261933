"""Chains of Gaussian states as arrays, and products of each step's matrix with its columns.

Series of equal matrices stand side by side as columns of one product. Steps with the same matrix are
one product, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.posteriors.filters.state_space import StateSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Data beyond so many standard deviations of their noise lose digits that count, if states are measured
# from zero: then from what is found so, once more.
FAR = 1e4

_RUN = 24  # steps with the same matrices that are worth a loop of their own


@dataclass(frozen=True, eq=False)
class Arrays:
    """The numbers of some chains: B batches with covariances of their own, of M chains each.

    Attributes:
        A: # (B|1, U, n, n)
        G: # (B|1, U, n, k)
        H: # (B|1, V, D, n)
        deviation: # (B|1, V, D)
        dynamics: # (T,)
        measurement: # (T,)
        seen: None if all. # (B|1, T, D)
        value: y, zero where not seen. # (B, D, T, M)
        drift: # (B|1, n, T, M|1)
    """

    A: Floats
    G: Floats
    H: Floats
    deviation: Floats
    dynamics: Ints
    measurement: Ints
    seen: NDArray[np.bool_] | None
    value: Floats
    drift: Floats

    @staticmethod
    def of(space: StateSpace) -> Arrays:
        """Those of a state-space model."""
        own = (space.transition, space.noise, space.loading, space.deviation)
        arrays = [x.detach().numpy() for x in own]
        seen = None if space.seen is None else space.seen.numpy()
        batches = max(len(x) for x in (*arrays, *(() if seen is None else (seen,))))
        value, drift = space.value.detach().numpy(), space.drift.detach().numpy()
        if seen is not None:
            value = np.where(seen, value, 0.0)
        many = batches == 1 and len(drift) > 1
        A, G, H, deviation = arrays
        return Arrays(
            A,
            G,
            H,
            deviation,
            space.dynamics.numpy(),
            space.measurement.numpy(),
            seen,
            columns(value, batches),
            columns(drift, 1) if many else drift.transpose(0, 2, 1)[..., None],
        )

    @property
    def batches(self) -> int:
        """B."""
        return len(self.value)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.dynamics)

    @cached_property
    def alike(self) -> NDArray[np.bool_]:
        """Whether each step has the same matrices as the one before. # (T,)"""
        u, v = self.dynamics, self.measurement
        out = np.zeros(len(u), np.bool_)
        out[2:] = (u[2:] == u[1:-1]) & (v[2:] == v[1:-1])
        if self.seen is not None:
            out[2:] &= (self.seen[:, 2:] == self.seen[:, 1:-1]).all((0, 2))
        return out

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """First steps, and the steps after the last, of steps with the same matrices."""
        starts = np.flatnonzero(~self.alike).tolist()
        return list(zip(starts, [*starts[1:], self.steps], strict=True))

    @property
    def counted(self) -> Floats:
        """One where a number is seen. # (B|1, D, T)"""
        if self.seen is None:
            return np.ones((1, 1, 1))
        return self.seen.transpose(0, 2, 1).astype(np.float64)

    @property
    def s(self) -> Floats:
        """Deviations. # (B|1, D, T)"""
        return self.deviation[:, self.measurement].transpose(0, 2, 1)

    @property
    def log_deviation(self) -> Floats:
        """# (B|1, D, T)"""
        return np.log(self.deviation)[:, self.measurement].transpose(0, 2, 1)

    def loading(self, t: int) -> Floats:
        """H, zero where not seen. # (B|1, D, n)"""
        H = self.H[:, self.measurement[t]]
        return H if self.seen is None else H * self.seen[:, t, :, None]

    def loadings(self, steps: Ints) -> Floats:
        """The same of several steps. # (B|1, steps, D, n)"""
        H = self.H[:, self.measurement[steps]]
        return H if self.seen is None else H * self.seen[:, steps, :, None]

    @cached_property
    def of_dynamics(self) -> Places:
        """Which A and G each step has."""
        return Places(self.dynamics, self.dynamics)

    @cached_property
    def of_measurement(self) -> Places:
        """Which H each step has."""
        return Places(self.measurement, self.measurement)

    def moved(self, x: Floats) -> Floats:
        """A x of the step before; zero at first. # (B, n, T, M)"""
        before = np.zeros_like(x)
        before[:, :, 1:] = x[:, :, :-1]
        return apply(self.A, self.of_dynamics, before)

    def expected(self, x: Floats) -> Floats:
        """H x, zero where not seen. # (B, D, T, M)"""
        y = apply(self.H, self.of_measurement, x)
        return y if self.seen is None else y * self.counted[..., None]

    def errors(self, predicted: Floats) -> Floats:
        """y − H x. # (B, D, T, M)"""
        return self.value - self.expected(predicted)

    def chains(self, x: Floats) -> Tensor:
        """(B, …, T, M) as (chains, T, …); (B, M) as (chains,)."""
        moved = np.moveaxis(x, -1, 0).reshape(-1, *x.shape[1:-1])
        return torch.from_numpy(
            np.ascontiguousarray(moved.swapaxes(1, 2) if x.ndim == 4 else moved)
        )


def columns(x: Floats, batches: int) -> Floats:
    """(chains, T, n) as (B, n, T, M)."""
    if batches == 1:
        return np.ascontiguousarray(x.transpose(2, 1, 0))[None]
    return np.ascontiguousarray(x.transpose(0, 2, 1))[..., None]


@dataclass(frozen=True, eq=False)
class Places:
    """Which of the different matrices each step has.

    Attributes:
        of: # (T,)
        step: A step that has each of them. # (P,)
    """

    of: Ints
    step: Ints

    @cached_property
    def runs(self) -> list[tuple[int, int, bool]]:
        """Pieces of all steps: those with the same matrices if they are many, and what is between."""
        ends = np.flatnonzero(np.diff(self.of)) + 1
        starts, ends = np.concatenate([[0], ends]), np.concatenate([ends, [len(self.of)]])
        out, at = [], 0
        for i in np.flatnonzero(ends - starts >= _RUN).tolist():
            if at < starts[i]:
                out.append((at, int(starts[i]), False))
            out.append((int(starts[i]), int(ends[i]), True))
            at = int(ends[i])
        return [*out, (at, len(self.of), False)] if at < len(self.of) else out

    @cached_property
    def reversed(self) -> Places:
        """From the last step to the first."""
        return Places(self.of[::-1], self.step)


def apply(matrices: Floats, places: Places, x: Floats) -> Floats:
    """The product of each step's matrix and its columns. # (B, i, T, M)

    Args:
        matrices: # (B|1, P, i, j)
        places: Which of them each step has.
        x: # (B|1, j, T, M)
    """
    T, M = x.shape[2:]
    B, place = max(len(matrices), len(x)), places.of
    out = np.empty((B, matrices.shape[-2], T, M))
    for start, end, same in places.runs:
        piece = x[:, :, start:end]
        if same:
            flat = piece.reshape(*piece.shape[:2], (end - start) * M)
            moved = matrices[:, place[start]] @ flat
            out[:, :, start:end] = moved.reshape(B, out.shape[1], end - start, M)
        else:
            found = matrices[:, place[start:end]] @ piece.transpose(0, 2, 1, 3)
            out[:, :, start:end] = found.transpose(0, 2, 1, 3)
    return out
