"""What endless data of like steps say of a state: the fixed point of a Riccati recursion, by doubling.

Source: Chu, Fan, Lin and Wang (2004), "Structure-preserving algorithms for periodic discrete-time
algebraic Riccati equations", International Journal of Control 77.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]

_MOST = 30  # doublings
_NEAR = 1e-9  # what the next doubling changes is the square of what this one did


class Endless(NamedTuple):
    """The fixed points of both recursions.

    Attributes:
        information: Λ of a state from its own data and all later ones. # (n, n)
        covariance: Y of a state given all earlier data. # (n, n)
        doublings: How many were needed; 2 to the power of it are steps enough.
    """

    information: _Floats
    covariance: _Floats
    doublings: int


def endless(A: _Floats, Q: _Floats, J: _Floats) -> Endless | None:
    """Λ = J + A' Λ (I + Q Λ)⁻¹ A and Y = Q + A Y (I + J Y)⁻¹ A'.

    Args:
        A: Of x_t = A x_{t−1} + noise. # (n, n)
        Q: The noise's covariance. # (n, n)
        J: H' R⁻¹ H of the data. # (n, n)

    Returns:
        None if they are not reached. They are not exact: a step of the recursion shows how near they
        are.

    Raises:
        numpy.linalg.LinAlgError: If numbers overflow on the way.

    Example:
        >>> one = np.ones((1, 1))
        >>> endless(one, one, one).information.round(4)  # the golden ratio
        array([[1.618]])
    """
    n = len(A)
    eye, both = np.eye(n), np.empty((n, 2 * n))
    Y, information = Q, J
    for count in range(1, _MOST + 1):
        both[:, :n], both[:, n:] = A, Y
        solved = np.linalg.solve(eye + Y.dot(information), both)
        moved = solved[:, :n]
        more = A.T.dot(information.dot(moved))
        wider = A.dot(solved[:, n:]).dot(A.T)
        A, information, Y = A.dot(moved), information + more, Y + wider
        # In what has no units: how much more all states together would be known.
        if np.vdot(more, Y) + np.vdot(wider, information) <= _NEAR and bool(
            (more.diagonal() <= _NEAR * information.diagonal()).all()
        ):
            return Endless((information + information.T) / 2, (Y + Y.T) / 2, count)
    return None
