"""Smoothing of chains of any moves as one compiled loop: see `smooth_moves`.

A stage of a move multiplies a message by a table and sums. It is a list of short runs, each over the
last dimension of what comes out, ``out[o + i] += x[·] a[·]``; in a run either the table goes along
(``ALONG_TABLE``), or the message (``ALONG_STATE``), or both (``ALONG_BOTH``). The way back, and the
expected counts of a table's cells, are the same runs with other roles.

As in `pyro_em.posteriors.messages.numba_chain`, a forward message is divided by its mass at the next
step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

ALONG_TABLE, ALONG_STATE, ALONG_BOTH = 0, 1, 2


_compiled: Callable[[Any], Any] = numba.njit(
    fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", cache=True, nogil=True
)


@_compiled
def _forth(
    x: np.ndarray,
    tables: np.ndarray,
    at: int,
    out: np.ndarray,
    size: int,
    runs: np.ndarray,
    begin: int,
    end: int,
    kind: int,
    n: int,
) -> None:
    """out = Σ x a, over the runs of one stage."""
    for i in range(size):
        out[i] = 0.0
    for e in range(begin, end):
        o, a, k = runs[0, e], at + runs[1, e], runs[2, e]
        if kind == 0:
            factor = x[k]
            for i in range(n):
                out[o + i] += factor * tables[a + i]
        elif kind == 1:
            factor = tables[a]
            for i in range(n):
                out[o + i] += factor * x[k + i]
        else:
            for i in range(n):
                out[o + i] += x[k + i] * tables[a + i]


@_compiled
def _back(
    x: np.ndarray,
    tables: np.ndarray,
    at: int,
    w: np.ndarray,
    out: np.ndarray,
    size: int,
    runs: np.ndarray,
    begin: int,
    end: int,
    kind: int,
    n: int,
    m: float,
    counts: np.ndarray,
) -> None:
    """out = Σ a w over the runs of one stage, and counts += m x w."""
    for i in range(size):
        out[i] = 0.0
    for e in range(begin, end):
        o, a, k = runs[0, e], at + runs[1, e], runs[2, e]
        if kind == 0:
            factor, total = m * x[k], 0.0
            for i in range(n):
                total += tables[a + i] * w[o + i]
                counts[a + i] += factor * w[o + i]
            out[k] += total
        elif kind == 1:
            factor, total = tables[a], 0.0
            for i in range(n):
                total += x[k + i] * w[o + i]
                out[k + i] += factor * w[o + i]
            counts[a] += m * total
        else:
            for i in range(n):
                out[k + i] += tables[a + i] * w[o + i]
                counts[a + i] += m * (x[k + i] * w[o + i])


@_compiled
def smooth_moves(
    likelihood: np.ndarray,
    tables: np.ndarray,
    place: np.ndarray,
    sequence: np.ndarray,
    weight: np.ndarray,
    runs: np.ndarray,
    begins: np.ndarray,
    kinds: np.ndarray,
    inner: np.ndarray,
    sizes: np.ndarray,
    gamma: np.ndarray,
    counts: np.ndarray,
    log_p: np.ndarray,
) -> None:
    """Fill gamma, counts and log_p; log_p is NaN where a step's mass nearly underflows.

    Args:
        likelihood: # (B, T, P)
        tables: All numbers of all stages. # (cells,)
        place: Where in ``tables`` each stage's table of each move begins. # (S, T - 1)
        sequence: What lies between the tables of two sequences, 0 where they share. # (S,)
        weight: How much each move counts in each stage. # (S, B or 1, T - 1 or 1)
        runs: Where each run begins in what comes out, in the table, and in the message. # (3, runs)
        begins: The first run of each stage, and the end. # (S + 1,)
        kinds: What goes along in the runs of each stage. # (S,)
        inner: Lengths of its runs. # (S,)
        sizes: Sizes of the message before the first stage, and after each. # (S + 1,)
        gamma: Where the posterior marginals go. # (B, T, P)
        counts: Where the sums of x w of each cell of a table are added; zero before. # (cells,)
        log_p: Where the log evidence of each sequence goes. # (B,)
    """
    B, T, P = likelihood.shape
    S = len(kinds)
    most = 0
    for s in range(S + 1):
        most = max(most, sizes[s])
    x, w, scale = np.zeros((S + 1, most)), np.zeros((S + 1, most)), np.empty(T)
    Bw, Tw = weight.shape[1], weight.shape[2]
    for b in range(B):
        total = 0.0
        for j in range(P):
            x[0, j] = likelihood[b, 0, j]
            gamma[b, 0, j] = x[0, j]
            total += x[0, j]
        mass, s_t, log_evidence = total, 1.0 / total, 0.0
        scale[0] = s_t
        is_lost = not total > 1e-150
        for t in range(1, T):
            for s in range(S):
                _forth(
                    x[s], tables, place[s, t - 1] + b * sequence[s], x[s + 1], sizes[s + 1],
                    runs, begins[s], begins[s + 1], kinds[s], inner[s],
                )  # fmt: skip
            total = 0.0
            for j in range(P):
                a = x[S, j] * (likelihood[b, t, j] * s_t)
                x[0, j] = a
                gamma[b, t, j] = a
                total += a
            if not total > 1e-150:  # a state that underflowed may have been the likely one
                is_lost = True
                break
            s_t = 1.0 / total
            scale[t] = s_t
            mass *= total
            if not 1e-150 < mass < 1e150:
                log_evidence += np.log(mass)
                mass = 1.0
        if is_lost:
            log_p[b] = np.nan
            continue
        log_p[b] = log_evidence + np.log(mass)
        for j in range(P):
            w[0, j] = 1.0
        for t in range(T - 1, 0, -1):
            for j in range(P):
                each = w[0, j] * scale[t]
                w[S, j] = likelihood[b, t, j] * each
                gamma[b, t, j] *= each
                x[0, j] = gamma[b, t - 1, j] * scale[t - 1]
            for s in range(S - 1):
                _forth(
                    x[s], tables, place[s, t - 1] + b * sequence[s], x[s + 1], sizes[s + 1],
                    runs, begins[s], begins[s + 1], kinds[s], inner[s],
                )  # fmt: skip
            for s in range(S - 1, -1, -1):
                m = weight[s, b % Bw, (t - 1) % Tw]
                _back(
                    x[s], tables, place[s, t - 1] + b * sequence[s], w[s + 1], w[s], sizes[s],
                    runs, begins[s], begins[s + 1], kinds[s], inner[s], m, counts,
                )  # fmt: skip
        for j in range(P):
            gamma[b, 0, j] *= w[0, j] * scale[0]
