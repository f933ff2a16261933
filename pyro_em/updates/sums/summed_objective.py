"""The expected log density of a group as a function of its parameters, from sums over the data.

    Σ_cells r log p(x | a(θ)) = ℓ(S, a(θ)) + c,     S = Σ_cells r T(x)

A climb asks for it some twenty times in one M-step. Where a family's density has one form in the
argument that moves, each of these is a function of the sums alone, which are taken once; the data are
not gone through again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pyro_em.families.family import (
    CHOLESKY,
    IDENTITY,
    PRECISION,
    Arguments,
    Statistics,
    expected_log_density,
    main_rule,
)
from pyro_em.graph.factors import Group, is_incomplete
from pyro_em.updates.expectations.statistics import dot, group_statistics

# Links that lose no digit where an argument nears the end of its domain, as a large logit would.
_LINKS = (IDENTITY, CHOLESKY, PRECISION)

_FEWER = 8  # times: how many fewer cells than data sums must have, to be worth taking


@dataclass(frozen=True, eq=False)
class SummedGroup:
    """A group in an M-step, by its sums.

    Attributes:
        group: The group.
        statistics: Its sums, with the arguments about which they were taken.
        rest: What does not depend on the arguments, in nats.
    """

    group: Group
    statistics: Statistics
    rest: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, group: Group, counts: Tensor, arguments: Arguments) -> Self | None:
        """The sums of a group at some arguments; None where sums do not tell its density.

        Args:
            group: The group.
            counts: Expected counts of its cells. # (members, *sizes)
            arguments: Arguments at which the sums are taken.
        """
        if any(a.dtype != torch.float64 for a in arguments.values()):
            return None
        if not is_told_by_sums(group, arguments) or _size(group, arguments) > counts.numel():
            return None
        family = group.family
        assert family is not None
        reference = {n: a.detach() for n, a in arguments.items()}
        statistics = group_statistics(group, counts, reference)
        statistics |= {f"reference:{n}": a for n, a in reference.items()}
        exact = dot(counts, group.log_density(reference))
        return cls(group, statistics, exact - expected_log_density(family, statistics, reference))

    def at(self, values: Mapping[str, Tensor]) -> Tensor:
        """The expected log density at parameter values, in nats; differentiable. # ()"""
        family = self.group.family
        assert family is not None
        arguments = self.group.evaluate_arguments(values)
        return expected_log_density(family, self.statistics, arguments) + self.rest


def is_told_by_sums(group: Group, arguments: Arguments) -> bool:
    """Whether a group's density depends on the data through its family's sums alone.

    Args:
        group: The group.
        arguments: Those that its distribution was given.
    """
    family = group.family
    if family is None or group.belief is not None or group.nested is not None:
        return False
    if group.value_binding is not None or not group.is_static or is_incomplete(group):
        return False
    if any(n in group.bindings and group.bindings[n].params for n in family.constants):
        return False  # sums were taken where it was
    if family.natural is not None:
        return False
    found = main_rule(family, arguments)
    return found is not None and found[1].link in _LINKS


def _size(group: Group, arguments: Arguments) -> int:
    """How many cells the sums have, each as often as it has to be fewer."""
    batch = 1 + len(group.sizes)
    shapes = [a.shape[:batch] for a in arguments.values()]
    return _FEWER * math.prod(max(s[d] for s in shapes) for d in range(batch))
