"""Sums along many steps with the same matrix, x_t = F x_{t−1} + b_t, in both directions.

Steps are gathered in blocks, inside which the sums are one product with a matrix of powers of F. What a
block leaves to the next ones is a sum of the same kind, with a power of F and far fewer steps: it is
found first, and what comes from the blocks before is added to a block's first step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]

_WIDE = 32  # numbers of a block: larger products take longer, smaller ones are more calls
_NOTHING = 1e-36  # squares of a matrix that adds nothing to what it is added to


class ConstantScans:
    """Sums with one matrix and its transpose.

    Args:
        powers: Those of F, from that of zero on, at least `least`. # (·, n, n)
        steps: How many steps there are to be.

    Attributes:
        steps: How many there have to be, a few more: blocks are of one length.
    """

    def __init__(self, powers: _Floats, steps: int) -> None:
        n = self._n = powers.shape[-1]
        self._blocks = -(-steps // _longest(n))
        L = self._length = -(-steps // self._blocks)
        self.steps = self._blocks * L
        self._one = powers[1]
        # From the rows of a block to their sums. # (length · n, length · n)
        flipped = np.zeros((2 * L - 1, n, n))
        flipped[L - 1 :] = powers[:L].swapaxes(-1, -2)
        a, b, c = flipped.strides
        blocks = np.ndarray((L, n, L, n), np.float64, flipped, (L - 1) * a, (-a, b, a, c))
        self._within = blocks.reshape(L * n, L * n)
        # From a block to the next one, the second next one, the fourth next one, …
        self._across, far = list[_Floats](), powers[L]
        while 1 << len(self._across) < self._blocks - 1:
            self._across.append(far)
            far = far.dot(far)
            if np.vdot(far, far) < _NOTHING:
                break

    @staticmethod
    def least(n: int) -> int:
        """How many powers are needed; a power of two.

        Args:
            n: Numbers of a state.
        """
        return 2 * _longest(n)

    def forward(self, b: _Floats) -> _Floats:
        """x_t = F x_{t−1} + b_t, from nothing.

        Args:
            b: They are overwritten. # (chains, steps, n)
        """
        L, n = self._length, self._n
        rows = b.reshape(-1, L * n)
        if self._blocks > 1:
            left = (rows @ self._within[:, -n:]).reshape(-1, self._blocks, n)
            for k, F in enumerate(self._across):
                moved, apart = _moved(left, F.T), 1 << k
                left[:, apart:] += moved[:, :-apart]
            rows.reshape(-1, self._blocks, L * n)[:, 1:, :n] += _moved(left, self._one.T)[:, :-1]
        return (rows @ self._within).reshape(b.shape)

    def backward(self, b: _Floats) -> _Floats:
        """x_t = F' x_{t+1} + b_t, from nothing.

        Args:
            b: They are overwritten. # (chains, steps, n)
        """
        L, n = self._length, self._n
        rows, within = b.reshape(-1, L * n), self._within.T
        if self._blocks > 1:
            left = (rows @ within[:, :n]).reshape(-1, self._blocks, n)
            for k, F in enumerate(self._across):
                moved, apart = _moved(left, F), 1 << k
                left[:, :-apart] += moved[:, apart:]
            rows.reshape(-1, self._blocks, L * n)[:, :-1, -n:] += _moved(left, self._one)[:, 1:]
        return (rows @ within).reshape(b.shape)


def _longest(n: int) -> int:
    """How many steps a block has at most."""
    return max(4, min(32, 1 << max(1, _WIDE // n).bit_length() >> 1))


def _moved(x: _Floats, F: _Floats) -> _Floats:
    """Rows times a matrix, in one product. # (chains, blocks, n)"""
    return (x.reshape(-1, len(F)) @ F).reshape(x.shape)
