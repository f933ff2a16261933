"""Gaussian components by whitened rows, and their moments: products with triangles, in blocks.

    ℓ_k(x) = h_k − ½ ‖W_k x' − W_k μ'_k‖²,      S_k = Σ_n r_kn x'_n x'_nᵀ,      W_k lower triangular

Half of each W_k is zero, and half of each S_k says what the other half says. So the features are taken
in blocks of s: of ``W_k x'`` the rows of one block need the features up to its end only, of S_k they
are needed from its beginning on. The rows of one block of all components are one product, which
computes (D + s) / 2D of what full matrices would.

Moments about zero lose (|x'| / σ)² in precision. Where that is more than three digits, and in single
precision, they are taken about each component's own mean, one component after the other. Of
independent features W is diagonal, and its products are of single numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_NEAR = 1e3

_ROWS = 1024  # at a time: what is computed of them stays in the cache


def block_size(D: int) -> int:
    """How many features are in a block: few waste little, and make small products."""
    return max(16, -(-D // 8))


def blocks(D: int) -> Iterator[slice]:
    """The blocks of D features."""
    size = block_size(D)
    return (slice(begin, min(begin + size, D)) for begin in range(0, D, size))


@dataclass(frozen=True, eq=False)
class Whitened:
    """Components as whitening matrices.

    Attributes:
        matrices: W, lower triangular, in the dtype of the rows. # (K, D, D)
        mean: μ'. # (K, D)
        is_near: Whether rows are so near to the components that moments may be taken about zero.
        parts: The rows of each block of all W, up to its end, and W μ' there.
            # (K * s, end) and (K * s, 1) each
    """

    matrices: Tensor
    mean: Tensor
    is_near: bool
    parts: tuple[tuple[Tensor, Tensor], ...] = field(init=False)

    def __post_init__(self) -> None:
        W, parts = self.matrices, []
        if W.dtype == torch.float64:
            shift = W @ self.mean.unsqueeze(-1)
            for b in blocks(W.shape[-1]):
                parts.append((W[:, b, : b.stop].reshape(-1, b.stop), shift[:, b].reshape(-1, 1)))
        object.__setattr__(self, "parts", tuple(parts))

    def part(self, cells: slice) -> Whitened:
        """Some of the components."""
        return Whitened(self.matrices[cells], self.mean[cells], self.is_near)

    def squares(self, x: Tensor) -> Tensor:
        """‖W_k (x' − μ'_k)‖². # (K, rows)

        Args:
            x: # (D, rows)
        """
        if not self.parts:  # W x' − W μ' would cancel in single precision, x' − μ' does not
            each = zip(self.matrices, self.mean, strict=True)
            white = [(W @ (x - mean.unsqueeze(-1))).square_().sum(0) for W, mean in each]
            return torch.stack(white)
        out = x.new_zeros(len(self.matrices), x.shape[1])
        for begin in range(0, x.shape[1], _ROWS):
            rows = slice(begin, begin + _ROWS)
            self._add_squares(x[:, rows], out[:, rows])
        return out

    def _add_squares(self, x: Tensor, out: Tensor) -> None:
        K, rows = out.shape
        room = x.new_empty(len(self.parts[0][0]), rows)
        for W, shift in self.parts:
            white = torch.mm(W, x[: W.shape[1]], out=room[: len(W)]).sub_(shift)
            out.add_(white.mul_(white).view(K, -1, rows).sum(1))

    def moments(self, weights: Tensor, x: Tensor) -> Tensor:
        """Σ r d and Σ r d dᵀ of some rows, in float64, so that they can be added; see `over_rows`.

        Args:
            weights: r. # (K, rows)
            x: # (D, rows)
        """
        if not self.is_near:
            out = []
            for w, mean in zip(weights, self.mean, strict=True):
                d = x - mean.unsqueeze(-1)
                weighted = d * w
                out += [weighted.sum(-1), (weighted @ d.T).reshape(-1)]
            return torch.cat(out).to(torch.float64)
        each = zip(weights.split(_ROWS, 1), x.split(_ROWS, 1), strict=True)
        total, *others = (self._moments(w, part) for w, part in each)
        for part in others:
            total += part
        return total

    def _moments(self, weights: Tensor, x: Tensor) -> Tensor:
        K, rows = weights.shape
        parts, room = [weights @ x.T], x.new_empty(len(self.parts[0][0]), rows)
        for b in blocks(len(x)):
            weighted = room[: K * (b.stop - b.start)]
            torch.mul(weights.unsqueeze(1), x[b], out=weighted.view(K, -1, rows))
            parts.append(x[b.start :] @ weighted.T)  # (D − begin, K * s)
        return torch.cat([p.reshape(-1) for p in parts])

    @property
    def point(self) -> Tensor | None:
        """What moments are taken about, of x'; None for zero. # (K, D)"""
        return None if self.is_near else self.mean

    def over_rows(self, moments: Tensor, flat: Tensor) -> Tensor:
        """Sums of `moments` in the order of others. # (K, D + P)

        Args:
            moments: The sums.
            flat: Where pairs of features are among all elements of a matrix, those of its upper half.
                # (P,)
        """
        K, D = self.mean.shape
        if not self.is_near:
            each = moments.view(K, D + D * D)
            return torch.cat([each[:, :D], each[:, D:].index_select(1, flat)], 1)
        first, rest = moments[: K * D].view(K, D), moments[K * D :]
        second = moments.new_zeros(K, D, D)
        for b in blocks(D):
            width, size = D - b.start, b.stop - b.start
            part, rest = rest[: width * K * size], rest[width * K * size :]
            second[:, b, b.start :] = part.view(width, K, size).permute(1, 2, 0)
        return torch.cat([first, second.view(K, -1).index_select(1, flat)], 1)


@dataclass(frozen=True, eq=False)
class Scaled:
    """Components of independent features.

    Attributes:
        scale: σ. # (K, D)
        mean: μ', about which moments are taken. # (K, D)
    """

    scale: Tensor
    mean: Tensor

    @property
    def point(self) -> Tensor:
        """See `Whitened.point`."""
        return self.mean

    def part(self, cells: slice) -> Scaled:
        """Some of the components."""
        return Scaled(self.scale[cells], self.mean[cells])

    def squares(self, x: Tensor) -> Tensor:
        """Σ_i (x'_i − μ'_ki)² / σ_ki². # (K, rows)"""
        each = zip(self.scale.unsqueeze(-1), self.mean.unsqueeze(-1), strict=True)
        return torch.stack([(x - mean).div_(scale).square_().sum(0) for scale, mean in each])

    def moments(self, weights: Tensor, x: Tensor) -> Tensor:
        """Σ r d and Σ r d² of some rows, in float64. # (K, 2 D)"""
        out = []
        for w, mean in zip(weights, self.mean.unsqueeze(-1), strict=True):
            d = x - mean
            weighted = d * w
            out.append(torch.cat([weighted.sum(-1), weighted.mul_(d).sum(-1)]))
        return torch.stack(out).to(torch.float64)

    def over_rows(self, moments: Tensor, flat: Tensor) -> Tensor:
        """See `Whitened.over_rows`: they are in that order."""
        return moments


def is_near(reach2: Tensor, variance: Tensor) -> bool:
    """Whether moments about zero lose no more than three digits.

    Args:
        reach2: The largest square of each feature. # (D,)
        variance: Of each feature in each component. # (K or 1, D)
    """
    return bool((reach2 <= _NEAR * variance).all())
