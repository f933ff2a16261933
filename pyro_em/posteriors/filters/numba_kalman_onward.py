"""The states of Gaussian chains given all data, from the first step on, as compiled loops.

See `pyro_em.posteriors.filters.kalman_steps` for the method.
"""

from __future__ import annotations

import numpy as np

from pyro_em.posteriors.filters.kalman_recursions import SAME
from pyro_em.posteriors.filters.numba_kalman import Work, compiled, copy, expect, next_look, settle

_TOGETHER = 8  # chains that are gone through step by step, so that the cache holds what is near


@compiled
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
    return count


@compiled
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
    for begin in range(0, M, _TOGETHER):
        u, v, p = dynamics[0], measurement[0], place[0]
        a, g, h, E = A[u], G[u], H[v], pull[p]  # each look at a part of an array takes time
        for t in range(T):
            if dynamics[t] != u or measurement[t] != v or place[t] != p:
                u, v, p = dynamics[t], measurement[t], place[t]
                a, g, h, E = A[u], G[u], H[v], pull[p]
            plain = t >= drifting
            here = t if len(seen) > 1 else 0
            for j in range(begin, min(M, begin + _TOGETHER)):
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
                squares[j] += total
