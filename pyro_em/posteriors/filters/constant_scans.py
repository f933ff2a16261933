"""Sums along many steps with the same matrix, x_t = F x_{t−1} + b_t, in both directions.

Steps are gathered in blocks, inside which the sums are one product with a matrix of powers of F; what a
block leaves to the next ones is a sum of the same kind, with a power of F and far fewer steps.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]

_WIDE = 64  # numbers of a block: larger products take longer, smaller ones are more calls
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
        self._powers, self._n = powers, powers.shape[-1]
        blocks = -(-steps // _longest(self._n))
        self._length = -(-steps // blocks)
        self.steps = blocks * self._length
        self._far = powers[self._length]

    @staticmethod
    def least(n: int) -> int:
        """How many powers are needed; a power of two.

        Args:
            n: Numbers of a state.
        """
        return 2 * _longest(n)

    @cached_property
    def _within(self) -> _Floats:
        """From the rows of a block to their sums. # (length · n, length · n)"""
        L, n = self._length, self._n
        powers = np.zeros((2 * L - 1, n, n))
        powers[L - 1 :] = self._powers[:L].swapaxes(-1, -2)
        a, b, c = powers.strides
        blocks = np.ndarray((L, n, L, n), np.float64, powers, (L - 1) * a, (-a, b, a, c))
        return blocks.reshape(L * n, L * n)

    def forward(self, b: _Floats) -> _Floats:
        """x_t = F x_{t−1} + b_t, from nothing.

        Args:
            b: # (chains, steps, n)
        """
        x, L = self._blocks(b, self._within), self._length
        if x.shape[1] > 1:
            left = _carried(self._far.T, x[:, :-1, -1].copy())
            after = self._powers[1 : L + 1].transpose(2, 0, 1).reshape(self._n, -1)
            x[:, 1:] += (left @ after).reshape(x[:, 1:].shape)
        return x.reshape(b.shape)

    def backward(self, b: _Floats) -> _Floats:
        """x_t = F' x_{t+1} + b_t, from nothing.

        Args:
            b: # (chains, steps, n)
        """
        x, L = self._blocks(b, self._within.T), self._length
        if x.shape[1] > 1:
            left = _carried(self._far, x[:, :0:-1, 0].copy())[:, ::-1]
            before = self._powers[L:0:-1].transpose(1, 0, 2).reshape(self._n, -1)
            x[:, :-1] += (left @ before).reshape(x[:, :-1].shape)
        return x.reshape(b.shape)

    def _blocks(self, b: _Floats, within: _Floats) -> _Floats:
        """Sums inside blocks. # (chains, blocks, length, n)"""
        L, n = self._length, self._n
        return (b.reshape(-1, L * n) @ within).reshape(len(b), -1, L, n)


def _longest(n: int) -> int:
    """How many steps a block has at most."""
    return int(min(32, max(4, 1 << int(math.log2(max(1, _WIDE // n))))))


def _carried(F: _Floats, x: _Floats) -> _Floats:
    """x_b ← x_b + x_{b−1} F, rows; they are overwritten. # (chains, blocks, n)"""
    apart = 1
    while apart < x.shape[1]:
        x[:, apart:] += x[:, :-apart] @ F
        F, apart = F.dot(F), 2 * apart
        if np.vdot(F, F) < _NOTHING:
            break
    return x
