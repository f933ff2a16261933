"""The most probable path of chains as one compiled loop: see `pyro_em.posteriors.messages.viterbi`.

Only the best log density that ends in each state is kept. Whence it came is found again along the one
path that counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

# Sums are made in the order in which numpy makes them: ties are decided alike.
_compiled: Callable[[Any], Any] = numba.njit(error_model="numpy", cache=True, nogil=True)


@_compiled
def best_paths(log_l: np.ndarray, log_A: np.ndarray, path: np.ndarray) -> None:
    """Fill in the path of each sequence.

    Args:
        log_l: Log densities; those of the first step with the initial ones. # (T, B, K)
        log_A: Rows from the former state. # (T - 1 or 1, B or 1, K, K)
        path: Where the states go. # (T, B)
    """
    T, B, K = log_l.shape
    best = np.empty((T, K), log_l.dtype)
    for b in range(B):
        own = b % log_A.shape[1]
        for j in range(K):
            best[0, j] = log_l[0, b, j]
        for t in range(1, T):
            A, before, now = log_A[(t - 1) % len(log_A), own], best[t - 1], best[t]
            for i in range(K):
                a = before[i]
                if i == 0:
                    for j in range(K):
                        now[j] = a + A[0, j]
                    continue
                for j in range(K):
                    x = a + A[i, j]
                    now[j] = x if x > now[j] else now[j]
            for j in range(K):
                now[j] += log_l[t, b, j]
        state = 0
        for j in range(1, K):
            if best[T - 1, j] > best[T - 1, state]:
                state = j
        path[T - 1, b] = state
        for t in range(T - 1, 0, -1):
            A, before, to = log_A[(t - 1) % len(log_A), own], best[t - 1], state
            state, top = 0, before[0] + A[0, to]
            for i in range(1, K):
                x = before[i] + A[i, to]
                if x > top:
                    state, top = i, x
            path[t - 1, b] = state
