"""From the arguments of the sites of Gaussian chains to the matrices of a state-space model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.posteriors.chain_layout import ChainLayout, Stack
from pyro_em.posteriors.state_space import StateSpace

_LOG_TWO_PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class StackNumbers:
    """The numbers of one stack, in float64; of size one where they are the same.

    Attributes:
        coefficients: C, the terms beside each other. # (cells|1, members|1, rows|1, D, Q)
        offset: The part of the mean that reads no latent. # (cells|1, members|1, rows|1, D)
        spread: Standard deviations, or lower Cholesky factors. # (…, D) or (…, D, D)
        is_matrix: Which of the two.
        value: The data, zero where missing; None for latents. # (members, rows, D)
        weight: How much each entry counts; None if once. # (members|1, rows|1, D|1)
    """

    coefficients: Tensor
    offset: Tensor
    spread: Tensor
    is_matrix: bool
    value: Tensor | None = None
    weight: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them."""
        return self.coefficients, self.offset, self.spread, self.value, self.weight

    @property
    def root(self) -> Tensor:
        """L, with L Lᵀ the covariance. # (cells|1, members|1, rows|1, D, D)"""
        return self.spread if self.is_matrix else self.spread.diag_embed()

    @property
    def deviations(self) -> Tensor:
        """Standard deviations, or the diagonal of the Cholesky factor. # (…, D)"""
        return self.spread.diagonal(dim1=-2, dim2=-1) if self.is_matrix else self.spread

    @property
    def is_degenerate(self) -> bool:
        """Whether an observed entry that counts has no noise."""
        if self.value is None:
            return False
        flat = self.deviations == 0
        return bool((flat if self.weight is None else flat & (self.weight > 0)).any())

    @property
    def varies(self) -> bool:
        """Whether the matrices differ between members."""
        weighted = self.weight is not None and bool(((self.weight != 0) & (self.weight != 1)).any())
        return weighted or max(self.coefficients.shape[1], self.spread.shape[1]) > 1

    @property
    def differs(self) -> bool:
        """Whether the matrices differ between rows or discrete cells."""
        weighted = self.weight is not None and bool(((self.weight != 0) & (self.weight != 1)).any())
        shapes = (self.coefficients.shape, self.spread.shape)
        return weighted or any(s[0] > 1 or s[2] > 1 for s in shapes)


@dataclass(frozen=True, eq=False)
class ChainNumbers:
    """The numbers of chains.

    Attributes:
        cells: Combinations of discrete values.
        stacks: Of each stack.
        space: The state-space model; its chains are those of the first cell, then of the second, ….
        constant: What each chain's evidence has besides, in nats. # (cells, chains)
    """

    cells: int
    stacks: tuple[StackNumbers, ...]
    space: StateSpace
    constant: Tensor

    @property
    def is_degenerate(self) -> bool:
        """Whether an observed entry that counts has no noise."""
        return any(s.is_degenerate for s in self.stacks)


def numbers_of(layout: ChainLayout, stacks: Sequence[StackNumbers]) -> ChainNumbers:
    """The state-space model of some chains.

    Args:
        layout: The chains.
        stacks: The numbers of each stack.
    """
    cells = max(t.shape[0] for s in stacks for t in (s.coefficients, s.offset, s.spread))
    form, device = layout.form, stacks[0].offset.device
    n, D, T = form.size, form.width, form.steps
    varying = [s.varies for s in stacks]
    own = [i for i, s in enumerate(layout.stacks) if s.form.is_latent]
    seen_of = [i for i, s in enumerate(layout.stacks) if not s.form.is_latent]

    each = _lead(layout, stacks, own, cells)
    kinds = layout.kinds(varying, True)
    transition = _Places((*each, kinds.count, n, n), device)
    noise = _Places((*each, kinds.count, n, form.fresh), device)
    drift = _Places((*_lead(layout, stacks, own, cells, offsets=True), T, n), device)
    for i in own:
        stack, number = layout.stacks[i], stacks[i]
        kind, member, start = kinds.entries[i]
        place = start[:, None, None] + stack.own
        reads = stack.reads.expand(len(kind), *stack.reads.shape)
        transition.add(
            stack, kind, member, (place.unsqueeze(-1), reads.unsqueeze(-2)), number.coefficients
        )
        noise.add(stack, kind, member, (place.unsqueeze(-1), place.unsqueeze(-2)), number.root)
        every = torch.arange(stack.members)
        drift.add(
            stack, stack.levels, every, (stack.starts[:, None, None] + stack.own,), number.offset
        )
    A = transition.tensor
    if len(form.carried):
        shift = A.new_zeros(n, n)
        shift[form.carried[:, 0].to(device), form.carried[:, 1].to(device)] = 1
        A = A + shift

    each = _lead(layout, stacks, seen_of, cells)
    kinds = layout.kinds(varying, False)
    loading = _Places((*each, kinds.count, D, n), device)
    deviation = _Places((*each, kinds.count, D), device)
    every_chain = (cells, form.chains)
    value = _Places((*every_chain, T, D), device)
    seen = _Places((1, form.chains, T, D), device)
    constant = value.flat.new_zeros(cells, form.chains)
    for i in seen_of:
        stack, number = layout.stacks[i], stacks[i]
        kind, member, start = kinds.entries[i]
        place = start[:, None, None] + stack.own
        reads = stack.reads.expand(len(kind), *stack.reads.shape)
        C, spread, residual, nats = _whitened(number)
        loading.add(stack, kind, member, (place.unsqueeze(-1), reads.unsqueeze(-2)), C)
        deviation.add(stack, kind, member, (place,), spread)
        every = torch.arange(stack.members)
        at = (stack.starts[:, None, None] + stack.own,)
        value.add(stack, stack.levels, every, at, residual)
        counts = torch.ones_like(residual[:1]) if number.weight is None else number.weight[None] > 0
        full = (1, stack.members, stack.form.rows, stack.form.width)
        seen.add(stack, stack.levels, every, at, counts.to(torch.float64).expand(full))
        by_row = nats.expand(-1, stack.members, stack.form.rows, -1).sum((1, 3))
        constant = constant.index_add(1, stack.chain.to(device), by_row.expand(cells, -1))
    there = seen.tensor > 0
    s = deviation.tensor
    space = StateSpace(
        A,
        drift.tensor,
        noise.tensor,
        layout.kinds(varying, True).of_level,
        loading.tensor,
        torch.where(s > 0, s, torch.ones_like(s)),
        kinds.of_level,
        value.tensor,
        None if bool(there.all()) else _once_if_alike(there, cells),
    )
    return ChainNumbers(cells, tuple(stacks), space, constant)


def _once_if_alike(seen: Tensor, cells: int) -> Tensor:
    """What is seen, once where all chains see the same. # (1, T, D) or (cells · chains, T, D)"""
    return seen[:1] if bool((seen == seen[:1]).all()) else seen.repeat(cells, 1, 1)


def _lead(
    layout: ChainLayout,
    stacks: Sequence[StackNumbers],
    which: Sequence[int],
    cells: int,
    offsets: bool = False,
) -> tuple[int, int]:
    """Cells and chains of tensors that some stacks fill; (1, 1) where all share them."""
    for i in which:
        shape = stacks[i].offset.shape
        varies = (shape[0] > 1 or shape[2] > 1) if offsets else stacks[i].differs
        if varies or not layout.stacks[i].is_uniform:
            return cells, layout.form.chains
    return 1, 1


class _Places:
    """A tensor of numbers for each cell and chain that stacks fill.

    Attributes:
        shape: # (cells|1, chains|1, levels or kinds, …)
        flat: The numbers, one after the other.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape = shape
        self.flat = torch.zeros(math.prod(shape), dtype=torch.float64, device=device)

    def add(
        self,
        stack: Stack,
        kind: Tensor,
        member: Tensor,
        places: tuple[Tensor, ...],
        numbers: Tensor,
    ) -> None:
        """Fill in the numbers of some members.

        Args:
            stack: Their stack.
            kind: Where each goes. # (c,)
            member: Which ones. # (c,)
            places: Along each of the last dimensions. # (c, rows, …) each
            numbers: # (cells|1, members|1, rows|1, …)
        """
        cells, chains = self.shape[:2]
        rows = stack.rows if chains > 1 else stack.rows[:1]
        there, rows = rows >= 0, rows.clamp(min=0)
        index = kind.reshape(-1, 1, *(1,) * (places[0].dim() - 2)).expand_as(places[0])
        for place, size in zip(places, self.shape[3:], strict=True):
            index = index * size + place
        index = index[:, rows]  # (c, chains, K, …)
        apart = math.prod(self.shape[2:])
        tail = (1,) * (index.dim() - 3)
        index = index + torch.arange(len(rows)).reshape(1, -1, 1, *tail) * apart
        chosen = numbers[:, member.to(numbers.device)] if numbers.shape[1] > 1 else numbers
        if numbers.shape[2] > 1:
            chosen = chosen[:, :, rows.to(numbers.device)]
        else:
            chosen = chosen.unsqueeze(2)  # (cells|1, c|1, 1, 1, …)
        chosen = chosen.expand(cells, *index.shape)
        if not bool(there.all()):
            chosen = chosen * there.reshape(1, *there.shape, *tail).to(chosen)
        each = torch.arange(cells).reshape(-1, *(1,) * index.dim()) * (chains * apart)
        index = (each + index.unsqueeze(0)).reshape(-1).to(self.flat.device)
        self.flat = self.flat.index_add(0, index, chosen.reshape(-1))

    @property
    def tensor(self) -> Tensor:
        """# (cells · chains|1, …)"""
        return self.flat.reshape(-1, *self.shape[2:])


def _whitened(number: StackNumbers) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An observed stack as numbers with independent noises.

    Returns:
        Coefficients, standard deviations, residuals at latents of zero, and what the evidence has
        besides, in nats, for each entry.
    """
    assert number.value is not None
    residual = number.value - number.offset
    C, spread = number.coefficients, number.spread
    nats = torch.zeros_like(spread[..., 0] if number.is_matrix else spread)
    if number.is_matrix:
        shape = torch.broadcast_shapes(spread.shape[:3], residual.shape[:3])
        residual = torch.linalg.solve_triangular(
            spread.expand(*shape, *spread.shape[-2:]),
            residual.expand(*shape, -1).unsqueeze(-1),
            upper=False,
        ).squeeze(-1)
        shape = torch.broadcast_shapes(spread.shape[:3], C.shape[:3])
        C = torch.linalg.solve_triangular(
            spread.expand(*shape, *spread.shape[-2:]), C.expand(*shape, *C.shape[-2:]), upper=False
        )
        nats = -number.deviations.log()
        spread = torch.ones_like(nats)
    if number.weight is not None:
        # w log N(r | s²) is log N(r | s²/w) and what follows.
        w = torch.where(number.weight > 0, number.weight, torch.ones_like(number.weight))
        counted = number.weight[None] > 0
        size = _LOG_TWO_PI + (0.0 if number.is_matrix else 2 * spread.log())
        nats = torch.where(counted, w * nats + 0.5 * (1 - w) * size - 0.5 * w.log(), 0.0)
        if bool((w != 1).any()):
            spread = spread / w.sqrt()
        residual = torch.where(counted, residual, torch.zeros_like(residual))
    return C, spread, residual, nats
