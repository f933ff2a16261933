"""Kalman's filter and smoother as compiled loops: see `pyro_em.posteriors.kalman_steps` for the method.

The filter takes one number of a step after the other, which needs no inverse of their covariance: S
is a lower triangle, of which each number y = h'x + s e changes column by column.

What depends on no data is computed once for all chains that share it, and no more once it repeats: as
long as steps are alike, matrices that have become those of the step before stay so.

All compiled functions that call each other are in this one file: Numba's cache on disk notices a change
of the file of the function that is called first, and of no other.

Source: Carlson (1973), "Fast triangular formulation of the square root filter", AIAA Journal 11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

SAME = 1e-14  # see `pyro_em.posteriors.kalman_recursions`
HALF_LOG_TWO_PI = 0.5 * np.log(2.0 * np.pi)

Work = tuple[np.ndarray, ...]  # what loops write over; Numba's own arrays take a second to compile

_compiled: Callable[[Any], Any] = numba.njit(
    fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", cache=True, nogil=True
)


@_compiled
def _reflect(X: np.ndarray, rows: int, pivots: int, columns: int) -> None:
    """Householder's triangle of the first columns, with a positive diagonal; the others go along.

    Args:
        X: Columns, one after the other. # (columns, rows)
        rows: How many rows count.
        pivots: How many columns are made triangular.
        columns: How many columns count.
    """
    for p in range(pivots):
        pivot = X[p]
        size = 0.0
        for i in range(p, rows):
            size += pivot[i] * pivot[i]
        if size == 0.0:
            continue
        norm, first = np.sqrt(size), pivot[p]
        turn = -1.0 if first > 0.0 else 1.0  # the sign of what is left on the diagonal
        v = first - turn * norm
        tau = 1.0 / (size + abs(first) * norm)
        for c in range(p + 1, columns):
            column = X[c]
            dot = v * column[p]
            for i in range(p + 1, rows):
                dot += pivot[i] * column[i]
            dot *= tau
            column[p] = turn * (column[p] - dot * v)
            for i in range(p + 1, rows):
                column[i] -= dot * pivot[i]
        pivot[p] = norm


@_compiled
def _copy(x: np.ndarray, out: np.ndarray) -> None:
    """Numba's own assignment of arrays takes a second to compile."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j]


@_compiled
def _settle(new: np.ndarray, old: np.ndarray, n: int, within: float) -> bool:
    """Whether two matrices are the same, row by row; the first is then kept in the second."""
    largest, same = 0.0, True
    for i in range(n):
        for j in range(n):
            largest = max(largest, abs(new[i, j]))
    for i in range(n):
        row = 0.0
        for j in range(n):
            row = max(row, abs(new[i, j]))
        for j in range(n):
            if not abs(new[i, j] - old[i, j]) <= within * (row + 1e-2 * largest):
                same = False
            old[i, j] = new[i, j]
    return same


@_compiled
def _next_look(count: int) -> int:
    """After how many like steps to compare again, next.

    With what was found a sixteenth of all steps ago, not a step ago: what converges slowly changes
    little from a step to the next, and is far from its end.
    """
    return count + 1 + count // 16


@_compiled
def _is_like(dynamics: np.ndarray, measurement: np.ndarray, seen: np.ndarray, t: int) -> bool:
    """Whether a step has the same matrices as the one before; the first two never have."""
    if t < 2 or dynamics[t] != dynamics[t - 1] or measurement[t] != measurement[t - 1]:
        return False
    if len(seen) > 1:
        for d in range(seen.shape[1]):
            if seen[t, d] != seen[t - 1, d]:
                return False
    return True


@_compiled
def _predict(X: np.ndarray, S: np.ndarray, A: np.ndarray, G: np.ndarray) -> None:
    """S becomes the lower triangle of [A S, G]."""
    n, k = G.shape
    for i in range(n):
        for j in range(n):
            total = 0.0
            for l in range(j, n):
                total += A[i, l] * S[l, j]
            X[i, j] = total
        for j in range(k):
            X[i, n + j] = G[i, j]
    _reflect(X, n + k, n, n)
    for i in range(n):
        for j in range(n):
            S[i, j] = X[i, j] if j <= i else 0.0


@_compiled
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


@_compiled
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


@_compiled
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
        work: Zeros. # (n, n + k), (n, n), (n, n), (D, n), (M, n), (2, max(n, D))
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
        alike = _is_like(dynamics, measurement, seen, t)
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
                steady = _settle(S, last, n, SAME) and alike
                look = _next_look(count)
        else:
            _copy(before[t - 1], before[t])
            _copy(after[t - 1], after[t])
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


@_compiled
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


@_compiled
def _expect(
    A: np.ndarray,
    drift: np.ndarray,
    near: np.ndarray,
    j: int,
    t: int,
    mean: np.ndarray,
    gained: np.ndarray,
) -> None:
    """What is expected of a step after the one before, and how far from it states are measured.

    Args:
        A: # (n, n)
        drift: As for `backward`.
        near: As for `backward`.
        j: The chain.
        t: The step.
        mean: Where A m + a goes. # (n,)
        gained: Where m − (A m before + a) goes. # (n,)
    """
    for i in range(len(mean)):
        mean[i] = drift[j % len(drift), t, i] if t < drift.shape[1] else 0.0
        if len(near) > 0:
            if t > 0:
                for l in range(len(mean)):
                    mean[i] += A[i, l] * near[j, t - 1, l]
            gained[i] = near[j, t, i] - mean[i]
        else:
            gained[i] = -mean[i]


@_compiled
def _solve(X: np.ndarray, k: int, column: np.ndarray) -> None:
    """U⁻¹ times a column, in place; U are the first columns of X."""
    for i in range(k - 1, -1, -1):
        total = column[i]
        for l in range(i + 1, k):
            total -= X[l, i] * column[l]
        column[i] = total / X[i, i]


@_compiled
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
        alike = t > 0 and t + 1 < T and _is_like(dynamics, measurement, seen, t + 1)
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
                _expect(a, drift, near, j, t, m, gained)
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
            _reflect(X, tall, wide, wide + more)
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
                steady = _settle(R, last, n, SAME) and alike
                look = _next_look(count)
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


@_compiled
def onward(
    A: np.ndarray,
    G: np.ndarray,
    dynamics: np.ndarray,
    pull: np.ndarray,
    factor: np.ndarray,
    place: np.ndarray,
    covariance: np.ndarray,
    which: np.ndarray,
    transition: np.ndarray,
    noise: np.ndarray,
    work: Work,
) -> int:
    """Covariances of the states given all data; return how many differ, -1 if too many.

    Args:
        A: # (U, n, n)
        G: # (U, n, k)
        dynamics: # (T,)
        pull: From `backward`; it may be the memory of `transition`. # (room, k or more, n)
        factor: From `backward`; it may be the memory of `noise`. # (room, k or more, k or more)
        place: From `backward`. # (T,)
        covariance: Where P goes, those that differ one after the other. # (room, n, n)
        which: Where it goes which P a step has. # (T,)
        transition: Where Φ goes, at the places of E; zero at first. # (room, n, n)
        noise: Where C goes, at the places of W. # (room, n, n)
        work: Zeros. # (n, k), (n, n), (n, n), (n, n)
    """
    T, n, k = len(place), G.shape[1], G.shape[2]
    J, half, last, before = work
    steady, count, alikes, look = False, 0, 0, 0
    for t in range(T):
        alike = t > 1 and place[t] == place[t - 1]
        if alike and steady:
            which[t] = count - 1
            continue
        if count == len(covariance):
            return -1
        which[t] = count
        P, F, C = covariance[count], transition[place[t]], noise[place[t]]
        count += 1
        if not alike:
            a, g, E, W = A[dynamics[t]], G[dynamics[t]], pull[place[t]], factor[place[t]]
            for i in range(n):
                for c in range(k):
                    total = 0.0
                    for l in range(c + 1):
                        total += g[i, l] * W[l, c]
                    J[i, c] = total
                for c in range(n):
                    total = a[i, c]
                    for l in range(k):
                        total -= g[i, l] * E[l, c]
                    half[i, c] = total if t > 0 else 0.0
            _copy(half, F)  # where E may have been
            for i in range(n):
                for j in range(i + 1):
                    total = 0.0
                    for c in range(k):
                        total += J[i, c] * J[j, c]
                    C[i, j] = total
                    C[j, i] = total
        for i in range(n):
            for j in range(n):
                total = 0.0
                for l in range(n):
                    total += F[i, l] * before[l, j]
                half[i, j] = total
        for i in range(n):
            for j in range(i + 1):
                total = 0.0
                for l in range(n):
                    total += half[i, l] * F[j, l]
                P[i, j] = total + C[i, j]
                P[j, i] = P[i, j]
        _copy(P, before)
        alikes = alikes + 1 if alike else 0
        if alikes == 0 or alikes == look:
            steady = _settle(P, last, n, SAME) and alike
            look = _next_look(alikes)
    return count


@_compiled
def follow(
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
    place: np.ndarray,
    shift: np.ndarray,
    states: np.ndarray,
    disturbance: np.ndarray,
    squares: np.ndarray,
    work: Work,
) -> None:
    """Means of the states given all data, or draws.

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
        near: What states are measured from, as for `backward`. # (M, T, n)
        pull: From `backward`. # (room, k or more, n)
        place: From `backward`. # (T,)
        shift: From `backward`, with or without noise. # (M, T, k)
        states: Where they go. # (M, T, n)
        disturbance: Where G ε goes; it may be the memory of `shift`. # (M, T, n)
        squares: Where squares of all noises go. # (M,)
        work: Zeros. # (M, n), (4, max(n, k))
    """
    M, T, D = value.shape
    n, k = G.shape[1:]
    delta, both = work
    epsilon, moved, m, gained = both[0], both[1], both[2], both[3]
    drifting = T if len(near) > 0 else drift.shape[1]
    u, v, p = dynamics[0], measurement[0], place[0]
    a, g, h, E = A[u], G[u], H[v], pull[p]  # each look at a part of an array takes time
    for t in range(T):
        if dynamics[t] != u or measurement[t] != v or place[t] != p:
            u, v, p = dynamics[t], measurement[t], place[t]
            a, g, h, E = A[u], G[u], H[v], pull[p]
        plain = t >= drifting
        here = t if len(seen) > 1 else 0
        for j in range(M):
            total = 0.0
            for i in range(k):
                e = shift[j, t, i]
                for l in range(n):
                    e -= E[i, l] * delta[j, l]
                epsilon[i] = e
                total += e * e
            for i in range(n):
                noise, other = 0.0, 0.0
                for l in range(k):
                    noise += g[i, l] * epsilon[l]
                for l in range(n):
                    other += a[i, l] * delta[j, l]
                disturbance[j, t, i] = noise
                moved[i] = noise + other
            if plain:
                for i in range(n):
                    delta[j, i] = moved[i]
                    states[j, t, i] = moved[i]
            else:
                _expect(a, drift, near, j, t, m, gained)
                for i in range(n):
                    delta[j, i] = moved[i] - gained[i]
                    states[j, t, i] = m[i] + moved[i]
            for d in range(D):
                if seen[here, d]:
                    e, then = value[j, t, d], 0.0
                    if not plain:
                        for i in range(n):
                            e -= h[d, i] * m[i]
                    for i in range(n):
                        then += h[d, i] * moved[i]
                    e = (e - then) * w[v, d]
                    total += e * e
            squares[j] += total
