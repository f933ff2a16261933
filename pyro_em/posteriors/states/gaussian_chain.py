"""The block of Gaussian latents that follow each other, by Kalman's filter and smoother.

Sites that are alike at many steps are one group with a member for each, so that neither the E-step nor
the M-step goes from site to site. What an E-step costs is linear in the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_em.graph.factors import Group
from pyro_em.graph.stretches import Later
from pyro_em.posteriors.gaussians.coordinates import apart, seen_coordinates
from pyro_em.posteriors.gaussians.gaussian import Arguments, GaussianBlock, counts_once
from pyro_em.posteriors.states.state_layout import Stack, StateLayout
from pyro_em.posteriors.states.state_numbers import StackNumbers, StateNumbers, numbers_of
from pyro_em.posteriors.states.state_solution import StateSolution, solve
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.gaussian_rows import (
    apart_rows,
    event_shape,
    is_matrix,
    tril_factors,
)


@dataclass(frozen=True, eq=False)
class GaussianChain(GaussianBlock):
    """Gaussian latents that follow each other, and the sites that read them.

    A group holds the sites of many steps as its members; ``lines`` are those of the first members.

    Attributes:
        chains: Where their numbers lie in states.
        beginning: The first few steps as one dense block, if somebody asks for it.
    """

    chains: StateLayout = field(kw_only=True)
    beginning: Later[GaussianBlock] = field(kw_only=True)

    @property
    def layout(self) -> StateLayout:
        """The chains, which are solved apart."""
        return self.chains

    def over(self, plates: tuple[str, ...], sizes: tuple[int, ...]) -> GaussianChain:
        """The same chains with a table over some plates."""
        return replace(self, plates=plates, sizes=sizes)

    @property
    def cost(self) -> int:
        """Numbers in the matrices of one E-step."""
        form = self.chains.form
        cells = torch.Size(self.states).numel()
        return cells * form.chains * form.steps * form.size * (form.size + form.width)

    @property
    def representative(self) -> GaussianBlock:
        """The first few steps, which stand for all."""
        return self.beginning.value

    @property
    def words(self) -> str:
        """See `pyro_em.graph.factors.Nested`."""
        return "Kalman filter and smoother"

    @property
    def kind(self) -> str:
        """See `GaussianBlock.kind`."""
        n = self.chains.form.size
        return f"chain: Kalman filter and smoother, {n} state{'s' * (n > 1)}"

    def solution(self, arguments: Arguments) -> StateSolution:
        """The posterior of the latents, for each state of the scope."""
        return solve(self.chains, self._stacks(arguments))

    def numbers(self, arguments: Arguments) -> StateNumbers:
        """The matrices of the chains."""
        return numbers_of(self.chains, self._stacks(arguments))

    def _stacks(self, arguments: Arguments) -> list[StackNumbers]:
        return [
            _numbers(group, stack, self.of_site(i, arguments))
            for i, (group, stack) in enumerate(zip(self.groups, self.chains.stacks, strict=True))
        ]


def _numbers(group: Group, stack: Stack, arguments: Arguments) -> StackNumbers:
    """The numbers of one stack."""
    double = torch.float64
    offset = apart_rows(group, arguments["loc"]).to(double)
    matrix = is_matrix(group)
    spread = tril_factors(group, arguments) if matrix else apart_rows(group, arguments["scale"])
    parts = [apart_rows(group, arguments[a], 1).to(double) for a in group.lines if a != "loc"]
    shape = torch.broadcast_shapes(*(p.shape[:3] for p in parts)) if parts else (1, 1, 1)
    width = event_shape(group).numel()
    C = offset.new_zeros(*shape, width, 0)
    C = torch.cat([C, *(p.expand(*shape, *p.shape[3:]) for p in parts)], -1)
    if stack.present is not None:
        C = C * stack.present.unsqueeze(-2).to(C)
    C, spread = _once_if_alike(C), _once_if_alike(spread.to(double))
    if group.role is Role.GAUSSIAN:
        return StackNumbers(C, offset, spread, matrix)
    value = apart_rows(group, group.value)[0].to(double)
    weight = None if counts_once(group) else _weights(group)
    seen = seen_coordinates(group)
    if seen is not None:
        seen = seen.reshape(stack.members, stack.form.rows, width)
        spread = apart(spread, seen)
        weight = seen.to(spread) if weight is None else weight * seen
    if weight is not None:
        value = torch.where(weight > 0, value, torch.zeros_like(value))
    full = (stack.members, stack.form.rows, width)
    return StackNumbers(C, offset, spread, matrix, value.expand(full), weight)


def _once_if_alike(t: Tensor) -> Tensor:
    """What holds the same numbers for all members, held once. # (cells|1, members|1, …)"""
    if t.shape[1] == 1 or t.requires_grad or not bool((t == t[:, :1]).all()):
        return t
    return t[:, :1]


def _weights(group: Group) -> Tensor:
    """How much each entry counts. # (members|1, rows|1, D|1)"""
    weights = group.weights().detach().to(torch.float64)
    if group.elements is None:
        weights = weights.reshape(weights.shape + (1,) * len(event_shape(group)))
    return apart_rows(group, weights, own_event=True)[0]
