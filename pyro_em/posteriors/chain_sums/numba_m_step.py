"""The M-step of Gaussian chains from sums, as compiled loops: see `compiled_m_step`.

What is not clearly determined is left: the numpy way judges it.
"""

from __future__ import annotations

import numpy as np

from pyro_em.posteriors.chain_sums.numba_loops import plain


@plain
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


@plain
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


@plain
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


@plain
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


@plain
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
