"""From the arguments of the sites of Gaussian chains to the matrices of a state-space model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.posteriors.filters.state_space import StateSpace
from pyro_em.posteriors.states.state_layout import Kinds, StateLayout

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
class StateNumbers:
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


def numbers_of(layout: StateLayout, stacks: Sequence[StackNumbers]) -> StateNumbers:
    """The state-space model of some chains.

    Args:
        layout: The chains.
        stacks: The numbers of each stack.
    """
    cells = max(t.shape[0] for s in stacks for t in (s.coefficients, s.offset, s.spread))
    form, device = layout.form, stacks[0].offset.device
    n, D, T = form.size, form.width, form.steps
    varying = tuple(s.varies for s in stacks)
    own = [i for i, s in enumerate(layout.stacks) if s.form.is_latent]
    data = [i for i, s in enumerate(layout.stacks) if not s.form.is_latent]
    every = (cells, form.chains)

    each, kinds = _lead(layout, stacks, own, cells), layout.kinds(varying, True)
    transition = _Filled(layout, (*each, kinds.count, n, n), kinds, device)
    noise = _Filled(layout, (*each, kinds.count, n, form.fresh), kinds, device)
    lead = _lead(layout, stacks, own, cells, offsets=True)
    drift = _Filled(layout, (*lead, T, n), None, device)
    for i in own:
        transition.add(i, (OWN, READ), stacks[i].coefficients)
        noise.add(i, (OWN, OWN), stacks[i].root)
        drift.add(i, (OWN,), stacks[i].offset)
    A = transition.tensor
    if len(form.carried):
        shift = A.new_zeros(n, n)
        shift[form.carried[:, 0].to(device), form.carried[:, 1].to(device)] = 1
        A = A + shift

    each, kinds = _lead(layout, stacks, data, cells), layout.kinds(varying, False)
    loading = _Filled(layout, (*each, kinds.count, D, n), kinds, device)
    deviation = _Filled(layout, (*each, kinds.count, D), kinds, device)
    value = _Filled(layout, (*every, T, D), None, device)
    constant = value.flat.new_zeros(every)
    for i in data:
        stack = layout.stacks[i]
        C, spread, residual, nats = _whitened(stacks[i])
        loading.add(i, (OWN, READ), C)
        deviation.add(i, (OWN,), spread)
        value.add(i, (OWN,), residual)
        if stacks[i].is_matrix or stacks[i].weight is not None:
            by_row = nats.expand(-1, stack.members, stack.form.rows, -1).sum((1, 3))
            constant = constant.index_add(1, stack.chain.to(device), by_row.expand(cells, -1))
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
        _seen(layout, stacks, data, cells),
    )
    return StateNumbers(cells, tuple(stacks), space, constant)


def _seen(
    layout: StateLayout, stacks: Sequence[StackNumbers], data: Sequence[int], cells: int
) -> Tensor | None:
    """Which numbers were observed, None if all. # (1, T, D) or (cells · chains, T, D)"""
    form, device = layout.form, stacks[0].offset.device
    shape = (1, form.chains, form.steps, form.width)
    if all(stacks[i].weight is None for i in data):
        places = sum(layout.stacks[i].members * layout.stacks[i].own.numel() for i in data)
        if places == math.prod(shape):
            return None
    seen = _Filled(layout, shape, None, device)
    for i in data:
        stack, weight = layout.stacks[i], stacks[i].weight
        full = (1, stack.members, stack.form.rows, stack.form.width)
        counts = (
            seen.flat.new_ones(1, 1, 1, 1) if weight is None else (weight[None] > 0).to(seen.flat)
        )
        seen.add(i, (OWN,), counts.expand(full))
    there = seen.tensor > 0
    return None if bool(there.all()) else _once_if_alike(there, cells)


def _once_if_alike(seen: Tensor, cells: int) -> Tensor:
    """What is seen, once where all chains see the same. # (1, T, D) or (cells · chains, T, D)"""
    return seen[:1] if bool((seen == seen[:1]).all()) else seen.repeat(cells, 1, 1)


def _lead(
    layout: StateLayout,
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


OWN, READ = "own", "read"  # what a dimension holds: a row's own numbers, or what it reads


@dataclass(frozen=True, eq=False)
class _Index:
    """Where the numbers of a stack go in a tensor.

    Attributes:
        members: Which ones.
        rows: By chain and rank. # (chains|1, K)
        there: Whether a chain has a row of the rank; None if all have.
        flat: Places. # (cells, members, chains|1, K, …)
    """

    members: Tensor
    rows: Tensor
    there: Tensor | None
    flat: Tensor


class _Filled:
    """A tensor of numbers for each cell and chain, which stacks fill.

    Args:
        layout: The chains, which remember where stacks go.
        shape: # (cells|1, chains|1, levels or kinds, …)
        kinds: The kinds of levels; None where each level has numbers of its own.
        device: Where the numbers are.

    Attributes:
        flat: The numbers, one after the other.
    """

    def __init__(
        self,
        layout: StateLayout,
        shape: tuple[int, ...],
        kinds: Kinds | None,
        device: torch.device,
    ) -> None:
        self.layout, self.shape, self.kinds = layout, shape, kinds
        self.flat = torch.zeros(math.prod(shape), dtype=torch.float64, device=device)

    def add(self, i: int, what: tuple[str, ...], numbers: Tensor) -> None:
        """Fill in the numbers of a stack.

        Args:
            i: Its number.
            what: What each of the last dimensions holds.
            numbers: # (cells|1, members|1, rows|1, …)
        """
        key = ("index", i, what, self.shape, self.kinds, self.flat.device)
        if key not in self.layout.indices:
            self.layout.indices[key] = self._index(i, what)
        index: _Index = self.layout.indices[key]
        chosen = numbers[:, index.members] if numbers.shape[1] > 1 else numbers
        # (cells|1, members|1, chains|1, K|1, …)
        chosen = chosen[:, :, index.rows] if numbers.shape[2] > 1 else chosen.unsqueeze(2)
        chosen = chosen.expand(index.flat.shape)
        if index.there is not None:
            chosen = chosen * index.there
        self.flat = self.flat.index_add(0, index.flat.reshape(-1), chosen.reshape(-1))

    def _index(self, i: int, what: tuple[str, ...]) -> _Index:
        stack = self.layout.stacks[i]
        if self.kinds is None:
            kind, members, start = stack.levels, torch.arange(stack.members), stack.starts
        else:
            kind, members, start = self.kinds.entries[i]
        cells, chains = self.shape[:2]
        rows = stack.rows if chains > 1 else stack.rows[:1]
        missing, rows = rows < 0, rows.clamp(min=0)
        count, depth = len(what), 2 + len(what)
        index = kind.reshape(-1, *(1,) * (1 + count))
        for d, (holds, size) in enumerate(zip(what, self.shape[3:], strict=True)):
            place = stack.reads.unsqueeze(0)
            if holds == OWN:
                place = start[:, None, None] + stack.own
            width = [1] * count
            width[d] = place.shape[-1]
            index = index * size + place.reshape(*place.shape[:2], *width)
        index = index[:, rows]  # (members, chains, K, …)
        apart, tail = math.prod(self.shape[2:]), (1,) * count
        index = index + apart * torch.arange(len(rows)).reshape(1, -1, *(1,) * (depth - 1))
        each = torch.arange(cells).reshape(-1, *(1,) * index.dim()) * (chains * apart)
        device = self.flat.device
        there = None
        if bool(missing.any()):
            there = (~missing).reshape(1, 1, *missing.shape, *tail).to(device)
        return _Index(
            members.to(device), rows.to(device), there, (each + index.unsqueeze(0)).to(device)
        )

    @property
    def tensor(self) -> Tensor:
        """# (cells · chains|1, …)"""
        return self.flat.reshape(math.prod(self.shape[:2]), *self.shape[2:])


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
