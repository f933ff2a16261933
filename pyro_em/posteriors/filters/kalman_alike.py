"""The smoother of long chains whose steps are all alike, in closed form: no step is computed by itself.

Let N be what an endless series of later data says of a state. Suppose that N were known of the last
state, too, with a mean of zero. Then no step differs from another: with J = H'R⁻¹H and Q = G G',

    Λ = J + N,   C = (Q⁻¹ + Λ)⁻¹ = G (I + G'ΛG)⁻¹ G',   F = A − CΛA,   N = A'ΛF,

the states given all data are x_t = F x_{t−1} + noise of covariance C, and

    l_t = H'R⁻¹ y_t − Λ a_t + F' l_{t+1},     m_t = F m_{t−1} + a_t + C l_t,     P_t = F P_{t−1} F' + C.

What was supposed is then taken back: with M = (N⁻¹ − P_last)⁻¹ and k steps to the last one,

    covariance   P_t + P_t F'ᵏ M Fᵏ P_t,          mean   m_t + P_t F'ᵏ M m_last,
    noise        C + C L_k C,                     transition   F + C L_k F,
    L_k = F'ᵏ (N⁻¹ − C − F C F' − … − Fᵏ C F'ᵏ)⁻¹ Fᵏ.

In a long series nothing is a difference there: with P what P_t converges to, M is N + N V N for the
V = (P⁻¹ − N)⁻¹ that a state given no later data has, and L_k = F'ᵏ (M⁻¹ + Fᵏ⁺¹ P F'ᵏ⁺¹)⁻¹ Fᵏ.

So all that depends on no data are powers of F, and they tell after how many steps nothing changes any
more. Errors are those of rounding times the precision of data beside what is known without them: only
chains with little of it are solved here. Means far from zero are found from what is found first, once
more.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_em.posteriors.filters.alike_means import means_of
from pyro_em.posteriors.filters.alike_steady import End, Numbers, Steady
from pyro_em.posteriors.filters.state_space import Smoothed, StateSpace

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]


def smoothed(space: StateSpace) -> Smoothed | None:
    """See `pyro_em.posteriors.filters.kalman.smoothed`.

    Args:
        space: The chains, on the CPU.

    Returns:
        None where steps differ, something is missing, or digits would be lost.
    """
    numbers = Numbers.of(space)
    if numbers is None:
        return None
    with np.errstate(all="ignore"):
        try:
            steady = Steady.of(numbers)
            end = None if steady is None else End.of(numbers, steady)
            means = None if steady is None or end is None else means_of(numbers, steady, end)
        except ValueError:  # numpy.linalg.LinAlgError is one; the logarithm of zero is another
            return None
    if steady is None or end is None or means is None:
        return None
    states, disturbances, squares = means
    T, determinant = numbers.steps, end.log_determinant
    nats = T * (len(numbers.H) * math.log(2 * math.pi) - 2 * float(np.log(numbers.precise).sum()))
    found = -0.5 * (squares + (determinant + nats))
    arrays = (found, np.array([determinant]), states, disturbances, *_covariances(T, steady, end))
    return Smoothed(*map(torch.from_numpy, arrays))


def _covariances(T: int, steady: Steady, end: End) -> tuple[_Floats | _Ints, ...]:
    """The different covariances, transitions and noises, and which of them each step has."""
    F, C, P, back = steady.transition, steady.noise, steady.covariance, steady.back
    n, many, last = len(F), min(steady.fore + 1, T - back), min(back, T - 1)
    powers = steady.powers[: last + 1]
    moved = powers.reshape(-1, n).dot(P).reshape(powers.shape)  # Fᵏ P
    toward = moved[:back] if back < T else powers @ end.covariances
    covariance = np.empty((1, many + back, n, n))
    covariance[0, :many] = steady.covariances[:many]
    np.add(end.covariances, _t(toward) @ (end.M @ toward), out=covariance[0, many:][::-1])
    (which, kind), order = np.empty((2, 1, T), np.int64), np.arange(many + back + 2)
    which[0, :many], which[0, many : T - back] = order[:many], many - 1
    which[0, T - back :] = order[many : many + back]
    kind[0, 0], kind[0, 1 : T - last], kind[0, T - last :] = 0, 1, order[2 : last + 2]
    # As C + … + Fᵏ C F'ᵏ = P − Fᵏ⁺¹ P F'ᵏ⁺¹, what is inverted is that of M, and the second of them.
    M, here = steady.end, powers[:last]
    left = (moved[1:] @ _t(powers[1:])).reshape(-1, n).dot(M).reshape(here.shape)
    left += np.eye(n)
    toward = here.reshape(-1, n).dot(C).reshape(here.shape)
    change = (_t(toward) @ (np.linalg.solve(_t(left), M) @ here)).reshape(-1, n)
    transition, noise = np.empty((2, 1, last + 2, n, n))
    transition[0, 0], transition[0, 1], noise[0, 0], noise[0, 1] = 0.0, F, covariance[0, 0], C
    np.add(F, change.dot(F).reshape(last, n, n)[::-1], out=transition[0, 2:])
    np.add(C, change.dot(C).reshape(last, n, n)[::-1], out=noise[0, 2:])
    return covariance, which, transition, noise, kind


def _t(x: _Floats) -> _Floats:
    """The transpose."""
    return x.swapaxes(-1, -2)
