"""Closed-form M-steps without the store: index maps and data magnitudes are worked out once.

The arithmetic is that of `pyro_em.m_step`; whatever is out of the ordinary there (a collapse, a
component that cannot be told from one, a number that is not finite) raises `Handover`, and the full
M-step decides and says what it found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.compiled.layout import is_in_order
from pyro_em.compiled.priors import contributions
from pyro_em.compiled.step import Handover
from pyro_em.families import Kind
from pyro_em.families.record import Statistics
from pyro_em.graph import FactorGraph
from pyro_em.m_step.closed_form import data_magnitude, onto_events, solve_kind, sum_to, used_events
from pyro_em.m_step.updates import ClosedForm, ParameterUpdate, bounds


@dataclass(eq=False)
class Solver:
    """The closed form of one parameter.

    Attributes:
        update: What was decided.
        shape: The parameter's shape.
        direct: Whether the only use has the parameter's elements in order.
        used: Which events are used at all; None where all are.
        magnitude: What the rounding of a spread is relative to, else None.
        interval: The interval of a scalar constraint.
        floor: The smallest variance that the user asked for.
        cells: The shape of the first use's cells.
        prior: What conjugate priors add to numerator and denominator, or None.
    """

    update: ParameterUpdate
    shape: tuple[int, ...]
    direct: bool
    used: Tensor | None
    magnitude: Tensor | None
    interval: tuple[float, float] | None
    floor: float
    cells: tuple[int, ...]
    prior: tuple[Tensor, Tensor] | None = None

    @property
    def kind(self) -> Kind:
        """The functional form."""
        assert self.update.kind is not None
        return self.update.kind

    def solve(
        self,
        statistics: Mapping[int, Statistics],
        arguments: Mapping[int, Mapping[str, Tensor]],
        value: Tensor,
    ) -> Tensor:
        """The maximiser.

        Args:
            statistics: Per group, with references.
            arguments: Per group, the current ones.
            value: The parameter's current value.

        Raises:
            Handover: If the full M-step has to look.
        """
        kind, event = self.kind, self.kind.event_dim
        if kind is Kind.MEAN_VECTOR and self.direct and self.prior is None:
            mean = self._weighted_mean(statistics)
            if mean is not None:
                return mean if mean.dtype == value.dtype else mean.to(value.dtype)
        n, d = self._sums(statistics, arguments, value)
        if self.prior is not None:
            n, d = n + self.prior[0], d + self.prior[1]
        natural, massless = solve_kind(kind, n, d)
        keep = massless if self.used is None else massless | ~self.used
        if kind.is_spread:
            self._check_spread(natural, d, keep)
        use = self.update.uses[0]
        if bool(keep.any()):
            if kind is not Kind.SIMPLEX:  # an empty component is said by the full M-step
                raise Handover
            shaped = keep.reshape(-1, *(1,) * event)
            natural = torch.where(shaped, torch.ones_like(natural), natural)
            new = use.selection.inverse(use.rule.link.forward(natural))
            new = torch.where(shaped, value.reshape(new.shape), new)
        else:
            new = use.selection.inverse(use.rule.link.forward(natural))
        new = new.reshape(self.shape)
        if self.interval is not None and event == 0:
            new = new.clamp(*self.interval)
        if not bool(torch.isfinite(new).all()):
            raise Handover
        return new if new.dtype == value.dtype else new.to(value.dtype)

    def _weighted_mean(self, statistics: Mapping[int, Statistics]) -> Tensor | None:
        """Σ w x / Σ w where each cell has its own mean: the precisions cancel."""
        (use,) = self.update.uses
        s = statistics[use.group]
        weight = s["weight"].unsqueeze(-1)
        if tuple(weight.shape[:-1]) != self.cells or use.selection.maps:
            return None
        mean = s["reference:loc"] + s["deviation"] / weight
        if not bool(torch.isfinite(mean).all()):
            raise Handover
        return mean.reshape(self.shape)

    def _sums(
        self,
        statistics: Mapping[int, Statistics],
        arguments: Mapping[int, Mapping[str, Tensor]],
        value: Tensor,
    ) -> tuple[Tensor, Tensor]:
        numerator: Tensor | None = None
        denominator: Tensor | None = None
        event = self.kind.event_dim
        for use in self.update.uses:
            n, d = use.rule.contribution(statistics[use.group], arguments[use.group])
            if self.direct:
                batch = len(self.cells)
                n = sum_to(n, self.cells, n.dim() - batch)
                d = sum_to(d, self.cells, d.dim() - batch)
                return n.reshape(-1, *n.shape[batch:]), d.reshape(-1, *d.shape[batch:])
            n, d = onto_events(self.kind, use.selection, n, d, value, event)
            numerator = n if numerator is None else numerator + n
            denominator = d if denominator is None else denominator + d
        assert numerator is not None and denominator is not None
        return numerator, denominator

    def _check_spread(self, natural: Tensor, d: Tensor, keep: Tensor) -> None:
        """Well clear of a collapse, a floor and a lack of data; otherwise the full M-step looks."""
        assert self.magnitude is not None
        mass = d.reshape(d.shape[0], -1).amax(-1)
        if self.kind is Kind.COVARIANCE:
            size = natural.shape[-1]
            tril, info = torch.linalg.cholesky_ex(natural)
            variances = natural.diagonal(dim1=-2, dim2=-1)
            # The squared pivot over the variance is 1 − R² of a feature on those before it.
            pivots = tril.diagonal(dim1=-2, dim2=-1)
            clear = (info == 0) & (pivots.square() > 1e-7 * variances).all(-1)
            clear &= (variances > 1e-12 * self.magnitude**2).all(-1) & (mass > size + 1.1)
            if self.floor > 0:
                clear &= torch.linalg.eigvalsh(natural)[..., 0] > self.floor
        else:
            clear = (natural > 1e-6 * self.magnitude) & (natural > 0) & (mass > 1.6)
            if self.floor > 0:
                clear &= natural > self.floor**0.5
        if not bool(clear.all()):
            raise Handover


def solvers_of(
    updates: Mapping[str, ParameterUpdate], graph: FactorGraph, values: Mapping[str, Tensor]
) -> list[Solver]:
    """One solver per closed form, locations first.

    Args:
        updates: Collapsed updates, all of them closed forms or fixed.
        graph: The collapsed graph.
        values: Parameter values, for their shapes.
    """
    out = []
    for name, update in updates.items():
        if not isinstance(update.update, ClosedForm):
            continue
        kind = update.kind
        assert kind is not None
        value, event = values[name], kind.event_dim
        selections = [u.selection for u in update.uses]
        reached = [*selections, *(p.selection for p in update.priors)]
        used = used_events(reached, value, event)
        index = selections[0].index
        direct = (
            len(selections) == 1
            and index.numel() == value.numel()
            and selections[0].factor is None
            and is_in_order(index)
        )
        magnitude = data_magnitude(update, graph, value) if kind.is_spread else None
        out.append(
            Solver(
                update,
                tuple(value.shape),
                direct,
                None if bool(used.all()) else used,
                magnitude,
                bounds(graph.parameters[name].constraint) if event == 0 else None,
                update.update.floor,
                tuple(index.shape[: index.dim() - event]),
                contributions(update, graph, value) if update.priors else None,
            )
        )
    return sorted(out, key=lambda s: 0 if s.kind.is_location else 1)
