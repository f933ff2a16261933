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

What depends on no data is computed until it repeats. The smoother needs no filter: states are measured
from zero, and where data are far from it from what is found so, once more.

Chains whose steps are all alike have a quicker smoother where no digits are lost by it: `kalman_alike`.

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

from pyro_em.posteriors.filters import kalman_alike
from pyro_em.posteriors.filters.kalman_arrays import FAR, Arrays, Floats, Places, apply, columns
from pyro_em.posteriors.filters.kalman_recursions import (
    Reflections,
    covariances,
    is_same,
    next_look,
    scanned,
)
from pyro_em.posteriors.filters.state_space import Filtered, Smoothed, StateSpace


def filtered(space: StateSpace) -> Filtered:
    """See `pyro_em.posteriors.filters.kalman.filtered`.

    Args:
        space: The chains, on the CPU.
    """
    arrays = Arrays.of(space)
    found = _forward(arrays)
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
    """See `pyro_em.posteriors.filters.kalman.smoothed`.

    Args:
        space: The chains, on the CPU.
    """
    alike = kalman_alike.smoothed(space)
    if alike is not None:
        return alike
    arrays = Arrays.of(space)
    told = _backward(arrays)
    near = _near(arrays, told)
    delta, epsilon = _onward(arrays, told, near, _shift(arrays, told, near))
    nats = math.log(2 * math.pi) + 2 * arrays.log_deviation
    squares = _squares(epsilon) + _squares(near.left(delta))
    sizes = told.log_determinant + (nats * arrays.counted).sum((1, 2))
    found, which = covariances(told.transition, told.noise, told.places)
    B, place = arrays.batches, torch.from_numpy(told.places.of)
    return Smoothed(
        arrays.chains(-0.5 * (squares + sizes[:, None])),
        torch.from_numpy(told.log_determinant),
        arrays.chains(near.moved(delta)),
        arrays.chains(apply(arrays.G, arrays.of_dynamics, epsilon)),
        torch.from_numpy(found),
        torch.from_numpy(which).expand(B, -1),
        torch.from_numpy(told.transition),
        torch.from_numpy(told.noise),
        place.expand(B, -1),
    )


def log_evidence(space: StateSpace) -> Tensor:
    """See `pyro_em.posteriors.filters.kalman.log_evidence`.

    Args:
        space: The chains, on the CPU.
    """
    return smoothed(space).log_evidence


def sampled(space: StateSpace, normal: Tensor) -> Tensor:
    """See `pyro_em.posteriors.filters.kalman.sampled`.

    Args:
        space: The chains, on the CPU.
        normal: Standard normal numbers. # (draws, chains, T, k)
    """
    arrays = Arrays.of(space)
    told = _backward(arrays)
    near = _near(arrays, told)
    # Draws are columns too, with the chains inside them.
    z, n = normal.numpy(), len(normal)
    if arrays.batches == 1:
        eta = columns(z.reshape(n * space.chains, *z.shape[2:]), 1)
    else:
        eta = np.ascontiguousarray(z.transpose(1, 3, 2, 0))
    shift = np.tile(_shift(arrays, told, near), n) + apply(told.factor, told.places, eta)
    near = near.tiled(n)
    delta, _ = _onward(arrays, told, near, shift)
    return arrays.chains(near.moved(delta)).unflatten(0, (n, space.chains))


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
        before: R of what is later than a step. # (B, P, n, n)
        turn: From the numbers of H/s and R to g and ζ. # (B, P, k + n, D + n)
        pull: E. # (B, P, k, n)
        factor: W. # (B, P, k, k)
        transition: Φ. # (B, P, n, n)
        noise: C. # (B, P, n, n)
        log_determinant: 2 Σ log|U|. # (B,)
    """

    places: Places
    before: Floats
    turn: Floats
    pull: Floats
    factor: Floats
    transition: Floats
    noise: Floats
    log_determinant: Floats


@dataclass(frozen=True, eq=False)
class _Near:
    """What states are measured from.

    Attributes:
        arrays: The chains.
        states: m; None for zero. # (B, n, T, M)
        gained: m − (A m before + a); None for zero. # (B|1, n, T, M|1)
        errors: (y − H (A m before + a)) / s. # (B, D, T, M)
    """

    arrays: Arrays
    states: Floats | None
    gained: Floats | None
    errors: Floats

    @classmethod
    def of(cls, arrays: Arrays, states: Floats | None) -> _Near:
        """From the states, or zero."""
        drift: Floats | None = arrays.drift if arrays.drift.any() else None
        if states is None:
            gained, errors = None if drift is None else -drift, arrays.value
            if drift is not None:
                errors = arrays.errors(drift)
        else:
            predicted = arrays.moved(states)
            if drift is not None:
                predicted += drift
            gained, errors = states - predicted, arrays.errors(predicted)
        return cls(arrays, states, gained, errors / arrays.s[..., None])

    def moved(self, delta: Floats) -> Floats:
        """States that are so far from m. # (B, n, T, M)"""
        return delta if self.states is None else self.states + delta

    def left(self, delta: Floats) -> Floats:
        """(y − H x) / s of these states. # (B, D, T, M)"""
        s = self.arrays.s[..., None]
        if self.states is None or self.gained is None:
            return self.arrays.errors(delta) / s
        return self.errors - self.arrays.expected(delta + self.gained) / s

    def tiled(self, n: int) -> _Near:
        """The same for chains n times."""
        states = None if self.states is None else np.tile(self.states, n)
        gained = self.gained
        if gained is not None and gained.shape[-1] > 1:
            gained = np.tile(gained, n)
        return replace(self, states=states, gained=gained)


def _forward(arrays: Arrays) -> _Forward:
    """The filter."""
    B, T = arrays.batches, arrays.steps
    n, D = arrays.H.shape[-1], arrays.H.shape[-2]
    k = arrays.G.shape[-1]
    St = np.zeros((B, n, n))
    array = np.zeros((B, n + k + D, D + n))
    upper = np.triu(np.ones((D + n, D + n)))
    place, steps, found = np.empty(T, np.int64), [], []
    for start, end in arrays.stretches:
        u, v = arrays.dynamics[start], arrays.measurement[start]
        H = arrays.loading(start)
        to = np.concatenate([_t(H), np.broadcast_to(np.eye(n), (len(H), n, n))], -1)
        move, array[:, n : n + k] = _t(arrays.A[:, u]) @ to, _t(arrays.G[:, u]) @ to
        array[:, n + k :, :D] = arrays.deviation[:, v, :, None] * np.eye(D)
        last, look = St, 8
        for t in range(start, end):
            array[:, :n] = St @ move
            triangle = _reflected(array)[:, : D + n] * upper
            triangle *= np.copysign(1.0, triangle.diagonal(axis1=-2, axis2=-1))[..., None]
            St = triangle[:, D:, D:]
            found.append(triangle)
            steps.append(t)
            place[t] = len(found) - 1
            if t - start == look:
                if is_same(St, last):
                    place[t:end] = len(found) - 1
                    break
                last, look = St, next_look(look)
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


def _near(arrays: Arrays, told: _Backward) -> _Near:
    """Zero; where data are far from it, what is found from there."""
    zero = _Near.of(arrays, None)
    if np.abs(zero.errors).max(initial=0.0) <= FAR:
        return zero
    delta, _ = _onward(arrays, told, zero, _shift(arrays, told, zero))
    return _Near.of(arrays, delta)


def _backward(arrays: Arrays) -> _Backward:
    """The noises of each step given the state before and all data: what does not depend on data."""
    B, T = arrays.batches, arrays.steps
    n, k = arrays.G.shape[-2:]
    place, steps, count = np.empty(T, np.int64), [], 0
    rows, turned, R = list[Floats](), list[Floats](), np.zeros((B, n, n))
    reflections = Reflections(B, n, k, arrays.H.shape[-2])
    for start, end in reversed(arrays.stretches):
        u, v = arrays.dynamics[start], arrays.measurement[start]
        G, A = arrays.G[:, u], arrays.A[:, u]
        both = np.zeros((max(len(G), len(A)), n, k + n))
        both[..., :k] = G
        if start:
            both[..., k:] = A
        H = arrays.loading(start) / arrays.deviation[:, v, :, None]
        before, found, R = reflections.of_run(both, H, R, end - start)
        rows += before
        turned += found
        many, count = len(found), count + len(found)
        place[end - many : end] = np.arange(count - 1, count - 1 - many, -1)
        place[start : end - many] = count - 1
        steps.append(np.arange(end - 1, end - 1 - many, -1))
    places = Places(place, np.concatenate(steps))
    every = _t(np.stack(turned, 1))[..., : k + n, :]
    sign = np.copysign(1.0, every.diagonal(0, -2, -1))[..., None]
    U, V = (
        every[..., :k, :k] * sign[..., :k, :] * np.tri(k).T,
        every[..., :k, k : k + n] * sign[..., :k, :],
    )
    turn = np.ascontiguousarray(every[..., k + n :]) * sign
    W = cast(Floats, np.linalg.inv(U))
    turn[..., :k, :] = W @ turn[..., :k, :]
    G, E = arrays.G[:, arrays.dynamics[places.step]], W @ V
    A = arrays.A[:, arrays.dynamics[places.step]]
    A[:, -1] = 0.0  # of the first step
    J = G @ W
    sizes = 2 * np.log(U.diagonal(0, -2, -1)).sum(-1)
    size = (sizes * np.bincount(place, minlength=count)).sum(-1)
    return _Backward(places, np.stack(rows, 1), turn, E, W, A - G @ E, J @ _t(J), size)


def _shift(arrays: Arrays, told: _Backward, near: _Near) -> Floats:
    """g of each step. # (B, k, T, M)"""
    k, D = told.factor.shape[-1], near.errors.shape[1]
    later = told.turn[..., D:]
    both = apply(told.turn[..., :D], told.places, near.errors)
    if near.gained is not None:
        both += apply(later @ told.before, told.places, near.gained)
    shift = both[:, :k]
    zeta = np.ascontiguousarray(both[:, k:, ::-1])
    zeta = scanned(later[..., k:, :], told.places.reversed, zeta)
    after = np.zeros_like(zeta)
    after[:, :, :-1] = zeta[:, :, -2::-1]
    return shift + apply(later[..., :k, :], told.places, after)


def _onward(arrays: Arrays, told: _Backward, near: _Near, shift: Floats) -> tuple[Floats, Floats]:
    """The states' distances from m # (B, n, T, M), and ε # (B, k, T, M)."""
    delta = apply(arrays.G, arrays.of_dynamics, shift)
    if near.gained is not None:
        delta -= near.gained
    delta = scanned(told.transition, told.places, delta)
    before = np.zeros_like(delta)
    before[:, :, 1:] = delta[:, :, :-1]
    epsilon = shift - apply(told.pull, told.places, before)
    return delta, epsilon


def _squares(x: Floats) -> Floats:
    """Sums over numbers and steps. # (B, M)"""
    return np.einsum("bitm,bitm->bm", x, x)


def _t(x: Floats) -> Floats:
    """The transpose."""
    return x.swapaxes(-1, -2)


def _reflected(x: Floats) -> Floats:
    """Columns after reflections of the first ones; what is below the diagonal is not set to zero.

    Numpy's own zeros take longer than the reflections.
    """
    found, _ = np.linalg.qr(x, mode="raw")
    return _t(cast(Floats, found))
