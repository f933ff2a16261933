"""Kalman's filter and smoother by compiled loops (`numba_kalman_…`): tensors in, tensors out.

Chains that share their matrices and miss the same data are a group, solved together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.posteriors.filters.kalman_arrays import FAR
from pyro_em.posteriors.filters.state_space import Filtered, Smoothed, StateSpace

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]
_Bools = NDArray[np.bool_]
_Which = NDArray[np.int32]

_NOWHERE = np.empty((0, 0, 0))  # states measured from zero
_LONG = 256  # steps of which most are supposed to repeat


def filtered(space: StateSpace) -> Filtered:
    """See `pyro_em.posteriors.filters.kalman.filtered`.

    Args:
        space: The chains, on the CPU.
    """
    groups = _Groups.of_space(space)
    B, T, n = groups.count, space.steps, space.size
    before, after, size = np.empty((B, T, n, n)), np.empty((B, T, n, n)), np.empty((B, T))
    parts = []
    for b, group in enumerate(groups.each()):
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
    groups = _Groups.of_space(space)
    found = [_smoothed(group) for group in groups.each()]
    evidences, means, disturbances = groups.together([x.of_chains for x in found])
    if groups.of is None:
        (only,) = found
        size = np.array([only.determinant])
        covariances, transitions, noises, which, place = (x[None] for x in only.of_group)
    else:
        size = np.array([x.determinant for x in found])
        covariances, transitions, noises, which, place = (
            _stacked(x) for x in zip(*(x.of_group for x in found), strict=True)
        )
    return Smoothed(
        evidences,
        groups.of_chains(size),
        means,
        disturbances,
        groups.of_chains(covariances),
        groups.of_chains(which),
        groups.of_chains(transitions),
        groups.of_chains(noises),
        groups.of_chains(place),
    )


def log_evidence(space: StateSpace) -> Tensor:
    """See `pyro_em.posteriors.filters.kalman.log_evidence`.

    Args:
        space: The chains, on the CPU.
    """
    groups = _Groups.of_space(space)
    found = [cast(_Solved, _solved(group, space.steps)) for group in groups.each()]
    (evidence,) = groups.together([(x.evidence,) for x in found])
    return evidence


@dataclass(frozen=True, eq=False)
class _Found:
    """The E-step of a group.

    Attributes:
        determinant: 2 Σ log|U|.
        of_chains: Evidence # (M,), means # (M, T, n), disturbances # (M, T, n).
        of_group: Covariances # (P, n, n), transitions # (Q, n, n), noises # (Q, n, n), and which of
            them each step has # (T,), (T,).
    """

    determinant: float
    of_chains: tuple[_Floats, ...]
    of_group: tuple[Any, ...]


def _smoothed(group: _Group) -> _Found:
    """The E-step of a group; memory for as many different matrices as most chains have."""
    T = len(group.dynamics)
    found = _smoothed_in(group, T // 4) if T > _LONG else None
    return found or cast(_Found, _smoothed_in(group, T))


def _smoothed_in(group: _Group, room: int) -> _Found | None:
    """The same.

    Args:
        group: The chains.
        room: How many different matrices there is memory for.

    Returns:
        None if it is too small.
    """
    from pyro_em.posteriors.filters.numba_kalman_onward import onward

    T, (n, k) = len(group.dynamics), group.G.shape[1:]
    transition, noise = np.empty((room, n, n)), np.empty((room, n, n))
    solved = _solved(group, room, (transition, noise))
    if solved is None:
        return None
    told = solved.told
    first, which = int(told.place[0]), np.empty(T, np.int32)
    # Covariances converge from both ends.
    covariance = np.empty((T if room == T else min(T, 3 * (room - first)), n, n))
    count = onward(
        group.A,
        group.G,
        group.dynamics,
        told.pull,
        told.factor,
        told.place,
        covariance,
        which,
        transition,
        noise,
        _work((n, k), (n, n), (n, n), (n, n)),
    )
    if count < 0:
        return None
    of_group = (
        covariance[:count],
        transition[first:],
        noise[first:],
        which,
        np.subtract(told.place, first, out=told.place),
    )
    of_chains = solved.evidence, solved.states, solved.disturbance
    return _Found(float(told.totals[0]), of_chains, of_group)


@dataclass(frozen=True, eq=False)
class _Solved:
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
    group: _Group, room: int, memory: tuple[_Floats, _Floats] | None = None
) -> _Solved | None:
    """Means and evidence; None where there is memory for too few matrices: see `_backward`."""
    told = _backward(group, _NOWHERE, room, memory)
    if told is None:
        return None
    states, disturbance, squares = _follow(group, _NOWHERE, told, told.shift)
    if told.is_far:
        told = cast(_Backward, _backward(group, states, room, memory))
        states, disturbance, squares = _follow(group, states, told, told.shift)
    determinant, nats, _ = told.totals
    return _Solved(told, states, disturbance, -0.5 * (squares + determinant) - nats)


def _stacked(arrays: Sequence[Any]) -> Any:
    """Arrays of groups side by side; after the last of shorter ones anything follows."""
    most = max(len(x) for x in arrays)
    out = np.empty((len(arrays), most, *arrays[0].shape[1:]), arrays[0].dtype)
    for own, x in zip(out, arrays, strict=True):
        own[: len(x)] = x
    return out


def sampled(space: StateSpace, normal: Tensor) -> Tensor:
    """See `pyro_em.posteriors.filters.kalman.sampled`.

    Args:
        space: The chains, on the CPU.
        normal: Standard normal numbers. # (draws, chains, T, k)
    """
    draws = np.empty((*normal.shape[:3], space.size))
    for group in _Groups.of_space(space).each():
        near = _NOWHERE
        told = cast(_Backward, _backward(group, near, space.steps))
        if told.is_far:
            near = _follow(group, near, told, told.shift)[0]
            told = cast(_Backward, _backward(group, near, space.steps))
        factor = told.factor[told.place]
        for i, eta in enumerate(normal.numpy()[:, group.chains]):
            shift = told.shift + (factor @ eta[..., None])[..., 0]
            draws[i, group.chains] = _follow(group, near, told, shift)[0]
    return torch.from_numpy(draws)


@dataclass(frozen=True, eq=False)
class _Group:
    """Chains that share their matrices and what is seen: see `state_space`."""

    chains: _Ints
    A: _Floats
    G: _Floats
    H: _Floats
    s: _Floats
    dynamics: _Ints
    measurement: _Ints
    seen: _Bools
    value: _Floats
    drift: _Floats

    @cached_property
    def w(self) -> _Floats:
        """1/s. # (V, D)"""
        return 1.0 / self.s


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
        own = (space.transition, space.noise, space.loading, space.deviation)
        if any(x.shape[0] > 1 for x in own):
            return _Groups(space, space.chains, np.arange(space.chains), seen)
        if len(seen) == 1:
            return _Groups(space, 1, None, seen)
        patterns, of = np.unique(
            np.packbits(seen.reshape(len(seen), -1), 1), axis=0, return_inverse=True
        )
        return _Groups(space, len(patterns), of, seen)

    def each(self) -> Iterator[_Group]:
        """One after the other."""
        space = self.space
        own = [_array(x) for x in (space.transition, space.noise, space.loading, space.deviation)]
        dynamics, measurement = _array(space.dynamics), _array(space.measurement)
        value, drift = _array(space.value), _array(space.drift)
        if not drift[:, 1:].any():
            drift = np.ascontiguousarray(drift[:, : int(drift[:, 0].any())])
        for b in range(self.count):
            chains = np.arange(space.chains) if self.of is None else np.flatnonzero(self.of == b)
            first = int(chains[0])
            A, G, H, s = (x[first % len(x)] for x in own)
            yield _Group(
                chains,
                A,
                G,
                H,
                s,
                dynamics,
                measurement,
                np.ascontiguousarray(self.seen[first % len(self.seen)]),
                value if self.of is None else value[chains],
                drift if len(drift) == 1 else drift[chains],
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


@dataclass(frozen=True, eq=False)
class _Backward:
    pull: _Floats
    factor: _Floats
    shift: _Floats
    place: _Which
    totals: _Floats

    @property
    def is_far(self) -> bool:
        """Whether data are so far from zero that states are measured from what is found first."""
        return not self.totals[2] <= FAR


def _forward(
    group: _Group, covariances: tuple[_Floats, _Floats, _Floats]
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


def _backward(
    group: _Group,
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
    from pyro_em.posteriors.filters.numba_kalman_backward import backward

    M, T, D = group.value.shape
    n, k = group.G.shape[1:]
    told, wide = D + n, k + n
    if memory is None or k > n:
        memory = np.empty((room, k, n)), np.empty((room, k, k))
    pull, factor = memory
    shift, place = np.empty((M, T, k)), np.empty(T, np.int32)
    totals = np.empty(3)
    backward(
        group.A,
        group.G,
        group.H,
        group.w,
        group.dynamics,
        group.measurement,
        group.seen,
        group.value,
        group.drift,
        near,
        pull,
        factor,
        shift,
        place,
        totals,
        (
            *_work(
                (told, n + told + 3),
                (wide, wide + told + 3),
                (n, n),
                (n, n),
                (M, told),
                (wide, told),
            ),
            np.zeros(((wide + 3) // 4, told, 4)),
            *_work((M, n), (2, told + k + 3)),
        ),
    )
    if place[0] < 0:
        return None
    return _Backward(pull, factor, shift, place, totals)


def _follow(
    group: _Group, near: _Floats, told: _Backward, shift: _Floats
) -> tuple[_Floats, _Floats, _Floats]:
    """States # (M, T, n), G ε # (M, T, n) and the squares of all noises # (M,).

    Args:
        group: The chains.
        near: What states are measured from, as for `_backward`.
        told: The noises of each step given the state before.
        shift: Their means, or draws of them; its memory may be used for G ε. # (M, T, k)
    """
    from pyro_em.posteriors.filters.numba_kalman_onward import follow

    n, k = group.G.shape[1:]
    states = np.empty((*shift.shape[:2], n))
    disturbance = shift if k == n else np.empty_like(states)
    squares = np.zeros(len(shift))
    follow(
        group.A,
        group.G,
        group.H,
        group.w,
        group.dynamics,
        group.measurement,
        group.seen,
        group.value,
        group.drift,
        near,
        told.pull,
        told.place,
        shift,
        states,
        disturbance,
        squares,
        _work((len(shift), n), (4, max(n, k))),
    )
    return states, disturbance, squares


def _array(x: Tensor) -> Any:
    """The numbers of a tensor on the CPU, in its own memory if they follow each other there."""
    return np.ascontiguousarray((x.detach() if x.requires_grad else x).numpy())


def _work(*shapes: tuple[int, int]) -> tuple[_Floats, ...]:
    return tuple(np.zeros(shape) for shape in shapes)
