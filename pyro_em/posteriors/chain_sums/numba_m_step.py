"""The M-step of Gaussian chains from sums, as compiled loops: see `compiled_m_step`.

Sums over steps are products of rows that lie one after the other, some hundred steps at a time. What is
not clearly determined is left: the numpy way judges it.

All compiled functions that call each other are in this one file: Numba's cache on disk notices a change
of the file of the function that is called first, and of no other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

WIDTH = 512  # steps at a time

_compiled: Callable[[Any], Any] = numba.njit(
    fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", cache=True, nogil=True
)


_plain: Callable[[Any], Any] = numba.njit(error_model="numpy", cache=True, nogil=True)


@_plain
def disturbances(
    covariance: np.ndarray,
    of_covariance: np.ndarray,
    transition: np.ndarray,
    noise: np.ndarray,
    of_transition: np.ndarray,
    A: np.ndarray,
    dynamics: np.ndarray,
    out: np.ndarray,
    work: np.ndarray,
) -> None:
    """Σ Cov(G ε), Σ Cov(G ε, x before) and Σ P before, by kind of step: see `state_sums.States`.

    Args:
        covariance: P, the different ones. # (L, P, n, n)
        of_covariance: Which of them each step has. # (L, T)
        transition: Φ, the different ones. # (L, Q, n, n)
        noise: C, the different ones. # (L, Q, n, n)
        of_transition: Which of both each step has. # (L, T)
        A: # (L|1, U, n, n)
        dynamics: The kind of each step. # (T,)
        out: Where sums go; zeros. # (3, L, U, n, n)
        work: # (2, n, n)
    """
    L, T = of_covariance.shape
    n = A.shape[-1]
    less, away = work[0], work[1]
    for l in range(L):
        t = 0
        while t < T:
            u, m = dynamics[t], of_transition[l, t]
            end = t + 1
            if t > 0:
                p = of_covariance[l, t - 1]
                while (
                    end < T
                    and dynamics[end] == u
                    and of_transition[l, end] == m
                    and of_covariance[l, end - 1] == p
                ):
                    end += 1
            count = float(end - t)
            noises, shared, before = out[0, l, u], out[1, l, u], out[2, l, u]
            C = noise[l, m]
            for i in range(n):
                for j in range(n):
                    noises[i, j] += count * C[i, j]
            if t > 0:
                P, F, a = covariance[l, p], transition[l, m], A[l if len(A) > 1 else 0, u]
                for i in range(n):
                    for j in range(n):
                        less[i, j] = a[i, j] - F[i, j]
                        before[i, j] += count * P[i, j]
                for i in range(n):
                    for j in range(n):
                        total = 0.0
                        for c in range(n):
                            total += less[i, c] * P[c, j]
                        away[i, j] = count * total
                        shared[i, j] -= count * total
                for i in range(n):
                    for j in range(n):
                        total = 0.0
                        for c in range(n):
                            total += away[i, c] * less[j, c]
                        noises[i, j] += total
            t = end


@_compiled
def _products(
    rows: np.ndarray,
    many: int,
    D: int,
    weight: np.ndarray,
    is_matrix: bool,
    phi_phi: np.ndarray,
    r_phi: np.ndarray,
    r_r: np.ndarray,
) -> None:
    """Add products of rows over steps: φ φᵀ, r φᵀ, and r rᵀ or its diagonal.

    Args:
        rows: r and φ. # (D + q, steps)
        many: How many steps count.
        D: Numbers in r.
        weight: Of each entry of r, where they differ; then r is weighed. # (D|1, steps)
        is_matrix: Whether all of r rᵀ is wanted.
        phi_phi: # (D|1, q, q)
        r_phi: # (D, q)
        r_r: # (D, D|1)
    """
    q = r_phi.shape[1]
    for a in range(q):
        x = rows[D + a]
        for b in range(a + 1):
            y = rows[D + b]
            for e in range(len(phi_phi)):
                total = 0.0
                if len(phi_phi) > 1:
                    w = weight[e]
                    for i in range(many):
                        total += w[i] * x[i] * y[i]
                else:
                    for i in range(many):
                        total += x[i] * y[i]
                phi_phi[e, a, b] += total
                if b < a:
                    phi_phi[e, b, a] += total
    for d in range(D):
        x = rows[d]
        for a in range(q):
            y = rows[D + a]
            total = 0.0
            for i in range(many):
                total += x[i] * y[i]
            r_phi[d, a] += total
        for c in range(0 if is_matrix else d, d + 1):
            y = rows[c]
            total = 0.0
            for i in range(many):
                total += x[i] * y[i]
            if is_matrix:
                r_r[d, c] += total
                if c < d:
                    r_r[c, d] += total
            else:
                r_r[d, 0] += total


@_compiled
def means(
    mean: np.ndarray,
    noise: np.ndarray,
    residual: np.ndarray,
    levels: np.ndarray,
    before: np.ndarray,
    own: np.ndarray,
    reads: np.ndarray,
    there: np.ndarray,
    features: np.ndarray,
    C: np.ndarray,
    weight: np.ndarray,
    is_matrix: bool,
    phi_phi: np.ndarray,
    r_phi: np.ndarray,
    r_r: np.ndarray,
    rows: np.ndarray,
    weights: np.ndarray,
) -> None:
    """What means of states add to the sums of a site.

    Args:
        mean: # (chains, T, n)
        noise: E[G ε]. # (chains, T, n)
        residual: The data less what is known of their means; empty for latents. # (chains, N, K, D)
        levels: The steps of the members. # (N,)
        before: The steps of the states that they read. # (N,)
        own: Places of a row's numbers in a state. # (K, D)
        reads: Places of what a row reads. # (K, Q)
        there: Whether it reads them. # (K, Q)
        features: Known features. # (F, N|1, chains|1)
        C: # (lead|1, K, D, Q)
        weight: What counts; empty if all do. # (chains, N, K, D|1)
        is_matrix: Whether entries are correlated.
        phi_phi: Where sums go. # (lead, K, D|1, q, q)
        r_phi: # (lead, K, D, q)
        r_r: # (lead, K, D, D|1)
        rows: Work. # (D + q, WIDTH)
        weights: Work. # (D|1, WIDTH)
    """
    chains, N = len(mean), len(levels)
    K, Q = reads.shape
    D, F = own.shape[1], len(features)
    for c in range(chains):
        l = c if len(r_phi) > 1 else 0
        of_C = c if len(C) > 1 else 0
        for k in range(K):
            for begin in range(0, N, rows.shape[1]):
                many = min(rows.shape[1], N - begin)
                for j in range(Q):
                    x, place = rows[D + j], reads[k, j]
                    if there[k, j]:
                        for i in range(many):
                            x[i] = mean[c, before[begin + i], place]
                    else:
                        for i in range(many):
                            x[i] = 0.0
                for f in range(F):
                    x = rows[D + Q + f]
                    chain = c if features.shape[2] > 1 else 0
                    for i in range(many):
                        x[i] = features[f, begin + i if features.shape[1] > 1 else 0, chain]
                for d in range(D):
                    x = rows[d]
                    if len(residual) == 0:
                        for i in range(many):
                            x[i] = noise[c, levels[begin + i], own[k, d]]
                    else:
                        for i in range(many):
                            x[i] = residual[c, begin + i, k, d]
                        for j in range(Q):
                            by, y = C[of_C, k, d, j], rows[D + j]
                            for i in range(many):
                                x[i] -= by * y[i]
                if len(weight) > 0:
                    entries = weight.shape[3]
                    for e in range(entries):
                        w = weights[e]
                        for i in range(many):
                            w[i] = weight[c, begin + i, k, e]
                    for a in range(D if entries > 1 else len(rows)):
                        x, w = rows[a], weights[a if entries > 1 else 0]
                        for i in range(many):
                            x[i] *= w[i]
                _products(rows, many, D, weights, is_matrix, phi_phi[l, k], r_phi[l, k], r_r[l, k])


@_plain
def _add_read(
    read: np.ndarray, C: np.ndarray, d: int, r_phi: np.ndarray, r_r: np.ndarray, is_matrix: bool
) -> None:
    """Add Cov(r, u) = −C Cov(u) and Cov(r) = C Cov(u) Cᵀ of the d-th entry of a row.

    Args:
        read: Cov(u). # (Q, Q)
        C: # (D, Q)
        d: The entry.
        r_phi: # (D, q)
        r_r: # (D, D|1)
        is_matrix: Whether entries are correlated.
    """
    Q = len(read)
    for a in range(Q):
        total = 0.0
        for b in range(Q):
            total += C[d, b] * read[b, a]
        r_phi[d, a] -= total
        if is_matrix:
            for c in range(len(C)):
                r_r[d, c] += total * C[c, a]
        else:
            r_r[d, 0] += total * C[d, a]


@_plain
def covariances_of_data(
    covariance: np.ndarray,
    of_covariance: np.ndarray,
    levels: np.ndarray,
    chains: int,
    reads: np.ndarray,
    there: np.ndarray,
    C: np.ndarray,
    weight: np.ndarray,
    is_matrix: bool,
    phi_phi: np.ndarray,
    r_phi: np.ndarray,
    r_r: np.ndarray,
    count: np.ndarray,
    read: np.ndarray,
) -> None:
    """What covariances of states add to the sums of an observed site.

    Args:
        covariance: P, the different ones. # (L, P, n, n)
        of_covariance: Which of them each step has. # (L, T)
        levels: The steps of the members. # (N,)
        chains: How many there are.
        reads: Places of what a row reads. # (K, Q)
        there: Whether it reads them. # (K, Q)
        C: # (lead|1, K, D, Q)
        weight: What counts; empty if all do. # (chains, N, K, D|1)
        is_matrix: Whether entries are correlated.
        phi_phi: Where sums go. # (lead, K, D|1, q, q)
        r_phi: # (lead, K, D, q)
        r_r: # (lead, K, D, D|1)
        count: Work, zeros. # (P,)
        read: Work. # (Q, Q)
    """
    K, Q = reads.shape
    lead, D, E = len(r_phi), r_phi.shape[2], phi_phi.shape[2]
    once = len(covariance) == 1 and lead == 1  # one sum for all chains
    alike = len(weight) == 0 and len(covariance) == 1  # each chain adds the same
    for k in range(K):
        for e in range(E):
            for c in range(1 if alike and once else chains):
                own = c if len(covariance) > 1 else 0
                for i in range(len(levels)):
                    w = 1.0
                    if len(weight) > 0:
                        w = weight[c, i, k, e]
                    elif once:
                        w = float(chains)
                    count[of_covariance[own, levels[i]]] += w
                if once and not alike and c < chains - 1:
                    continue
                l = c if lead > 1 else 0
                for a in range(Q):
                    for b in range(Q):
                        read[a, b] = 0.0
                for p in range(covariance.shape[1]):
                    if count[p] > 0.0:
                        P = covariance[own, p]
                        for a in range(Q):
                            for b in range(Q):
                                if there[k, a] and there[k, b]:
                                    read[a, b] += count[p] * P[reads[k, a], reads[k, b]]
                        count[p] = 0.0
                for a in range(Q):
                    for b in range(Q):
                        phi_phi[l, k, e, a, b] += read[a, b]
                of_C = C[l if len(C) > 1 else 0, k]
                for d in range(e if E > 1 else 0, e + 1 if E > 1 else D):
                    _add_read(read, of_C, d, r_phi[l, k], r_r[l, k], is_matrix)


@_plain
def covariances_of_latents(
    sums: np.ndarray,
    chains: int,
    kinds: np.ndarray,
    own: np.ndarray,
    reads: np.ndarray,
    there: np.ndarray,
    is_matrix: bool,
    phi_phi: np.ndarray,
    r_phi: np.ndarray,
    r_r: np.ndarray,
) -> None:
    """What covariances of states add to the sums of a site of latents.

    Args:
        sums: From `disturbances`. # (3, L, U, n, n)
        chains: How many there are.
        kinds: Those of the site's steps.
        own: Places of a row's numbers in a state. # (K, D)
        reads: Places of what a row reads. # (K, Q)
        there: Whether it reads them. # (K, Q)
        is_matrix: Whether entries are correlated.
        phi_phi: Where sums go. # (lead, K, 1, q, q)
        r_phi: # (lead, K, D, q)
        r_r: # (lead, K, D, D|1)
    """
    lead, L, D = len(r_phi), sums.shape[1], own.shape[1]
    K, Q = reads.shape
    for c in range(max(lead, L)):
        l, from_ = c if lead > 1 else 0, c if L > 1 else 0
        by = float(chains) if lead == 1 and L == 1 else 1.0
        for u in kinds:
            noises, shared, before = sums[0, from_, u], sums[1, from_, u], sums[2, from_, u]
            for k in range(K):
                for a in range(Q):
                    if not there[k, a]:
                        continue
                    for b in range(Q):
                        if there[k, b]:
                            phi_phi[l, k, 0, a, b] += by * before[reads[k, a], reads[k, b]]
                    for d in range(D):
                        r_phi[l, k, d, a] += by * shared[own[k, d], reads[k, a]]
                for d in range(D):
                    if is_matrix:
                        for e in range(D):
                            r_r[l, k, d, e] += by * noises[own[k, d], own[k, e]]
                    else:
                        r_r[l, k, d, 0] += by * noises[own[k, d], own[k, d]]


@_plain
def equations(
    design: np.ndarray,
    column: np.ndarray,
    place: np.ndarray,
    precision: np.ndarray,
    phi_phi: np.ndarray,
    r_phi: np.ndarray,
    gram: np.ndarray,
    right: np.ndarray,
    work: np.ndarray,
) -> None:
    """Add a site's normal equations, see `state_regression.Regression`.

    Args:
        design: # (lead, K, D, q, w)
        column: # (lead, K, D, w)
        place: Where products of columns go. # (lead, K, rows, w · w)
        precision: Of each entry; empty where no spread matters. # (lead|1, K, D)
        phi_phi: # (lead, K, D|1, q, q)
        r_phi: # (lead, K, D, q)
        gram: The matrices of all systems.
        right: Their right-hand sides.
        work: # (q, w)
    """
    lead, K, D, q, w = design.shape
    for l in range(lead):
        for k in range(K):
            for d in range(D):
                J = design[l, k, d]
                phi = phi_phi[l, k, d if phi_phi.shape[2] > 1 else 0]
                by = 1.0
                if len(precision) > 0:
                    by = precision[l if len(precision) > 1 else 0, k, d]
                for a in range(q):
                    for j in range(w):
                        total = 0.0
                        for b in range(q):
                            total += phi[a, b] * J[b, j]
                        work[a, j] = total
                for i in range(w):
                    pulled = 0.0
                    for a in range(q):
                        pulled += J[a, i] * r_phi[l, k, d, a]
                    right[column[l, k, d, i]] += by * pulled
                    for j in range(w):
                        total = 0.0
                        for a in range(q):
                            total += J[a, i] * work[a, j]
                        gram[place[l, k, d, i * w + j]] += by * total


@_plain
def solved(
    gram: np.ndarray,
    right: np.ndarray,
    sizes: np.ndarray,
    out: np.ndarray,
    work: np.ndarray,
    most: float,
) -> bool:
    """The solutions of all systems; whether each is clearly determined.

    With columns of unit length tr G is n, so that 1/tr G⁻¹ bounds the least eigenvalue, and n the
    largest.

    Args:
        gram: Their matrices, one after the other.
        right: Their right-hand sides, one after the other.
        sizes: Of each. # (systems,)
        out: Where solutions go.
        work: # (3, largest, largest)
        most: The condition beyond which one is not clear.
    """
    at, column = 0, 0
    low, inverse, scale = work[0], work[1], work[2, 0]
    for n in sizes:
        for i in range(n):
            diagonal = gram[at + i * n + i]
            if not diagonal > 0.0:
                return False
            scale[i] = 1.0 / np.sqrt(diagonal)
        size = 0.0
        for i in range(n):
            for j in range(i + 1):
                total = gram[at + i * n + j] * scale[i] * scale[j]
                for c in range(j):
                    total -= low[i, c] * low[j, c]
                if i == j:
                    if not total > 0.0:
                        return False
                    low[i, i] = np.sqrt(total)
                else:
                    low[i, j] = total / low[j, j]
            for j in range(i + 1):
                total = 1.0 if i == j else 0.0
                for c in range(j, i):
                    total -= low[i, c] * inverse[c, j]
                inverse[i, j] = total / low[i, i]
                size += inverse[i, j] * inverse[i, j]
        if not size * n < most:
            return False
        for i in range(n):  # L z = s b, in place of the solution
            total = right[column + i] * scale[i]
            for c in range(i):
                total -= low[i, c] * out[column + c]
            out[column + i] = total / low[i, i]
        for i in range(n - 1, -1, -1):
            total = out[column + i]
            for c in range(i + 1, n):
                total -= low[c, i] * out[column + c]
            out[column + i] = total / low[i, i]
        for i in range(n):
            out[column + i] *= scale[i]
        at, column = at + n * n, column + n
    return True


@_plain
def spreads(
    design: np.ndarray,
    column: np.ndarray,
    step: np.ndarray,
    phi_phi: np.ndarray,
    r_phi: np.ndarray,
    r_r: np.ndarray,
    is_matrix: bool,
    row: np.ndarray,
    place: np.ndarray,
    factor: np.ndarray,
    total: np.ndarray,
    work: np.ndarray,
) -> None:
    """Move r rᵀ of a site to new coefficients, and add it to the sums of the spreads it is of.

    Args:
        design: Empty where no coefficient is free. # (lead, K, D, q, w)
        column: # (lead, K, D, w)
        step: By how much each unknown moves. # (p + 1,)
        phi_phi: # (lead, K, D|1, q, q)
        r_phi: # (lead, K, D, q)
        r_r: # (lead, K, D, D|1)
        is_matrix: Whether entries are correlated.
        row: Numbers of `r_r`, as one. # (entries,)
        place: The element of θ that each is summed for. # (entries,)
        factor: What it is multiplied by. # (entries,)
        total: The sums. # (elements of θ,)
        work: # (2, D, q)
    """
    K, D, q = r_phi.shape[1:]
    delta, moved = work[0], work[1]
    for l in range(len(design)):
        for k in range(K):
            for d in range(D):
                phi = phi_phi[l, k, d if phi_phi.shape[2] > 1 else 0]
                for a in range(q):
                    x = 0.0
                    for j in range(design.shape[4]):
                        x += design[l, k, d, a, j] * step[column[l, k, d, j]]
                    delta[d, a] = x
                for a in range(q):
                    x = 0.0
                    for b in range(q):
                        x += delta[d, b] * phi[b, a]
                    moved[d, a] = x
            for d in range(D):
                for c in range(0 if is_matrix else d, d + 1):
                    x = 0.0
                    for a in range(q):
                        x += moved[d, a] * delta[c, a]
                        x -= r_phi[l, k, d, a] * delta[c, a] + r_phi[l, k, c, a] * delta[d, a]
                    if is_matrix:
                        r_r[l, k, d, c] += x
                        if c < d:
                            r_r[l, k, c, d] += x
                    else:
                        r_r[l, k, d, 0] += x
    width = r_r.shape[3]
    for e in range(len(row)):
        rest, i = divmod(row[e], width)
        rest, d = divmod(rest, D)
        l, k = divmod(rest, K)
        total[place[e]] += factor[e] * r_r[l, k, d, i]


@_plain
def deviations(
    total: np.ndarray,
    chosen: np.ndarray,
    count: np.ndarray,
    least: np.ndarray,
    before: np.ndarray,
    lost: float,
    out: np.ndarray,
) -> bool:
    """Deviations from sums of squares; whether each is clearly above rounding.

    Args:
        total: Sums of squares. # (elements of θ,)
        chosen: Which elements are deviations. # (p,)
        count: How many data each has. # (p,)
        least: What rounding may be. # (p,)
        before: What they were, of those with a single datum. # (p,)
        lost: How much of a variance a single datum may leave.
        out: Where they go. # (p,)
    """
    for i in range(len(chosen)):
        if not (count[i] > 0.0 and total[chosen[i]] > 0.0):
            return False
        if count[i] < 2.0 and not total[chosen[i]] >= lost * count[i] * before[i] ** 2:
            return False
        out[i] = np.sqrt(total[chosen[i]] / count[i])
        if not out[i] > least[i]:
            return False
    return True


@_plain
def matrices(
    total: np.ndarray,
    begin: int,
    count: np.ndarray,
    magnitude: np.ndarray,
    is_factor: bool,
    before: np.ndarray,
    lost: float,
    out: np.ndarray,
    work: np.ndarray,
) -> bool:
    """Covariances, or their lower triangles, from sums; whether each is clearly regular.

    The least eigenvalue is at least 1/tr Σ⁻¹, and at most the least variance.

    Args:
        total: Sums. # (elements of θ,)
        begin: Where those of the matrices begin.
        count: How many data each has. # (events,)
        magnitude: What rounding is relative to. # (events, D)
        is_factor: Whether the parameter holds triangles.
        before: The parameters before. # (elements of θ,)
        lost: How much of a variance few data may leave.
        out: The new parameters. # (elements of θ,)
        work: Zeros. # (2, D, D)
    """
    low, inverse = work[0], work[1]
    D = len(low)
    for v in range(len(count)):
        at = begin + v * D * D
        if not count[v] > 0.0:
            return False
        for i in range(D):
            for j in range(i + 1):
                x = 0.5 * (total[at + i * D + j] + total[at + j * D + i]) / count[v]
                out[at + i * D + j] = x
                out[at + j * D + i] = x
        for i in range(D):
            for j in range(i + 1):
                x = out[at + i * D + j]
                for c in range(j):
                    x -= low[i, c] * low[j, c]
                if i == j:
                    variance = out[at + i * D + i]
                    if not (x > 1e-10 * variance and variance > 1e-8 * magnitude[v, i] ** 2):
                        return False
                    low[i, i] = np.sqrt(x)
                else:
                    low[i, j] = x / low[j, j]
        if count[v] < D + 1.1:
            size, was = 0.0, np.inf
            for i in range(D):
                variance = before[at + i * D + i]
                if is_factor:
                    variance = 0.0
                    for c in range(i + 1):
                        variance += before[at + i * D + c] ** 2
                was = min(was, variance)
                for j in range(i + 1):
                    x = 1.0 if i == j else 0.0
                    for c in range(j, i):
                        x -= low[i, c] * inverse[c, j]
                    inverse[i, j] = x / low[i, i]
                    size += inverse[i, j] ** 2
            if not lost * was * size < 1.0:
                return False
        if is_factor:
            for i in range(D):
                for j in range(D):
                    out[at + i * D + j] = low[i, j]
    return True
