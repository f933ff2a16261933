"""Sums over the steps of Gaussian chains, as compiled loops: see `compiled_m_step`.

Sums over steps are products of rows that lie one after the other, some hundred steps at a time.

All compiled functions that call each other are in one file: Numba's cache on disk notices a change of
the file of the function that is called first, and of no other.
"""

from __future__ import annotations

import numpy as np

from pyro_em.posteriors.chain_sums.numba_loops import compiled, plain

WIDTH = 512  # steps at a time


@plain
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


@compiled
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


@compiled
def _entries(states: np.ndarray, steps: np.ndarray, place: int, out: np.ndarray) -> None:
    """One number of the states of some steps.

    Args:
        states: # (T, n)
        steps: Mostly steps that follow each other. # (many,)
        place: Which number.
        out: Where they go. # (many or more,)
    """
    many, first, gaps = len(steps), steps[0], 0
    for i in range(many):
        gaps += steps[i] != first + i
    if gaps == 0:
        own = states[first : first + many, place]
        for i in range(many):
            out[i] = own[i]
    else:
        for i in range(many):
            out[i] = states[steps[i], place]


@compiled
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
                    x = rows[D + j]
                    if there[k, j]:
                        _entries(mean[c], before[begin : begin + many], reads[k, j], x)
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
                        _entries(noise[c], levels[begin : begin + many], own[k, d], x)
                    else:
                        data = residual[c, begin : begin + many, k, d]
                        for i in range(many):
                            x[i] = data[i]
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


@plain
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


@plain
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


@plain
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
