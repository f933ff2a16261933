"""The means of chains whose steps are alike, by sums along all steps with one matrix.

See `kalman_alike` for what they are and for the letters.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pyro_em.posteriors.filters.alike_steady import End, Numbers, Steady, along
from pyro_em.posteriors.filters.constant_scans import ConstantScans

_Floats = NDArray[np.float64]

_FAR = 1e-11  # errors of means, in standard deviations, for which they are found once more
_LOST = 1e-6  # those that doing so may leave, as data are rounded where they lie
_SHORT = 8  # numbers of a row that is short
_ROOM = 1 << 14  # numbers of chains whose means are found together


def means_of(numbers: Numbers, steady: Steady, end: End) -> tuple[_Floats, _Floats, _Floats] | None:
    """States # (chains, T, n), G ε # (chains, T, n) and the squares of all noises # (chains,)."""
    (chains, T, D), n = numbers.value.shape, len(numbers.A)
    scans = ConstantScans(steady.powers, T, steady.reach)
    many = max(1, _ROOM // (T * max(n, D)))
    if chains <= many:
        return _of_few(numbers, steady, end, scans)
    states, disturbance = np.empty((2, chains, T, n))
    squares = np.empty(chains)
    for start in range(0, chains, many):
        here = slice(start, start + many)
        drift = numbers.drift if len(numbers.drift) == 1 else numbers.drift[here]
        own = numbers._replace(value=numbers.value[here], drift=drift)
        found = _of_few(own, steady, end, scans)
        if found is None:
            return None
        states[here], disturbance[here], squares[here] = found
    return states, disturbance, squares


def _of_few(
    numbers: Numbers, steady: Steady, end: End, scans: ConstantScans
) -> tuple[_Floats, _Floats, _Floats] | None:
    """The same of chains whose numbers stay in the processor's memory."""
    A, G, first_G = numbers.A, numbers.G[0], numbers.G[1]
    y, drift = numbers.value, numbers.drift
    told, states, own = _found(numbers, steady, end, scans, y, drift, None)
    rows, first, whole = states.reshape(-1, len(A)), own, states
    spread = np.maximum(steady.covariance.diagonal(), 1e-300)
    each = 1e-32 * (end.loss * steady.back) ** 2 / len(rows)
    error = each * float(np.vdot(rows, rows)) / min(spread.tolist())
    if error > _FAR**2:  # of each number by itself, as their units differ
        error = each * max((rows.T.dot(rows).diagonal() / spread).tolist())
    error = math.sqrt(error)
    if not error <= _LOST * steady.back:
        return None
    if error > _FAR:
        # From the means on; the first state's noise may be so wide that it is no small distance.
        states[:, 0] = drift[:, 0] + own @ first_G.T
        gained = drift - states
        gained[:, 1:] += states[:, :-1] @ A.T
        gained[:, 0] = 0.0
        y = y - states @ numbers.loading.T
        told, states, own = _found(numbers, steady, end, scans, y, gained, own)
        first, whole = first + own, whole + states
    epsilon = _product(told, steady.gain)
    epsilon[:, 1:] -= _product(states, steady.pull)[:, :-1]
    epsilon[:, 0] = first
    disturbance = _product(epsilon, _turned(G))
    disturbance[:, 0] = first @ first_G.T
    left = _product(states, _turned(numbers.loading))
    left = _scaled(np.subtract(y, left, out=left), numbers.precise)
    return whole, disturbance, _squares(epsilon) + _squares(left)


def _found(
    numbers: Numbers,
    steady: Steady,
    end: End,
    scans: ConstantScans,
    y: _Floats,
    drift: _Floats,
    near: _Floats | None,
) -> tuple[_Floats, _Floats, _Floats]:
    """l and the means, # (chains, T, n) each, and ε of the first step # (chains, k).

    Args:
        numbers: The chains.
        steady: The steps as if data followed.
        end: That none follow.
        scans: Sums with F.
        y: # (chains, T, D)
        drift: a. # (chains|1, T, n)
        near: What ε of the first step is measured from; None for zero. # (chains, k)
    """
    chains, T, _ = y.shape
    n, P, first = len(numbers.A), steady.covariance, numbers.G[1]
    moves = bool(np.vdot(drift, drift) != 0.0)  # so do numbers that are none
    told = np.zeros((chains, scans.steps, n))
    np.matmul(y, numbers.H * numbers.precise[:, None], out=told[:, :T])
    if moves:
        told[:, :T] -= drift @ steady.information
    told = scans.backward(told)
    states = _product(told, steady.noise)
    states[:, 0] = _first(numbers, steady, told, near) @ first.T
    if moves:
        states[:, :T] += drift
    states = scans.forward(states)
    # What was supposed of the last state is taken back.
    told, states = told[:, :T], states[:, :T]
    pull = states[:, -1].dot(end.M)
    more = pull.dot(end.toward).reshape(chains, -1, n)
    many = more.shape[1]
    told[:, T - many :] += more
    if steady.back < T:
        states[:, T - many :] += _product(more, P)
    else:
        own = along(steady, np.arange(T - many, T))
        states[:, T - many :] += (more.swapaxes(0, 1) @ own).swapaxes(0, 1)
    return told, states, _first(numbers, steady, told, near)


def _first(numbers: Numbers, steady: Steady, told: _Floats, near: _Floats | None) -> _Floats:
    """ε of the first step, from what it is measured from. # (chains, k)"""
    pull = told[:, 0].dot(numbers.G[1])
    return (pull if near is None else pull - near).dot(steady.first)


def _turned(x: _Floats) -> _Floats:
    """The transpose, its rows beside each other in memory: products with it are twice as quick."""
    return np.ascontiguousarray(x.T)


def _scaled(x: _Floats, by: _Floats) -> _Floats:
    """Columns times numbers; short rows are quicker as a product of matrices."""
    return _product(x, np.diag(by)) if len(by) <= _SHORT else x * by


def _product(x: _Floats, by: _Floats) -> _Floats:
    """Of all rows at once. # (chains, T, ·)"""
    return x.reshape(-1, len(by)).dot(by).reshape(*x.shape[:-1], by.shape[1])


def _squares(x: _Floats) -> _Floats:
    """Sums over numbers and steps. # (chains,)"""
    flat = x.reshape(len(x), -1)
    return np.array([np.vdot(flat, flat)]) if len(x) == 1 else np.einsum("ij,ij->i", flat, flat)
