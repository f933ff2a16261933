"""E-steps of mixtures over rows as one compiled loop: some rows at a time stay in the first cache.

Log densities of K components, responsibilities r and the sums Σ r T, without a table of all rows. The
exponential and the logarithm are polynomials, which a processor evaluates for several rows at once:

    2^x = 2^n Σ_i (f log 2)^i / i!,           x = n + f,  |f| ≤ ½
    log u = e log 2 + 2 Σ_i s^(2i+1) / (2i+1),    u = 2^e m,  s = (m − 1) / (m + 1)

to the last bit or two of a double. Functions that round on purpose forbid that sums be reordered; those
that add over rows allow it.

Source: Muller (2016), "Elementary Functions", chapters 3 and 11.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_NUMBERS = 2**14  # that are held of the rows that are looked at together

_LOG2_E = 1.4426950408889634

ONE = np.ones(1)  # how often each row counts where nothing is said

_exactly: Callable[[Any], Any] = numba.njit(
    fastmath={"contract", "nsz"}, error_model="numpy", cache=True, nogil=True
)

_adding: Callable[[Any], Any] = numba.njit(
    fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", cache=True, nogil=True
)

_intrinsic: Callable[[Any], Any] = intrinsic


@_intrinsic
def _bits(_: Any, x: Any) -> Any:
    """The bits of a double as an integer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(64))

    return types.int64(x), codegen


@_intrinsic
def _double(_: Any, i: Any) -> Any:
    """The double of some bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(i), codegen


_SHIFT = 6755399441055744.0  # 1.5 · 2^52: added to a number it leaves its integer in the last bits

_LN2 = math.log(2.0)
_LN2_HIGH = 0.6931471803691238  # with trailing zeros: its product with an exponent is exact
_LN2_LOW = 1.9082149292705877e-10
_MANTISSA = 0x000FFFFFFFFFFFFF
_ONE = 0x3FF0000000000000
_WHOLE = 0x4330000000000000  # the bits of 2^52

E0, E1, E2, E3, E4, E5, E6, E7, E8, E9, E10, E11, E12, E13 = (
    _LN2**i / math.factorial(i) for i in range(14)
)
L3, L5, L7, L9, L11, L13, L15, L17, L19, L21 = (2.0 / i for i in range(3, 22, 2))


@_exactly
def _exp2(x: float) -> float:
    """2^x of a number that is not above zero; zero below −1000."""
    near = -1010.0 if x < -1010.0 else x  # what is no number stays none
    shifted = near + _SHIFT
    f = near - (shifted - _SHIFT)
    p = E12 + f * E13
    p = E11 + f * p
    p = E10 + f * p
    p = E9 + f * p
    p = E8 + f * p
    p = E7 + f * p
    p = E6 + f * p
    p = E5 + f * p
    p = E4 + f * p
    p = E3 + f * p
    p = E2 + f * p
    p = E1 + f * p
    p = E0 + f * p
    return 0.0 if x < -1000.0 else p * _double((_bits(shifted) + 1023) << 52)


@_exactly
def _log(u: float) -> float:
    """The logarithm of a number that is not below one."""
    bits = _bits(u)
    e = _double(((bits >> 52) - 1023) | _WHOLE) - 4503599627370496.0
    m = _double((bits & _MANTISSA) | _ONE)
    is_high = m > 1.4142135623730951
    m = 0.5 * m if is_high else m
    e = e + 1.0 if is_high else e
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    p = L19 + q * L21
    p = L17 + q * p
    p = L15 + q * p
    p = L13 + q * p
    p = L11 + q * p
    p = L9 + q * p
    p = L7 + q * p
    p = L5 + q * p
    p = L3 + q * p
    return e * _LN2_HIGH + (e * _LN2_LOW + (2.0 * s + s * q * p))


@_exactly
def _log1p(t: float, u: float, inverse: float) -> float:
    """log(1 + t) of a number that is not negative, u = 1 + t as it was rounded."""
    return _log(u) + (t - (u - 1.0)) * inverse


@_adding
def _block(numbers: int) -> int:
    """How many rows are looked at together, of each of which some numbers are held."""
    return max(32, min(256, _NUMBERS // numbers // 16 * 16))


@_adding
def _normalised(
    joint: np.ndarray,
    often: np.ndarray,
    begin: int,
    n: int,
    top: np.ndarray,
    total: np.ndarray,
    mass: np.ndarray,
) -> float:
    """Log joint densities become responsibilities, times how often a row counts; the log evidence.

    Args:
        joint: # (K, rows)
        often: # (N,) or (1,)
        begin: The first of the rows.
        n: How many they are.
        top: Room for a number of each row. # (rows,)
        total: The same.
        mass: Where the sums of responsibilities are added. # (K,)
    """
    K = joint.shape[0]
    for j in range(n):
        top[j] = joint[0, j]
        total[j] = 0.0
    for k in range(1, K):
        for j in range(n):
            top[j] = joint[k, j] if joint[k, j] > top[j] else top[j]
    for k in range(K):
        for j in range(n):
            r = _exp2((joint[k, j] - top[j]) * _LOG2_E)
            joint[k, j] = r
            total[j] += r
    evidence = 0.0
    own = often[begin : begin + n]
    if len(often) == 1:
        for j in range(n):
            evidence += top[j] + _log(total[j])
            total[j] = 1.0 / total[j]
    else:
        for j in range(n):
            evidence += own[j] * (top[j] + _log(total[j]))
            total[j] = own[j] / total[j]
    for k in range(K):
        added = 0.0
        for j in range(n):
            joint[k, j] *= total[j]
            added += joint[k, j]
        mass[k] += added
    return evidence


@_adding
def students(
    x: np.ndarray,
    often: np.ndarray,
    begin: int,
    end: int,
    constant: np.ndarray,
    half: np.ndarray,
    loc: np.ndarray,
    inverse: np.ndarray,
    mass: np.ndarray,
    moments: np.ndarray,
) -> float:
    """The E-step on some rows of Student distributions; see `pyro_em.densities.student`.

    Args:
        x: # (N, numbers)
        often: How often each row counts, or `ONE`. # (N,)
        begin: The first of the rows.
        end: One past the last.
        constant: Log weights and log normalisers. # (K,)
        half: ½ (ν + 1). # (numbers, K)
        loc: # (numbers, K)
        inverse: 1 / (σ √ν). # (numbers, K)
        mass: Where Σ r is added. # (K,)
        moments: Where Σ r, Σ q, Σ q z, Σ q z² and Σ r log(1 + t) are added. # (K, numbers, 5)

    Returns:
        The log evidence, in nats.
    """
    M, K = loc.shape
    B = _block(K * (1 + 3 * M))
    joint, top, total = np.empty((K, B)), np.empty(B), np.empty(B)
    held = np.empty((3, M, K, B))
    own = np.empty(B)
    evidence = 0.0
    for first in range(begin, end, B):
        n = min(B, end - first)
        for k in range(K):
            for j in range(n):
                joint[k, j] = constant[k]
        for i in range(M):
            for j in range(n):
                own[j] = x[first + j, i]
            for k in range(K):
                m, w, h = loc[i, k], inverse[i, k], half[i, k]
                for j in range(n):
                    z = (own[j] - m) * w
                    t = z * z
                    u = 1.0 + t
                    v = 1.0 / u
                    log = _log1p(t, u, v)
                    held[0, i, k, j] = z
                    held[1, i, k, j] = v
                    held[2, i, k, j] = log
                    joint[k, j] -= h * log
        evidence += _normalised(joint, often, first, n, top, total, mass)
        for i in range(M):
            for k in range(K):
                s0 = s1 = s2 = s3 = s4 = 0.0
                for j in range(n):
                    r, z = joint[k, j], held[0, i, k, j]
                    q = r * held[1, i, k, j]
                    s0 += r
                    s1 += q
                    s2 += q * z
                    s3 += q * z * z
                    s4 += r * held[2, i, k, j]
                moments[k, i, 0] += s0
                moments[k, i, 1] += s1
                moments[k, i, 2] += s2
                moments[k, i, 3] += s3
                moments[k, i, 4] += s4
    return evidence


@_adding
def weibulls(
    logarithm: np.ndarray,
    often: np.ndarray,
    begin: int,
    end: int,
    constant: np.ndarray,
    shape: np.ndarray,
    shift: np.ndarray,
    mass: np.ndarray,
    moments: np.ndarray,
) -> float:
    """The E-step on some rows of Weibull distributions; see `pyro_em.densities.weibull`.

    Args:
        logarithm: log x. # (N, numbers)
        often: How often each row counts, or `ONE`. # (N,)
        begin: The first of the rows.
        end: One past the last.
        constant: Log weights and the logarithms of shapes. # (K,)
        shape: k. # (numbers, K)
        shift: −k log λ. # (numbers, K)
        mass: Where Σ r is added. # (K,)
        moments: Where Σ r, Σ r t and Σ r exp(t) t^j / j! are added. # (K, numbers, ·)

    Returns:
        The log evidence, in nats.
    """
    M, K = shape.shape
    last = moments.shape[2] - 3
    B = _block(K * (1 + 2 * M) + 1)
    joint, top, total = np.empty((K, B)), np.empty(B), np.empty(B)
    held = np.empty((2, M, K, B))
    own = np.empty(B)
    evidence = 0.0
    for first in range(begin, end, B):
        n = min(B, end - first)
        for k in range(K):
            for j in range(n):
                joint[k, j] = constant[k]
        for i in range(M):
            for j in range(n):
                own[j] = logarithm[first + j, i]
            for k in range(K):
                a, b = shape[i, k], shift[i, k]
                for j in range(n):
                    t = a * own[j] + b
                    u = -t if t > 0.0 else t
                    u = -600.0 if u < -600.0 else u
                    v = _exp2(u * _LOG2_E)
                    e = 1.0 / v if t > 0.0 else v
                    held[0, i, k, j] = t
                    held[1, i, k, j] = e
                    joint[k, j] += t - e - own[j]
        evidence += _normalised(joint, often, first, n, top, total, mass)
        for i in range(M):
            for k in range(K):
                s0 = s1 = s2 = 0.0
                for j in range(n):
                    r, t = joint[k, j], held[0, i, k, j]
                    e = r * held[1, i, k, j]
                    s0 += r
                    s1 += r * t
                    s2 += e
                    held[0, i, k, j] = -600.0 if t < -600.0 else 600.0 if t > 600.0 else t
                    held[1, i, k, j] = e
                moments[k, i, 0] += s0
                moments[k, i, 1] += s1
                moments[k, i, 2] += s2
                scale = 1.0
                for m in range(1, last + 1):
                    s0 = 0.0
                    for j in range(n):
                        e = held[1, i, k, j] * held[0, i, k, j]
                        held[1, i, k, j] = e
                        s0 += e
                    scale /= m
                    moments[k, i, m + 2] += s0 * scale
    return evidence


@_adding
def exponentials(
    features: np.ndarray,
    often: np.ndarray,
    begin: int,
    end: int,
    constant: np.ndarray,
    linear: np.ndarray,
    mass: np.ndarray,
    moments: np.ndarray,
) -> float:
    """The E-step on some rows of densities in linear form; see `pyro_em.densities.exponential`.

    Args:
        features: T(x). # (P, N)
        often: How often each row counts, or `ONE`. # (N,)
        begin: The first of the rows.
        end: One past the last.
        constant: Log weights and log normalisers. # (K,)
        linear: η. # (K, P)
        mass: Where Σ r is added. # (K,)
        moments: Where Σ r T(x) is added. # (K, P)

    Returns:
        The log evidence, in nats.
    """
    K, P = linear.shape
    B = _block(K + P)
    joint, top, total = np.empty((K, B)), np.empty(B), np.empty(B)
    evidence = 0.0
    for first in range(begin, end, B):
        n = min(B, end - first)
        for k in range(K):
            for j in range(n):
                joint[k, j] = constant[k]
        for p in range(P):
            here = features[p, first : first + n]  # an index from zero has no sign to look at
            for k in range(K):
                slope = linear[k, p]
                for j in range(n):
                    joint[k, j] += slope * here[j]
        evidence += _normalised(joint, often, first, n, top, total, mass)
        for p in range(P):
            here = features[p, first : first + n]
            for k in range(K):
                own = 0.0
                for j in range(n):
                    own += joint[k, j] * here[j]
                moments[k, p] += own
    return evidence
