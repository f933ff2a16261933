"""Sums along many steps with the same matrix, x_t = F x_{t−1} + b_t, in both directions.

Steps are gathered in blocks, inside which the sums are one product with a matrix of powers of F. What a
block leaves to the next ones is found first, and added to a block's first step: where powers of F are
soon nothing, it is one product with those of the last few blocks, and else a sum of the same kind, with
a power of F and far fewer steps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]

_WIDE = 32  # numbers of a block: larger products take longer, smaller ones are more calls
_SPAN = 64  # numbers of blocks before a block that are taken together
_NOTHING = 1e-36  # squares of a matrix that adds nothing to what it is added to


class ConstantScans:
    """Sums with one matrix and its transpose.

    Args:
        powers: Those of F, from that of zero on, at least `least`. # (·, n, n)
        steps: How many steps there are to be.
        reach: After how many steps powers are nothing; as many as steps if they never are.

    Attributes:
        steps: How many there have to be, a few more: blocks are of one length.
    """

    def __init__(self, powers: _Floats, steps: int, reach: int) -> None:
        n = self._n = powers.shape[-1]
        blocks = self._blocks = -(-steps // _longest(n))
        L = self._length = -(-steps // blocks)
        self.steps = blocks * L
        # From the rows of a block to their sums. # (length · n, length · n)
        flipped = np.zeros((2 * L - 1, n, n))
        flipped[L - 1 :] = powers[:L].swapaxes(-1, -2)
        a, b, c = flipped.strides
        within = np.ndarray((L, n, L, n), np.float64, flipped, (L - 1) * a, (-a, b, a, c))
        self._within = within.reshape(L * n, L * n)
        self._across: _Near | _Far | None = None
        if blocks > 1:
            span = min(blocks - 1, -(-(reach - 1) // L))
            if span * n <= _SPAN and span * L - L + 1 < len(powers):
                self._across = _Near(powers[1::L][:span])
            else:
                self._across = _Far(powers[1], powers[L], blocks)

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
        n, wide = self._n, len(self._within)
        rows = b.reshape(-1, wide)
        if self._across is not None:
            own = rows.dot(self._within[:, -n:]).reshape(-1, self._blocks, n)
            rows.reshape(-1, self._blocks, wide)[:, 1:, :n] += self._across.forward(own)
        return rows.dot(self._within).reshape(b.shape)

    def backward(self, b: _Floats) -> _Floats:
        """x_t = F' x_{t+1} + b_t, from nothing.

        Args:
            b: They are overwritten. # (chains, steps, n)
        """
        n, wide, within = self._n, len(self._within), self._within.T
        rows = b.reshape(-1, wide)
        if self._across is not None:
            own = rows.dot(within[:, :n]).reshape(-1, self._blocks, n)
            rows.reshape(-1, self._blocks, wide)[:, :-1, -n:] += self._across.backward(own)
        return rows.dot(within).reshape(b.shape)


class _Near:
    """What reaches a block from the few blocks beside it, by one product.

    Args:
        powers: F, and its powers of one more step for each block in between. # (span, n, n)
    """

    def __init__(self, powers: _Floats) -> None:
        self._span, n, _ = powers.shape
        self._forward = powers[::-1].swapaxes(-1, -2).reshape(-1, n)
        self._backward = powers.reshape(-1, n)

    def forward(self, own: _Floats) -> _Floats:
        """Of all blocks but the first, from the sums at the ends of each. # (chains, blocks - 1, n)"""
        return self._sums(own[:, :-1], self._forward, self._span - 1)

    def backward(self, own: _Floats) -> _Floats:
        """Of all blocks but the last, from the sums at the starts of each. # (chains, blocks - 1, n)"""
        return self._sums(own[:, 1:], self._backward, 0)

    def _sums(self, own: _Floats, powers: _Floats, start: int) -> _Floats:
        """Of as many blocks one after the other as there are powers."""
        chains, blocks, n = own.shape
        padded = np.zeros((chains, blocks + self._span - 1, n))
        padded[:, start : start + blocks] = own
        rows = np.ndarray((chains, blocks, len(powers)), np.float64, padded, 0, padded.strides)
        return rows.reshape(-1, len(powers)).dot(powers).reshape(own.shape)


class _Far:
    """The same where all blocks reach each other, by sums of two, four, … of them.

    Args:
        one: F. # (n, n)
        far: From block to block. # (n, n)
        blocks: How many there are.
    """

    def __init__(self, one: _Floats, far: _Floats, blocks: int) -> None:
        self._one, self._powers = one, list[_Floats]()
        while 1 << len(self._powers) < blocks - 1:
            self._powers.append(far)
            far = far.dot(far)
            if np.vdot(far, far) < _NOTHING:
                break

    def forward(self, own: _Floats) -> _Floats:
        """As of those nearby; they are overwritten."""
        for k, F in enumerate(self._powers):
            moved, apart = _moved(own, F.T), 1 << k
            own[:, apart:] += moved[:, :-apart]
        return _moved(own, self._one.T)[:, :-1]

    def backward(self, own: _Floats) -> _Floats:
        """As of those nearby; they are overwritten."""
        for k, F in enumerate(self._powers):
            moved, apart = _moved(own, F), 1 << k
            own[:, :-apart] += moved[:, apart:]
        return _moved(own, self._one)[:, 1:]


def _longest(n: int) -> int:
    """How many steps a block has at most."""
    return max(4, min(32, 1 << max(1, _WIDE // n).bit_length() >> 1))


def _moved(x: _Floats, F: _Floats) -> _Floats:
    """Rows times a matrix, in one product. # (chains, blocks, n)"""
    return x.reshape(-1, len(F)).dot(F).reshape(x.shape)
