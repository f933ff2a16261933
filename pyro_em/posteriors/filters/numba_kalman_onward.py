"""The states of Gaussian chains given all data, from the first step on, as compiled loops.

See `pyro_em.posteriors.filters.kalman_steps` for the method.
"""

from __future__ import annotations

import numpy as np

from pyro_em.posteriors.filters.kalman_recursions import SAME
from pyro_em.posteriors.filters.numba_fours import apart, load, plus, store, times
from pyro_em.posteriors.filters.numba_kalman import (
    compiled_in_order,
    copy,
    expect,
    inside_in_order,
    matrix,
    next_look,
    settle,
)
from pyro_em.posteriors.filters.numba_kalman_small import along_in_fours, is_small

_MANY = 8  # like steps that are worth a loop of their own
_TOGETHER = 8  # chains that are gone through step by step, so that the cache holds what is near


@compiled_in_order
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
    slab: np.ndarray,
) -> int:
    """Covariances of the states given all data; return how many differ, -1 if too many.

    Args:
        A: # (U, n, n)
        G: # (U, n, k)
        dynamics: # (T,)
        pull: From `backward`; it may be the memory of `transition`. # (room, k or more, n)
        factor: From `backward`; it may be the memory of `noise`. # (room, k or more, k or more)
        place: From `backward`; then counted from the first of the places. # (T,)
        covariance: Where P goes, those that differ one after the other. # (room, n, n)
        which: Where it goes which P a step has. # (T,)
        transition: Where Φ goes, at the places of E; zero at first. # (room, n, n)
        noise: Where C goes, at the places of W. # (room, n, n)
        slab: Memory. # (n k + 3 n²,)
    """
    T, n, k = len(place), G.shape[1], G.shape[2]
    J, at = matrix(slab, np.int64(0), n, k)
    half, at = matrix(slab, at, n, n)
    last, at = matrix(slab, at, n, n)
    before, at = matrix(slab, at, n, n)
    for i in range(n):
        for c in range(n):
            last[i, c], before[i, c] = 0.0, 0.0
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
            copy(half, F)  # where E may have been
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
        copy(P, before)
        alikes = alikes + 1 if alike else 0
        if alikes == 0 or alikes == look:
            steady = settle(P, last, n, SAME) and alike
            look = next_look(alikes)
    first = place[0]
    for t in range(T):
        place[t] -= first
    return count


@inside_in_order
def _in_fours(X: np.ndarray, slab: np.ndarray, at: int) -> tuple[np.ndarray, int]:
    """A matrix in blocks of four rows, column by column: row 4 b + i is number i of block b."""
    apart()
    rows, columns = X.shape
    blocks = (rows + 3) // 4
    out, end = matrix(slab, at, blocks * columns, 4)
    for i in range(rows):
        for c in range(columns):
            out[(i // 4) * columns + c, i % 4] = X[i, c]
    return out, end


@inside_in_order
def _along(
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
    both: np.ndarray,
) -> float:
    """Like steps of a chain without drift; return the squares of their noises.

    With Φ = A − G E a state is Φ x + G g, x the one before: it does not wait for its noise.

    Args:
        E: As `_in_fours` lays it out, like G, Φ and H. # (n ⌈k/4⌉, 4)
        G: # (k ⌈n/4⌉, 4)
        F: Φ. # (n ⌈n/4⌉, 4)
        H: # (n ⌈D/4⌉, 4)
        w: 1/s. # (D,)
        value: # (T, D)
        shift: # (T, k)
        delta: The state before the first step, then the last one. # (n,)
        states: # (T, n)
        disturbance: It may be the memory of `shift`. # (T, n)
        first: The first step.
        end: The step after the last.
        both: Memory. # (4, max(n, k, D) and three more)
    """
    apart()
    D, n, k = len(w), len(delta), shift.shape[1]
    epsilon, moved, then = both[0], both[1], both[2]
    squares = 0.0
    for i in range(n):
        moved[i] = delta[i]
    for t in range(first, end):
        for b in range(0, k, 4):
            total = times(load(E, (b // 4) * n, 0), moved[0])
            for l in range(1, n):
                total = plus(total, load(E, (b // 4) * n + l, 0), moved[l])
            store(both, 0, b, total)
        for b in range(0, n, 4):
            total = times(load(G, (b // 4) * k, 0), shift[t, 0])
            for l in range(1, k):
                total = plus(total, load(G, (b // 4) * k + l, 0), shift[t, l])
            for l in range(n):
                total = plus(total, load(F, (b // 4) * n + l, 0), moved[l])
            store(both, 2, b, total)
        for i in range(n):
            states[t, i] = then[i]
            moved[i] = then[i]
        for i in range(k):
            e = shift[t, i] - epsilon[i]
            epsilon[i] = e
            squares += e * e
        for b in range(0, n, 4):
            total = times(load(G, (b // 4) * k, 0), epsilon[0])
            for l in range(1, k):
                total = plus(total, load(G, (b // 4) * k + l, 0), epsilon[l])
            store(both, 2, b, total)
        for i in range(n):
            disturbance[t, i] = then[i]
        for b in range(0, D, 4):
            total = times(load(H, (b // 4) * n, 0), moved[0])
            for l in range(1, n):
                total = plus(total, load(H, (b // 4) * n + l, 0), moved[l])
            store(both, 3, b, total)
        for d in range(D):
            e = (value[t, d] - both[3, d]) * w[d]
            squares += e * e
    for i in range(n):
        delta[i] = moved[i]
    return squares


def follow_memory(M: int, D: int, n: int, k: int) -> int:
    """How many numbers `follow` writes over: see `pyro_em.posteriors.filters.numba_kalman_backward`."""
    fours = (k + 3) * n + (n + 3) * (k + n) + (D + 3) * n
    return M * n + 4 * (max(n, k, D) + 3) + n * n + fours + 8 * D + 80


@compiled_in_order
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
    totals: np.ndarray,
    near: np.ndarray,
    pull: np.ndarray,
    place: np.ndarray,
    shift: np.ndarray,
    states: np.ndarray,
    disturbance: np.ndarray,
    evidence: np.ndarray,
    slab: np.ndarray,
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
        drift: # (M|1, T, n)
        totals: From `backward`. # (4,)
        near: What states are measured from, as for `backward`. # (M, T, n)
        pull: From `backward`. # (room, k or more, n)
        place: From `backward`. # (T,)
        shift: From `backward`, with or without noise. # (M, T, k)
        states: Where they go. # (M, T, n)
        disturbance: Where G ε goes; it may be the memory of `shift`. # (M, T, n)
        evidence: Where nats go; those at the mode of all noises if `shift` is their mean. # (M,)
        slab: Memory for as many numbers as `follow_memory` says.
    """
    M, T, D = value.shape
    n, k = G.shape[1:]
    delta, at = matrix(slab, np.int64(0), M, n)
    both, at = matrix(slab, at, 4, max(n, k, D) + 3)
    phi, at = matrix(slab, at, n, n)
    fours, at = matrix(slab, at, 2 * D + 20, 4)
    epsilon, moved, m, gained = both[0, :k], both[1, :n], both[2, :n], both[3, :n]
    drifting = np.int64(totals[3])
    for j in range(M):
        evidence[j] = 0.0  # squares of all noises
        for i in range(n):
            delta[j, i] = 0.0
    for begin in range(0, M, _TOGETHER):
        stop = min(M, begin + _TOGETHER)
        t = np.int64(0)  # no constant: functions are compiled anew for these
        while t < T:
            u, v, p = dynamics[t], measurement[t], place[t]
            a, g, h, E = A[u], G[u], H[v], pull[p]  # each look at a part of an array takes time
            end = t + 1
            while end < T and place[end] == p:  # these are alike
                end += 1
            here, whole = t if len(seen) > 1 else 0, True
            for d in range(D):
                whole &= seen[here, d]
            if whole and t >= drifting and end - t >= _MANY and k > 0:
                for i in range(n):
                    for c in range(n):
                        total = a[i, c]
                        for l in range(k):
                            total -= g[i, l] * E[l, c]
                        phi[i, c] = total
                if is_small(D, n, k, end - t):
                    for j in range(begin, stop):
                        evidence[j] += along_in_fours(
                            E,
                            g,
                            phi,
                            h,
                            w[v],
                            value[j],
                            shift[j],
                            delta[j],
                            states[j],
                            disturbance[j],
                            t,
                            end,
                            fours,
                        )
                    t = end
                    continue
                of_E, place_of_G = _in_fours(E[:k], slab, at)
                of_G, place_of_F = _in_fours(g, slab, place_of_G)
                of_F, place_of_H = _in_fours(phi, slab, place_of_F)
                of_H, _ = _in_fours(h, slab, place_of_H)
                for j in range(begin, stop):
                    evidence[j] += _along(
                        of_E,
                        of_G,
                        of_F,
                        of_H,
                        w[v],
                        value[j],
                        shift[j],
                        delta[j],
                        states[j],
                        disturbance[j],
                        t,
                        end,
                        both,
                    )
                t = end
                continue
            while t < end:
                plain = t >= drifting
                here = t if len(seen) > 1 else 0
                for j in range(begin, stop):
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
                        expect(a, drift, near, j, t, m, gained)
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
                    evidence[j] += total
                t += 1
    for j in range(M):
        evidence[j] = -0.5 * (evidence[j] + totals[0]) - totals[1]
