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
from pyro_em.families.conjugacy import conjugate
from pyro_em.families.family import Statistics
from pyro_em.families.forms import Kind, Spread
from pyro_em.graph.binding import Selection, is_in_order
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.update import ClosedForm, ParameterUpdate, Prior

Blend = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(eq=False)
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
        kind, event = self.kind, self.kind.event_dim
        if kind is Kind.MEAN_VECTOR and self.direct and self.prior is None and blend is None:
            mean = self._weighted_mean(statistics)
            if mean is not None:
                return mean if mean.dtype == value.dtype else mean.to(value.dtype), []
        n, d = self._sums(statistics, arguments, value)
        if blend is not None:
            n, d = blend(self.update.name, n, d)
        if self.prior is not None:
            n, d = n + self.prior[0].to(n), d + self.prior[1].to(d)
            _refuse_boundary_mode(self.update, self.graph, n, d, value)
        natural, massless = kind.form.solve(n, d)
        keep = massless if self.all_used else massless | ~self.used
        if kind.is_spread:
            natural = self._checked_spread(natural, keep, d, value)
        use, kept = self.update.uses[0], bool(keep.any())
        if kept:
            shaped = keep.reshape(-1, *(1,) * event)
            natural = torch.where(shaped, kind.form.filler(natural), natural)
        new = use.selection.inverse(use.rule.link.forward(natural))
        if kept:
            new = torch.where(shaped, value.reshape(new.shape).to(new.dtype), new)
        new = new.reshape(self.shape)
        if event == 0 and self.interval is not None:
            new = self._clipped(new, value, keep)
        if not bool(torch.isfinite(new).all()):
            self._refuse_infinite(new, value)
        # What only a flat prior reads is no component without data.
        empty = [int(i) for i in (massless & self.read).nonzero().reshape(-1)] if kept else []
        return new if new.dtype == value.dtype else new.to(value.dtype), empty

    def _weighted_mean(self, statistics: Mapping[int, Statistics]) -> Tensor | None:
        """Σ w x / Σ w where each cell has its own mean: the precisions cancel."""
        (use,) = self.update.uses
        s = statistics[use.group]
        weight = s["weight"].unsqueeze(-1)
        if tuple(weight.shape[:-1]) != self.cells or use.selection.maps:
            return None
        mean = s["reference:loc"] + s["deviation"] / weight
        if not bool(torch.isfinite(mean).all()):
            return None
        return mean.reshape(self.shape)

    def _sums(
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
            n, d = onto_events(self.kind, use.selection, n, d, value, event)
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
        before = _natural(self.update, value.reshape(a.shape).to(a.dtype))
        bad, spread = form.collapsed(a, before, mass, self.magnitude)
        bad = bad & ~keep
        if bool(bad.any()):
            k = int(bad.nonzero()[0])
            raise DegenerateError(_collapse(self.update, self.graph, k, spread[k], mass[k]))
        return a

    def _refuse_infinite(self, new: Tensor, value: Tensor) -> None:
        event = self.kind.event_dim
        flat = new.reshape(len(self.used), -1)
        bad = int((~torch.isfinite(flat)).any(-1).nonzero()[0])
        raise DegenerateError(
            message(
                f"parameter '{self.update.name}', {_component(value, event, bad)}",
                "its update is not finite; nothing was changed.",
                _sites(self.update, self.graph),
                ["check the data at this site", "start elsewhere (init='random', num_restarts)"],
            )
        )


def solver_of(update: ParameterUpdate, graph: FactorGraph, value: Tensor) -> Solver:
    """The solver of a closed form.

    Args:
        update: A closed form, but no median.
        graph: The graph that its uses refer to.
        value: The parameter's value, for its shape.
    """
    kind = update.kind
    assert kind is not None and isinstance(update.update, ClosedForm)
    event = kind.event_dim
    selections = [u.selection for u in update.uses]
    used = used_events([*selections, *(p.selection for p in update.priors)], value, event)
    index = selections[0].index
    direct = (
        len(selections) == 1
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
        used_events(selections, value, event),
        bool(used.all()),
        bounds(graph.parameters[update.name].constraint) if event == 0 else None,
        update.update.floor,
        tuple(index.shape[: index.dim() - event]),
        contributions(update, graph, value) if update.priors else None,
    )


def closed_form(
    update: ParameterUpdate,
    graph: FactorGraph,
    statistics: Mapping[int, Statistics],
    arguments: Sequence[Mapping[str, Tensor]],
    counts: Sequence[Tensor],
    value: Tensor,
    blend: Blend | None = None,
) -> tuple[Tensor, list[int]]:
    """The maximiser of the expected log joint in one parameter; see `Solver.solve`.

    Args:
        update: The decided update.
        graph: The factor graph.
        statistics: Expected statistics per group.
        arguments: The current arguments per group.
        counts: Expected counts per group (for order statistics).
        value: The parameter's current value.
        blend: From a parameter's name, numerator and denominator to running averages of them.
    """
    if update.kind is Kind.MEDIAN:
        return _medians(update, graph, arguments, counts, value)
    return solver_of(update, graph, value).solve(statistics, arguments, value, blend)


def apply_floor(update: ParameterUpdate, value: Tensor) -> Tensor:
    """A parameter's value with its spread raised to the floor that the user asked for.

    A start below the floor would make the first floored update look like a fall of the evidence.
    """
    kind = update.kind
    floor = update.update.floor if isinstance(update.update, ClosedForm) else 0.0
    if kind is None or not kind.is_spread or floor <= 0:
        return value
    rows = value.reshape(-1, *value.shape[value.dim() - kind.event_dim :])
    natural, low = kind.form.floored(_natural(update, rows), floor)
    raised = update.uses[0].selection.inverse(update.uses[0].rule.link.forward(natural))
    return torch.where(low.reshape(-1, *(1,) * kind.event_dim), raised, rows).reshape(value.shape)


def _prod(shape: Sequence[int]) -> int:
    out = 1
    for s in shape:
        out *= s
    return out


def _component(value: Tensor, event: int, flat: int) -> str:
    shape = value.shape[: value.dim() - event]
    if not shape:
        return "its only component"
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    shown = index[0] if len(index) == 1 else tuple(reversed(index))
    return f"component {shown}"


def _sites(update: ParameterUpdate, graph: FactorGraph) -> str:
    names = [graph.groups[u.group].members[0] for u in update.uses]
    return "it is estimated from site " + ", ".join(f"'{n}'" for n in dict.fromkeys(names))


def _natural(update: ParameterUpdate, rows: Tensor) -> Tensor:
    """Parameter events as natural values of the kind."""
    out = rows
    for m in update.uses[0].selection.maps:
        out = m.forward(out)
    return update.uses[0].rule.link.inverse(out)


def used_events(selections: Sequence[Selection], value: Tensor, event: int) -> Tensor:
    """Which of a parameter's events any selection reads. # (events,)"""
    size = _prod(value.shape[value.dim() - event :])
    used = torch.zeros(value.numel() // size, dtype=torch.bool, device=value.device)
    for selection in selections:
        index = selection.index
        used[(index[index >= 0] // size).reshape(-1)] = True
    return used


def onto_events(
    kind: Kind, selection: Selection, n: Tensor, d: Tensor, value: Tensor, event: int
) -> tuple[Tensor, Tensor]:
    """Sum numerators and denominators of an argument's cells onto the parameter's events."""
    index = selection.index
    cells = index.shape[: index.dim() - event]
    n_event = n.shape[len(cells) :]
    d_event = d.shape[len(cells) :]
    batch = [max(a, b) for a, b in zip(n.shape[: len(cells)], d.shape, strict=False)]
    n, d = n.expand(*batch, *n_event), d.expand(*batch, *d_event)
    if selection.factor is not None:
        n, d = kind.form.exposed(n, d, selection.factor)
    n, d = sum_to(n, cells, len(n_event)), sum_to(d, cells, len(d_event))
    size = _prod(value.shape[value.dim() - event :])
    n_events = value.numel() // size
    first = index if event == 0 else index.flatten(index.dim() - event).min(-1).values
    row = torch.where(first >= 0, first // size, n_events).reshape(-1)
    d_out = d.new_zeros(n_events + 1, *d_event).index_add(0, row, d.reshape(-1, *d_event))
    if kind is Kind.SIMPLEX:
        # Rows may be permuted: scatter element by element.
        flat = torch.where(index >= 0, index, value.numel()).reshape(-1)
        n_flat = n.new_zeros(value.numel() + 1).index_add(0, flat, n.reshape(-1))
        return n_flat[:-1].reshape(n_events, -1), d_out[:-1]
    n_out = n.new_zeros(n_events + 1, *n_event).index_add(0, row, n.reshape(-1, *n_event))
    return n_out[:-1], d_out[:-1]


def prior_contribution(
    update: ParameterUpdate, prior: Prior, graph: FactorGraph, value: Tensor, event: int
) -> tuple[Tensor, Tensor]:
    """What a conjugate prior adds, on the parameter's events."""
    group = graph.groups[prior.group]
    assert group.family is not None and update.kind is not None
    maps = tuple(m.name for m in update.uses[0].selection.maps)
    rule = conjugate(group.family.distribution, update.kind, maps)
    assert rule is not None
    batch = prior.selection.index.dim() - event
    arguments = {name: a.detach() for name, a in group.arguments.items()}
    if event:  # a scalar prior of a vector is kept below its expansion, an event is not
        last = prior.selection.index.shape[batch:]
        arguments = {
            name: a if group.family.argument_event_dim(name) else a.expand(*a.shape[:batch], *last)
            for name, a in arguments.items()
        }
    n, d = rule(arguments)
    weight = group.weights().to(n.dtype)
    for _ in range(batch - weight.dim()):
        weight = weight.unsqueeze(-1)
    # A vector's elements may have a plate of their own, and then a weight each.
    batch = weight.dim()
    n = n * weight.reshape(weight.shape + (1,) * (n.dim() - batch))
    d = d * weight.reshape(weight.shape + (1,) * (d.dim() - batch))
    return onto_events(update.kind, prior.selection, n, d, value, event)


def _refuse_boundary_mode(
    update: ParameterUpdate, graph: FactorGraph, n: Tensor, d: Tensor, value: Tensor
) -> None:
    """A prior such as Dirichlet(0.5) is unbounded where a component has too little data."""
    kind = update.kind
    assert kind is not None
    bad = kind.form.outside(n, d)
    if bad is None:
        return
    size = float(d.abs().max().clamp(min=1.0))
    rounding = 64 * torch.finfo(n.dtype).eps * size
    rounded = (bad < 0) & (bad >= -rounding)
    if kind is Kind.SIMPLEX:
        n.masked_fill_(rounded, 0.0)
    bad = bad.masked_fill(rounded, 0.0)
    if not bool((bad < 0).any()):
        return
    place = (bad < 0).nonzero()[0].tolist()
    event = 1 if kind is Kind.SIMPLEX else 0
    row = _component(value, event, place[0]) if value.dim() > event else ""
    where = f"{row}, value {place[1]}" if row and event else row
    where = where or (f"component {place[1]}" if event else "its only component")
    sites = ", ".join(f"'{graph.groups[p.group].members[0]}'" for p in update.priors)
    names = "/".join(sorted({graph.groups[p.group].distribution for p in update.priors}))
    raise DegenerateError(
        message(
            f"site {sites}, {where}",
            f"its posterior mode is on the boundary: expected count plus prior count minus one is "
            f"{float(bad[tuple(place)]):.4g} < 0, and the density is unbounded there. The update "
            "was rolled back.",
            f"a {names} prior with a concentration below one favours the boundary more than these "
            "data speak against it",
            [
                "use a concentration of at least one (exactly one is maximum likelihood)",
                "make it a parameter without a prior: pyro.param instead of pyro.sample",
                "use a guide with a spread: ExactPosteriorEM(model, AutoNormal)",
            ],
        )
    )


def sum_to(tensor: Tensor, cells: Sequence[int], event: int = 0) -> Tensor:
    """Sum over the cells that an argument is constant along, and expand to its cells."""
    axes = [i for i, size in enumerate(cells) if size == 1 and tensor.shape[i] > 1]
    tensor = tensor.sum(axes, keepdim=True) if axes else tensor
    return tensor.expand(*cells, *tensor.shape[tensor.dim() - event :])


def _collapse(
    update: ParameterUpdate, graph: FactorGraph, k: int, spread: Tensor, mass: Tensor
) -> str:
    """The sentence on a spread that collapses."""
    assert update.kind is not None
    form = update.kind.form
    assert isinstance(form, Spread)
    return message(
        f"parameter '{update.name}', "
        + _component(graph.parameters[update.name].leaf, form.event_dim, k),
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


def data_magnitude(update: ParameterUpdate, graph: FactorGraph, value: Tensor) -> Tensor:
    """The largest value among the data of each spread: what its rounding is relative to.

    Returns:
        One number per event of the parameter, or one per feature. # (events,) or (events, D)
    """
    assert update.kind is not None
    event = update.kind.event_dim
    size = _prod(value.shape[value.dim() - event :])
    n_events = value.numel() // size
    out: Tensor | None = None
    for use in update.uses:
        group = graph.groups[use.group]
        assert group.family is not None
        x = group.family.magnitude(group.value.detach())
        index = use.selection.index
        first = index if event == 0 else index.flatten(index.dim() - event).min(-1).values
        features = x.shape[first.dim() :]
        axes = [i for i, n in enumerate(first.shape) if n == 1 and x.shape[i] > 1]
        x = x.amax(axes, keepdim=True) if axes else x
        batch = torch.broadcast_shapes(first.shape, x.shape[: first.dim()])
        row = torch.where(first >= 0, first // size, n_events).expand(batch).reshape(-1)
        x = x.expand(*batch, *features).reshape(len(row), *features)
        if out is None:
            out = x.new_zeros(n_events + 1, *features)
        row = row.reshape(-1, *(1,) * len(features)).expand(x.shape)
        out = out.scatter_reduce(0, row, x, "amax")
    assert out is not None
    return out[:-1]


def _medians(
    update: ParameterUpdate,
    graph: FactorGraph,
    arguments: Sequence[Mapping[str, Tensor]],
    counts: Sequence[Tensor],
    value: Tensor,
) -> tuple[Tensor, list[int]]:
    """Weighted medians: a second pass over the data, one sort per element."""
    points: list[list[Tensor]] = [[] for _ in range(value.numel())]
    weights: list[list[Tensor]] = [[] for _ in range(value.numel())]
    for use in update.uses:
        group = graph.groups[use.group]
        index = use.selection.index
        w = counts[use.group].to(value.dtype)
        w = w.reshape(w.shape + (1,) * group.event_dims) / arguments[use.group]["scale"].detach()
        w = w if group.elements is None else w * group.elements
        shape = torch.broadcast_shapes(index.shape, w.shape, group.value.shape)
        full, x, w = index.expand(shape), group.value.expand(shape), w.expand(shape)
        for j in range(value.numel()):
            chosen = full == j
            points[j].append(x[chosen])
            weights[j].append(w[chosen])
    new, massless = value.reshape(-1).clone(), []
    interval = bounds(graph.parameters[update.name].constraint)
    for j in range(value.numel()):
        if not points[j]:
            continue
        x, w = torch.cat(points[j]), torch.cat(weights[j])
        if x.numel() == 0:
            continue
        if not float(w.sum()) > 0:
            massless.append(j)
            continue
        order = x.argsort()
        total = w[order].cumsum(0)
        at = int(torch.searchsorted(total, total[-1] / 2))
        new[j] = update.uses[0].selection.inverse(x[order][min(at, len(x) - 1)])
        if interval is not None:
            new[j] = new[j].clamp(*interval)  # the profile is concave
    return new.reshape(value.shape), massless


def contributions(
    update: ParameterUpdate, graph: FactorGraph, value: Tensor
) -> tuple[Tensor, Tensor]:
    """n₀ and d₀ of all priors of a parameter, on its events, in float64.

    Args:
        update: A closed form with priors.
        graph: The collapsed graph.
        value: The parameter's value, for its shape.
    """
    assert update.kind is not None
    wide = value.to(torch.float64)
    parts = [
        prior_contribution(update, p, graph, wide, update.kind.event_dim) for p in update.priors
    ]
    n, d = (torch.stack([p[i].to(torch.float64) for p in parts]).sum(0) for i in (0, 1))
    return n, d


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
