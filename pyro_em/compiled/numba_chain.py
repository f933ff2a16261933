"""Smoothing of chains as one compiled loop: see `pyro_em.compiled.forward_backward`."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(
    fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", cache=True, nogil=True
)
def smooth(
    likelihood: np.ndarray, A: np.ndarray, weight: np.ndarray, gamma: np.ndarray, xi: np.ndarray
) -> float:
    """Fill gamma and xi; return the log evidence, NaN where a step's mass nearly underflows.

    Args:
        likelihood: # (B, T, K)
        A: # (K, K)
        weight: Of each transition; one number stands for all. # (B or 1, T - 1 or 1)
        gamma: Where the posterior marginals go. # (B, T, K)
        xi: Where the expected transitions go. # (K, K)
    """
    B, T, K = likelihood.shape
    w, beta, scale = np.empty(K), np.empty(K), np.empty(T)
    xi[:, :] = 0.0
    log_evidence = 0.0
    for b in range(B):
        total = 0.0
        for j in range(K):
            gamma[b, 0, j] = likelihood[b, 0, j]
            total += gamma[b, 0, j]
        for j in range(K):
            gamma[b, 0, j] /= total
        log_evidence += np.log(total)
        for t in range(1, T):
            row = gamma[b, t]
            row[:] = 0.0
            for i in range(K):
                a = gamma[b, t - 1, i]
                for j in range(K):
                    row[j] += a * A[i, j]
            total = 0.0
            for j in range(K):
                row[j] *= likelihood[b, t, j]
                total += row[j]
            if not total > 1e-150:  # a state that underflowed may have been the likely one
                return np.nan
            scale[t] = 1.0 / total
            log_evidence += np.log(total)
            for j in range(K):
                row[j] *= scale[t]
        beta[:] = 1.0
        for t in range(T - 1, 0, -1):
            for j in range(K):
                w[j] = likelihood[b, t, j] * beta[j] * scale[t]
                gamma[b, t, j] *= beta[j]
            m = weight[b % weight.shape[0], (t - 1) % weight.shape[1]]
            for i in range(K):
                s = 0.0
                a = gamma[b, t - 1, i] * m
                for j in range(K):
                    s += A[i, j] * w[j]
                    xi[i, j] += a * w[j]
                beta[i] = s
        for j in range(K):
            gamma[b, 0, j] *= beta[j]
    for i in range(K):
        for j in range(K):
            xi[i, j] *= A[i, j]
    return log_evidence
