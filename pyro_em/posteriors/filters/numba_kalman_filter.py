"""Kalman's filter as compiled loops: see `pyro_em.posteriors.filters.kalman_steps` for the method.

The filter takes one number of a step after the other, which needs no inverse of their covariance: S
is a lower triangle, of which each number y = h'x + s e changes column by column.

Source: Carlson (1973), "Fast triangular formulation of the square root filter", AIAA Journal 11.
"""

from __future__ import annotations

import numpy as np

from pyro_em.posteriors.filters.kalman_recursions import SAME
from pyro_em.posteriors.filters.numba_kalman import (
    Work,
    compiled,
    copy,
    inside,
    is_like,
    next_look,
    reflect,
    settle,
)


@inside
def _predict(X: np.ndarray, S: np.ndarray, A: np.ndarray, G: np.ndarray) -> None:
    """S becomes the lower triangle of [A S, G]."""
    n, k = G.shape
    for i in range(n):
        for j in range(n):
            total = 0.0
            for l in range(j, n):
                total += A[i, l] * S[l, j]
            X[j, i] = total
        for j in range(k):
            X[n + j, i] = G[i, j]
    reflect(X, n + k, n + k, n, n)
    for i in range(n):
        for j in range(n):
            S[i, j] = X[j, i] if j <= i else 0.0


@inside
def _update(S: np.ndarray, h: np.ndarray, s: float, gain: np.ndarray) -> float:
    """S after one number y = h'x + s e, and its gain; return its variance."""
    n = len(h)
    f = s * s
    for i in range(n):
        gain[i] = 0.0
    for j in range(n - 1, -1, -1):
        phi = 0.0
        for i in range(j, n):
            phi += h[i] * S[i, j]
        more = f + phi * phi
        b, c = np.sqrt(f / more), phi / (np.sqrt(f) * np.sqrt(more))
        for i in range(j, n):
            was = S[i, j]
            S[i, j] = b * was - c * gain[i]
            gain[i] += phi * was
        f = more
    for i in range(n):
        gain[i] /= f
    return f


@inside
def _square(S: np.ndarray, P: np.ndarray) -> None:
    """P = S S' of a lower triangle."""
    n = len(S)
    for i in range(n):
        for j in range(i + 1):
            total = 0.0
            for l in range(j + 1):
                total += S[i, l] * S[j, l]
            P[i, j] = total
            P[j, i] = total


@compiled
def forward(
    A: np.ndarray,
    G: np.ndarray,
    H: np.ndarray,
    s: np.ndarray,
    dynamics: np.ndarray,
    measurement: np.ndarray,
    seen: np.ndarray,
    value: np.ndarray,
    drift: np.ndarray,
    predicted: np.ndarray,
    mean: np.ndarray,
    evidence: np.ndarray,
    determinant: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    work: Work,
) -> None:
    """The filter of chains that share their matrices.

    Args:
        A: # (U, n, n)
        G: # (U, n, k)
        H: # (V, D, n)
        s: # (V, D)
        dynamics: # (T,)
        measurement: # (T,)
        seen: Of each step, or of all. # (T|1, D)
        value: # (M, T, D)
        drift: Zero at all other steps. # (M|1, T or fewer, n)
        predicted: Where predicted means go. # (M, T, n)
        mean: Where filtered means go. # (M, T, n)
        evidence: Where nats go. # (M, T)
        determinant: Where the steps' log determinants go. # (T,)
        before: Where predicted covariances go. # (T, n, n)
        after: Where filtered covariances go. # (T, n, n)
        work: Zeros. # (n + k, n + 3), (n, n), (n, n), (D, n), (M, n), (2, max(n, D))
    """
    M, T, D = value.shape
    n = A.shape[-1]
    X, S, last, gain, m, both = work
    f, moved = both[0], both[1]
    size, ratio = 0.0, 0.0
    steady, known, count, look = False, False, 0, 0
    for t in range(T):
        u, v = dynamics[t], measurement[t]
        here = t if len(seen) > 1 else 0
        alike = is_like(dynamics, measurement, seen, t)
        known = steady and alike
        if not known:
            _predict(X, S, A[u], G[u])
            _square(S, before[t])
            size, ratio = 0.0, 0.0
            for d in range(D):
                if seen[here, d]:
                    variance = _update(S, H[v, d], s[v, d], gain[d])
                    f[d] = 1.0 / variance
                    size += np.log(2.0 * np.pi * variance)
                    ratio += np.log(variance / (s[v, d] * s[v, d]))
            _square(S, after[t])
            count = count + 1 if alike else 0
            if count == 0 or count == look:
                steady = settle(S, last, n, SAME) and alike
                look = next_look(count)
        else:
            copy(before[t - 1], before[t])
            copy(after[t - 1], after[t])
        determinant[t] = ratio
        for j in range(M):
            x = m[j]
            for i in range(n):
                total = drift[j % len(drift), t, i] if t < drift.shape[1] else 0.0
                if t > 0:
                    for l in range(n):
                        total += A[u, i, l] * x[l]
                moved[i] = total
                predicted[j, t, i] = total
            squares = 0.0
            for d in range(D):
                if seen[here, d]:
                    e = value[j, t, d]
                    for i in range(n):
                        e -= H[v, d, i] * moved[i]
                    for i in range(n):
                        moved[i] += gain[d, i] * e
                    squares += e * e * f[d]
            for i in range(n):
                x[i] = moved[i]
                mean[j, t, i] = moved[i]
            evidence[j, t] = -0.5 * (squares + size)
