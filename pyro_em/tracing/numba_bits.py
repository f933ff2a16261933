"""What images of bits cost, and the slope of it, in one pass as a compiled loop: `bits_lost`.

With e = exp(−|x|) for the logit x of a bit t,

    cost = max(x, 0) − x t + log(1 + e),   slope = p − t,   p = 1 / (1 + e) or e / (1 + e) for x < 0.

Both functions are polynomials, which a processor evaluates for several bits at once:

    2^y = 2^n Σ_i (f log 2)^i / i!,   y = n + f,  |f| ≤ ½,
    log(1 + e) = 2 Σ_i w^(2i+1) / (2i+1),   w = e / (2 + e) ≤ ⅓,

each to the last bit or two of a single. As |x| log₂ e is rounded before, the cost of a foretold bit is
off by 4e-7 of itself at most for |x| below 4, and by 4e-6 below 80; the slope by 1e-7. A function that
rounds on purpose forbids that sums be reordered; the one that adds up allows it.

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

_exactly: Callable[[Any], Any] = numba.njit(
    fastmath={"contract", "nsz"}, error_model="numpy", cache=True, nogil=True
)

_adding: Callable[[Any], Any] = numba.njit(
    fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", cache=True, nogil=True
)

_intrinsic: Callable[[Any], Any] = intrinsic


@_intrinsic
def _bits(_: Any, x: Any) -> Any:
    """The bits of a single as an integer."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@_intrinsic
def _single(_: Any, i: Any) -> Any:
    """The single of some bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


_ZERO, _ONE, _TWO = np.float32(0.0), np.float32(1.0), np.float32(2.0)
_LOG2_E = np.float32(1.4426950408889634)
# 1.5 · 2^23: added to a number it leaves its integer in the last bits.
_SHIFT = np.float32(12582912.0)
_LOWEST = np.float32(-125.0)  # of exponents: below, log(1 + e) is nothing beside any cost
_BIAS, _PLACE = np.int32(127), np.int32(23)

E0, E1, E2, E3, E4, E5, E6, E7 = (
    np.float32(math.log(2.0) ** i / math.factorial(i)) for i in range(8)
)
L1, L3, L5, L7, L9, L11, L13 = (np.float32(2.0 / i) for i in range(1, 15, 2))


@_exactly
def _exp2(y: float) -> Any:
    """2^y of a number that is not above zero."""
    near = y if y > _LOWEST else _LOWEST
    shifted = near + _SHIFT
    f = near - (shifted - _SHIFT)
    p = E6 + f * E7
    p = E5 + f * p
    p = E4 + f * p
    p = E3 + f * p
    p = E2 + f * p
    p = E1 + f * p
    p = E0 + f * p
    return p * _single((_bits(shifted) + _BIAS) << _PLACE)


@_exactly
def _lost(x: Any, t: Any, e: Any) -> Any:
    """What a bit costs; where it is foretold, all that is left is log(1 + e)."""
    w = e / (_TWO + e)
    q = w * w
    p = L11 + q * L13
    p = L9 + q * p
    p = L7 + q * p
    p = L5 + q * p
    p = L3 + q * p
    p = L1 + q * p
    above = x if x > _ZERO else _ZERO
    return (above - x * t) + w * p


@_adding
def bits_lost(logits: np.ndarray, bits: np.ndarray, slope: np.ndarray, cost: np.ndarray) -> None:
    """Fill in what each row costs, and the slope of that in each logit.

    Args:
        logits: Singles, as all of these. # (N, D)
        bits: What was observed. # (N, D)
        slope: Where probability − bit goes. # (N, D)
        cost: Where −log p of each row goes. # (N,)
    """
    for n in range(logits.shape[0]):
        total = _ZERO
        for i in range(logits.shape[1]):
            x, t = logits[n, i], bits[n, i]
            e = _exp2(-abs(x) * _LOG2_E)
            total += _lost(x, t, e)
            odds = _ONE if x >= _ZERO else e
            slope[n, i] = odds / (_ONE + e) - t
        cost[n] = total
