"""The forward messages of chains as one compiled loop, in logarithms: `forward`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_compiled: Callable[[Any], Any] = numba.njit(error_model="numpy", cache=True, nogil=True)


@_compiled
def forward_rows(log_l: np.ndarray, log_A: np.ndarray, alpha: np.ndarray, norm: np.ndarray) -> None:
    """Fill in the messages of each sequence.

    Args:
        log_l: Log densities; those of the first step with the initial ones. # (T, B, K)
        log_A: Rows from the former state. # (T - 1 or 1, B or 1, K, K)
        alpha: Where log p(z_t | x_1, …, x_t) goes. # (T, B, K)
        norm: Where log p(x_t | x_1, …, x_{t-1}) goes. # (T, B)
    """
    T, B, K = log_l.shape
    top, total = np.empty(K, log_l.dtype), np.empty(K, log_l.dtype)
    for b in range(B):
        own = b % log_A.shape[1]
        for t in range(T):
            now = alpha[t, b]
            if t == 0:
                for j in range(K):
                    now[j] = log_l[0, b, j]
            else:
                A, before = log_A[(t - 1) % len(log_A), own], alpha[t - 1, b]
                for j in range(K):
                    top[j], total[j] = -np.inf, 0.0
                for i in range(K):
                    for j in range(K):
                        top[j] = max(top[j], before[i] + A[i, j])
                for i in range(K):
                    for j in range(K):
                        if top[j] > -np.inf:
                            total[j] += np.exp(before[i] + A[i, j] - top[j])
                for j in range(K):
                    now[j] = top[j] + np.log(total[j]) + log_l[t, b, j]
            most, mass = -np.inf, 0.0
            for j in range(K):
                most = max(most, now[j])
            for j in range(K):
                mass += np.exp(now[j] - most)
            norm[t, b] = most + np.log(mass)
            for j in range(K):
                now[j] -= norm[t, b]
