"""Kalman's filter and smoother by compiled loops (`numba_kalman_…`): tensors in, tensors out.

Chains that share their matrices and miss the same data are a group, solved together. As little as can
be lies between tensors and loops: with a series of a thousand steps it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from pyro_em.posteriors.filters.kalman_arrays import FAR
from pyro_em.posteriors.filters.kalman_groups import (
    Floats,
    Group,
    Groups,
    Which,
    group_at_hand,
    only_group,
)
from pyro_em.posteriors.filters.state_space import (
    Filtered,
    Smoothed,
    SmoothedArrays,
    StateSpace,
)

_NOWHERE = np.empty((0, 0, 0))  # states measured from zero
_LONG = 256  # steps of which most are supposed to repeat


def filtered(space: StateSpace) -> Filtered:
    """See `pyro_em.posteriors.filters.kalman.filtered`.

    Args:
        space: The chains, on the CPU.
    """
    groups = Groups.of_space(space)
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
    group = only_group(space)
    if group is not None:
        return smoothed_group(group).tensors
    groups = Groups.of_space(space)
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


def smoothed_at_hand(space: StateSpace) -> Smoothed | None:
    """The same of one group whose numbers are on the CPU without derivatives; None of any other.

    Args:
        space: The chains.
    """
    group = group_at_hand(space)
    return None if group is None else smoothed_group(group).tensors


def log_evidence(space: StateSpace) -> Tensor:
    """See `pyro_em.posteriors.filters.kalman.log_evidence`.

    Args:
        space: The chains, on the CPU.
    """
    groups = Groups.of_space(space)
    found = [cast(_Means, _means(group, space.steps)) for _, group in groups.each()]
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
    n, k = group.G.shape[1:]
    transition, noise = np.empty((1, room, n, n)), np.empty((1, room, n, n))
    found = _means(group, room, (transition[0], noise[0]) if k <= n else None)
    if found is None:
        return None
    T, place = len(group.dynamics), found.place
    first, which = int(place[0]), np.empty((1, T), np.int32)
    # Covariances converge from both ends.
    covariance = np.empty((1, T if room == T else min(T, 3 * (room - first)), n, n))
    count = _loops().onward(
        group.A,
        group.G,
        group.dynamics,
        found.pull,
        found.factor,
        place,
        covariance[0],
        which[0],
        transition[0],
        noise[0],
        np.empty(n * k + 3 * n * n),
    )
    if count < 0:
        return None
    shared = covariance[:, :count], which, transition[:, first:], noise[:, first:], place[None]
    return SmoothedArrays(
        found.evidence, found.totals[:1], found.states, found.disturbance, *shared
    )


class _Loops(NamedTuple):
    """Compiled loops: see `numba_kalman_backward` and `numba_kalman_onward`."""

    backward: Any
    follow: Any
    onward: Any
    memory: Callable[[int, int, int, int], int]


@cache
def _loops() -> _Loops:
    """Those of the smoother; to import them takes time, and Numba."""
    from pyro_em.posteriors.filters import numba_kalman_backward, numba_kalman_onward

    def memory(M: int, D: int, n: int, k: int) -> int:
        """How many numbers are written over, the same ones on the way back and on the way forth."""
        own = numba_kalman_backward.backward_memory(M, D, n, k)
        return max(own, numba_kalman_onward.follow_memory(M, D, n, k))

    onward = numba_kalman_onward
    return _Loops(numba_kalman_backward.backward, onward.follow, onward.onward, lru_cache(memory))


class _Means(NamedTuple):
    """The noises of each step given the state before, and what follows without covariances.

    Attributes:
        near: What states are measured from.
        pull: Of the noises, see `pyro_em.posteriors.filters.numba_kalman_backward`, as the following.
        factor: W.
        shift: g; gone where its memory holds the disturbances.
        place: Which E and W a step has.
        totals: Sums over steps.
        states: Means. # (M, T, n)
        disturbance: G ε. # (M, T, n)
        evidence: In nats. # (M,)
        slab: Memory.
    """

    near: Floats
    pull: Floats
    factor: Floats
    shift: Floats
    place: Which
    totals: Floats
    states: Floats
    disturbance: Floats
    evidence: Floats
    slab: Floats


def _means(
    group: Group,
    room: int,
    memory: tuple[Floats, Floats] | None = None,
    keeps_shift: bool = False,
) -> _Means | None:
    """Means and evidence.

    Args:
        group: The chains.
        room: How many different matrices there is memory for.
        memory: Some that is free until the steps are gone through in their order. # (room, n, n) each
        keeps_shift: Whether `shift` is wanted after the means have been found.

    Returns:
        None if more matrices differ.
    """
    M, T, D = group.value.shape
    n, k = group.G.shape[1:]
    pull, factor = memory or (np.empty((room, k, n)), np.empty((room, k, k)))
    shift, states, place = np.empty((M, T, k)), np.empty((M, T, n)), np.empty(T, np.int32)
    disturbance = shift if k == n and not keeps_shift else np.empty((M, T, n))
    totals, evidence = np.empty(4), np.empty(M)
    loops = _loops()
    slab, near = np.zeros(loops.memory(M, D, n, k)), _NOWHERE
    while True:
        loops.backward(*group[1:], near, pull, factor, shift, place, totals, slab)
        if place[0] < 0:
            return None
        out = states, disturbance, evidence, slab
        loops.follow(*group[1:], totals, near, pull, place, shift, *out)
        # Data are far from zero: once more from there.
        if len(near) > 0 or totals[2] <= FAR:
            return _Means(
                near, pull, factor, shift, place, totals, states, disturbance, evidence, slab
            )
        near, states, slab = states, np.empty((M, T, n)), np.zeros(len(slab))


def sampled(space: StateSpace, normal: Tensor) -> Tensor:
    """See `pyro_em.posteriors.filters.kalman.sampled`.

    Args:
        space: The chains, on the CPU.
        normal: Standard normal numbers. # (draws, chains, T, k)
    """
    draws = np.empty((*normal.shape[:3], space.size))
    for chains, group in Groups.of_space(space).each():
        told = cast(_Means, _means(group, space.steps, keeps_shift=True))
        factor = told.factor[told.place]
        noises, squares = np.empty_like(told.states), np.empty_like(told.evidence)
        for i, eta in enumerate(normal.numpy()[:, chains]):
            shift = told.shift + (factor @ eta[..., None])[..., 0]
            states = np.empty_like(told.states)
            out = states, noises, squares, told.slab
            _loops().follow(*group[1:], told.totals, told.near, told.pull, told.place, shift, *out)
            draws[i, chains] = states
    return torch.from_numpy(draws)


def _stacked(arrays: Sequence[Any]) -> Any:
    """Arrays of groups side by side; after the last of shorter ones anything follows."""
    most = max(len(x) for x in arrays)
    out = np.empty((len(arrays), most, *arrays[0].shape[1:]), arrays[0].dtype)
    for own, x in zip(out, arrays, strict=True):
        own[: len(x)] = x
    return out


def _forward(
    group: Group, covariances: tuple[Floats, Floats, Floats]
) -> tuple[Floats, Floats, Floats]:
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


def _work(*shapes: tuple[int, int]) -> tuple[Floats, ...]:
    return tuple(np.zeros(shape) for shape in shapes)
