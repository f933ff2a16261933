"""Kalman's filter and smoother on factors of covariances, by numpy.

Forward goes S with S S' the covariance. One triangle holds all that a step does to it:

    [S'A'H'  S'A']     [F½  K̄']
    [G'H'    G'  ] = Q [0   S'],        F = F½'F½ the variance of y,  K = K̄ F½⁻ᵀ its gain.
    [diag s  0   ]

Backward go rows R and numbers ζ such that all later data say of δ_t = x_t − E[x_t | y_{≤t}] what
R δ = ζ + noise of variance one says. With W the rows [H/s; R] of a step and what is later, of
d_t = x_t − E[x_t | y_{<t}] = A δ_{t−1} + G ε,

    [W G  W A]     [U  V]
    [I    0  ] = Q [0  R] ,     U ε = w − V δ_{t−1} + noise of variance one

given x_{t−1} and all data: the states are a Markov chain again, along which means and covariances are
sums. No matrix is inverted but U, whose UᵀU = I + … has the prior of ε in it, and no covariance is
the difference of two others. The evidence is that of the mode, −½|ε|² − ½|e|² there, less log|U|.

What depends on no data is computed until it repeats. Along steps whose matrices are the same, a
recursion x_t = F x_{t−1} + b_t is solved in log T steps, x ← x + F x one step before, F ← F².

Source: Kailath, Sayed and Hassibi (2000), "Linear estimation", chapter 12, for the array of the filter;
Bierman (1977), "Factorization methods for discrete sequential estimation", chapters VI and X, for the
rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from pyro_em.posteriors.kalman_arrays import (
    Arrays,
    Floats,
    Ints,
    Places,
    apply,
    columns,
    scanned,
)
from pyro_em.posteriors.state_space import Filtered, Smoothed, StateSpace

_SAME = 1e-14  # how far a matrix may be from that of the step before, for it to repeat


_NEAR = (
    1e-3  # the same for a filter whose means are no results: a smoother's may start from any near
)


def filtered(space: StateSpace) -> Filtered:
    """See `pyro_em.posteriors.kalman.filtered`.

    Args:
        space: The chains, on the CPU.
    """
    arrays = Arrays.of(space)
    found = _forward(arrays, _SAME)
    before = _predicted_covariances(arrays, found)
    errors = arrays.errors(found.predicted)
    white = apply(found.whiten, found.places, errors)
    sizes = (math.log(2 * math.pi) + 2 * found.log_root) * arrays.counted
    return Filtered(
        arrays.chains(-0.5 * (white**2 + sizes[..., None]).sum(1)),
        arrays.chains(found.predicted),
        torch.from_numpy(before),
        arrays.chains(found.mean),
        torch.from_numpy(found.covariance[:, found.places.of]),
        torch.from_numpy(2 * (found.log_root - arrays.log_deviation).sum(1)),
    )


def smoothed(space: StateSpace) -> Smoothed:
    """See `pyro_em.posteriors.kalman.smoothed`.

    Args:
        space: The chains, on the CPU.
    """
    arrays = Arrays.of(space)
    found = _forward(arrays, _NEAR)
    told = _backward(arrays, found)
    epsilon, distance = _onward(arrays, found, told, told.shift)
    left = (arrays.errors(found.predicted) - arrays.expected(distance)) / arrays.s[..., None]
    nats = 0.5 * math.log(2 * math.pi) + arrays.log_deviation
    squares = (epsilon**2).sum((1, 2)) + (left**2).sum((1, 2))
    sizes = told.log_determinant + 2 * (nats * arrays.counted).sum((1, 2))
    covariances, which = _covariances(told)
    B, place = arrays.batches, torch.from_numpy(told.places.of)
    return Smoothed(
        arrays.chains(-0.5 * (squares + sizes[:, None])),
        torch.from_numpy(told.log_determinant),
        arrays.chains(found.predicted + distance),
        arrays.chains(apply(arrays.G, arrays.of_dynamics, epsilon)),
        torch.from_numpy(covariances),
        torch.from_numpy(which).expand(B, -1),
        torch.from_numpy(told.transition),
        torch.from_numpy(told.noise),
        place.expand(B, -1),
    )


def sampled(space: StateSpace, normal: Tensor) -> Tensor:
    """See `pyro_em.posteriors.kalman.sampled`.

    Args:
        space: The chains, on the CPU.
        normal: Standard normal numbers. # (draws, chains, T, k)
    """
    arrays = Arrays.of(space)
    found = _forward(arrays, _NEAR)
    told = _backward(arrays, found)
    # Draws are columns too, with the chains inside them.
    z, n = normal.numpy(), len(normal)
    if arrays.batches == 1:
        eta = columns(z.reshape(n * space.chains, *z.shape[2:]), 1)
    else:
        eta = np.ascontiguousarray(z.transpose(1, 3, 2, 0))
    shift, mean, predicted = (np.tile(x, n) for x in (told.shift, found.mean, found.predicted))
    shift += apply(told.factor, told.places, eta)
    _, distance = _onward(arrays, replace(found, mean=mean, predicted=predicted), told, shift)
    return arrays.chains(predicted + distance).unflatten(0, (n, space.chains))


@dataclass(frozen=True, eq=False)
class _Forward:
    """The filter's results.

    Attributes:
        places: Which of the matrices a step has.
        covariance: # (B, P, n, n)
        whiten: F½⁻ᵀ. # (B, P, D, D)
        log_root: Logarithms of the diagonal of F½. # (B, D, T)
        predicted: # (B, n, T, M)
        mean: # (B, n, T, M)
    """

    places: Places
    covariance: Floats
    whiten: Floats
    log_root: Floats
    predicted: Floats
    mean: Floats


@dataclass(frozen=True, eq=False)
class _Backward:
    """ε = g − E δ_{t−1} + W η of each step, and what follows of the states.

    Attributes:
        places: Which of the matrices a step has.
        pull: E. # (B, P, k, n)
        factor: W. # (B, P, k, k)
        transition: Φ. # (B, P, n, n)
        noise: C. # (B, P, n, n)
        shift: g. # (B, k, T, M)
        log_determinant: 2 Σ log|U|. # (B,)
    """

    places: Places
    pull: Floats
    factor: Floats
    transition: Floats
    noise: Floats
    shift: Floats
    log_determinant: Floats


def _forward(arrays: Arrays, within: float) -> _Forward:
    """The filter.

    Args:
        arrays: The chains.
        within: When its gains are taken to repeat.
    """
    B, T = arrays.batches, arrays.steps
    n, D = arrays.H.shape[-1], arrays.H.shape[-2]
    k = arrays.G.shape[-1]
    St = np.zeros((B, n, n))
    array = np.zeros((B, n + k + D, D + n))
    upper = np.triu(np.ones((D + n, D + n)))
    place, steps, found = np.empty(T, np.int64), [], []
    steady, alike = False, arrays.alike
    for t in range(T):
        if not (steady and alike[t]):
            if not alike[t]:
                u, v = arrays.dynamics[t], arrays.measurement[t]
                H = arrays.loading(t)
                to = np.concatenate([_t(H), np.broadcast_to(np.eye(n), (len(H), n, n))], -1)
                move, array[:, n : n + k] = _t(arrays.A[:, u]) @ to, _t(arrays.G[:, u]) @ to
                array[:, n + k :, :D] = arrays.deviation[:, v, :, None] * np.eye(D)
            array[:, :n] = St @ move
            triangle = _reflected(array)[:, : D + n] * upper
            triangle *= np.copysign(1.0, triangle.diagonal(axis1=-2, axis2=-1))[..., None]
            new = triangle[:, D:, D:]
            steady = alike[t] and t % 2 == 0 and _settled(new, St, within)
            St = new
            found.append(triangle)
            steps.append(t)
        place[t] = len(found) - 1
    places = Places(place, np.asarray(steps))
    triangles = np.stack(found, 1)
    root, roots = triangles[..., D:, D:], triangles[..., :D, :D]
    whiten = _t(cast(Floats, np.linalg.inv(roots)))
    K = _t(triangles[..., :D, D:]) @ whiten
    keep = np.eye(n) - K @ arrays.loadings(places.step)
    mean = apply(keep, places, arrays.drift) + apply(K, places, arrays.value)
    mean = scanned(keep @ arrays.A[:, arrays.dynamics[places.step]], places, mean)
    predicted = arrays.moved(mean) + arrays.drift
    log_root = np.log(roots.diagonal(axis1=-2, axis2=-1))[:, place].swapaxes(-1, -2)
    return _Forward(places, _t(root) @ root, whiten, log_root, predicted, mean)


def _predicted_covariances(arrays: Arrays, found: _Forward) -> Floats:
    """A P A' + G G'. # (B, T, n, n)"""
    noise = (arrays.G @ _t(arrays.G))[:, arrays.dynamics]
    A = arrays.A[:, arrays.dynamics[1:]]
    moved = A @ found.covariance[:, found.places.of[:-1]] @ _t(A)
    out = np.array(np.broadcast_to(noise, (arrays.batches, *noise.shape[1:])))
    out[:, 1:] += (moved + _t(moved)) / 2
    return out


def _backward(arrays: Arrays, found: _Forward) -> _Backward:
    """The noises of each step given the state before and all data."""
    B, T = arrays.batches, arrays.steps
    n, D = arrays.H.shape[-1], arrays.H.shape[-2]
    k = arrays.G.shape[-1]
    R = np.zeros((B, n, n))
    # The last columns are turned by the reflections of the first.
    array = np.zeros((B, D + n + k, k + n + D + n))
    array[:, D + n :, :k] = np.eye(k)
    array[:, : D + n, k + n :] = np.eye(D + n)
    upper = np.triu(np.ones((k + n, k + n + D + n)))
    upper[:, k + n :] = 1.0
    place, steps, parts = np.empty(T, np.int64), [], []
    steady, same = False, arrays.alike
    for t in range(T - 1, -1, -1):
        alike = 0 < t < T - 1 and same[t + 1]
        if not (steady and alike):
            if not alike:
                u, v = arrays.dynamics[t], arrays.measurement[t]
                A = arrays.A[:, u] if t else np.zeros_like(arrays.A[:, u])
                shape = max(len(A), len(arrays.G)), n
                both = np.empty((*shape, k + n))
                both[..., :k], both[..., k:] = arrays.G[:, u], A
                rows = arrays.loading(t) / arrays.deviation[:, v, :, None]
                array[:, :D, : k + n] = rows @ both
            array[:, D : D + n, : k + n] = R @ both
            triangle = _reflected(array)[:, : k + n] * upper
            triangle *= np.copysign(1.0, triangle.diagonal(axis1=-2, axis2=-1))[..., None]
            new = triangle[:, k:, k : k + n]
            parts.append((triangle, R))
            steps.append(t)
            steady = alike and t % 2 == 0 and _settled(new, R)
            R = new
        place[t] = len(parts) - 1
    places = Places(place, np.asarray(steps))
    triangles, before = (np.stack(x, 1) for x in zip(*parts, strict=True))
    own = arrays.dynamics[places.step]
    G, U = arrays.G[:, own], triangles[..., :k, :k]
    W = cast(Floats, np.linalg.inv(U))
    E, J = W @ triangles[..., :k, k : k + n], G @ W
    transition = np.where((places.step > 0)[:, None, None], arrays.A[:, own] - G @ E, 0.0)
    size = 2 * np.log(U.diagonal(axis1=-2, axis2=-1)).sum(-1)[:, place].sum(1)
    turn = triangles[..., k + n :]
    # told = (v/s, ζ + R (E[x | y_{≤t}] − E[x | y_{<t}])); ζ comes from the step after.
    told = np.empty((B, D + n, *arrays.value.shape[2:]))
    told[:, :D] = arrays.errors(found.predicted) / arrays.s[..., None]
    told[:, D:] = apply(before, places, found.mean - found.predicted)
    ahead = turn[..., k:, :]
    zeta = np.ascontiguousarray(apply(ahead, places, told)[:, :, ::-1])
    zeta = scanned(ahead[..., D:], places.reversed, zeta)[:, :, ::-1]
    told[:, D:, :-1] += zeta[:, :, 1:]
    shift = apply(W @ turn[..., :k, :], places, told)
    return _Backward(places, E, W, transition, J @ _t(J), shift, size)


def _onward(
    arrays: Arrays, found: _Forward, told: _Backward, shift: Floats
) -> tuple[Floats, Floats]:
    """ε # (B, k, T, M), and the states' distances from their predictions # (B, n, T, M)."""
    gained = found.mean - found.predicted
    delta = apply(arrays.G, arrays.of_dynamics, shift) - gained
    delta = scanned(told.transition, told.places, delta)
    before = np.zeros_like(delta)
    before[:, :, 1:] = delta[:, :, :-1]
    return shift - apply(told.pull, told.places, before), delta + gained


def _covariances(told: _Backward) -> tuple[Floats, Ints]:
    """The different ones of Cov(x_t | y), and which each step has. # (B, P, n, n), (T,)"""
    P = np.zeros_like(told.noise[:, 0])
    place = told.places.of
    out: list[Floats] = []
    which = np.empty(len(place), np.int64)
    for start, end, same in told.places.runs:
        for t in range(start, end):
            F = told.transition[:, place[t]]
            new = F @ P @ _t(F)
            new = (new + _t(new)) / 2 + told.noise[:, place[t]]
            steady = same and t % 2 == 0 and _settled(new, P)
            which[t] = len(out)
            out.append(new)
            P = new
            if steady:
                which[t:end] = which[t]
                break
    return np.stack(out, 1), which


def _t(x: Floats) -> Floats:
    """The transpose."""
    return x.swapaxes(-1, -2)


def _reflected(x: Floats) -> Floats:
    """Columns after reflections of the first ones; what is below the diagonal is not set to zero.

    Numpy's own zeros take longer than the reflections.
    """
    found, _ = np.linalg.qr(x, mode="raw")
    return _t(cast(Floats, found))


def _settled(new: Floats, old: Floats, within: float = _SAME) -> bool:
    """Whether a matrix is as before, row by row."""
    size = np.abs(new)
    limit = within * (size.max(-1, keepdims=True) + 1e-2 * size.max())
    return bool((np.abs(new - old) <= limit).all())
