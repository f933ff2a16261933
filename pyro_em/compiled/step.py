"""What a compiled E-step returns, and how sums over the data are collected for a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_em.families.record import Statistics
from pyro_em.graph import Group
from pyro_em.statistics import group_statistics

IMPOSSIBLE = 1e25  # logarithms of zero are large finite numbers in products


class Handover(Exception):
    """The compiled iteration met something that the full one has to judge."""


@dataclass(frozen=True, eq=False)
class Sums:
    """Evidence and expected statistics at some parameters: all that an exact EM step needs.

    Attributes:
        log_evidence: In nats.
        features: Expected features of linear groups; None where there are none. # like η
        moments: Per Gaussian group Σ r d and Σ r d dᵀ, and Σ r. # (K, P), (K,)
        statistics: Of all other groups, without references.
        noise: How far rounding may carry the evidence, in nats, beyond that of a sum.
    """

    log_evidence: float
    features: Tensor | None
    moments: Mapping[int, tuple[Tensor, Tensor]]
    statistics: Mapping[int, Statistics]
    noise: float = 0.0


class NormalRows(Protocol):
    """Rows of a Normal group, evaluated by matrix products; ``p`` is what it is evaluated with."""

    @property
    def width(self) -> int:
        """Numbers per row that a chunk holds."""
        ...

    def features(self, rows: slice, p: Any) -> Any:
        """What both halves of the E-step need of some rows."""
        ...

    def log_density(self, p: Any, features: Any, onto: Tensor | None = None) -> Tensor:
        """Log densities of some rows, added to what is there. # (K, rows)"""
        ...

    def moments(self, p: Any, weights: Tensor, features: Any) -> Tensor:
        """Sums of some rows, in float64. # (K, P)"""
        ...

    def correction(self, p: Any, moments: Tensor, mass: Tensor) -> Tensor | float:
        """What rounded coefficients cost the log evidence, to first order, in nats."""
        ...


class NormalSolver(Protocol):
    """The M-step of a Normal group with parameters of its own."""

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that are held."""
        ...

    def enter(self, values: Mapping[str, Tensor]) -> Any:
        """The components at parameter values; their ``prepared`` is what rows are evaluated with."""
        ...

    def values(self, at: Any) -> dict[str, Tensor]:
        """The parameters at components."""
        ...

    def m_step(self, at: Any, moments: Tensor, mass: Tensor) -> tuple[Any, Tensor]:
        """The maximiser, and by how much it raises the expected log joint, in nats."""
        ...


def checked(log_evidence: Tensor, mass: Tensor, expected: float) -> float:
    """The log evidence, where the data are possible and every posterior sums to one.

    Args:
        log_evidence: In nats.
        mass: Posterior probabilities whose sum is known. # any shape
        expected: That sum.

    Raises:
        Handover: If not; the full E-step says what is wrong.
    """
    value, off = float(log_evidence), float(mass.sum()) - expected
    if not abs(value) < IMPOSSIBLE or not abs(off) <= 1e-6 * expected:
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


def group_sums(
    group: Group,
    counts: Tensor,
    arguments: Mapping[str, Tensor],
    known: Statistics | None = None,
    *,
    masked: bool = False,
) -> Statistics:
    """Σ counts · T(x) of a group, whose masked cells count nothing.

    Args:
        group: The group.
        counts: Posterior probabilities; sums over dimensions along which nothing of the group
            varies are of size one. # (members, *sizes or 1s)
        arguments: At the E-step.
        known: T(x), where it was worked out before.
        masked: Whether the counts know of the mask already.
    """
    if group.mask is not None and not masked:
        counts = counts * group.mask
    return group_statistics(group, counts, arguments, known)


def scattered(eta: Tensor, columns: Tensor, entries: Sequence[Tensor]) -> Tensor:
    """Expected features, each added where it belongs. # like η

    Args:
        eta: For its size.
        columns: Elements of η. # (entries,)
        entries: Expected features, in the order of their columns.
    """
    flat = entries[0] if len(entries) == 1 else torch.cat(list(entries))
    return torch.zeros_like(eta).index_add_(0, columns, flat)
