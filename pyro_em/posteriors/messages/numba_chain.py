"""Smoothing of chains as one compiled loop: see `pyro_em.posteriors.messages.forward_backward`.

A forward message is not divided by its own mass: that goes into the next step's likelihood, so that
no second pass waits for a sum. Logarithms are taken of products of many masses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_WIDTH = 8  # numbers side by side; LLVM splits what a machine's registers do not hold

_STEPS = 16  # steps whose transitions are counted together

ONE = np.ones((1, 1))  # the weight where none is given


_compiled: Callable[[Any], Any] = numba.njit(
    fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", cache=True, nogil=True
)


_intrinsic: Callable[[Any], Any] = intrinsic


@_intrinsic
def _product(
    _: Any, out: Any, o: Any, x: Any, i: Any, M: Any, m: Any, step: Any, n: Any, width: Any
) -> Any:
    """``out[o:o + width] = x[i:i + n] @ M``, whose rows begin at m, m + step, … of a flat array.

    The sums stay in registers, where Numba's own loops load and store ``out`` for each of the n
    terms, and no views are made. Arrays are contiguous; the width is a multiple of eight.
    """
    integer = ir.IntType(64)
    vector = ir.VectorType(ir.DoubleType(), _WIDTH)
    mask = ir.Constant(ir.VectorType(ir.IntType(32), _WIDTH), [0] * _WIDTH)
    nothing, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(vector, [0.0] * _WIDTH)
    fast = ("contract", "reassoc", "nsz")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def at(k: int) -> Any:
            array = context.make_array(signature.args[k])(context, builder, args[k])
            return builder.gep(array.data, [args[k + 1]])

        to, factors, matrix = at(0), at(2), at(4)
        step, n, width = args[6:]

        def vectors(start: Any, count: int) -> list[Any]:
            places = (builder.gep(start, [integer(_WIDTH * q)]) for q in range(count))
            return [builder.bitcast(place, vector.as_pointer()) for place in places]

        def block(start: Any, count: int) -> None:
            """Columns from ``start`` on, by two chains of sums: each term waits for one before."""
            sums = [[cgutils.alloca_once(builder, vector) for _ in range(count)] for _ in range(2)]
            for total in sums[0] + sums[1]:
                builder.store(zeros, total)

            def term(row: Any, chain: int) -> None:
                factor = builder.load(builder.gep(factors, [row]))
                one = builder.insert_element(nothing, factor, ir.IntType(32)(0))
                all_ = builder.shuffle_vector(one, nothing, mask)
                columns = builder.gep(matrix, [builder.add(builder.mul(row, step), start)])
                for total, place in zip(sums[chain], vectors(columns, count), strict=True):
                    product = builder.fmul(all_, builder.load(place, align=8), flags=fast)
                    builder.store(builder.fadd(product, builder.load(total), flags=fast), total)

            with cgutils.for_range(builder, builder.ashr(n, integer(1))) as pair:
                row = builder.mul(pair.index, integer(2))
                term(row, 0)
                term(builder.add(row, integer(1)), 1)
            with builder.if_then(builder.trunc(n, ir.IntType(1))):
                term(builder.sub(n, integer(1)), 0)
            for q, place in enumerate(vectors(builder.gep(to, [start]), count)):
                both = [builder.load(chain[q]) for chain in sums]
                builder.store(builder.fadd(*both, flags=fast), place, align=8)

        two = integer(2 * _WIDTH)
        with cgutils.for_range(builder, builder.sdiv(width, two)) as loop:
            block(builder.mul(loop.index, two), 2)
        done = builder.mul(builder.sdiv(width, two), two)
        with builder.if_then(builder.icmp_signed("<", done, width)):
            block(done, 1)
        return context.get_dummy_value()

    return types.void(out, o, x, i, M, m, step, n, width), codegen


@_compiled
def smooth_rows(
    likelihood: np.ndarray,
    A: np.ndarray,
    weight: np.ndarray,
    often: np.ndarray,
    gamma: np.ndarray,
    xi: np.ndarray,
) -> float:
    """Fill gamma and xi; return the log evidence, NaN where a step's mass nearly underflows.

    Args:
        likelihood: # (B, T, K)
        A: # (K, K)
        weight: Of each transition; one number stands for all. # (B or 1, T - 1 or 1)
        often: Of each sequence, in the log evidence. # (B,)
        gamma: Where the posterior marginals go. # (B, T, K)
        xi: Where the expected transitions go. # (K, K)
    """
    B, T, K = likelihood.shape
    P = -(-K // _WIDTH) * _WIDTH
    forward, backward, counts = np.zeros((K, P)), np.zeros((K, P)), np.zeros((K, P))
    for i in range(K):
        for j in range(K):
            forward[i, j], backward[j, i] = A[i, j], A[i, j]
    alpha, moved, beta, scale = np.zeros(P), np.zeros(P), np.zeros(P), np.empty(T)
    starts, ends, n = np.zeros((K, _STEPS)), np.zeros((_STEPS, P)), 0
    log_evidence = 0.0
    for b in range(B):
        total = 0.0
        for j in range(K):
            alpha[j] = likelihood[b, 0, j]
            gamma[b, 0, j] = alpha[j]
            total += alpha[j]
        mass, s = total, 1.0 / total
        scale[0] = s
        for t in range(1, T):
            _product(moved, 0, alpha, 0, forward, 0, P, K, P)
            total = 0.0
            for j in range(K):
                a = moved[j] * (likelihood[b, t, j] * s)
                alpha[j] = a
                gamma[b, t, j] = a
                total += a
            if not total > 1e-150:  # a state that underflowed may have been the likely one
                return np.nan
            s = 1.0 / total
            scale[t] = s
            mass *= total
            if not 1e-150 < mass < 1e150:
                log_evidence += often[b] * np.log(mass)
                mass = 1.0
        log_evidence += often[b] * np.log(mass)
        for j in range(K):
            beta[j] = 1.0
        for t in range(T - 1, 0, -1):
            s = scale[t]
            for j in range(K):
                each = beta[j] * s
                ends[n, j] = likelihood[b, t, j] * each
                gamma[b, t, j] *= each
            _product(beta, 0, ends, n * P, backward, 0, P, K, P)
            m = weight[b % weight.shape[0], (t - 1) % weight.shape[1]] * scale[t - 1]
            for i in range(K):
                starts[i, n] = gamma[b, t - 1, i] * m
            n += 1
            if n == _STEPS or (t == 1 and b == B - 1):
                for i in range(K):
                    _product(moved, 0, starts, i * _STEPS, ends, 0, P, n, P)
                    for j in range(P):
                        counts[i, j] += moved[j]
                n = 0
        for j in range(K):
            gamma[b, 0, j] *= beta[j] * scale[0]
    for i in range(K):
        for j in range(K):
            xi[i, j] = counts[i, j] * A[i, j]
    return log_evidence


@_compiled
def smooth_lanes(
    likelihood: np.ndarray,
    A: np.ndarray,
    weight: np.ndarray,
    often: np.ndarray,
    gamma: np.ndarray,
    xi: np.ndarray,
) -> float:
    """The same for many sequences with few states: the inner loops run over sequences.

    Args:
        likelihood: # (K, T, B)
        A: # (K, K)
        weight: Of each transition; one number stands for all. # (T - 1 or 1, B or 1)
        often: Of each sequence, in the log evidence. # (B,)
        gamma: Where the posterior marginals go. # (K, T, B)
        xi: Where the expected transitions go. # (K, K)
    """
    K, T, B = likelihood.shape
    P, Q = -(-B // _WIDTH) * _WIDTH, -(-K // 4) * 4
    At = np.empty((K, K))
    for i in range(K):
        for j in range(K):
            At[j, i] = A[i, j]
    alpha, moved, beta, to = np.zeros((K, P)), np.zeros((K, P)), np.ones((K, P)), np.zeros((Q, P))
    scale, mass, total, m = np.empty((T, B)), np.ones(B), np.empty(B), np.empty(B)
    counts = np.zeros((K, Q))
    low, high, log_evidence = 1.0, 1.0, 0.0
    for t in range(T):
        for b in range(B):
            total[b] = 0.0
        for j in range(K):
            row, l, g = moved[j], likelihood[j, t], gamma[j, t]
            if t > 0:
                _product(moved, j * P, At, j * K, alpha, 0, P, K, P)
                s = scale[t - 1]
                for b in range(B):
                    a = row[b] * (l[b] * s[b])
                    row[b] = a
                    g[b] = a
                    total[b] += a
            else:
                for b in range(B):
                    a = l[b]
                    row[b] = a
                    g[b] = a
                    total[b] += a
        alpha, moved = moved, alpha
        s, least, most, bad = scale[t], 1.0, 1.0, 0
        for b in range(B):
            least, most = min(least, total[b]), max(most, total[b])
            bad += not total[b] > 1e-150
            mass[b] *= total[b]
            s[b] = 1.0 / total[b]
        if bad:  # a state that underflowed may have been the likely one
            return np.nan
        low, high = low * least, high * most
        if low < 1e-150 or high > 1e150:
            for b in range(B):
                log_evidence += often[b] * np.log(mass[b])
                mass[b] = 1.0
            low, high = 1.0, 1.0
    for b in range(B):
        log_evidence += often[b] * np.log(mass[b])
    for t in range(T - 1, 0, -1):
        s = scale[t]
        for j in range(K):
            w, e, l, g = to[j], beta[j], likelihood[j, t], gamma[j, t]
            for b in range(B):
                each = e[b] * s[b]
                w[b] = l[b] * each
                g[b] *= each
        of, s = weight[(t - 1) % weight.shape[0]], scale[t - 1]
        if len(of) == 1:
            for b in range(B):
                m[b] = of[0] * s[b]
        else:
            for b in range(B):
                m[b] = of[b] * s[b]
        for i in range(K):
            _product(beta, i * P, A, i * K, to, 0, P, K, P)
            g = gamma[i, t - 1]
            for j in range(0, Q, 4):
                w0, w1, w2, w3 = to[j], to[j + 1], to[j + 2], to[j + 3]
                c0, c1, c2, c3 = 0.0, 0.0, 0.0, 0.0
                for b in range(B):
                    a = g[b] * m[b]
                    c0 += a * w0[b]
                    c1 += a * w1[b]
                    c2 += a * w2[b]
                    c3 += a * w3[b]
                counts[i, j] += c0
                counts[i, j + 1] += c1
                counts[i, j + 2] += c2
                counts[i, j + 3] += c3
    s = scale[0]
    for j in range(K):
        e, g = beta[j], gamma[j, 0]
        for b in range(B):
            g[b] *= e[b] * s[b]
    for i in range(K):
        for j in range(K):
            xi[i, j] = counts[i, j] * A[i, j]
    return log_evidence


@_compiled
def smooth_each(
    likelihood: np.ndarray, A: np.ndarray, gamma: np.ndarray, xi: np.ndarray, log_p: np.ndarray
) -> None:
    """Fill all of them, where each step has transitions of its own.

    Args:
        likelihood: # (T, B, K)
        A: # (T - 1, B or 1, K, K)
        gamma: Where the posterior marginals go. # (T, B, K)
        xi: Where those of neighbours go. # (T - 1, B, K, K)
        log_p: Where the log evidence of each sequence goes; NaN where a step's mass nearly
            underflows. # (B,)
    """
    T, B, K = likelihood.shape
    moved, beta, to, scale = np.zeros(K), np.zeros(K), np.zeros(K), np.empty(T)
    for b in range(B):
        own, total, log_evidence, mass = b % A.shape[1], 0.0, 0.0, 1.0
        for t in range(T):
            if t > 0:
                for j in range(K):
                    moved[j] = 0.0
                for i in range(K):
                    a = gamma[t - 1, b, i] * scale[t - 1]
                    for j in range(K):
                        moved[j] += a * A[t - 1, own, i, j]
            total = 0.0
            for j in range(K):
                a = likelihood[t, b, j] * (moved[j] if t > 0 else 1.0)
                gamma[t, b, j] = a
                total += a
            if not total > 1e-100:  # a state that underflowed may have been the likely one
                mass = np.nan
                break
            scale[t] = 1.0 / total
            mass *= total
            if not 1e-150 < mass < 1e150:
                log_evidence += np.log(mass)
                mass = 1.0
        log_p[b] = log_evidence + np.log(mass)
        if not mass > 0.0:
            continue
        for j in range(K):
            beta[j] = 1.0
        for t in range(T - 1, -1, -1):
            for j in range(K):
                each = beta[j] * scale[t]
                to[j] = likelihood[t, b, j] * each
                gamma[t, b, j] *= each
            if t == 0:
                break
            for i in range(K):
                a, total = gamma[t - 1, b, i] * scale[t - 1], 0.0
                for j in range(K):
                    p = A[t - 1, own, i, j] * to[j]
                    xi[t - 1, b, i, j] = a * p
                    total += p
                beta[i] = total
