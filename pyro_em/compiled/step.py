"""What a compiled E-step returns, and how sums over the data are collected for a group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.families.record import Statistics
from pyro_em.graph import Group
from pyro_em.statistics import group_statistics


class Handover(Exception):
    """The compiled iteration met something that the full one has to judge."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Evidence and expected statistics at some parameters: all that an exact EM step needs.

    Attributes:
        log_evidence: In nats.
        statistics: Per group, without references.
        noise: How far rounding may carry the evidence, in nats, beyond that of a sum.
    """

    log_evidence: float
    statistics: Mapping[int, Statistics]
    noise: float = 0.0


def checked(log_evidence: Tensor, mass: Tensor, expected: float) -> float:
    """The log evidence, where it is finite and every posterior sums to one.

    Args:
        log_evidence: In nats.
        mass: Posterior probabilities whose sum is known. # any shape
        expected: That sum.

    Raises:
        Handover: If not; the full E-step says what is wrong.
    """
    value, off = float(log_evidence), float(mass.sum()) - expected
    if not math.isfinite(value) or not abs(off) <= 1e-6 * expected:
        raise Handover
    return value


def known_statistics(group: Group) -> Statistics | None:
    """T(x) of a group whose statistics do not change with the arguments, else None."""
    family = group.family
    if family is None or family.has_reference:
        return None
    arguments = {name: a.detach() for name, a in group.arguments.items()}
    floating = next((a.dtype for a in arguments.values() if a.is_floating_point()), torch.float64)
    return {
        name: t if t.is_floating_point() else t.to(floating)
        for name, t in family.statistics(group.value, arguments).items()
    }


def counted(
    group: Group,
    counts: Tensor,
    arguments: Mapping[str, Tensor],
    known: Statistics | None = None,
) -> Statistics:
    """Σ counts · T(x) of a group, whose masked cells count nothing.

    Args:
        group: The group.
        counts: Posterior probabilities; sums over dimensions along which nothing of the group
            varies are of size one. # (members, *sizes or 1s)
        arguments: At the E-step.
        known: T(x), where it was worked out before.
    """
    if group.mask is not None:
        counts = counts * group.mask
    return group_statistics(group, counts, arguments, known)
