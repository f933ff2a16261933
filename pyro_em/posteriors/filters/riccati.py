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


def endless(A: _Floats, Q: _Floats, J: _Floats, eye: _Floats) -> Endless | None:
    """Λ = J + A' Λ (I + Q Λ)⁻¹ A and Y = Q + A Y (I + J Y)⁻¹ A'.

    Args:
        A: Of x_t = A x_{t−1} + noise. # (n, n)
        Q: The noise's covariance. # (n, n)
        J: H' R⁻¹ H of the data. # (n, n)
        eye: I. # (n, n)

    Returns:
        None if they are not reached. They are not exact: a step of the recursion shows how near they
        are.

    Raises:
        numpy.linalg.LinAlgError: If numbers overflow on the way.

    Example:
        >>> one = np.ones((1, 1))
        >>> endless(one, one, one, one).information.round(4)  # the golden ratio
        array([[1.618]])
    """
    n = len(A)
    both, information = np.concatenate((A, Q), 1), J  # A and Y side by side
    A, Y = both[:, :n], both[:, n:]
    for count in range(1, _MOST + 1):
        matrix = Y.dot(information)
        matrix += eye
        solved = np.linalg.solve(matrix, both)
        more = A.T.dot(information.dot(solved[:, :n]))
        both = A.dot(solved)
        wider = both[:, n:].dot(A.T)
        information, Y = information + more, np.add(Y, wider, out=both[:, n:])
        A = both[:, :n]
        # In what has no units: how much more all states together would be known.
        if (
            np.vdot(more, Y) <= _NEAR
            and np.vdot(wider, information) <= _NEAR
            and bool((more.diagonal() <= _NEAR * information.diagonal()).all())
        ):
            return Endless(information, Y, count)
    return None
