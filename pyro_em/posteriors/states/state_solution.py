"""The posterior of Gaussian chains as E-step and M-step ask for it: see `Integrated`.

Given all data the states are a Markov chain again (`pyro_em.posteriors.filters.state_space.Smoothed`),
whose covariances and those of its noises are sums: nothing is the difference of large numbers, and
nothing is inverted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pyro_em.posteriors.filters.kalman import disturbances, lagged_covariance, sampled, smoothed
from pyro_em.posteriors.filters.state_space import Smoothed
from pyro_em.posteriors.states.state_layout import StateLayout
from pyro_em.posteriors.states.state_numbers import StackNumbers, StateNumbers, numbers_of
from pyro_em.updates.expectations.linear_moments import LinearMoments, linear_moments

_LOG_TWO_PI_E = 1 + math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class StateSolution:
    """The posterior of the unknowns of some chains. Latents are named by the number of their stack.

    Attributes:
        layout: The chains.
        numbers: What was solved.
        smoothed: The E-step; its chains are those of the first discrete cell, then of the second, ….
    """

    layout: StateLayout
    numbers: StateNumbers
    smoothed: Smoothed

    def __getstate__(self) -> dict[str, Any]:
        return {"layout": self.layout, "numbers": self.numbers, "smoothed": self.smoothed}

    @property
    def cells(self) -> int:
        """Combinations of discrete values."""
        return self.numbers.cells

    @property
    def degenerate(self) -> bool:
        """Whether an observed entry that counts has no spread."""
        return self.numbers.is_degenerate

    @cached_property
    def log_evidence(self) -> Tensor:
        """Nats of each chain. # (cells, chains)"""
        return self._by_cell(self.smoothed.log_evidence) + self.numbers.constant

    def constant_rows(self, site: int) -> Tensor:
        """No row is outside the chains. # (cells, rows)"""
        rows = self.layout.sites[site].rows
        return self.numbers.constant.new_zeros(self.cells, rows)

    def mean(self, latent: int) -> Tensor:
        """Posterior mean. # (cells, members · rows, q)"""
        return self._own(latent, self._by_cell(self.smoothed.mean)).flatten(1, 2)

    def covariance_of(
        self, latent_a: int, elements_a: Tensor, latent_b: int, elements_b: Tensor
    ) -> Tensor:
        """Posterior covariance of pairs of elements; zero between chains. # (cells, m, q_a, q_b)"""
        (s, chain, own), (t, other, its) = (
            self._places(latent_a, elements_a),
            self._places(latent_b, elements_b),
        )
        swapped = s > t
        found = self.numbers.constant.new_zeros(self.cells, len(s), own.shape[1], its.shape[1])
        for backward in (False, True):
            which = (swapped if backward else ~swapped).nonzero().squeeze(-1)
            which = which[chain[which] == other[which]]
            if not len(which):
                continue
            early, late = (t, s) if backward else (s, t)
            pairs, back = torch.unique(
                torch.stack([early[which], late[which]]), dim=1, return_inverse=True
            )
            if bool((pairs[0] == pairs[1]).all()):
                matrices = self.smoothed.covariance[:, pairs[0]]
            else:
                matrices = lagged_covariance(self.numbers.space, self.smoothed, pairs[0], pairs[1])
            matrices = self._by_cell(matrices)  # (cells|1, chains|1, pairs, n, n)
            at = chain[which] if matrices.shape[1] > 1 else torch.zeros_like(chain[which])
            one, two = (its, own) if backward else (own, its)
            part = matrices[
                :,
                at[:, None, None],
                back[:, None, None],
                one[which].unsqueeze(-1),
                two[which].unsqueeze(-2),
            ]
            found[:, which] = (part.mT if backward else part).expand(self.cells, -1, -1, -1)
        return found

    def coefficients(self, site: int) -> Tensor:
        """(C, b), of which the mean of a stack is made. # (cells|1, rows|1, D, Q + 1)"""
        numbers = self.numbers.stacks[site]
        C, b = numbers.coefficients, numbers.offset.unsqueeze(-1)
        shape = torch.broadcast_shapes(C.shape[:3], b.shape[:3])
        both = torch.cat([C.expand(*shape, *C.shape[3:]), b.expand(*shape, *b.shape[3:])], -1)
        stack = self.layout.stacks[site]
        if shape[1:] != (1, 1):
            both = both.expand(-1, stack.members, stack.form.rows, -1, -1)
        return both.flatten(1, 2)

    def linear_moments(self, site: int, diagonal: bool = False) -> LinearMoments:
        """Moments of the residuals and of φ = (unknowns that the mean reads, 1), for the M-step.

        Args:
            site: The number of the stack.
            diagonal: Whether of E[r rᵀ] only the diagonal is wanted.
        """
        stack, numbers = self.layout.stacks[site], self.numbers.stacks[site]
        mean, covariance = self._read(site)
        if stack.form.is_latent:
            residual, spread, cross = self._noise(site)
        else:
            assert numbers.value is not None
            C = numbers.coefficients
            residual = numbers.value - numbers.offset - (C @ mean.unsqueeze(-1)).squeeze(-1)
            if numbers.weight is not None:
                seen = numbers.weight > 0
                residual = torch.where(seen, residual, torch.zeros_like(residual))
                C = C * seen.unsqueeze(-1)
            cross = -(C @ covariance)
            if diagonal:
                spread = -(cross * C).sum(-1)
            else:
                spread = -(cross @ C.mT)
        if diagonal:
            if spread.dim() == residual.dim() + 1:
                spread = spread.diagonal(dim1=-2, dim2=-1)
            second = spread + residual.square()
        else:
            second = spread + residual.unsqueeze(-1) * residual.unsqueeze(-2)
        full = (self.cells, stack.members, stack.form.rows)

        def rows(t: Tensor) -> Tensor:
            return t.expand(*full, *t.shape[3:]).flatten(1, 2)

        return linear_moments(
            rows(mean), rows(covariance), rows(residual), rows(cross), rows(second), diagonal
        )

    def whitened(self, site: int) -> Tensor:
        """Residuals at the posterior mean over the spread, of a latent its noise; zero without spread.

        Args:
            site: The number of the stack.

        Returns:
            Zero at observed entries of weight zero. # (cells, members, rows, D)
        """
        stack, numbers = self.layout.stacks[site], self.numbers.stacks[site]
        if stack.form.is_latent:
            own = stack.starts[:, None, None] + stack.own
            residual = self._gathered(self._disturbance, stack.levels, stack.chain, own)
        else:
            assert numbers.value is not None
            mean = self._gathered(self._mean, self._read_levels(site), stack.chain, stack.reads)
            if stack.present is not None:
                mean = mean * stack.present.to(mean)
            read = (numbers.coefficients @ mean.unsqueeze(-1)).squeeze(-1)
            residual = numbers.value - numbers.offset - read
            if numbers.weight is not None:
                residual = torch.where(numbers.weight > 0, residual, torch.zeros_like(residual))
        if numbers.is_matrix:
            inverse = torch.linalg.pinv(numbers.root)
            return (inverse @ residual.unsqueeze(-1)).squeeze(-1)
        none = numbers.spread == 0
        white = residual / torch.where(none, 1.0, numbers.spread)
        return torch.where(none, torch.zeros_like(white), white)

    def moments(self, site: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of what the rows of an observed stack read, terms beside each other.

        Returns:
            # (cells, members · rows, Q), (cells, members · rows, Q, Q)
        """
        stack = self.layout.stacks[site]
        full = (self.cells, stack.members, stack.form.rows)
        mean, covariance = self._read(site)
        return (
            mean.expand(*full, -1).flatten(1, 2),
            covariance.expand(*full, -1, -1).flatten(1, 2),
        )

    def noise(self, site: int) -> Tensor:
        """The covariance of a stack given all latents. # (cells|1, members · rows|1, D, D)"""
        stack, root = self.layout.stacks[site], self.numbers.stacks[site].root
        covariance = root @ root.mT
        if covariance.shape[1:3] != (1, 1):
            covariance = covariance.expand(-1, stack.members, stack.form.rows, -1, -1)
        return covariance.flatten(1, 2)

    def seeing(self, kept: Mapping[int, Tensor]) -> StateSolution:
        """The posterior given some of the data only: the weights of all others are zero.

        Args:
            kept: By the number of a stack which of its rows are seen; all of one that is not named.
                # (members · rows,) each
        """
        stacks = list(self.numbers.stacks)
        for i, rows in kept.items():
            stack, own = self.layout.stacks[i], stacks[i]
            seen = rows.to(own.offset).reshape(stack.members, stack.form.rows, 1)
            weight = seen if own.weight is None else own.weight * seen
            stacks[i] = replace(own, weight=weight)
        return solve(self.layout, stacks)

    def _read(self, site: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance of what rows read. # (cells|1, members, rows, Q), (…, Q, Q)"""
        stack, level = self.layout.stacks[site], self._read_levels(site)
        mean = self._gathered(self._mean, level, stack.chain, stack.reads)
        covariance = self._pairs(self._covariance, level, stack.chain, stack.reads, stack.reads)
        if stack.present is not None:
            there = stack.present.to(mean)
            mean = mean * there
            covariance = covariance * (there.unsqueeze(-1) * there.unsqueeze(-2))
        return mean, covariance

    def _noise(self, site: int) -> tuple[Tensor, Tensor, Tensor]:
        """The noise of a latent: mean, covariance, and covariance with what its mean reads."""
        stack = self.layout.stacks[site]
        own = stack.starts[:, None, None] + stack.own  # (members, rows, D)
        covariance, cross = self._disturbances
        residual = self._gathered(self._disturbance, stack.levels, stack.chain, own)
        spread = self._pairs(covariance, stack.levels, stack.chain, own, own)
        shared = self._pairs(cross, stack.levels, stack.chain, own, stack.reads)
        if stack.present is not None:
            shared = shared * stack.present.unsqueeze(-2)
        return residual, spread, shared

    def counted_coefficients(self, site: int) -> Tensor:
        """C, zero at entries of weight zero. # (cells|1, rows|1, D, Q)"""
        numbers, stack = self.numbers.stacks[site], self.layout.stacks[site]
        C = numbers.coefficients
        if numbers.weight is not None:
            C = C * (numbers.weight > 0).unsqueeze(-1)
        if C.shape[1:3] == (1, 1):
            return C.flatten(1, 2)
        return C.expand(-1, stack.members, stack.form.rows, -1, -1).flatten(1, 2)

    def residual_at(self, site: int, read: Tensor, own: Tensor | None = None) -> Tensor:
        """y − b − C u at some values; zero at observed entries of weight zero. # (cells|1, rows, D)"""
        stack, numbers = self.layout.stacks[site], self.numbers.stacks[site]
        full = (stack.members, stack.form.rows)
        y = numbers.value if own is None else own.reshape(*full, own.shape[-1])
        assert y is not None
        read = read.reshape(len(read), *full, read.shape[-1])
        r = y - numbers.offset - (numbers.coefficients @ read.unsqueeze(-1)).squeeze(-1)
        if numbers.weight is not None:
            r = torch.where(numbers.weight > 0, r, torch.zeros_like(r))
        return r.expand(-1, *full, -1).flatten(1, 2)

    def read_of(self, site: int, values: Mapping[int, Tensor]) -> Tensor:
        """What the rows of a stack read of values of all latents. # (members · rows, Q)"""
        return self._read_values(site, {i: v.unsqueeze(0) for i, v in values.items()})[0]

    def read_of_draws(self, site: int, drawn: Sequence[Tensor]) -> Tensor:
        """What the rows of a stack read of draws of all latents. # (n, cells, members · rows, Q)

        Args:
            site: The number of the stack.
            drawn: In the order of stacks. # (n, cells, members · rows, q) each
        """
        latents = [i for i, stack in enumerate(self.layout.stacks) if stack.form.is_latent]
        values = {i: v.flatten(0, 1) for i, v in zip(latents, drawn, strict=True)}
        return self._read_values(site, values).unflatten(0, drawn[0].shape[:2])

    def _read_values(self, site: int, values: Mapping[int, Tensor]) -> Tensor:
        """What the rows of a stack read. # (n, members · rows, Q), of (n, elements, q) each"""
        form, stack = self.layout.form, self.layout.stacks[site]
        n = len(next(iter(values.values())))
        path = self.numbers.constant.new_zeros(n, form.chains, form.steps, form.size)
        for i, value in values.items():
            level, chain, own = self._places(i, torch.arange(value.shape[1]))
            path[:, chain.unsqueeze(-1), level.unsqueeze(-1), own] = value.to(path)
        for here, before in form.carried.tolist():
            if here == before:  # it was new at one level, and is there ever since
                path[..., here] = path[..., here].cumsum(-1)
            else:
                path[:, :, 1:, here] = path[:, :, :-1, before]
        found = self._gathered(path, self._read_levels(site), stack.chain, stack.reads)
        if stack.present is not None:
            found = found * stack.present.to(found)
        return found.flatten(1, 2)

    def read_covariance(self, site: int, covariances: Mapping[int, Tensor]) -> Tensor:
        """The same of covariances of independent elements. # (members · rows, Q, Q)"""
        form = self.layout.form
        n = form.size
        path = self.numbers.constant.new_zeros(form.chains, form.steps, n, n)
        for i, value in covariances.items():
            level, chain, own = self._places(i, torch.arange(len(value)))
            at = chain[:, None, None], level[:, None, None], own.unsqueeze(-1), own.unsqueeze(-2)
            path[at] = value
        copies = dict(form.carried.tolist())
        lasting = [here for here, before in copies.items() if here == before]
        for here, other in product(lasting, lasting):
            path[..., here, other] = path[..., here, other].cumsum(-1)
        moved = [pair for pair in copies.items() if pair[0] not in lasting]
        for (here, before), (other, its) in product(moved, moved):
            path[:, 1:, here, other] = path[:, :-1, before, its]
        stack = self.layout.stacks[site]
        level = self._read_levels(site)
        found = self._pairs(path.unsqueeze(0), level, stack.chain, stack.reads, stack.reads)
        if stack.present is not None:
            there = stack.present.to(found)
            found = found * (there.unsqueeze(-1) * there.unsqueeze(-2))
        return found[0].flatten(0, 1)

    def is_of(self, other: object) -> bool:
        """Whether it is the posterior of the very numbers of another one, stack by stack."""
        if self is other or not isinstance(other, StateSolution):
            return self is other
        pairs = zip(self.numbers.stacks, other.numbers.stacks, strict=True)
        return all(
            x is y or (x is not None and y is not None and torch.equal(x, y))
            for a, b in pairs
            for x, y in zip(a.tensors, b.tensors, strict=True)
        )

    def sample(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Joint draws of all latents. # (n, cells, members · rows, q) each, in the order of stacks"""
        drawn = sampled(self.numbers.space, n, generator)  # (n, cells · chains, T, size)
        drawn = drawn.reshape(n * self.cells, -1, *drawn.shape[2:])
        return [
            self._own(i, drawn).flatten(1, 2).unflatten(0, (n, self.cells))
            for i, stack in enumerate(self.layout.stacks)
            if stack.form.is_latent
        ]

    def prior_draw(self, generator: torch.Generator) -> dict[int, Tensor]:
        """One draw of all latents from their prior. # (cells, members · rows, q) each

        Args:
            generator: The source of randomness, on the CPU.
        """
        space = self.numbers.space
        shape = (space.chains, space.steps, space.noise.shape[-1], 1)
        z = torch.randn(shape, generator=generator, dtype=torch.float64).to(space.noise)
        state = space.value.new_zeros(space.chains, space.size)
        states = []
        for t, kind in enumerate(space.dynamics.tolist()):
            moved = (
                (space.transition[:, kind] @ state.unsqueeze(-1)).squeeze(-1) if t else 0 * state
            )
            state = moved + space.drift[:, t] + (space.noise[:, kind] @ z[:, t]).squeeze(-1)
            states.append(state)
        path = self._by_cell(torch.stack(states, 1))
        return {
            i: self._own(i, path).flatten(1, 2)
            for i, stack in enumerate(self.layout.stacks)
            if stack.form.is_latent
        }

    def entropy(self) -> Tensor:
        """Entropy of the posterior of each chain, −inf at a variance of zero. # (cells, chains)"""
        layout = self.layout
        sizes = layout.block_sizes.to(self.numbers.constant)
        log_det = self._by_cell(self.smoothed.log_determinant)
        out = (0.5 * _LOG_TWO_PI_E * sizes - 0.5 * log_det).expand(self.cells, layout.blocks)
        for i, stack in enumerate(layout.stacks):
            if stack.form.is_latent:
                logs = self.numbers.stacks[i].deviations.log().sum(-1)
                each = logs.expand(self.cells, stack.members, stack.form.rows).sum(1)
                out = out.index_add(1, stack.chain.to(out.device), each)
        return out

    @cached_property
    def _mean(self) -> Tensor:
        return self._by_cell(self.smoothed.mean)

    @cached_property
    def _covariance(self) -> Tensor:
        return self._by_cell(self.smoothed.covariance)

    @cached_property
    def _disturbance(self) -> Tensor:
        return self._by_cell(self.smoothed.disturbance)

    @cached_property
    def _disturbances(self) -> tuple[Tensor, Tensor]:
        """Covariances of the noises of each step, and with the state before. # (…, T, n, n) each"""
        covariance, cross = disturbances(self.numbers.space, self.smoothed)
        return self._by_cell(covariance), self._by_cell(cross)

    def _by_cell(self, t: Tensor) -> Tensor:
        """# (cells · chains|1, …) as (cells|1, chains|1, …)"""
        return t.unsqueeze(0) if len(t) == 1 else t.unflatten(0, (self.cells, self.layout.blocks))

    def _read_levels(self, site: int) -> Tensor:
        """The levels of the states that the members of a stack read. # (members,)"""
        stack = self.layout.stacks[site]
        return (stack.levels - 1).clamp(min=0) if stack.form.is_latent else stack.levels

    def _own(self, latent: int, path: Tensor) -> Tensor:
        """The numbers of a latent in states. # (…, members, rows, q)"""
        stack = self.layout.stacks[latent]
        return self._gathered(
            path, stack.levels, stack.chain, stack.starts[:, None, None] + stack.own
        )

    def _gathered(self, t: Tensor, level: Tensor, chain: Tensor, places: Tensor) -> Tensor:
        """Numbers of states. # (cells|1, members, rows, ·)

        Args:
            t: # (cells|1, chains|1, T, n)
            level: # (members,)
            chain: # (rows,)
            places: # (rows, ·) or (members, rows, ·)
        """
        chain = chain if t.shape[1] > 1 else torch.zeros_like(chain)
        return t[:, chain[None, :, None], level[:, None, None], places]

    def _pairs(self, t: Tensor, level: Tensor, chain: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Parts of matrices of states. # (cells|1, members, rows, ·, ·)"""
        chain = chain if t.shape[1] > 1 else torch.zeros_like(chain)
        rows = chain[None, :, None, None]
        return t[:, rows, level[:, None, None, None], a.unsqueeze(-1), b.unsqueeze(-2)]

    def _places(self, latent: int, elements: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The level, the chain and the places of elements of a latent."""
        stack = self.layout.stacks[latent]
        member, row = elements // stack.form.rows, elements % stack.form.rows
        own = stack.starts[member].unsqueeze(-1) + stack.own[row]
        return stack.levels[member], stack.chain[row], own


def solve(layout: StateLayout, stacks: Sequence[StackNumbers]) -> StateSolution:
    """Evidence and posterior of some chains.

    Args:
        layout: The chains.
        stacks: The numbers of each of their stacks.
    """
    numbers = numbers_of(layout, stacks)
    return StateSolution(layout, numbers, smoothed(numbers.space))
