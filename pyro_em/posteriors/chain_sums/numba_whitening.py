"""Data whose noises are correlated, whitened by a compiled loop: see `state_matrices`."""

from __future__ import annotations

import numpy as np

from pyro_em.posteriors.chain_sums.numba_loops import plain


@plain
def whiten(
    factor: np.ndarray, C: np.ndarray, rows: np.ndarray, white: np.ndarray, out: np.ndarray
) -> None:
    """L⁻¹ C and L⁻¹ r by substitution.

    Args:
        factor: L; nothing above its diagonal is read. # (chains|1, K, D, D)
        C: # (chains|1, K, D, Q)
        rows: r. # (chains, N, K, D)
        white: Where L⁻¹ C goes. # (chains|1, K, D, Q)
        out: Where L⁻¹ r goes. # (chains, N, K, D)
    """
    chains, N, K, D = rows.shape
    for l in range(len(white)):
        for k in range(K):
            L, c = factor[l % len(factor), k], C[l % len(C), k]
            for q in range(C.shape[3]):
                for d in range(D):
                    x = c[d, q]
                    for e in range(d):
                        x -= L[d, e] * white[l, k, e, q]
                    white[l, k, d, q] = x / L[d, d]
    for j in range(chains):
        for k in range(K):
            L = factor[j % len(factor), k]
            for d in range(D):
                by = 1.0 / L[d, d]
                for i in range(N):
                    out[j, i, k, d] = rows[j, i, k, d] * by
                for e in range(d):
                    by_other = by * L[d, e]
                    for i in range(N):
                        out[j, i, k, d] -= by_other * out[j, i, k, e]
