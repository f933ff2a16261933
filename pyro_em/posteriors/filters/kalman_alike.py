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
more. States after the last data are predicted. Errors are those of rounding times the precision of
data beside what is known without them: only chains with little of it are solved here. Means far from
zero are found from what is found first, once more.
"""

from __future__ import annotations

import numpy as np

from pyro_em.posteriors.filters.alike_lengths import arrays_of_lengths
from pyro_em.posteriors.filters.alike_steady import Numbers, Steady
from pyro_em.posteriors.filters.state_space import Smoothed, StateSpace


def smoothed(space: StateSpace) -> Smoothed | None:
    """See `pyro_em.posteriors.filters.kalman.smoothed`.

    Args:
        space: The chains, on the CPU.

    Returns:
        None where steps differ, something is missing before a chain's last datum, or digits would be
        lost.
    """
    numbers = Numbers.of(space)
    if numbers is None:
        return None
    with np.errstate(all="ignore"):
        try:
            steady = Steady.of(numbers)
            found = None if steady is None else arrays_of_lengths(numbers, steady)
        except ValueError:  # numpy.linalg.LinAlgError is one; the logarithm of zero is another
            return None
    return None if found is None else found.tensors
