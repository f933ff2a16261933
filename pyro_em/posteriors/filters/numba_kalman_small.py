"""Means of Gaussian chains along like steps, with states and noises of at most four numbers.

Most series have such states. They stay in one register from a step to the next, so that a step takes as
long as its product with a state does; whatever no later step waits for is computed beside it. What is
missing of four numbers is zero, in matrices and states.
"""

from __future__ import annotations

import numpy as np

from pyro_em.posteriors.filters.numba_fours import (
    apart,
    lane,
    larger,
    load,
    plus,
    plus_product,
    product,
    store,
    times,
)
from pyro_em.posteriors.filters.numba_kalman import inside, inside_in_order

_WORTH = 8  # like steps for which matrices are laid out


@inside
def is_small(D: int, n: int, k: int, steps: int) -> bool:
    """Whether these loops serve so many like steps."""
    return D > 0 and 0 < k <= 4 and n <= 4 and steps >= _WORTH


@inside_in_order
def down_in_fours(
    turn: np.ndarray,
    w: np.ndarray,
    value: np.ndarray,
    shift: np.ndarray,
    zeta: np.ndarray,
    first: int,
    last: int,
    slab: np.ndarray,
) -> float:
    """g and ζ of like steps of a chain from the last one on; return how large whitened data are.

    Args:
        turn: See `pyro_em.posteriors.filters.numba_kalman_backward`. # (…, D + n, 4)
        w: 1/s. # (D,)
        value: # (T, D)
        shift: Where g goes. # (T, k)
        zeta: # (n,)
        first: The first step.
        last: The last one.
        slab: Memory. # (2 D + 10 or more, 4)
    """
    apart()
    D, n, k, far = len(w), len(zeta), shift.shape[1], 0.0
    # From data to g and to ζ, then from ζ to both.
    for c in range(D + 4):
        for i in range(4):
            there = c < D + n
            slab[2 * c, i] = turn[i // 4, c, i % 4] if there and i < k else 0.0
            slab[2 * c + 1, i] = turn[(k + i) // 4, c, (k + i) % 4] if there and i < n else 0.0
    at, end = 2 * D, 2 * D + 8
    for i in range(4):
        slab[end, i] = zeta[i] if i < n else 0.0
        slab[end + 1, i] = 0.0
    z = load(slab, end, 0)
    fours_of_w = w.reshape((1, D))
    g0, g1 = load(slab, at, 0), load(slab, at + 2, 0)
    g2, g3 = load(slab, at + 4, 0), load(slab, at + 6, 0)
    z0, z1 = load(slab, at + 1, 0), load(slab, at + 3, 0)
    z2, z3 = load(slab, at + 5, 0), load(slab, at + 7, 0)
    whole = D - D % 4
    none = load(slab, end + 1, 0)
    most = none
    for t in range(last, first - 1, -1):
        g, y = none, none
        for d in range(0, whole, 4):
            x, i = product(load(value, t, d), load(fours_of_w, 0, d)), 2 * d
            most = larger(most, x)
            a, b, c, e = lane(x, 0), lane(x, 1), lane(x, 2), lane(x, 3)
            g = plus(plus(g, load(slab, i, 0), a), load(slab, i + 2, 0), b)
            g = plus(plus(g, load(slab, i + 4, 0), c), load(slab, i + 6, 0), e)
            y = plus(plus(y, load(slab, i + 1, 0), a), load(slab, i + 3, 0), b)
            y = plus(plus(y, load(slab, i + 5, 0), c), load(slab, i + 7, 0), e)
        for d in range(whole, D):
            x = value[t, d] * w[d]
            far = max(far, abs(x))
            g, y = plus(g, load(slab, 2 * d, 0), x), plus(y, load(slab, 2 * d + 1, 0), x)
        a, b, c, e = lane(z, 0), lane(z, 1), lane(z, 2), lane(z, 3)
        z = plus(plus(plus(y, z0, a), z2, c), plus(times(z1, b), z3, e), 1.0)
        g = plus(plus(plus(plus(g, g0, a), g1, b), g2, c), g3, e)
        if k == 4:
            store(shift, t, 0, g)
        else:
            store(slab, end, 0, g)
            for i in range(k):
                shift[t, i] = slab[end, i]
    store(slab, end, 0, most)
    for i in range(4):
        far = max(far, slab[end, i])
    store(slab, end, 0, z)
    for i in range(n):
        zeta[i] = slab[end, i]
    return far


@inside_in_order
def along_in_fours(
    E: np.ndarray,
    G: np.ndarray,
    F: np.ndarray,
    H: np.ndarray,
    w: np.ndarray,
    value: np.ndarray,
    shift: np.ndarray,
    delta: np.ndarray,
    states: np.ndarray,
    disturbance: np.ndarray,
    first: int,
    end: int,
    slab: np.ndarray,
) -> float:
    """Like steps of a chain without drift; return the squares of their noises.

    With Φ = A − G E a state is Φ x + G g, x the one before: it does not wait for its noise.

    Args:
        E: # (k or more, n)
        G: # (n, k)
        F: Φ. # (n, n)
        H: # (D, n)
        w: 1/s. # (D,)
        value: # (T, D)
        shift: # (T, k)
        delta: The state before the first step, then the last one. # (n,)
        states: # (T, n)
        disturbance: It may be the memory of `shift`. # (T, n)
        first: The first step.
        end: The step after the last.
        slab: Memory. # (2 D + 20 or more, 4)
    """
    apart()
    D, n, k = len(w), len(delta), shift.shape[1]
    more, spare = 12, 16 + 2 * D
    for i in range(spare + 4):
        for c in range(4):
            slab[i, c] = 0.0
    for c in range(n):
        slab[spare, c] = delta[c]
        for i in range(k):
            slab[c, i] = -E[i, c]
        for i in range(n):
            slab[8 + c, i] = F[i, c]
        for d in range(D):
            slab[more + 5 * (d // 4) + c, d % 4] = -H[d, c]
    for d in range(D):
        slab[more + 5 * (d // 4) + 4, d % 4] = w[d]
    for c in range(k):
        for i in range(n):
            slab[4 + c, i] = G[i, c]
    e0, e1, e2, e3 = load(slab, 0, 0), load(slab, 1, 0), load(slab, 2, 0), load(slab, 3, 0)
    g0, g1, g2, g3 = load(slab, 4, 0), load(slab, 5, 0), load(slab, 6, 0), load(slab, 7, 0)
    f0, f1, f2, f3 = load(slab, 8, 0), load(slab, 9, 0), load(slab, 10, 0), load(slab, 11, 0)
    x, squares = load(slab, spare, 0), load(slab, spare + 1, 0)
    for t in range(first, end):
        a, b, c, d = lane(x, 0), lane(x, 1), lane(x, 2), lane(x, 3)
        if k == 4:
            g = load(shift, t, 0)
        else:
            for i in range(k):
                slab[spare + 2, i] = shift[t, i]
            g = load(slab, spare + 2, 0)
        y = times(g0, lane(g, 0))
        y = plus(plus(plus(y, g1, lane(g, 1)), g2, lane(g, 2)), g3, lane(g, 3))
        x = plus(plus(plus(y, f0, a), f2, c), plus(times(f1, b), f3, d), 1.0)
        noise = plus(plus(plus(plus(g, e0, a), e1, b), e2, c), e3, d)
        squares = plus_product(squares, noise, noise)
        y = times(g0, lane(noise, 0))
        y = plus(plus(plus(y, g1, lane(noise, 1)), g2, lane(noise, 2)), g3, lane(noise, 3))
        if n == 4:
            store(states, t, 0, x)
            store(disturbance, t, 0, y)
        else:
            store(slab, spare, 0, x)
            store(slab, spare + 1, 0, y)
            for i in range(n):
                states[t, i] = slab[spare, i]
                disturbance[t, i] = slab[spare + 1, i]
        a, b, c, d = lane(x, 0), lane(x, 1), lane(x, 2), lane(x, 3)
        at = more
        for begin in range(0, D, 4):
            if begin + 4 <= D:
                y = load(value, t, begin)
            else:
                for i in range(D - begin):
                    slab[spare + 3, i] = value[t, begin + i]
                y = load(slab, spare + 3, 0)
            y = plus(plus(y, load(slab, at, 0), a), load(slab, at + 1, 0), b)
            y = plus(plus(y, load(slab, at + 2, 0), c), load(slab, at + 3, 0), d)
            y = product(y, load(slab, at + 4, 0))
            squares = plus_product(squares, y, y)
            at += 5
    store(slab, spare, 0, x)
    store(slab, spare + 1, 0, squares)
    for i in range(n):
        delta[i] = slab[spare, i]
    one = spare + 1
    return (slab[one, 0] + slab[one, 1]) + (slab[one, 2] + slab[one, 3])
