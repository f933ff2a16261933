"""Kalman's filter and smoother by compiled loops (`numba_kalman_…`): tensors in, tensors out.

Chains that share their matrices and miss the same data are a group, solved together. As little as can
be lies between tensors and loops: with a series of a thousand steps it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.posteriors.filters.kalman_arrays import FAR
from pyro_em.posteriors.filters.state_space import (
    Filtered,
    Smoothed,
    SmoothedArrays,
    StateSpace,
)

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]
_Bools = NDArray[np.bool_]
_Which = NDArray[np.int32]

_NOWHERE = np.empty((0, 0, 0))  # states measured from zero
_LONG = 256  # steps of which most are supposed to repeat


class Group(NamedTuple):
    """Chains that share their matrices and what is seen: see `pyro_em.posteriors.filters.state_space`.

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

    s: _Floats
    A: _Floats
    G: _Floats
    H: _Floats
    w: _Floats
    dynamics: _Ints
    measurement: _Ints
    seen: _Bools
    value: _Floats
    drift: _Floats


def filtered(space: StateSpace) -> Filtered:
    """See `pyro_em.posteriors.filters.kalman.filtered`.

    Args:
        space: The chains, on the CPU.
    """
    groups = _Groups.of_space(space)
    B, T, n = groups.count, space.steps, space.size
    before, after, size = np.empty((B, T, n, n)), np.empty((B, T, n, n)), np.empty((B, T))
    parts = []
    for b, (_, group) in enumerate(groups.each()):
        parts.append(_forward(group, (before[b], after[b], size[b])))
    evidence, predicted, mean = groups.together(parts)
    return Filtered(
        evidence,
        predicted,
        groups.of_chains(before),
        mean,
        groups.of_chains(after),
        groups.of_chains(size),
    )


def smoothed(space: StateSpace) -> Smoothed:
    """See `pyro_em.posteriors.filters.kalman.smoothed`.

    Args:
        space: The chains, on the CPU.
    """
    group = _only_group(space)
    if group is not None:
        return smoothed_group(group).tensors
    groups = _Groups.of_space(space)
    found = [smoothed_group(group) for _, group in groups.each()]
    evidence, mean, disturbance = groups.together(
        [(x.log_evidence, x.mean, x.disturbance) for x in found]
    )
    shared = [
        groups.of_chains(_stacked([x[0] for x in own]))
        for own in zip(*(x[4:] for x in found), strict=True)
    ]
    determinant = groups.of_chains(np.concatenate([x.log_determinant for x in found]))
    return Smoothed(evidence, determinant, mean, disturbance, *shared)


def log_evidence(space: StateSpace) -> Tensor:
    """See `pyro_em.posteriors.filters.kalman.log_evidence`.

    Args:
        space: The chains, on the CPU.
    """
    groups = _Groups.of_space(space)
    found = [cast(_Solved, _solved(group, space.steps)) for _, group in groups.each()]
    (evidence,) = groups.together([(x.evidence,) for x in found])
    return evidence


def smoothed_group(group: Group) -> SmoothedArrays:
    """The E-step of a group; memory for as many different matrices as most chains have.

    Args:
        group: The chains.
    """
    T = len(group.dynamics)
    found = _smoothed_in(group, T // 4) if T > _LONG else None
    return found or cast(SmoothedArrays, _smoothed_in(group, T))


def _smoothed_in(group: Group, room: int) -> SmoothedArrays | None:
    """The same.

    Args:
        group: The chains.
        room: How many different matrices there is memory for.

    Returns:
        None if it is too small.
    """
    T, (n, k) = len(group.dynamics), group.G.shape[1:]
    transition, noise = np.empty((room, n, n)), np.empty((room, n, n))
    solved = _solved(group, room, (transition, noise) if k <= n else None)
    if solved is None:
        return None
    (pull, factor, _, place, totals), states, disturbance, evidence = solved
    first, which = int(place[0]), np.empty(T, np.int32)
    # Covariances converge from both ends.
    covariance = np.empty((T if room == T else min(T, 3 * (room - first)), n, n))
    work = np.zeros(n * k + 3 * n * n)
    A, G, dynamics = group.A, group.G, group.dynamics
    count = _loops().onward(
        A, G, dynamics, pull, factor, place, covariance, which, transition, noise, work
    )
    if count < 0:
        return None
    np.subtract(place, first, out=place)
    transition, noise = transition[None, first:], noise[None, first:]
    shared = covariance[None, :count], which[None], transition, noise, place[None]
    return SmoothedArrays(evidence, totals[:1], states, disturbance, *shared)


class _Loops(NamedTuple):
    """Compiled loops: see `numba_kalman_backward` and `numba_kalman_onward`."""

    backward: Any
    backward_memory: Callable[[int, int, int, int], int]
    follow: Any
    follow_memory: Callable[[int, int, int, int], int]
    onward: Any


@cache
def _loops() -> _Loops:
    """Those of the smoother; to import them takes time, and Numba."""
    from pyro_em.posteriors.filters.numba_kalman_backward import backward, backward_memory
    from pyro_em.posteriors.filters.numba_kalman_onward import follow, follow_memory, onward

    return _Loops(backward, backward_memory, follow, follow_memory, onward)


class _Backward(NamedTuple):
    """What `backward` finds: see there."""

    pull: _Floats
    factor: _Floats
    shift: _Floats
    place: _Which
    totals: _Floats

    @property
    def is_far(self) -> bool:
        """Whether data are so far from zero that states are measured from what is found first."""
        return not self.totals[2] <= FAR


class _Solved(NamedTuple):
    """The noises of each step given the state before, and what follows without covariances.

    Attributes:
        told: The noises.
        states: Means. # (M, T, n)
        disturbance: G ε. # (M, T, n)
        evidence: In nats. # (M,)
    """

    told: _Backward
    states: _Floats
    disturbance: _Floats
    evidence: _Floats


def _solved(
    group: Group, room: int, memory: tuple[_Floats, _Floats] | None = None
) -> _Solved | None:
    """Means and evidence; None where there is memory for too few matrices: see `_backward`."""
    told = _backward(group, _NOWHERE, room, memory)
    if told is None:
        return None
    states, disturbance, squares = _follow(group, _NOWHERE, told, told.shift)
    if told.is_far:
        told = cast(_Backward, _backward(group, states, room, memory))
        states, disturbance, squares = _follow(group, states, told, told.shift)
    size, nats = told.totals[:2].tolist()
    return _Solved(told, states, disturbance, -0.5 * (squares + size) - nats)


def _backward(
    group: Group,
    near: _Floats,
    room: int,
    memory: tuple[_Floats, _Floats] | None = None,
) -> _Backward | None:
    """The noises of each step given the state before and all data.

    Args:
        group: The chains.
        near: What states are measured from; empty if that is zero. # (M, T, n)
        room: How many different matrices there is memory for.
        memory: Some that is free until the steps are gone through in their order. # (room, n, n) each

    Returns:
        None if there are more.
    """
    M, T, D = group.value.shape
    n, k = group.G.shape[1:]
    pull, factor = memory or (np.empty((room, k, n)), np.empty((room, k, k)))
    shift, place, totals = np.empty((M, T, k)), np.empty(T, np.int32), np.empty(4)
    loops = _loops()
    slab = np.zeros(loops.backward_memory(M, D, n, k))
    loops.backward(*group[1:], near, pull, factor, shift, place, totals, slab)
    return None if place[0] < 0 else _Backward(pull, factor, shift, place, totals)


def _follow(
    group: Group, near: _Floats, told: _Backward, shift: _Floats
) -> tuple[_Floats, _Floats, _Floats]:
    """States # (M, T, n), G ε # (M, T, n) and the squares of all noises # (M,).

    Args:
        group: The chains.
        near: What states are measured from, as for `_backward`.
        told: The noises of each step given the state before.
        shift: Their means, or draws of them; its memory may be used for G ε. # (M, T, k)
    """
    M, T, D = group.value.shape
    n, k = group.G.shape[1:]
    states, squares = np.empty((M, T, n)), np.empty(M)
    disturbance = shift if k == n else np.empty_like(states)
    drifting = int(told.totals[3])
    loops = _loops()
    slab = np.empty(loops.follow_memory(M, D, n, k))
    out = states, disturbance, squares, slab
    loops.follow(*group[1:], drifting, near, told.pull, told.place, shift, *out)
    return states, disturbance, squares


def sampled(space: StateSpace, normal: Tensor) -> Tensor:
    """See `pyro_em.posteriors.filters.kalman.sampled`.

    Args:
        space: The chains, on the CPU.
        normal: Standard normal numbers. # (draws, chains, T, k)
    """
    draws = np.empty((*normal.shape[:3], space.size))
    for chains, group in _Groups.of_space(space).each():
        near = _NOWHERE
        told = cast(_Backward, _backward(group, near, space.steps))
        if told.is_far:
            near = _follow(group, near, told, told.shift)[0]
            told = cast(_Backward, _backward(group, near, space.steps))
        factor = told.factor[told.place]
        for i, eta in enumerate(normal.numpy()[:, chains]):
            shift = told.shift + (factor @ eta[..., None])[..., 0]
            draws[i, chains] = _follow(group, near, told, shift)[0]
    return torch.from_numpy(draws)


def _stacked(arrays: Sequence[Any]) -> Any:
    """Arrays of groups side by side; after the last of shorter ones anything follows."""
    most = max(len(x) for x in arrays)
    out = np.empty((len(arrays), most, *arrays[0].shape[1:]), arrays[0].dtype)
    for own, x in zip(out, arrays, strict=True):
        own[: len(x)] = x
    return out


def _only_group(space: StateSpace) -> Group | None:
    """All chains as one group; None where there are more."""
    A, G, H, s = (
        _numbers(x) for x in (space.transition, space.noise, space.loading, space.deviation)
    )
    if max(len(A), len(G), len(H), len(s)) > 1:
        return None
    if space.seen is None:
        seen = np.ones((1, space.value.shape[-1]), np.bool_)
    elif len(space.seen) > 1:
        return None
    else:
        seen = _array(space.seen[0])
    rest = _array(space.value), _array(space.drift)
    dynamics, measurement = _array(space.dynamics), _array(space.measurement)
    A, G, H, s = (np.ascontiguousarray(x[0]) for x in (A, G, H, s))
    return Group(s, A, G, H, 1.0 / s, dynamics, measurement, seen, *rest)


@dataclass(frozen=True, eq=False)
class _Groups:
    """All groups.

    Attributes:
        space: The chains.
        count: How many groups there are.
        of: The group of each chain; None if there is one. # (chains,)
    """

    space: StateSpace
    count: int
    of: _Ints | None
    seen: _Bools

    @staticmethod
    def of_space(space: StateSpace) -> _Groups:
        """Those of a state-space model."""
        D = space.value.shape[-1]
        seen = np.ones((1, 1, D), np.bool_) if space.seen is None else space.seen.numpy()
        if any(len(x) > 1 for x in (space.transition, space.noise, space.loading, space.deviation)):
            return _Groups(space, space.chains, np.arange(space.chains), seen)
        if len(seen) == 1:
            return _Groups(space, 1, None, seen)
        patterns, of = np.unique(
            np.packbits(seen.reshape(len(seen), -1), 1), axis=0, return_inverse=True
        )
        return _Groups(space, len(patterns), of, seen)

    def each(self) -> Iterator[tuple[_Ints | slice, Group]]:
        """One after the other: which chains they are, and their numbers."""
        space = self.space
        only = _only_group(space)
        if only is not None:
            yield slice(None), only
            return
        A, G, H, s, dynamics, measurement, value, drift = map(
            _array,
            (
                space.transition,
                space.noise,
                space.loading,
                space.deviation,
                space.dynamics,
                space.measurement,
                space.value,
                space.drift,
            ),
        )
        w = 1.0 / s
        for b in range(self.count):
            chains = np.flatnonzero(self.of == b)
            first = int(chains[0])
            seen = np.ascontiguousarray(self.seen[first % len(self.seen)])
            own = [x[first % len(x)] for x in (s, A, G, H, w)]
            yield (
                chains,
                Group(
                    own[0],
                    own[1],
                    own[2],
                    own[3],
                    own[4],
                    dynamics,
                    measurement,
                    seen,
                    value[chains],
                    drift if len(drift) == 1 else drift[chains],
                ),
            )

    def together(self, parts: Sequence[tuple[_Floats, ...]]) -> list[Tensor]:
        """Numbers of the chains of each group as those of all chains."""
        if self.of is None:
            return [torch.from_numpy(x) for x in parts[0]]
        back = np.argsort(np.argsort(self.of, kind="stable"), kind="stable")
        return [torch.from_numpy(np.concatenate(x)[back]) for x in zip(*parts, strict=True)]

    def of_chains(self, x: _Floats | _Which) -> Tensor:
        """Numbers of each group as those of each chain, or of all."""
        return torch.from_numpy(x if self.of is None else x[self.of])


def _forward(
    group: Group, covariances: tuple[_Floats, _Floats, _Floats]
) -> tuple[_Floats, _Floats, _Floats]:
    """The filter: nats, predicted and filtered means.

    Args:
        group: The chains.
        covariances: Where covariances and log determinants go. # (T, n, n), (T, n, n), (T,)
    """
    from pyro_em.posteriors.filters.numba_kalman_filter import forward

    M, T, D = group.value.shape
    n, k = group.G.shape[1:]
    before, after, size = covariances
    nats, predicted, mean = np.empty((M, T)), np.empty((M, T, n)), np.empty((M, T, n))
    forward(
        group.A,
        group.G,
        group.H,
        group.s,
        group.dynamics,
        group.measurement,
        group.seen,
        group.value,
        group.drift,
        predicted,
        mean,
        nats,
        size,
        before,
        after,
        _work((n + k, n + 3), (n, n), (n, n), (D, n), (M, n), (2, max(n, D))),
    )
    return nats, predicted, mean


def _numbers(x: Tensor) -> Any:
    """The numbers of a tensor on the CPU, in its own memory."""
    return (x.detach() if x.requires_grad else x).numpy()


def _array(x: Tensor) -> Any:
    """The same, one after the other."""
    return np.ascontiguousarray(_numbers(x))


def _work(*shapes: tuple[int, int]) -> tuple[_Floats, ...]:
    return tuple(np.zeros(shape) for shape in shapes)
