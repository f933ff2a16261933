"""The noises of Gaussian chains given all data, from the last step on, as compiled loops.

See `pyro_em.posteriors.filters.kalman_steps` for the method.
"""

from __future__ import annotations

import numpy as np

from pyro_em.posteriors.filters.kalman_recursions import SAME
from pyro_em.posteriors.filters.numba_fours import apart, load, plus, store, times
from pyro_em.posteriors.filters.numba_kalman import (
    compiled_in_order,
    drifts_until,
    expect,
    inside_in_order,
    is_like,
    matrix,
    next_look,
    reflect,
    settle,
)
from pyro_em.posteriors.filters.numba_kalman_small import down_in_fours, is_small

HALF_LOG_TWO_PI = 0.5 * np.log(2.0 * np.pi)


@inside_in_order
def _own_rows(
    Y: np.ndarray,
    R: np.ndarray,
    H: np.ndarray,
    w: np.ndarray,
    seen: np.ndarray,
    columns: int,
) -> None:
    """What a step and all later ones say of its state: the triangle of [H/s; R].

    Args:
        Y: Where its columns go, before those that go along. # (D + n, columns and three more, or more)
        R: What later steps say. # (n, n)
        H: # (D, n)
        w: 1/s. # (D,)
        seen: # (D,)
        columns: How many columns there are.
    """
    apart()
    D, n = H.shape
    for d in range(D):
        for c in range(n):
            Y[d, c] = H[d, c] * w[d] if seen[d] else 0.0
    for i in range(n):
        for c in range(n):
            Y[D + i, c] = R[i, c]
    reflect(Y, D + n, D, n, columns)


@inside_in_order
def _rows_before(
    X: np.ndarray, Y: np.ndarray, A: np.ndarray, G: np.ndarray, moves: bool, columns: int
) -> None:
    """What they say of its noise and of the state before: the triangle of [Y G, Y A; I, 0].

    Args:
        X: Where its columns go. # (n + k, columns and three more, or more)
        Y: From `_own_rows`, what goes along too. # (n or more, columns − k or more)
        A: # (n, n)
        G: # (n, k)
        moves: Whether there is a state before.
        columns: How many columns there are, with those that go along.
    """
    apart()
    n, k = G.shape
    for i in range(n + k):
        for c in range(k + n):
            X[i, c] = 0.0
        for c in range(k + n, columns):
            X[i, c] = Y[i, c - k] if i < n else 0.0
    for i in range(k):
        X[n + i, i] = 1.0
    for i in range(n):
        for l in range(i, n):
            by = Y[i, l]
            for c in range(k):
                X[i, c] += by * G[l, c]
            if moves:
                for c in range(n):
                    X[i, k + c] += by * A[l, c]
    reflect(X, n + k, n, k + n, columns)


@inside_in_order
def _solve(X: np.ndarray, k: int, columns: int, W: np.ndarray) -> float:
    """Multiply by U⁻¹, in place, what is right of U in its rows; return 2 log|U|.

    Args:
        X: U, and what is right of it. # (k or more, columns or more)
        k: The size of U.
        columns: How many columns there are.
        W: Where U⁻¹ goes. # (k, k)
    """
    apart()
    size, product = 0.0, 1.0
    for i in range(k - 1, -1, -1):
        u = X[i, i]
        own = 1.0 / u
        product *= u
        if product > 1e100:
            size += np.log(product)
            product = 1.0
        for c in range(k):
            W[i, c] = 0.0
        for l in range(i + 1, k):
            by = X[i, l]
            for c in range(l, k):
                W[i, c] -= by * W[l, c]
            for c in range(k, columns):
                X[i, c] -= by * X[l, c]
        for c in range(i + 1, k):
            W[i, c] *= own
        W[i, i] = own
        for c in range(k, columns):
            X[i, c] *= own
    return 2.0 * (size + np.log(product))


@inside_in_order
def _first_alike(
    dynamics: np.ndarray, measurement: np.ndarray, seen: np.ndarray, first: int, t: int
) -> int:
    """The first step, at least that given, from which on to t all are alike."""
    if len(seen) == 1 and first > 0:
        u, v = dynamics[t], measurement[t]
        while t > first and t > 1 and dynamics[t - 1] == u and measurement[t - 1] == v:
            t -= 1
        return t
    while t > first and is_like(dynamics, measurement, seen, t):
        t -= 1
    return t


@inside_in_order
def _down(
    turn: np.ndarray,
    w: np.ndarray,
    value: np.ndarray,
    shift: np.ndarray,
    zeta: np.ndarray,
    first: int,
    last: int,
    both: np.ndarray,
) -> float:
    """g and ζ of like steps of a chain from the last one on; return how large whitened data are.

    Args:
        turn: From the numbers of H/s and R to g and ζ, four rows side by side. # (…, D + n, 4)
        w: 1/s. # (D,)
        value: # (T, D)
        shift: Where g goes. # (T, k)
        zeta: # (n,)
        first: The first step.
        last: The last one.
        both: Memory. # (2, D + n or k + n, and three more)
    """
    apart()
    D, n, k = len(w), len(zeta), shift.shape[1]
    x, out, far = both[0], both[1], 0.0
    for i in range(n):
        x[D + i] = zeta[i]
    for t in range(last, first - 1, -1):
        for d in range(D):
            x[d] = value[t, d] * w[d]
            far = max(far, abs(x[d]))
        for b in range(len(turn)):
            rows = turn[b]
            total = times(load(rows, 0, 0), x[0])
            for l in range(1, D + n):
                total = plus(total, load(rows, l, 0), x[l])
            store(both, 1, 4 * b, total)
        for i in range(n):
            x[D + i] = out[k + i]
        for i in range(k):
            shift[t, i] = out[i]
    for i in range(n):
        zeta[i] = x[D + i]
    return far


def backward_memory(M: int, D: int, n: int, k: int) -> int:
    """How many numbers `backward` writes over.

    Args:
        M: Chains.
        D: Numbers observed at a step.
        n: Numbers of a state.
        k: Noises of a step.
    """
    told, wide = D + n, k + n
    rows = told * (n + told + 3) + wide * (wide + told + 3) + 2 * n * n + M * (told + n)
    return rows + 2 * (told + k + 3) + (wide + 3) * told + 8 * D + 40


@compiled_in_order
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
    slab: np.ndarray,
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
        drift: # (M|1, T, n)
        near: What states are measured from; empty if that is zero. # (M, T, n)
        pull: Where E goes, those that differ one before the other. # (room, k or more, n)
        factor: Where W goes, likewise. # (room, k or more, k or more)
        shift: Where g goes. # (M, T, k)
        place: Where it goes which E and W a step has; the first is -1 if they are too many. # (T,)
        totals: Where 2 Σ log|U| goes, Σ log(√2π s) of all that is seen, how large whitened data are at
            most, and after how many steps nothing drifts. # (4,)
        slab: Zeros, as many as `backward_memory` says.
    """
    M, T, D = value.shape
    n, k = G.shape[1:]
    told, wide = D + n, k + n
    # The data go along as columns if they are few, else the matrix that turns them is kept.
    few = told > M
    Y, at = matrix(slab, np.int64(0), told, n + told + 3)
    X, at = matrix(slab, at, wide, wide + told + 3)
    R, at = matrix(slab, at, n, n)
    last, at = matrix(slab, at, n, n)
    data, at = matrix(slab, at, M, told)
    zeta, at = matrix(slab, at, M, n)
    both, at = matrix(slab, at, 2, told + k + 3)
    blocks = (wide + 3) // 4
    end = at + 4 * blocks * told
    turn = slab[at:end].reshape((blocks, told, 4))
    fours, _ = matrix(slab, end, 2 * D + 10, 4)
    m, gained = both[0, :n], both[1, :n]
    drifting = T if len(near) > 0 else drifts_until(drift)
    steady, kept, last_place, size, sizes = False, False, len(pull), 0.0, 0.0
    own_nats, nats, far, whole = 0.0, 0.0, 0.0, True
    count, look = 0, 0
    u, v = dynamics[T - 1], measurement[T - 1]
    a, g, h, scale = A[u], G[u], H[v], w[v]  # each look at a part of an array takes time
    t = T - 1
    while t >= 0:
        here = t if len(seen) > 1 else 0
        alike = t > 0 and t + 1 < T and is_like(dynamics, measurement, seen, t + 1)
        if not alike:
            u, v = dynamics[t], measurement[t]
            a, g, h, scale = A[u], G[u], H[v], w[v]
            own_nats, whole = 0.0, True
            for d in range(D):
                if seen[here, d]:
                    own_nats += HALF_LOG_TWO_PI - np.log(scale[d])
                else:
                    whole = False
        known = steady and kept and alike
        if known and whole and t >= drifting:
            first = _first_alike(dynamics, measurement, seen, max(drifting, 1), t)
            small = is_small(D, n, k, t + 1 - first)
            for j in range(M):
                x, g_, z = value[j], shift[j], zeta[j]
                if small:
                    far = max(far, down_in_fours(turn, scale, x, g_, z, first, t, fours))
                else:
                    far = max(far, _down(turn, scale, x, g_, z, first, t, both))
            for s in range(first, t + 1):
                place[s] = last_place
            nats += own_nats * (t + 1 - first)
            sizes += size * (t + 1 - first)
            t = first - 1
            continue
        nats += own_nats
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
                said = zeta[j, i]
                if not plain:
                    for l in range(i, n):
                        said += R[i, l] * gained[l]
                data[j, D + i] = said
        if not known:
            E, W = pull[last_place], factor[last_place]
            carry = few and not (steady and alike)
            more = M if carry else told
            for i in range(told):
                for c in range(more):
                    Y[i, n + c] = data[c, i] if carry else 0.0
                if not carry:
                    Y[i, n + i] = 1.0
            _own_rows(Y, R, h, scale, seen[here], n + more)
            _rows_before(X, Y, a, g, t > 0, wide + more)
            size = _solve(X, k, wide + more, W)
            kept = not carry
            for i in range(k):
                for c in range(n):
                    E[i, c] = X[i, k + c]
            for i in range(n):
                for c in range(n):
                    R[i, c] = X[k + i, k + c] if c >= i else 0.0
            count = count + 1 if alike else 0
            if count == 0 or count == look:
                steady = settle(R, last, n, SAME) and alike
                look = next_look(count)
            if kept:
                for i in range(wide):
                    for c in range(told):
                        turn[i // 4, c, i % 4] = X[i, wide + c]
            else:
                for j in range(M):
                    for i in range(k):
                        shift[j, t, i] = X[i, wide + j]
                    for i in range(n):
                        zeta[j, i] = X[k + i, wide + j]
        sizes += size
        if kept:
            for j in range(M):
                for b in range(blocks):
                    rows = turn[b]
                    total = times(load(rows, 0, 0), data[j, 0])
                    for c in range(1, told):
                        total = plus(total, load(rows, c, 0), data[j, c])
                    store(both, 1, 4 * b, total)
                for i in range(k):
                    shift[j, t, i] = both[1, i]
                for i in range(n):
                    zeta[j, i] = both[1, k + i]
        t -= 1
    totals[0], totals[1], totals[2], totals[3] = sizes, nats, far, drifting
