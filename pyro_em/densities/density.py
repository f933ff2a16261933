"""What an E-step on sums returns, and how sums over the data are collected for a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_em.errors import Handover
from pyro_em.families.family import Statistics

IMPOSSIBLE = 1e25  # logarithms of zero are large finite numbers in products


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

    def over_rows(self, p: Any, moments: Tensor) -> Tensor:
        """Sums over all rows at hand, in a form that other rows add to. # (K, P')"""
        ...

    def about(self, before: Any, now: Any, moments: Tensor, mass: Tensor) -> Tensor:
        """Sums over rows of one E-step as if residuals had been taken at another. # (K, P')

        Args:
            before: What the rows were evaluated with.
            now: What those of the other E-step are evaluated with.
            moments: As `over_rows` returns.
            mass: Σ r. # (K,)
        """
        ...

    def correction(self, p: Any, moments: Tensor, mass: Tensor) -> Tensor | float:
        """What rounded coefficients cost the log evidence, to first order, in nats."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """What rows are evaluated with, of which some components can be taken."""

    def part(self, cells: slice) -> Any:
        """Some of the components."""
        ...


class PreparedRows(NormalRows, Protocol):
    """Rows whose parameters are not their own: coefficients follow from arguments."""

    def prepare(self, arguments: Mapping[str, Tensor]) -> Any:
        """What rows are evaluated with."""
        ...

    def statistics(
        self, p: Any, moments: Tensor, mass: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        """The family's statistics from moments and their mass."""
        ...


class PlainRows:
    """What kinds of rows share whose moments are taken as they are, with nothing rounded.

    Attributes:
        is_local: Whether moments say nothing at arguments far from those at which they were taken.
    """

    is_local = False

    def over_rows(self, p: Any, moments: Tensor) -> Tensor:
        """See `NormalRows`."""
        return moments

    def about(self, before: Any, now: Any, moments: Tensor, mass: Tensor) -> Tensor:
        """See `NormalRows`: they are of the data alone, and taken about no point."""
        return moments

    def correction(self, p: Any, moments: Tensor, mass: Tensor) -> Tensor | float:
        """Nothing: all is computed in float64."""
        return 0.0


class KeepsRows:
    """Marks rows whose M-step needs the responsibilities themselves, which no sums stand for.

    Their ``moments`` are these; they are put side by side, not added.
    """


class NormalSolver(Protocol):
    """The M-step of a Normal group with parameters of its own."""

    @property
    def params(self) -> tuple[str, ...]:
        """The parameters that are held."""
        ...

    def enter(self, values: Mapping[str, Tensor]) -> Any:
        """The components at parameter values; their ``prepared`` is what rows are evaluated with."""
        ...

    def values(self, components: Any) -> dict[str, Tensor]:
        """The parameters at components."""
        ...

    def m_step(self, components: Any, moments: Tensor, mass: Tensor) -> tuple[Any, Tensor | float]:
        """The maximiser, and by how much it raises the expected log joint, in nats."""
        ...


def checked(log_evidence: Tensor, mass: Tensor, expected: float) -> float:
    """The log evidence, where the data are possible and every posterior sums to one.

    Args:
        log_evidence: In nats.
        mass: Posterior probabilities whose sum is known. # any shape
        expected: That sum.

    Raises:
        Handover: If not; the E-step through tables finds out what is wrong.
    """
    value, off = float(log_evidence), float(mass.sum()) - expected
    if not abs(value) < IMPOSSIBLE or not abs(off) <= 1e-6 * expected:
        raise Handover
    return value


def scattered(eta: Tensor, columns: Tensor, entries: Sequence[Tensor]) -> Tensor:
    """Expected features, each added where it belongs. # like η

    Args:
        eta: For its size.
        columns: Elements of η. # (entries,)
        entries: Expected features, in the order of their columns.
    """
    flat = entries[0] if len(entries) == 1 else torch.cat(list(entries))
    return torch.zeros_like(eta).index_add_(0, columns, flat)
