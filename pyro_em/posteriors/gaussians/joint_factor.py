"""The factor of Λ of all unknowns of a linear-Gaussian component, leaves first and then dense matrices.

A component without leaves has dense matrices alone. What is asked of a factor is the same: moves
towards the mode, what noises make of unknowns, log determinants, moments and draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from pyro_em.posteriors.gaussians.block_factors import (
    BlockFactor,
    RowsOfCore,
    factor_from_rows,
    factorized,
    log_determinants,
    precision_of,
    squares_of,
    substituted,
    without_cached,
)
from pyro_em.posteriors.gaussians.block_places import Bucket
from pyro_em.posteriors.gaussians.flat_reads import added
from pyro_em.posteriors.gaussians.gaussian_layout import BlockLayout
from pyro_em.posteriors.gaussians.leaf_factors import (
    CoreSum,
    LeafFactor,
    LeafMoments,
    eliminated,
    leaf_triangles,
    times,
)
from pyro_em.posteriors.gaussians.site_rows import SiteRows


@dataclass(frozen=True, eq=False)
class JointFactor:
    """The factor of Λ.

    Attributes:
        layout: Blocks and places.
        dense: Of the blocks; of those with leaves of the core alone.
        leaves: Given the core.
    """

    layout: BlockLayout
    dense: tuple[BlockFactor, ...]
    leaves: tuple[LeafFactor, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return without_cached(self)

    @property
    def cells(self) -> int:
        """Combinations of discrete values; 1 where there is nothing unknown."""
        return len(self.dense[0].T) if self.dense else 1

    def move(self, gradient: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
        """The way from ε to the mode, and twice the nats that the density was short of there.

        Args:
            gradient: Of the density of the rows, in the unknowns. # (cells, vector_size)
            epsilon: The noises. # (cells, vector_size)

        Returns:
            # (cells, vector_size), (cells,)
        """
        core = gradient[:, : self.layout.core_size]
        alone, short = [], gradient.new_zeros(len(gradient))
        for leaf in self.leaves:
            g = leaf.own(gradient)
            own = times(leaf.T.mT, g) - leaf.own(epsilon)
            move = leaf.solve(own)
            back = -times(leaf.K.mT, own)
            if leaf.R is not None:
                back = back + times(leaf.R.mT, g)
            core = added(core, leaf.leaves.boundary.vector, back)
            alone.append(move)
            short = short + (own * move).sum((1, 2))
        own = torch.cat([f.gather_in(core) for f in self.dense], 1)
        own = own - epsilon[:, : self.layout.core_size]
        move = torch.cat([f.solve(own) for f in self.dense], 1)
        short = short + (own * move).sum(-1)
        if not self.leaves:
            return move, short
        step = torch.cat([f.spread_out(move) for f in self.dense], 1)
        parts = [
            (m - times(f.K, f.of_core(step))).flatten(1)
            for f, m in zip(self.leaves, alone, strict=True)
        ]
        return torch.cat([move, *parts], 1), short

    def spread_out(self, epsilon: Tensor) -> Tensor:
        """What noises make of all unknowns. # (cells, vector_size)"""
        core = torch.cat([f.spread_out(epsilon) for f in self.dense], 1)
        parts = [f.spread_out(f.own(epsilon), core).flatten(1) for f in self.leaves]
        return torch.cat([core, *parts], 1) if parts else core

    def log_determinants(self) -> Tensor:
        """log|Λ| of each block. # (cells, blocks)"""
        out = log_determinants(self.dense)
        for leaf in self.leaves:
            each = 2 * leaf.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            out = added(out, leaf.leaves.block, each)
        return out

    def squares(self, epsilon: Tensor) -> Tensor:
        """‖ε‖² of each block. # (cells, blocks)"""
        out = torch.cat([squares_of(f, epsilon) for f in self.dense], 1)
        for leaf in self.leaves:
            out = added(out, leaf.leaves.block, leaf.own(epsilon).square().sum(-1))
        return out

    def drawn(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Posterior deviations of all unknowns. # (n, cells, vector_size)

        Args:
            n: Number of draws.
            generator: The source of randomness; by default torch's.
        """
        core = []
        for factor in self.dense:
            z = _normal(factor.cholesky, n, generator)
            core.append(factor.drawn(z).flatten(1, 2).movedim(-1, 0))
        if not self.leaves:
            return torch.cat(core, -1)
        flat = torch.cat(core, -1)
        parts = [flat]
        for leaf in self.leaves:
            own = leaf.given(_normal(leaf.cholesky, n, generator)).movedim(-1, 0)
            with_core = times(leaf.G, flat[:, :, leaf.leaves.boundary.vector])
            parts.append((own + with_core).flatten(2))
        return torch.cat(parts, -1)

    def drawn_from_prior(self, generator: torch.Generator) -> Tensor:
        """Deviations of all unknowns as the prior has them. # (cells, vector_size)

        Args:
            generator: The source of randomness, on the CPU.
        """
        sizes = [f.bucket.vector for f in self.dense] + [f.leaves.vector for f in self.leaves]
        like = self.dense[0].T
        z = torch.cat(
            [
                torch.randn(
                    (self.cells, s.stop - s.start), generator=generator, dtype=torch.float64
                )
                for s in sizes
            ],
            1,
        )
        return self.spread_out(z.to(like.device))

    def covariance_of(self, a: tuple[int, Tensor], b: tuple[int, Tensor]) -> Tensor:
        """The covariance of pairs of elements of one block that no leaf's rows hold.

        Args:
            a: A latent's site and an element for each pair.
            b: The same of the other.

        Returns:
            # (cells, m, q_a, q_b)
        """
        size = self.layout.core_size
        portion = max(1, _AT_ONCE // max(1, self.cells * size))
        out = []
        for i in range(0, len(a[1]), portion):
            x = self._of_core(a[0], a[1][i : i + portion])
            y = self._of_core(b[0], b[1][i : i + portion])
            moved = torch.cat(
                [
                    torch.einsum(
                        "cmibk,cbkl->cmibl",
                        x[..., f.bucket.vector].unflatten(-1, (-1, f.bucket.size)),
                        f.covariance,
                    ).flatten(3)
                    for f in self.dense
                ],
                -1,
            )
            out.append(moved @ y.mT)
        return torch.cat(out, 1)

    def _of_core(self, latent: int, elements: Tensor) -> Tensor:
        """How some elements vary with the core's unknowns. # (cells, m, q, core_size)"""
        own = self.layout.own[latent]
        assert own is not None
        places = own.vector[elements]
        like = self.dense[0].T
        out = like.new_zeros(self.cells, *places.shape, self.layout.core_size)
        if bool((places < self.layout.core_size).all()):
            return out.scatter(-1, places.expand(self.cells, *places.shape).unsqueeze(-1), 1.0)
        for leaf in self.leaves:
            begin, end = leaf.leaves.vector.start, leaf.leaves.vector.stop
            which = ((places[:, 0] >= begin) & (places[:, 0] < end)).nonzero().squeeze(-1)
            if not len(which) or not leaf.leaves.reads:
                continue
            at = places[which] - begin
            rows = leaf.G.flatten(1, 2)[:, at]  # (cells, m, q, reads)
            to = leaf.leaves.boundary.vector[at // leaf.leaves.size]
            part = like.new_zeros(*rows.shape[:-1], self.layout.core_size)
            part = part.scatter_add(-1, to.expand(rows.shape), rows)
            out = out.index_copy(1, which, part)
        return out

    @cached_property
    def covariance(self) -> Tensor:
        """Cov(h), the flat matrices. # (cells, matrix_size)"""
        core = self._core
        return torch.cat([core, *(m.covariance for m in self._moments)], 1)

    @cached_property
    def noise(self) -> Tensor:
        """Cov(ε), the flat matrices; leaves have their own part alone. # (cells, matrix_size)"""
        core = [f.noise.flatten(1) for f in self.dense]
        return torch.cat([*core, *(m.noise for m in self._moments)], 1)

    @cached_property
    def noise_and_latents(self) -> Tensor:
        """Cov(ε, h), the flat matrices. # (cells, matrix_size)"""
        core = [f.noise_and_latents.flatten(1) for f in self.dense]
        return torch.cat([*core, *(m.noise_and_latents for m in self._moments)], 1)

    @cached_property
    def _core(self) -> Tensor:
        return torch.cat([f.covariance.flatten(1) for f in self.dense], 1)

    @cached_property
    def _moments(self) -> list[LeafMoments]:
        return [LeafMoments(leaf, self._core) for leaf in self.leaves]


_AT_ONCE = 2**22  # numbers that are held of many pairs at once


def joint_factor(layout: BlockLayout, rows: Sequence[SiteRows], cells: int) -> JointFactor:
    """The factor of Λ.

    Args:
        layout: Blocks and places.
        rows: The numbers of the sites.
        cells: Combinations of discrete values.
    """
    flat = precision_of(layout, rows, cells)
    core = flat[:, : sum(b.count * b.size**2 for b in layout.buckets)]
    leaves: list[LeafFactor] = []
    said, taken = CoreSum(core), CoreSum(torch.zeros_like(core))
    for batch in layout.leaves:
        leaves.append(eliminated(layout, batch, rows, cells, flat, said, taken))
    before = said.all()
    left = before + taken.all() if leaves else before
    dense = []
    for bucket in layout.buckets:
        T = substituted(layout, bucket, rows, cells)
        shape = -1, bucket.count, bucket.size, bucket.size
        M, all_said = (x[:, bucket.matrix].reshape(shape) for x in (left, before))
        from_rows = partial(_from_rows, layout, bucket, rows, T, leaves)
        diagonal = all_said.diagonal(dim1=-2, dim2=-1)
        dense.append(factorized(layout, bucket, rows, T, M, diagonal, from_rows))
    return JointFactor(layout, tuple(dense), tuple(leaves))


def _from_rows(
    layout: BlockLayout,
    bucket: Bucket,
    rows: Sequence[SiteRows],
    T: Tensor,
    leaves: Sequence[LeafFactor],
    which: Tensor,
) -> Tensor | None:
    """The factors of some blocks by QR; None if the rows are too many. # (cells, n, d, d)"""
    said: list[RowsOfCore] = []
    for leaf in leaves:
        found = leaf_triangles(layout, leaf.leaves, rows, leaf.T, leaf.R)
        if found is None:
            return None
        p, batch = leaf.leaves.size, leaf.leaves
        said.append(RowsOfCore(found[..., p:, p:].mT, batch.boundary.vector, batch.block))
    return factor_from_rows(layout, bucket, rows, T, which, said)


def _normal(like: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers for each row of matrices. # (cells, B, d, n)"""
    shape = (*like.shape[:-1], n)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
