"""E-steps on rows by compiled loops (numba, the ``fast`` extra): where they serve, and in parts.

A table of a mixture is written and read a dozen times by as many operations; a compiled loop keeps some
rows in the first cache and adds up what is asked for. Only few kinds of rows have one, and few rows do
not wait for numba to start.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[np.float64]

# Adds Σ r of some rows to the third and their moments to the fourth; returns their log evidence.
Loop = Callable[[slice, Numbers | None, Numbers, Numbers], float]

_HAS_NUMBA = importlib.util.find_spec("numba") is not None

# Cells for which numba is not started. A rule by size alone, so that a fit repeated gives the same
# digits.
_FEW = 2**18

_PART = (
    2**15
)  # rows of a part; the same whatever the number of threads, as sums of parts are rounded


@runtime_checkable
class CompiledRows(Protocol):
    """Rows whose E-step a compiled loop takes, where nothing else reads them."""

    def loop(self, p: Any, constant: Tensor) -> tuple[Loop, int] | None:
        """The loop, and how many moments a component has; None where none serves.

        Args:
            p: What rows are evaluated with.
            constant: Log densities that no row reaches. # (K, 1)
        """
        ...


def serves(rows: int, K: int, device: torch.device) -> bool:
    """Whether a compiled loop is worth its start."""
    return _HAS_NUMBA and device.type == "cpu" and rows * K >= _FEW


def swept(
    loop: Loop, rows: int, often: Tensor | None, K: int, moments: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The log evidence and all sums over the rows.

    Args:
        loop: Goes through some of them.
        rows: How many there are.
        often: How often each counts; None where each counts once. # (rows,)
        K: Components.
        moments: Of each.

    Returns:
        # (), (K,), (K, moments)
    """
    counts = None if often is None else as_numbers(often)
    parts = [slice(i, min(i + _PART, rows)) for i in range(0, rows, _PART)]
    out = np.zeros((len(parts), K, 1 + moments))
    evidence = np.zeros(len(parts))

    def one(number: int) -> None:
        mass, sums = np.zeros(K), np.zeros((K, moments))
        evidence[number] = loop(parts[number], counts, mass, sums)
        out[number, :, 0], out[number, :, 1:] = mass, sums

    one(0)
    threads = min(torch.get_num_threads(), len(parts) - 1)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(1, len(parts))))
    else:
        for number in range(1, len(parts)):
            one(number)
    total = torch.from_numpy(out.sum(0))
    return torch.tensor(evidence.sum()), total[:, 0].contiguous(), total[:, 1:].contiguous()


def as_numbers(t: Tensor) -> Numbers:
    """A tensor as contiguous numbers; they share its memory where they can."""
    return np.ascontiguousarray(t.detach().to(torch.float64).numpy())
