"""Closed-form M-step: add the numerators and denominators of all uses, solve by kind.

    θ ← f⁻¹(solve(Σ_uses n, Σ_uses d))

A component without mass keeps its former value. A spread that collapses is floored where the user
asked for it, otherwise refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.distributions import bounds
from pyro_em.errors import DegenerateError, message
from pyro_em.families.family import Statistics
from pyro_em.families.form import Spread
from pyro_em.families.forms import Kind
from pyro_em.graph.bindings.binding import is_in_order
from pyro_em.graph.factors import FactorGraph
from pyro_em.tracing.sites import Role
from pyro_em.updates.closed_forms.from_data import from_data
from pyro_em.updates.closed_forms.priors import contributions, refuse_boundary_mode
from pyro_em.updates.expectations.scatter import (
    component_in_words,
    data_magnitude,
    onto_events,
    sum_to,
    used_events,
)
from pyro_em.updates.update import ClosedForm, ParameterUpdate

Blend = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Solver:
    """The closed form of one parameter, decided once and solved from sums over the data.

    Attributes:
        update: What was decided.
        graph: The graph that its uses refer to.
        shape: The parameter's shape.
        direct: Whether the only use has the parameter's elements in order.
        used: Which events are read at all, priors included. # (events,)
        read: Which events a factor reads. # (events,)
        all_used: Whether every event is read.
        interval: The interval of a scalar constraint.
        floor: The smallest variance that the user asked for.
        cells: The shape of the first use's cells.
        prior: What conjugate priors add to numerator and denominator, or None.
    """

    update: ParameterUpdate
    graph: FactorGraph
    shape: tuple[int, ...]
    direct: bool
    used: Tensor
    read: Tensor
    all_used: bool
    interval: tuple[float, float] | None
    floor: float
    cells: tuple[int, ...]
    prior: tuple[Tensor, Tensor] | None = None

    @property
    def kind(self) -> Kind:
        """The functional form."""
        assert self.update.kind is not None
        return self.update.kind

    @cached_property
    def magnitude(self) -> Tensor:
        """What the rounding of a spread is relative to; see `data_magnitude`."""
        like = torch.empty(self.shape, device=self.used.device)
        return data_magnitude(self.update, self.graph, like)

    def solve(
        self,
        statistics: Mapping[int, Statistics],
        arguments: Mapping[int, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
        value: Tensor,
        blend: Blend | None = None,
    ) -> tuple[Tensor, list[int]]:
        """The maximiser of the expected log joint in the parameter.

        Args:
            statistics: Expected statistics per group, with references.
            arguments: The current arguments per group.
            value: The parameter's current value.
            blend: From a parameter's name, numerator and denominator to running averages of them.

        Returns:
            The new value, and the flat indices of events that had no mass and were kept.

        Raises:
            DegenerateError: If a spread collapses, or no finite solution exists.
        """
        if self.kind.form.is_average and self.direct and self.prior is None and blend is None:
            mean = self._weighted_mean(statistics)
            if mean is not None:
                return mean if mean.dtype == value.dtype else mean.to(value.dtype), []
        n, d = self.sums(statistics, arguments, value)
        if blend is not None:
            n, d = blend(self.update.name, n, d)
        return self.maximiser(n, d, value)

    def maximiser(self, n: Tensor, d: Tensor, value: Tensor) -> tuple[Tensor, list[int]]:
        """The maximiser from sums over all of the data; see `solve`.

        Args:
            n: Numerators of all uses on the parameter's events, priors left out.
            d: Denominators.
            value: The parameter's current value.
        """
        kind, event = self.kind, self.kind.event_dim
        if self.prior is not None:
            n, d = n + self.prior[0].to(n), d + self.prior[1].to(d)
            refuse_boundary_mode(self.update, self.graph, n, d, value)
        natural, massless = kind.form.solve(n, d)
        keep = massless if self.all_used else massless | ~self.used
        if kind.is_spread:
            natural = self._checked_spread(natural, keep, d, value)
        use, any_kept = self.update.uses[0], bool(keep.any())
        if any_kept:
            shaped = keep.reshape(-1, *(1,) * event)
            natural = torch.where(shaped, kind.form.filler(natural), natural)
        new = use.selection.inverse(use.rule.link.forward(natural))
        if any_kept:
            new = torch.where(shaped, value.reshape(new.shape).to(new.dtype), new)
        new = new.reshape(self.shape)
        if event == 0 and self.interval is not None:
            new = self._clipped(new, value, keep)
        if not bool(torch.isfinite(new).all()):
            self._refuse_infinite(new, value)
        # What only a flat prior reads is no component without data.
        empty = [int(i) for i in (massless & self.read).nonzero().reshape(-1)] if any_kept else []
        return new if new.dtype == value.dtype else new.to(value.dtype), empty

    def _weighted_mean(self, statistics: Mapping[int, Statistics]) -> Tensor | None:
        """Σ w x / Σ w where each cell has its own mean: the precisions cancel."""
        (use,) = self.update.uses
        s = statistics[use.group]
        weight = s.get("precision", s["weight"]).unsqueeze(-1)
        if tuple(weight.shape[:-1]) != self.cells or use.selection.maps:
            return None
        mean = s["reference:loc"] + s["deviation"] / weight
        if not bool(torch.isfinite(mean).all()):
            return None
        return mean.reshape(self.shape)

    def sums(
        self,
        statistics: Mapping[int, Statistics],
        arguments: Mapping[int, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]],
        value: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Numerators and denominators of all uses, summed onto the parameter's events."""
        numerator: Tensor | None = None
        denominator: Tensor | None = None
        event = self.kind.event_dim
        for use in self.update.uses:
            detached = {n: a.detach() for n, a in arguments[use.group].items()}
            n, d = use.rule.contribution(statistics[use.group], detached)
            if self.direct:
                batch = len(self.cells)
                n = sum_to(n, self.cells, n.dim() - batch)
                d = sum_to(d, self.cells, d.dim() - batch)
                return n.reshape(-1, *n.shape[batch:]), d.reshape(-1, *d.shape[batch:])
            n, d = onto_events(self.kind, use.at(value), n, d, value, event)
            numerator = n if numerator is None else numerator + n
            denominator = d if denominator is None else denominator + d
        assert numerator is not None and denominator is not None
        return numerator, denominator

    def _clipped(self, new: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        """Inside the constraint: the nearest end is the maximiser of a unimodal profile."""
        assert self.interval is not None
        low, high = self.interval
        if self.update.priors and math.isfinite(high):  # a Uniform prior is zero at its upper end
            high -= 8 * torch.finfo(value.dtype).eps * max(abs(high), high - max(low, -high))
        return torch.where(keep.reshape(self.shape), value.to(new.dtype), new.clamp(low, high))

    def _checked_spread(self, a: Tensor, keep: Tensor, d: Tensor, value: Tensor) -> Tensor:
        """Spreads floored where the user asked for it; a collapse is refused by name."""
        form = self.kind.form
        if not bool(torch.isfinite(a).all()):
            return a
        if self.floor > 0:
            raised, _ = form.floored(a, self.floor)
            return torch.where(keep.reshape(-1, *(1,) * form.event_dim), a, raised)
        mass = d.reshape(len(a), -1).amax(-1)
        before = natural_values(self.update, value.reshape(a.shape).to(a.dtype))
        bad, spread = form.collapsed(a, before, mass, self.magnitude)
        bad = bad & ~keep
        if bool(bad.any()):
            if all(self.graph.groups[u.group].role is Role.GAUSSIAN for u in self.update.uses):
                # A variance of latents at zero has no unbounded likelihood: it stays where it is.
                return torch.where(bad.reshape(-1, *(1,) * form.event_dim), before, a)
            k = int(bad.nonzero()[0])
            raise DegenerateError(_collapse(self.update, self.graph, k, spread[k], mass[k]))
        return a

    def _refuse_infinite(self, new: Tensor, value: Tensor) -> None:
        event = self.kind.event_dim
        flat = new.reshape(len(self.used), -1)
        bad = int((~torch.isfinite(flat)).any(-1).nonzero()[0])
        raise DegenerateError(
            message(
                f"parameter '{self.update.name}', {component_in_words(value, event, bad)}",
                "its update is not finite; nothing was changed.",
                _sites(self.update, self.graph),
                ["check the data at this site", "start elsewhere (init='random', num_restarts)"],
            )
        )


def solver_of(
    update: ParameterUpdate,
    graph: FactorGraph,
    value: Tensor,
    values: Mapping[str, Tensor] | None = None,
) -> Solver:
    """The solver of a closed form.

    Args:
        update: A closed form that is solved from sums.
        graph: The graph that its uses refer to.
        value: The parameter's value, for its shape.
        values: All parameters as they are now, for priors that depend on them.
    """
    kind = update.kind
    assert kind is not None and isinstance(update.update, ClosedForm)
    event = kind.event_dim
    selections = [u.natural for u in update.uses]
    read = None if graph.all_data is None else graph.all_data.read.get(update.name)
    if read is None:
        read = used_events(selections, value, event)
    used = read
    if update.priors:
        used = read | used_events([p.selection for p in update.priors], value, event)
    index = selections[0].index
    direct = (
        len(selections) == 1
        and not update.uses[0].is_multiple
        and index.numel() == value.numel()
        and selections[0].factor is None
        and is_in_order(index)
    )
    return Solver(
        update,
        graph,
        tuple(value.shape),
        direct,
        used,
        read,
        bool(used.all()),
        bounds(graph.parameters[update.name].constraint) if event == 0 else None,
        update.update.floor,
        tuple(index.shape[: index.dim() - event]),
        contributions(update, graph, value, values) if update.priors else None,
    )


def closed_form(
    update: ParameterUpdate,
    graph: FactorGraph,
    statistics: Mapping[int, Statistics],
    arguments: Sequence[Mapping[str, Tensor]],
    counts: Sequence[Tensor],
    values: Mapping[str, Tensor],
    blend: Blend | None = None,
) -> tuple[Tensor, list[int]]:
    """The maximiser of the expected log joint in one parameter; see `Solver.solve`.

    Args:
        update: The decided update.
        graph: The factor graph.
        statistics: Expected statistics per group.
        arguments: The current arguments per group.
        counts: Expected counts per group (for order statistics).
        values: All parameters as they are now.
        blend: From a parameter's name, numerator and denominator to running averages of them.
    """
    value = values[update.name]
    if update.needs_data:
        return from_data(update, graph, arguments, counts, value)
    return solver_of(update, graph, value, values).solve(statistics, arguments, value, blend)


def floor_of(update: ParameterUpdate) -> float:
    """Below which a parameter's spread must not fall; zero where nothing was asked for."""
    is_spread = update.kind is not None and update.kind.is_spread
    return update.update.floor if is_spread and isinstance(update.update, ClosedForm) else 0.0


def apply_floor(update: ParameterUpdate, value: Tensor) -> Tensor:
    """A parameter's value with its spread raised to the floor that the user asked for.

    A start below the floor would make the first floored update look like a fall of the evidence.
    """
    kind, floor = update.kind, floor_of(update)
    if kind is None or floor <= 0:
        return value
    rows = value.reshape(-1, *value.shape[value.dim() - kind.event_dim :])
    natural, low = kind.form.floored(natural_values(update, rows), floor)
    raised = update.uses[0].selection.inverse(update.uses[0].rule.link.forward(natural))
    return torch.where(low.reshape(-1, *(1,) * kind.event_dim), raised, rows).reshape(value.shape)


def _sites(update: ParameterUpdate, graph: FactorGraph) -> str:
    names = [graph.groups[u.group].members[0] for u in update.uses]
    return "it is estimated from site " + ", ".join(f"'{n}'" for n in dict.fromkeys(names))


def natural_values(update: ParameterUpdate, rows: Tensor) -> Tensor:
    """Parameter events as natural values of the kind."""
    out = rows
    for m in update.uses[0].selection.maps:
        out = m.forward(out)
    return update.uses[0].rule.link.inverse(out)


def _collapse(
    update: ParameterUpdate, graph: FactorGraph, k: int, spread: Tensor, mass: Tensor
) -> str:
    """The sentence on a spread that collapses."""
    assert update.kind is not None
    form = update.kind.form
    assert isinstance(form, Spread)
    return message(
        f"parameter '{update.name}', "
        + component_in_words(graph.parameters[update.name].leaf, form.event_dim, k),
        f"{form.words} {float(spread):.3g} from {float(mass):.3g} observations. "
        "The update was rolled back.",
        "a component that holds a single point (or a line) has unbounded likelihood; "
        + _sites(update, graph),
        [
            "restart elsewhere: fit(..., init='random', num_restarts=10, seed=0)",
            f"set a floor: updates={{'{update.name}': ClosedForm(floor=1e-3)}}",
            "use fewer components, or share the spread between them",
        ],
    )


def solvers_of(
    updates: Mapping[str, ParameterUpdate], graph: FactorGraph, values: Mapping[str, Tensor]
) -> list[Solver]:
    """One solver per closed form, locations first.

    Args:
        updates: Collapsed updates, all of them closed forms or fixed.
        graph: The collapsed graph.
        values: Parameter values, for their shapes.
    """
    out = [
        solver_of(update, graph, values[name])
        for name, update in updates.items()
        if isinstance(update.update, ClosedForm)
    ]
    return sorted(out, key=lambda s: 0 if s.kind.is_location else 1)
