"""The E-step of chains whose steps are alike, all of one length, as arrays.

See `kalman_alike` for the equations and for the letters.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pyro_em.posteriors.filters.alike_means import means_of
from pyro_em.posteriors.filters.alike_steady import End, Numbers, Steady
from pyro_em.posteriors.filters.state_space import SmoothedArrays

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int32]


def arrays_of(numbers: Numbers, steady: Steady) -> SmoothedArrays | None:
    """What `Smoothed` holds; None where digits would be lost.

    Args:
        numbers: The chains.
        steady: Their steps as if data followed.
    """
    end = End.of(numbers, steady)
    means = None if end is None else means_of(numbers, steady, end)
    if end is None or means is None:
        return None
    states, disturbances, squares = means
    T, size = numbers.steps, end.log_determinant
    precise = sum(map(math.log, numbers.precise.tolist()))
    nats = T * (len(numbers.H) * math.log(2 * math.pi) - 2 * precise)
    found = -0.5 * (squares + (size + nats))
    covariances = _covariances(T, steady, end)
    return SmoothedArrays(found, np.array([size]), states, disturbances, *covariances)


def _covariances(
    T: int, steady: Steady, end: End
) -> tuple[_Floats, _Ints, _Floats, _Floats, _Ints]:
    """The different covariances, transitions and noises, and which of them each step has."""
    F, C, P, back = steady.transition, steady.noise, steady.covariance, steady.back
    n, many, last = len(F), min(steady.fore + 1, T - back), min(back, T - 1)
    powers = steady.powers[: last + 1]
    moved = powers.reshape(-1, n).dot(P).reshape(powers.shape)  # Fᵏ P
    toward = moved[:back] if back < T else powers @ end.covariances
    covariance = np.empty((1, many + back, n, n))
    covariance[0, :many] = steady.covariances[:many]
    np.add(end.covariances, _t(toward) @ (end.M @ toward), out=covariance[0, many:][::-1])
    (which, kind), order = np.empty((2, 1, T), np.int32), np.arange(many + back + 2)
    which[0, :many], which[0, many : T - back] = order[:many], many - 1
    which[0, T - back :] = order[many : many + back]
    kind[0, 0], kind[0, 1 : T - last], kind[0, T - last :] = 0, 1, order[2 : last + 2]
    # As C + … + Fᵏ C F'ᵏ = P − Fᵏ⁺¹ P F'ᵏ⁺¹, what is inverted is that of M, and the second of them.
    M, here = steady.end, powers[:last]
    left = M @ (moved[1:] @ np.ascontiguousarray(_t(powers[1:])))
    left += powers[0]
    toward = here.reshape(-1, n).dot(C).reshape(here.shape)
    change = (_t(toward) @ (np.linalg.solve(left, M) @ here)).reshape(-1, n)
    transition, noise = np.empty((2, 1, last + 2, n, n))
    transition[0, 0], transition[0, 1], noise[0, 0], noise[0, 1] = 0.0, F, covariance[0, 0], C
    np.add(F, change.dot(F).reshape(last, n, n)[::-1], out=transition[0, 2:])
    np.add(C, change.dot(C).reshape(last, n, n)[::-1], out=noise[0, 2:])
    return covariance, which, transition, noise, kind


def _t(x: _Floats) -> _Floats:
    """The transpose."""
    return x.swapaxes(-1, -2)
