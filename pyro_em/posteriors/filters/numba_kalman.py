"""What compiled filters and smoothers of Gaussian chains share: see `kalman_steps`.

What depends on no data is computed once for all chains that share it, and no more once it repeats: as
long as steps are alike, matrices that have become those of the step before stay so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any, cast

import numba
import numpy as np

from pyro_em.posteriors.filters.kalman_recursions import SAME
from pyro_em.posteriors.filters.numba_fours import apart, load, plus, store, times

Work = tuple[np.ndarray, ...]  # what loops write over; Numba's own arrays take a second to compile

_SHORT = {"contract", "nsz", "arcp"}  # sums in the order of their terms
_INSIDE: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def keyed(function: Callable[..., Any], key: str) -> FunctionType:
    """A function that Numba's cache on disk takes for another one when a key changes.

    The cache knows a function by its own file and by what it closes over, not by the files of the
    functions that it calls: so it closes over the key, and does nothing with it.

    Args:
        function: A function that closes over nothing.
        key: Of all that it calls.
    """
    plain = cast(FunctionType, function)
    code: CodeType = plain.__code__.replace(co_freevars=("key",))
    closure = (CellType(key),)
    return FunctionType(code, plain.__globals__, plain.__name__, plain.__defaults__, closure)


def _digest() -> str:
    """Of the files whose compiled functions call each other, and of what they read elsewhere."""
    found = hashlib.sha256(repr(SAME).encode())
    own = Path(__file__).parent
    for path in (own / "numba_fours.py", *sorted(own.glob("numba_kalman*.py"))):
        found.update(path.read_bytes())
    return found.hexdigest()


_KEY = _digest()


def compiled(function: Callable[..., Any]) -> Any:
    """A function as machine code, kept on disk until one of these files changes.

    Args:
        function: What Numba can compile.
    """
    return _compiled(function, {"reassoc", *_SHORT}, {"no_cfunc_wrapper": True})


def compiled_in_order(function: Callable[..., Any]) -> Any:
    """The same, with sums in the order of their terms.

    Args:
        function: What Numba can compile.
    """
    return _compiled(function, _SHORT, {"no_cfunc_wrapper": True})


def inside(function: Callable[..., Any]) -> Any:
    """The same of one that only compiled functions call, which takes less time to compile.

    Args:
        function: What Numba can compile.
    """
    return _compiled(function, {"reassoc", *_SHORT}, _INSIDE)


def inside_in_order(function: Callable[..., Any]) -> Any:
    """The same, with sums in the order of their terms: short ones, several at a time.

    Args:
        function: What Numba can compile.
    """
    return _compiled(function, _SHORT, _INSIDE)


def _compiled(function: Callable[..., Any], fast: set[str], options: dict[str, Any]) -> Any:
    make: Any = numba.njit
    decorator = make(
        fastmath=fast, error_model="numpy", cache=True, nogil=True, _nrt=False, **options
    )
    return decorator(keyed(function, _KEY))


@inside_in_order
def reflect(X: np.ndarray, rows: int, above: int, pivots: int, columns: int) -> None:
    """Householder's triangle of the first columns, with a positive diagonal; the others go along.

    Four columns are taken side by side; those after the last are zero.

    Args:
        X: # (rows or more, columns and three more, or more)
        rows: How many rows count.
        above: How many of them are above those that are a triangle already.
        pivots: How many columns are made triangular.
        columns: How many columns count.
    """
    apart()
    for p in range(pivots):
        end = min(rows, above + p + 1)
        size = 0.0
        for i in range(p, end):
            size += X[i, p] * X[i, p]
        if size == 0.0:
            continue
        norm, first = np.sqrt(size), X[p, p]
        turn = -1.0 if first > 0.0 else 1.0  # the sign of what is left on the diagonal
        v = first - turn * norm
        tau = 1.0 / (size + abs(first) * norm)
        for c in range(p + 1, columns, 4):
            top = load(X, p, c)
            total = times(top, v)
            for i in range(p + 1, end):
                total = plus(total, load(X, i, c), X[i, p])
            total = times(total, -tau)
            store(X, p, c, times(plus(top, total, v), turn))
            for i in range(p + 1, end):
                store(X, i, c, plus(load(X, i, c), total, X[i, p]))
        X[p, p] = norm


@inside
def matrix(slab: np.ndarray, at: int, rows: int, columns: int) -> tuple[np.ndarray, int]:
    """A matrix of some memory, and where the next one begins."""
    apart()
    end = at + rows * columns
    return slab[at:end].reshape((rows, columns)), end


@inside
def copy(x: np.ndarray, out: np.ndarray) -> None:
    """Numba's own assignment of arrays takes a second to compile."""
    apart()
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j]


@inside
def settle(new: np.ndarray, old: np.ndarray, n: int, within: float) -> bool:
    """Whether two matrices are the same, row by row; the first is then kept in the second."""
    apart()
    largest, same = 0.0, True
    for i in range(n):
        for j in range(n):
            largest = max(largest, abs(new[i, j]))
    for i in range(n):
        row = 0.0
        for j in range(n):
            row = max(row, abs(new[i, j]))
        for j in range(n):
            if not abs(new[i, j] - old[i, j]) <= within * (row + 1e-2 * largest):
                same = False
            old[i, j] = new[i, j]
    return same


@inside
def next_look(count: int) -> int:
    """After how many like steps to compare again, next.

    With what was found a sixteenth of all steps ago, not a step ago: what converges slowly changes
    little from a step to the next, and is far from its end.
    """
    return count + 1 + count // 16


@inside
def is_like(dynamics: np.ndarray, measurement: np.ndarray, seen: np.ndarray, t: int) -> bool:
    """Whether a step has the same matrices as the one before; the first two never have."""
    if t < 2 or dynamics[t] != dynamics[t - 1] or measurement[t] != measurement[t - 1]:
        return False
    if len(seen) > 1:
        for d in range(seen.shape[1]):
            if seen[t, d] != seen[t - 1, d]:
                return False
    return True


@inside
def drifts_until(drift: np.ndarray) -> int:
    """After how many steps a drift is zero. # drift: (M|1, T, n)"""
    apart()
    for t in range(drift.shape[1] - 1, -1, -1):
        for j in range(len(drift)):
            for i in range(drift.shape[2]):
                if drift[j, t, i] != 0.0:
                    return t + 1
    return 0


@inside
def expect(
    A: np.ndarray,
    drift: np.ndarray,
    near: np.ndarray,
    j: int,
    t: int,
    mean: np.ndarray,
    gained: np.ndarray,
) -> None:
    """What is expected of a step after the one before, and how far from it states are measured.

    Args:
        A: # (n, n)
        drift: As for `backward`.
        near: As for `backward`.
        j: The chain.
        t: The step.
        mean: Where A m + a goes. # (n,)
        gained: Where m − (A m before + a) goes. # (n,)
    """
    apart()
    for i in range(len(mean)):
        mean[i] = drift[j % len(drift), t, i]
        if len(near) > 0:
            if t > 0:
                for l in range(len(mean)):
                    mean[i] += A[i, l] * near[j, t - 1, l]
            gained[i] = near[j, t, i] - mean[i]
        else:
            gained[i] = -mean[i]
