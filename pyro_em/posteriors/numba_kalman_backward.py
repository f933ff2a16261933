"""The noises of Gaussian chains given all data, from the last step on, as compiled loops.

See `pyro_em.posteriors.kalman_steps` for the method.
"""

from __future__ import annotations

import numpy as np

from pyro_em.posteriors.kalman_recursions import SAME
from pyro_em.posteriors.numba_kalman import (
    Work,
    compiled,
    expect,
    is_like,
    next_look,
    reflect,
    settle,
)

HALF_LOG_TWO_PI = 0.5 * np.log(2.0 * np.pi)


@compiled
def _rows(
    X: np.ndarray,
    R: np.ndarray,
    A: np.ndarray,
    G: np.ndarray,
    H: np.ndarray,
    w: np.ndarray,
    seen: np.ndarray,
    moves: bool,
) -> None:
    """The columns of [[H/s; R] G, [H/s; R] A] above the prior's identity."""
    D = len(H)
    n, k = G.shape
    for c in range(k + n):
        column = X[c]
        for i in range(D + n + k):
            column[i] = 0.0
        if c >= k and not moves:
            continue
        for l in range(n):
            by = G[l, c] if c < k else A[l, c - k]
            if by != 0.0:
                for d in range(D):
                    column[d] += H[d, l] * by
                for i in range(l + 1):
                    column[D + i] += R[i, l] * by
        for d in range(D):
            column[d] = column[d] * w[d] if seen[d] else 0.0
        if c < k:
            column[D + n + c] = 1.0


@compiled
def _solve(X: np.ndarray, k: int, column: np.ndarray) -> None:
    """U⁻¹ times a column, in place; U are the first columns of X."""
    for i in range(k - 1, -1, -1):
        total = column[i]
        for l in range(i + 1, k):
            total -= X[l, i] * column[l]
        column[i] = total / X[i, i]


@compiled
def backward(
    A: np.ndarray,
    G: np.ndarray,
    H: np.ndarray,
    w: np.ndarray,
    dynamics: np.ndarray,
    measurement: np.ndarray,
    seen: np.ndarray,
    value: np.ndarray,
    drift: np.ndarray,
    near: np.ndarray,
    pull: np.ndarray,
    factor: np.ndarray,
    shift: np.ndarray,
    place: np.ndarray,
    totals: np.ndarray,
    work: Work,
) -> None:
    """The noises of each step given the state before and all data.

    Args:
        A: # (U, n, n)
        G: # (U, n, k)
        H: # (V, D, n)
        w: 1/s. # (V, D)
        dynamics: # (T,)
        measurement: # (T,)
        seen: Of each step, or of all. # (T|1, D)
        value: # (M, T, D)
        drift: Zero at all other steps. # (M|1, T or fewer, n)
        near: What states are measured from; empty if that is zero. # (M, T, n)
        pull: Where E goes, those that differ one before the other. # (room, k or more, n)
        factor: Where W goes, likewise. # (room, k or more, k or more)
        shift: Where g goes. # (M, T, k)
        place: Where it goes which E and W a step has; the first is -1 if they are too many. # (T,)
        totals: Where 2 Σ log|U| goes, Σ log(√2π s) of all that is seen, and how large whitened data are
            at most. # (3,)
        work: Zeros. # (k + D + 2 n, D + n + k), (n, n), (n, n), (M, D + n), (k + n, D + n), (M, n),
            (2, n)
    """
    M, T, D = value.shape
    n, k = G.shape[1:]
    tall, told, wide = D + n + k, D + n, k + n
    # The data go along as columns if they are few, else the matrix that turns them is kept.
    few = told > M
    X, R, last, data, turn, zeta, both = work
    m, gained = both[0], both[1]
    drifting = T if len(near) > 0 else drift.shape[1]
    steady, kept, last_place, size, sizes = False, False, len(pull), 0.0, 0.0
    own_nats, nats, far = 0.0, 0.0, 0.0
    count, look = 0, 0
    u, v = dynamics[T - 1], measurement[T - 1]
    a, g, h, scale = A[u], G[u], H[v], w[v]  # each look at a part of an array takes time
    for t in range(T - 1, -1, -1):
        here = t if len(seen) > 1 else 0
        alike = t > 0 and t + 1 < T and is_like(dynamics, measurement, seen, t + 1)
        if not alike:
            u, v = dynamics[t], measurement[t]
            a, g, h, scale = A[u], G[u], H[v], w[v]
            own_nats = 0.0
            for d in range(D):
                if seen[here, d]:
                    own_nats += HALF_LOG_TWO_PI - np.log(scale[d])
        nats += own_nats
        known = steady and kept and alike
        if not known:
            last_place -= 1
            if last_place < 0:
                place[0] = -1
                return
        place[t] = last_place
        plain = t >= drifting
        for j in range(M):
            if not plain:
                expect(a, drift, near, j, t, m, gained)
            for d in range(D):
                e = 0.0
                if seen[here, d]:
                    e = value[j, t, d]
                    if not plain:
                        for i in range(n):
                            e -= h[d, i] * m[i]
                data[j, d] = e * scale[d]
                far = max(far, abs(data[j, d]))
            for i in range(n):
                total = zeta[j, i]
                if not plain:
                    for l in range(i, n):
                        total += R[i, l] * gained[l]
                data[j, D + i] = total
        if not known:
            E, W = pull[last_place], factor[last_place]
            _rows(X, R, a, g, h, scale, seen[here], t > 0)
            carry = few and not (steady and alike)
            more = M if carry else told
            for c in range(more):
                column = X[wide + c]
                for i in range(tall):
                    column[i] = 0.0
                if carry:
                    for i in range(told):
                        column[i] = data[c, i]
                else:
                    column[c] = 1.0
            reflect(X, tall, wide, wide + more)
            kept = not carry
            size = 0.0
            for i in range(k):
                size += 2.0 * np.log(X[i, i])
            for c in range(k, wide + more):
                _solve(X, k, X[c])
            for i in range(k):
                for c in range(n):
                    E[i, c] = X[k + c, i]
            for c in range(k):
                for i in range(k):
                    W[i, c] = 0.0
                W[c, c] = 1.0
            for c in range(k):  # columns of U⁻¹
                for i in range(c, -1, -1):
                    total = W[i, c]
                    for l in range(i + 1, c + 1):
                        total -= X[l, i] * W[l, c]
                    W[i, c] = total / X[i, i]
            for i in range(n):
                for c in range(n):
                    R[i, c] = X[k + c, k + i] if c >= i else 0.0
            count = count + 1 if alike else 0
            if count == 0 or count == look:
                steady = settle(R, last, n, SAME) and alike
                look = next_look(count)
            if kept:
                for i in range(wide):
                    for c in range(told):
                        turn[i, c] = X[wide + c, i]
            else:
                for j in range(M):
                    for i in range(k):
                        shift[j, t, i] = X[wide + j, i]
                    for i in range(n):
                        zeta[j, i] = X[wide + j, k + i]
        sizes += size
        if kept:
            for j in range(M):
                for i in range(wide):
                    total = 0.0
                    for c in range(told):
                        total += turn[i, c] * data[j, c]
                    if i < k:
                        shift[j, t, i] = total
                    else:
                        zeta[j, i - k] = total
    totals[0], totals[1], totals[2] = sizes, nats, far
