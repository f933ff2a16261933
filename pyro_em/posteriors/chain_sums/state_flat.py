"""The numbers of all sites of Gaussian chains as one vector, and where they go in matrices.

What no parameter reaches is computed once. At other parameters one gather, one sum by places and one
scatter make the numbers of all sites and the matrices of a state-space model, whatever sites there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyro_em.posteriors.chain_sums.state_arguments import Linear, Numbers, Picked, Places
from pyro_em.posteriors.chain_sums.state_sites import Site

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Piece:
    """Numbers that lie in the vector one after the other.

    Attributes:
        begin: Where they begin.
        end: Where others follow.
        shape: Their shape.
    """

    begin: int
    end: int
    shape: Shape

    def of(self, vector: Numbers) -> Numbers:
        """A view of them."""
        return vector[self.begin : self.end].reshape(self.shape)


@dataclass(frozen=True, eq=False)
class SitePieces:
    """The numbers of one site.

    Attributes:
        coefficients: C. # (chains|1, K, D, Q)
        raw: The spread as parameters have it. # (chains|1, K, D, …)
        spread: The same as deviations or lower triangles; the same piece but for covariances.
        whitened: Coefficients of data whose noises are independent, with variance one; None where
            spreads are deviations, and for latents. # (chains|1, K, D, Q)
    """

    coefficients: Piece
    raw: Piece
    spread: Piece
    whitened: Piece | None


@dataclass(frozen=True, eq=False)
class Vector:
    """From parameters to the numbers of all sites.

    Attributes:
        constant: What no parameter reaches. # (numbers,)
        row: Of each entry of the derivative the number. # (entries,)
        column: The element of θ. # (entries,)
        factor: The entry. # (entries,)
        mapped: Numbers that are elements of θ after maps, with their places.
        pieces: Of each site.
    """

    constant: Numbers
    row: Places
    column: Places
    factor: Numbers
    mapped: tuple[tuple[Places, Picked], ...]
    pieces: tuple[SitePieces, ...]

    @classmethod
    def of(cls, sites: Sequence[Site]) -> Vector:
        """That of some sites."""
        constants, pieces, mapped = list[Numbers](), list[SitePieces](), []
        entries, size = list[tuple[Places, Places, Numbers]](), 0

        def piece(x: Numbers) -> Piece:
            nonlocal size
            constants.append(x.reshape(-1))
            size += x.size
            return Piece(size - x.size, size, x.shape)

        def linear(x: Linear) -> Piece:
            entries.append((x.row + size, x.column, x.factor))
            return piece(x.constant[0])

        for site in sites:
            C, of_spread = linear(site.coefficients), size
            raw = spread = linear(site.spread.linear)
            for picked in site.spread.picked:
                if picked.maps:
                    mapped.append((picked.row + of_spread, picked))
                else:
                    entries.append((picked.row + of_spread, picked.column, picked.factor))
            if site.spread.argument == "covariance_matrix":
                spread = piece(np.zeros(raw.shape))
            white = None
            if not site.is_latent and site.spread.is_matrix:
                lead = np.broadcast_shapes(C.shape[:1], spread.shape[:1])
                white = piece(np.zeros((*lead, *C.shape[1:])))
            pieces.append(SitePieces(C, raw, spread, white))
        row, column, factor = (np.concatenate(x) for x in zip(*entries, strict=True))
        return cls(np.concatenate(constants), row, column, factor, tuple(mapped), tuple(pieces))

    def at(self, theta: Numbers) -> Numbers:
        """The numbers at parameters; what is whitened is not.

        Raises:
            LinAlgError: If a covariance is none.
        """
        moved = self.factor * theta.take(self.column)
        out: Numbers = self.constant + np.bincount(self.row, moved, len(self.constant))
        for place, picked in self.mapped:
            out[place] = picked.forward(theta)
        for own in self.pieces:
            if own.spread is not own.raw:
                own.spread.of(out)[...] = np.linalg.cholesky(own.raw.of(out))
        return out


@dataclass(frozen=True, eq=False)
class Scatter:
    """Where numbers of the vector go in some arrays that lie one after the other.

    Attributes:
        bare: The arrays without what sites put there. # (numbers,)
        pieces: Of each array.
        to: Places of what sites put there. # (placed,)
        source: Its places in the vector of all sites. # (placed,)
        is_twice: Whether numbers meet at a place.
    """

    bare: Numbers
    pieces: tuple[Piece, ...]
    to: Places
    source: Places
    is_twice: bool

    @classmethod
    def of(cls, arrays: Sequence[Numbers], entries: Sequence[tuple[int, Places, Piece]]) -> Scatter:
        """That of some arrays.

        Args:
            arrays: Without what sites put there. # (lead, …) each
            entries: The array, places in it of one chain # (kinds, numbers), and the numbers
                # (chains|1, …).
        """
        sizes = np.cumsum([0, *(x.size for x in arrays)]).tolist()
        pieces = tuple(
            Piece(a, b, x.shape) for a, b, x in zip(sizes[:-1], sizes[1:], arrays, strict=True)
        )
        bare = np.concatenate([x.reshape(-1) for x in arrays])
        none = np.empty(0, dtype=np.int64)
        to, source = [none], [none]
        for i, place, piece in entries:
            lead, size = len(arrays[i]), arrays[i].size
            each = (size // lead) * np.arange(lead)[:, None, None]
            numbers = np.arange(piece.begin, piece.end).reshape(piece.shape[0], 1, -1)
            to.append((sizes[i] + each + place).reshape(-1))
            source.append(np.broadcast_to(numbers, (lead, *place.shape)).reshape(-1))
        placed = np.concatenate(to)
        bare[placed] = 0.0
        ordered = np.sort(placed)
        is_twice = bool((ordered[1:] == ordered[:-1]).any())
        return cls(bare, pieces, placed, np.concatenate(source), is_twice)

    def at(self, vector: Numbers) -> list[Numbers]:
        """The arrays at the numbers of all sites."""
        out = self.bare.copy()
        if self.is_twice:
            np.add.at(out, self.to, vector.take(self.source))
        else:
            out[self.to] = vector.take(self.source)
        return [p.of(out) for p in self.pieces]
