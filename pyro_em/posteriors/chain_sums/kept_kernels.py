"""What steps on sums of chains are decided to be, kept by all that it follows from.

Where numbers go, which elements of parameters they are, and which coefficients share equations follow
from bindings, masks and updates, not from data. A key holds all of these to the bit, so that what is
found again is what would be made. The data and what bounds spreads are always those at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding, Selection
from pyro_em.graph.factors import Group, is_incomplete
from pyro_em.posteriors.chain_sums.compiled_m_step import CompiledMStep
from pyro_em.posteriors.chain_sums.state_joined import data_of_site
from pyro_em.posteriors.chain_sums.state_matrices import ChainMatrices
from pyro_em.posteriors.chain_sums.state_regression import Regression
from pyro_em.posteriors.chain_sums.state_spreads import Spreads
from pyro_em.posteriors.states.gaussian_chain import GaussianChain
from pyro_em.posteriors.states.kept_layouts import may_be_kept
from pyro_em.posteriors.states.state_layout import StateLayout
from pyro_em.updates.update import ParameterUpdate

_MOST = 2**17  # numbers in a key


@dataclass(frozen=True, eq=False)
class Decided:
    """Matrices and M-step of some chains, whatever their data.

    Attributes:
        layouts: Where the numbers of each component lie.
        chains: The matrices of each, without data.
        stacks: For each site of these the stacks that it stands for.
        regression: Least squares of coefficients.
        spreads: Closed forms of spreads, within the limits of the data that were decided on.
    """

    layouts: tuple[StateLayout, ...]
    chains: tuple[ChainMatrices, ...]
    stacks: tuple[tuple[tuple[int, ...], ...], ...]
    regression: Regression
    spreads: Spreads

    @cached_property
    def compiled(self) -> CompiledMStep | None:
        """The M-step by compiled loops; None where these do not serve."""
        return CompiledMStep.of(self.chains, self.regression, self.spreads)

    @cached_property
    def determined(self) -> set[Hashable]:
        """Constraints of parameters under which nothing is known to be left undetermined."""
        return set()

    def on(self, blocks: Sequence[GaussianChain]) -> tuple[ChainMatrices, ...]:
        """The matrices with the data of some chains."""
        return tuple(
            matrices.on(
                None if site.is_latent else data_of_site(site, stacks, block.groups, block.chains)
                for site, stacks in zip(matrices.sites, own, strict=True)
            )
            for matrices, own, block in zip(self.chains, self.stacks, blocks, strict=True)
        )


def decided(
    blocks: Sequence[GaussianChain],
    updates: Mapping[str, ParameterUpdate],
    shapes: Mapping[str, torch.Size],
    decide: Callable[[], Decided],
) -> Decided:
    """What was decided before of chains that are the same but for their data, or what is decided now.

    Args:
        blocks: The chains.
        updates: What was decided per parameter.
        shapes: Of the parameters that the chains read, in their order in θ.
        decide: Decides anew.
    """
    layouts = tuple(b.chains for b in blocks)
    key = _key(blocks, updates, shapes) if all(map(may_be_kept, layouts)) else None
    if key is None:
        return decide()
    known = layouts[0].kernels
    found: Decided | None = known.get(key)
    if found is None or any(a is not b for a, b in zip(found.layouts, layouts, strict=True)):
        found = decide()
        known.clear()  # one is kept of each layout
        known[key] = found
    return found


class _NotKept(Exception):
    """What is decided follows from more than is held against each other."""


def _key(
    blocks: Sequence[GaussianChain],
    updates: Mapping[str, ParameterUpdate],
    shapes: Mapping[str, torch.Size],
) -> Hashable | None:
    """All that the decision follows from, data and layouts excepted; None where that is too much."""
    tensors = _Tensors()
    try:
        groups = tuple(tuple(_of_group(g, tensors) for g in b.groups) for b in blocks)
    except _NotKept:
        return None
    asked = tuple((n, type(u.update), u.kind) for n, u in updates.items())
    return groups, asked, tuple(shapes.items())


def _of_group(group: Group, told: _Tensors) -> Hashable:
    if is_incomplete(group) or not group.is_unscaled:
        raise _NotKept
    return (
        group.members[0],
        len(group.members),
        group.role,
        group.distribution,
        group.n_plates,
        group.sizes,
        group.value.shape,
        group.value.device,
        group.event_dims,
        group.by_steps,
        group.matrix,
        group.lines,
        tuple(group.arguments),
        tuple((a, _of_binding(b, told)) for a, b in group.bindings.items()),
        told(group.mask),
        told(group.elements),
    )


def _of_binding(binding: Binding, told: _Tensors) -> Hashable:
    if binding.how not in ("constant", "selection", "affine"):
        raise _NotKept
    return (
        binding.how,
        binding.params,
        binding.normalise,
        binding.link,
        binding.logs,
        told(binding.constant),
        tuple(_of_selection(s, told) for s in binding.selections),
        tuple((n, j.size, *map(told, j.tensors)) for n, j in (binding.jacobians or {}).items()),
    )


def _of_selection(s: Selection, told: _Tensors) -> Hashable:
    maps = tuple((type(m), m.name, m.exponent) for m in s.maps)
    return s.param, maps, told(s.index), told(s.factor)


class _Tensors:
    """Tensors as parts of a key, which together are not too large."""

    def __init__(self) -> None:
        self._size = 0

    def __call__(self, t: Tensor | None) -> Hashable:
        """The numbers of one, and where they stand.

        Raises:
            _NotKept: If there are too many numbers.
        """
        if t is None:
            return None
        shape, one = t.shape, t.detach()
        for d, (n, step) in enumerate(zip(shape, t.stride(), strict=True)):
            if n > 1 and step == 0:  # the same all along, held once
                one = one.narrow(d, 0, 1)
        self._size += one.numel()
        if self._size > _MOST:
            raise _NotKept
        return shape, t.dtype, one.cpu().numpy().tobytes()
