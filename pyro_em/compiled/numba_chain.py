"""The messages of a chain as a compiled loop: see `pyro_em.compiled.forward_backward`."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(
    fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", cache=True, nogil=True
)
def sweep(likelihood: np.ndarray, A: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> None:
    """Fill alpha and beta; a step whose mass underflows leaves rows that are not numbers.

    Args:
        likelihood: # (B, T, K)
        A: # (K, K)
        alpha: Where the forward messages go. # (B, T, K)
        beta: Where the backward messages go. # (B, T, K)
    """
    B, T, K = likelihood.shape
    w = np.empty(K, likelihood.dtype)
    for b in range(B):
        total = 0.0
        for j in range(K):
            alpha[b, 0, j] = likelihood[b, 0, j]
            total += alpha[b, 0, j]
        for j in range(K):
            alpha[b, 0, j] /= total
        for t in range(1, T):
            row = alpha[b, t]
            row[:] = 0.0
            for i in range(K):
                a = alpha[b, t - 1, i]
                for j in range(K):
                    row[j] += a * A[i, j]
            total = 0.0
            for j in range(K):
                row[j] *= likelihood[b, t, j]
                total += row[j]
            scale = 1.0 / total
            for j in range(K):
                row[j] *= scale
        for j in range(K):
            beta[b, T - 1, j] = 1.0 / K
        for t in range(T - 1, 0, -1):
            for j in range(K):
                w[j] = likelihood[b, t, j] * beta[b, t, j]
            total = 0.0
            for i in range(K):
                s = 0.0
                for j in range(K):
                    s += A[i, j] * w[j]
                beta[b, t - 1, i] = s
                total += s
            scale = 1.0 / total
            for i in range(K):
                beta[b, t - 1, i] *= scale
