"""The sites of Gaussian chains for steps on sums: what is alike at all of their steps is held once.

A site stands for a stack (`pyro_em.posteriors.states.state_layout`). Its rows are told by chain and
rank; the rows of one chain that read the same numbers are one row with as many entries. Offsets that
parameters move from step to step are coefficients of known features: with φ = (u, f) a mean is (C, B) φ
and what is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_em.graph.factors import Group
from pyro_em.posteriors.chain_sums.state_arguments import (
    Linear,
    Numbers,
    Places,
    Spread,
    Unlike,
    beside,
    linear_of,
    masked,
    reshaped,
    spread_of,
)
from pyro_em.posteriors.gaussians.coordinates import seen_coordinates
from pyro_em.posteriors.gaussians.gaussian import counts_once
from pyro_em.posteriors.states.state_layout import Stack
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.gaussian_rows import apart_rows, event_shape, is_matrix

Along = slice | Places  # some steps, or some places

_MANY = 2**23  # numbers of a design that is looked at
_FEATURES = 64


@dataclass(frozen=True, eq=False)
class Site:
    """A stack whose matrices are the same at all of its steps.

    Attributes:
        name: Its first member.
        is_latent: Whether it is one of latents.
        levels: The steps of its members.
        before: The steps of the states that they read.
        steps: N, how many members there are.
        lead: How many chains have arguments of their own; 1 where they share them.
        own: Places of a row's numbers: in the state, or in the data of the step. # (K, D)
        reads: Places of what a row reads. # (K, Q)
        there: Whether it reads them; None where each row reads all. # (K, Q)
        coefficients: C. # (1, lead|1, K, D, Q)
        offset: # (N|1, chains|1, K, D)
        spread: # (chains|1, K, D, …)
        features: f. # (F, N|1, chains|1)
        design: Of each entry of ∂(C, B)/∂θ where it is, and the entry.
        value: The data, zero where missing; None for latents, and where they are not held.
            # (chains, N, K, D)
        weight: One where a row is seen, or an entry; None where all are. # (chains, N, K|K, D)
        by_entry: Whether the weights are those of entries.
        count: Members that count. # (lead, K) or (lead, K, D)
    """

    name: str
    is_latent: bool
    levels: Along
    before: Along
    steps: int
    lead: int
    own: Places
    reads: Places
    there: NDArray[np.bool_] | None
    coefficients: Linear
    offset: Linear
    spread: Spread
    features: Numbers
    design: Design
    value: Numbers | None
    weight: Numbers | None
    by_entry: bool
    count: Numbers

    @property
    def width(self) -> int:
        """D."""
        return self.own.shape[1]

    @property
    def ranks(self) -> int:
        """K."""
        return self.own.shape[0]


@dataclass(frozen=True, eq=False)
class Design:
    """∂(C, B)/∂θ: entries that are not zero.

    Attributes:
        row: The entry of the mean: by chain, rank and number, as one. # (entries,)
        place: The coordinate of φ. # (entries,)
        column: The element of θ. # (entries,)
        factor: # (entries,)
    """

    row: Places
    place: Places
    column: Places
    factor: Numbers


def site_of(group: Group, stack: Stack, chains: int, begins: Mapping[str, int]) -> Site:
    """A stack as steps on sums need it.

    Args:
        group: Its sites.
        stack: Where they lie.
        chains: How many chains there are.
        begins: Where each parameter begins in θ.

    Raises:
        Unlike: If its steps are not alike, or chains differ in what they read.
    """
    name, latent = group.members[0], group.role is Role.GAUSSIAN
    if not stack.is_uniform:
        raise Unlike(f"series differ in what '{name}' reads")
    if bool((stack.starts != stack.starts[0]).any()):
        raise Unlike(f"the data of a step lie at other places than those of another, at '{name}'")
    matrix, N = is_matrix(group), stack.members
    ranks = stack.rows[0]
    own = (stack.starts[0] + stack.own[ranks]).numpy()
    reads = stack.reads[ranks].numpy()
    there = None if stack.present is None else stack.present[ranks].numpy()
    K, D = own.shape
    parts = [linear_of(group, stack, a, begins, 1) for a in group.lines if a != "loc"]
    none = np.zeros((1, 1, K, D, 0))
    empty = np.empty(0, dtype=np.int64)
    coefficients = Linear(none, empty, empty, np.empty(0))
    if parts:
        coefficients = beside(parts, reads.shape[1])
    if there is not None:
        coefficients = masked(coefficients, there)
    offset = linear_of(group, stack, "loc", begins, 0, by_step=True)
    spread = spread_of(group, stack, begins)
    value, weight = (None, None) if latent else data_of(group, stack, chains)
    if latent and not (group.mask is None and group.elements is None and group.is_unscaled):
        raise Unlike(f"'{name}' is masked or counted otherwise than once")
    alike = bool((reads == reads[:1]).all()) and (there is None or bool((there == there[:1]).all()))
    if K > 1 and alike and not matrix:  # one row with as many entries
        own, reads = own.reshape(1, -1), reads[:1]
        there = None if there is None else there[:1]
        of_C, D = coefficients.constant.shape[:2], K * D
        coefficients = reshaped(coefficients, (*of_C, 1, D, reads.shape[1]))
        offset = reshaped(offset, (*offset.constant.shape[:2], 1, D))
        of_spread = spread.linear.constant.shape[:2]
        linear = reshaped(spread.linear, (*of_spread, 1, D))
        spread = Spread(spread.argument, linear, spread.picked)
        value = None if value is None else value.reshape(chains, N, 1, D)
        weight = None if weight is None else weight.reshape(chains, N, 1, D)
        K = 1
    features, entered, by_chain = _features(offset)
    lead = max(coefficients.constant.shape[1], spread.linear.constant.shape[1], by_chain)
    design = _design(coefficients, entered, by_chain, lead, reads.shape[1])
    by_entry = weight is not None and bool((weight != weight[..., :1]).any())
    if weight is not None and not by_entry:
        weight = weight[..., 0]
    count: Numbers = np.full((lead, K), float(N if lead > 1 else N * chains))
    if weight is not None:
        summed = weight.sum(1)
        count = summed if lead > 1 else summed.sum(0, keepdims=True)
    levels = stack.levels.numpy()
    return Site(
        name,
        latent,
        along(levels),
        along((levels - 1).clip(min=0) if latent else levels),
        N,
        lead,
        own,
        reads,
        there,
        coefficients,
        offset,
        spread,
        features,
        design,
        value,
        weight,
        by_entry,
        count,
    )


def along(x: Places) -> Along:
    """Indices as a slice, where they are one."""
    if len(x) == 1:
        return slice(int(x[0]), int(x[0]) + 1)
    step = int(x[1] - x[0])
    if step > 0 and bool((np.diff(x) == step).all()):
        return slice(int(x[0]), int(x[-1]) + 1, step)
    return x


def indices(steps: Along) -> Places:
    """The steps, one by one."""
    return np.arange(steps.start, steps.stop, steps.step) if isinstance(steps, slice) else steps


def data_of(group: Group, stack: Stack, chains: int) -> tuple[Numbers, Numbers | None]:
    """The data, zero where missing, and what counts. # (chains, N, K, D) each"""
    name, D = group.members[0], event_shape(group).numel()
    if seen_coordinates(group) is not None:
        raise Unlike(f"vectors of '{name}' are seen in part")
    where = stack.rows.numpy()
    full = stack.members, stack.form.rows, D

    def laid(t: torch.Tensor) -> Numbers:
        rows = t.detach().cpu().to(torch.float64).expand(full).numpy()
        out: Numbers = np.ascontiguousarray(rows[:, where].transpose(1, 0, 2, 3))
        return out

    value = laid(apart_rows(group, group.value)[0])
    if counts_once(group):
        return value, None
    weights = group.weights()
    if group.elements is None:
        weights = weights.reshape(weights.shape + (1,) * len(event_shape(group)))
    weight = laid(apart_rows(group, weights, own_event=True)[0])
    if bool(((weight != 0) & (weight != 1)).any()):
        raise Unlike(f"data of '{name}' count otherwise than once")
    return np.where(weight > 0, value, 0.0), None if bool((weight == 1).all()) else weight


def _features(offset: Linear) -> tuple[Numbers, _Entered, int]:
    """What offsets are linear in, and where parameters enter.

    Returns:
        Features. # (F, N|1, chains|1)
        Entries of ∂B/∂θ.
        How many chains have coefficients of their own.
    """
    none = np.empty(0, dtype=np.int64)
    if offset.is_constant:
        return np.empty((0, 1, 1)), _Entered(none, none, none, none, none, np.empty(0)), 1
    (m, c, k, d), column, factor = offset.entries()
    N, C, K, D = offset.constant.shape
    if N == 1 or _is_same_for(m, (c, k, d, column), factor, N):
        first = m == 0
        c, k, d, column, factor = (x[first] for x in (c, k, d, column, factor))
        if C > 1 and _is_same_for(c, (k, d, column), factor, C):
            first, C = c == 0, 1
            c, k, d, column, factor = (x[first] for x in (c, k, d, column, factor))
        return np.ones((1, 1, 1)), _Entered(c, k, d, 0 * c, column, factor), C
    size = int(column.max()) + 1
    keys, which = np.unique(np.ravel_multi_index((k, d, column), (K, D, size)), return_inverse=True)
    if len(keys) * N * C > _MANY:
        raise Unlike("offsets depend on many parameters, otherwise at each step")
    table = np.zeros((len(keys), N, C))
    table[which, m, c] = factor
    found, of = np.unique(table.reshape(len(keys), -1), axis=0, return_inverse=True)
    if len(found) > _FEATURES:
        raise Unlike("offsets depend on many parameters, otherwise at each step")
    k, d, column = np.unravel_index(keys, (K, D, size))
    ones = np.ones(len(keys))
    features: Numbers = found.reshape(-1, N, C)
    return features, _Entered(0 * k, k, d, of.reshape(-1), column, ones), 1


def _is_same_for(along: Places, other: tuple[Places, ...], factor: Numbers, size: int) -> bool:
    """Whether entries are the same at all indices along one dimension."""
    count = len(factor) // size
    if count * size != len(factor):
        return False
    order = np.lexsort((*other[::-1], along))
    tables = [x[order].reshape(size, count) for x in (*other, factor)]
    return bool((along[order].reshape(size, count) == np.arange(size)[:, None]).all()) and all(
        bool((x == x[:1]).all()) for x in tables
    )


def _design(
    coefficients: Linear, offsets: _Entered, by_chain: int, lead: int, width: int
) -> Design:
    """∂(C, B)/∂θ of coefficients and of what parameters add to offsets."""
    _, chains, K, D, _ = coefficients.constant.shape
    (_, c, k, d, q), column, factor = coefficients.entries()
    parts = []
    of_coefficients = _Entered(c, k, d, q, column, factor)
    of_offsets = replace(offsets, place=offsets.place + width)
    for own, held in ((of_coefficients, chains), (of_offsets, by_chain)):
        for b in range(lead if held == 1 else 1):
            row = np.ravel_multi_index((own.chain + b, own.rank, own.number), (lead, K, D))
            parts.append((row, own.place, own.column, own.factor))
    return Design(*(np.concatenate(x) for x in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class _Entered:
    """Entries of a derivative: chain, rank, number and coordinate of φ, the element of θ, the entry."""

    chain: Places
    rank: Places
    number: Places
    place: Places
    column: Places
    factor: Numbers
