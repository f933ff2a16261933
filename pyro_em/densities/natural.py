"""Simplex rows, probabilities and rates of all factors, as one vector.

An M-step on sums has their natural values φ in one vector: elements of simplex rows, probabilities
beside their complements, rates. With η = (log φ, −rates) every log density of `linear` is a sum of
elements of η times features of the data, so with N the posterior expectation of those features

    E-step   Θ = η[columns],   N = Σ_cells r f        M-step   φ ← N / Σ_row N,  or N_n / N_d for rates

and the expected log joint rises by ⟨N, η_new − η⟩: a handful of operations for all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.densities.linear import KINDS, Linear, linear, main_argument
from pyro_em.densities.symbols import spread
from pyro_em.distributions import bounds
from pyro_em.errors import Handover
from pyro_em.families.family import Rule
from pyro_em.families.form import Form
from pyro_em.families.forms import Kind
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.update import ClosedForm, Fixed, ParameterUpdate

Values = Mapping[str, Tensor]


_IMPOSSIBLE = -1e30  # log 0, such that 0 · log 0 = 0 in a product


_MANY_CELLS = 2**24


def formed(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same numbers in another shape and dtype; a look is quicker than an operation for nothing."""
    if t.shape != shape:
        t = t.reshape(shape)
    return t if t.dtype == dtype else t.to(dtype)


@dataclass(frozen=True, eq=False)
class State:
    """φ and η at some parameter values.

    Attributes:
        phi: φ. # (|φ|,)
        eta: η: the logarithms of φ, and the negative rates. # (|η|,)
    """

    phi: Tensor
    eta: Tensor


@dataclass(frozen=True, eq=False)
class Segment:
    """Where the natural values of a parameter, or constants, are in φ.

    Attributes:
        param: The parameter; empty for constants.
        kind: The functional form.
        start: The first element in φ.
        shape: The parameter's shape.
        dtype: Its dtype.
        is_free: Whether M-steps change it.
        constant: The argument that no parameter reaches.
        group: Whose argument it is.
    """

    param: str
    kind: Kind
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_free: bool
    constant: Tensor | None = None
    group: int = -1

    @cached_property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    def natural(self, values: Values) -> Tensor:
        """Its elements of φ at parameter values."""
        out = (values[self.param] if self.constant is None else self.constant).to(torch.float64)
        if self.kind.form.is_row:
            out = out / out.sum(-1, keepdim=True)
        return out.reshape(-1)

    def value(self, phi: Tensor) -> Tensor:
        """The parameter's value that stands in φ."""
        return formed(phi.narrow(0, self.start, self.numel), self.shape, self.dtype)


@dataclass(frozen=True, eq=False)
class Naturals:
    """The layout of φ and its M-step.

    φ holds simplex rows, then probabilities, their complements, and rates.

    Attributes:
        segments: The segments of φ, in this order.
        row: For each element of φ the row with which it sums to one; a rate is its own. # (|φ|,)
        may_be_empty: Whether a row may be without mass, and then keeps its values. # (rows,)
        p: The first probability; the first complement; the first rate.
        free: Elements that M-steps change; None where all are. # (|φ|,)
        rounding: The dtype of the parameters, where it is coarser than float64.
    """

    segments: Sequence[Segment]
    row: Tensor
    may_be_empty: Tensor
    p: tuple[int, int, int]
    free: Tensor | None
    rounding: torch.dtype | None

    @property
    def params(self) -> frozenset[str]:
        """The parameters that are held."""
        return frozenset(b.param for b in self.segments if b.param)

    @property
    def solved(self) -> frozenset[str]:
        """Those of them that M-steps change."""
        return frozenset(b.param for b in self.segments if b.is_free)

    def enter(self, values: Values) -> State:
        """φ and η at parameter values."""
        parts = [b.natural(values) for b in self.segments]
        complements = [
            1 - part
            for b, part in zip(self.segments, parts, strict=True)
            if b.kind.form.has_complement
        ]
        phi = torch.cat(_in_order(self.segments, parts, complements))
        return State(phi, self._eta(phi))

    def _eta(self, phi: Tensor) -> Tensor:
        log = phi.log().clamp_(min=_IMPOSSIBLE)
        first = self.p[2]
        return log if first == self.size else torch.cat([log, -phi[first:]])

    @cached_property
    def remembered(self) -> dict[Any, Any]:
        """What was found out about the features that came with it."""
        return {}

    @cached_property
    def size(self) -> int:
        """Elements of φ."""
        return len(self.row)

    @cached_property
    def rows(self) -> int:
        """Rows of φ; the last are the rates."""
        return len(self.may_be_empty)

    def m_step(self, state: State, N: Tensor) -> tuple[State, Tensor]:
        """The maximiser, and by how much it raises the expected log joint, in nats.

        Args:
            state: At the E-step.
            N: Expected features. # like η

        Raises:
            Handover: If a probability or a rate has no mass, or rounds to what it is not.
        """
        low, high, end = self.p
        if self.rows == 1 and end == self.size:  # one simplex row and nothing else
            n, mass = N, N.sum(0, keepdim=True)
            phi, least = n / mass, mass
        else:
            n = N[: self.size]
            mass = N.new_zeros(self.rows).index_add_(0, self.row, n)
            if end < self.size:
                mass[self.rows - (self.size - end) :] = N[self.size :]
            phi, least = n / mass.index_select(0, self.row), mass.amin()
        if not float(least) > 0:
            if not bool(((mass > 0) | self.may_be_empty).all()):
                raise Handover
            phi = torch.where((mass > 0)[self.row], phi, state.phi)
        if self.free is not None:
            phi = torch.where(self.free, phi, state.phi)
        if self.rounding is not None:
            phi = phi.to(self.rounding).to(torch.float64)
            if low < high:
                rest = torch.sub(1, phi[low:high], out=phi[high:end])
                if not float(rest.amin()) > 0 and bool(((rest == 0) & (n[high:end] > 0)).any()):
                    raise Handover
        eta = self._eta(phi)
        return State(phi, eta), torch.dot(N, eta - state.eta)

    def features(self, segment: Segment, n: Tensor, d: Tensor) -> list[Feature]:
        """Where numerators and denominators of a segment's elements are in η. # (numel,) each"""
        low, high, end = self.p
        place = torch.arange(segment.numel, device=self.row.device) + segment.start
        return _features(segment.kind.form, n, d, place, high - low, self.size - end)

    def values(self, state: State) -> dict[str, Tensor]:
        """The parameters that M-steps change, at a state."""
        return {b.param: b.value(state.phi) for b in self.segments if b.is_free}


@dataclass(frozen=True, eq=False)
class Feature:
    """A feature of one group's data and the elements of η that it multiplies.

    Attributes:
        few: The feature of each datum, # (members, *sizes or 1s, *to_event, *event), or of each value
            that occurs where there are codes. # (values, *1s, *event)
        columns: # (members or 1, *sizes or 1s, *to_event or 1s, *event)
        codes: Which value each datum is. # (members, *sizes or 1s)
    """

    few: Tensor
    columns: Tensor
    codes: Tensor | None = None

    @property
    def f(self) -> Tensor:
        """The feature of each datum. # (members, *sizes or 1s, *to_event, *event)"""
        return spread(self.few, self.codes)


# Per linear group its features and its base measure h. # (members, *sizes or 1s)
Linears = Mapping[int, tuple[list[Feature], Tensor]]


def naturals(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
    eligible: Collection[int],
) -> tuple[Naturals, Linears] | None:
    """The vector of a collapsed graph, and the features and base measure of its linear groups.

    Args:
        graph: A collapsed graph.
        updates: Collapsed updates, closed forms or fixed.
        values: Parameter values, for their shapes.
        eligible: Groups whose linear form the kernel can use.

    Returns:
        None where no group is linear.
    """
    linears = _linears(graph, updates, eligible)
    if not linears or not all(form.is_remembered for form in linears.values()):
        return _naturals(graph, updates, values, linears)
    # What no datum enters is the same in the next run of the model.
    selections = [graph.groups[g].bindings[f.argument].selections[0] for g, f in linears.items()]
    held = dict.fromkeys(s.param for s in selections)
    asked = (
        _naturals,
        tuple((g, graph.groups[g].arguments[f.argument].shape) for g, f in linears.items()),
        tuple((n, values[n].shape, values[n].dtype, type(updates[n].update)) for n in held),
    )
    objects = [*linears.values(), *selections]
    before, found = selections[0].remembered.get(asked, ((), None))
    if len(before) != len(objects) or any(a is not b for a, b in zip(before, objects, strict=True)):
        found = _naturals(graph, updates, values, linears)
        if all(s.is_whole for s in selections):  # constants are of their run
            selections[0].remembered[asked] = objects, found
    return found


def _naturals(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
    linears: Mapping[int, Linear],
) -> tuple[Naturals, Linears] | None:
    """The vector and the features of groups whose linear forms are known; see `naturals`."""
    segments = _segments(graph, updates, values, linears)
    coarse = {b.dtype for b in segments if b.is_free}
    if len(coarse) != 1:  # nothing that is free, or more than one rounding
        return None
    device = graph.groups[0].value.device
    starts = {b.param or b.group: b.start for b in segments}
    pairs = sum(b.numel for b in segments if b.kind.form.has_complement)
    rates = sum(b.numel for b in segments if b.kind.form.has_rate)
    features: dict[int, tuple[list[Feature], Tensor]] = {}
    for g, form in linears.items():
        group = graph.groups[g]
        shape = group.arguments[form.argument].shape
        constants = torch.arange(shape.numel(), device=device).reshape(shape) + starts.get(g, 0)
        place = torch.full_like(constants, -1)
        for s in group.bindings[form.argument].selections:
            place = torch.where(s.index >= 0, s.index + starts[s.param], place)
        place = torch.where(place < 0, constants, place)
        listed = _features(form.rule.kind.form, form.n, form.d, place, pairs, rates)
        features[g] = (
            [replace(part, codes=form.codes) for part in listed],
            spread(form.base, form.codes),
        )
    read = [f.columns.reshape(-1) for listed, _ in features.values() for f in listed]
    return _layout(segments, torch.cat(read), coarse.pop(), device), features


def _segments(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
    linears: Mapping[int, Linear],
) -> list[Segment]:
    """The segments of φ: of parameters, and of what no parameter reaches; by kind."""
    segments: list[Segment] = []
    placed: set[str] = set()
    for g, form in linears.items():
        binding, kind = graph.groups[g].bindings[form.argument], form.rule.kind
        argument = graph.groups[g].arguments[form.argument].detach()
        reached = torch.zeros(argument.shape, dtype=torch.bool, device=argument.device)
        for s in binding.selections:
            reached |= s.index >= 0
            if s.param not in placed:
                placed.add(s.param)
                free = not isinstance(updates[s.param].update, Fixed)
                value = values[s.param]
                segments.append(Segment(s.param, kind, 0, tuple(value.shape), value.dtype, free))
        if not bool(reached.all()):
            shape, dtype = tuple(argument.shape), argument.dtype
            segments.append(Segment("", kind, 0, shape, dtype, False, argument, g))
    complements = sum(b.numel for b in segments if b.kind.form.has_complement)
    out, start = [], 0
    for b in sorted(segments, key=lambda b: KINDS.index(b.kind)):
        out.append(replace(b, start=start + complements * b.kind.form.has_rate))
        start += b.numel
    return out


def _linears(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate], eligible: Collection[int]
) -> dict[int, Linear]:
    """Linear groups all of whose parameters are fixed or solved by linear groups alone."""
    linears: dict[int, Linear] = {}
    for g in eligible:
        group = graph.groups[g]
        main = main_argument(group)
        if main is None or _feature_cells(group, *main) > _MANY_CELLS:
            continue
        form = linear(group, main)
        if form is not None:
            linears[g] = form
    while True:
        keep = {
            g: form
            for g, form in linears.items()
            if all(_is_held(p, graph, updates, linears) for p in graph.groups[g].params)
        }
        if len(keep) == len(linears):
            return linears
        linears = keep


def _is_held(
    param: str,
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    linears: Mapping[int, Linear],
) -> bool:
    """Whether φ can hold a parameter: as it is, with one kind, in linear groups alone."""
    kinds = set()
    for g, group in enumerate(graph.groups):
        for argument, binding in group.bindings.items():
            for s in binding.selections:
                if s.param != param:
                    continue
                if g not in linears or argument != linears[g].argument or s.maps:
                    return False
                kinds.add(linears[g].rule.kind)
    update = updates[param]
    if len(kinds) != 1 or not isinstance(update.update, ClosedForm | Fixed):
        return False
    (kind,) = kinds
    if kind.form.is_row or isinstance(update.update, Fixed):
        return True
    interval, (low, high) = bounds(graph.parameters[param].constraint), kind.form.interval
    return interval is not None and interval[0] <= low and interval[1] >= high


def _feature_cells(group: Group, name: str, rule: Rule) -> int:
    """Roughly how many numbers the features of a group's data have in an argument."""
    width = group.arguments[name].shape[-1] if rule.kind.form.is_row else 2
    assert group.family is not None
    return group.value.numel() * (1 if group.family.event_dim else width)


def _features(
    form: Form, n: Tensor, d: Tensor, place: Tensor, pairs: int, rates: int
) -> list[Feature]:
    """What multiplies which elements of η in a log-linear form.

    Args:
        form: The form.
        n: Its numerators.
        d: Its denominators; of a simplex unused.
        place: Where the argument is in φ.
        pairs: How many probabilities there are: their complements are so much further on in φ.
        rates: How many rates there are: their negatives are so much further on in η.
    """
    columns = [place]
    if form.has_complement:
        columns.append(place + pairs)
    if form.has_rate:
        columns.append(place + rates)
    return [Feature(f, c) for f, c in zip(form.features(n, d), columns, strict=True)]


def _in_order(
    segments: Sequence[Segment], parts: Sequence[Tensor], complements: Sequence[Tensor]
) -> list[Tensor]:
    """What belongs to the segments in the order of φ: complements before the rates.

    Args:
        segments: The segments of φ.
        parts: One tensor for each.
        complements: One tensor for each segment of probabilities.
    """
    first = sum(not b.kind.form.has_rate for b in segments)
    return [*parts[:first], *complements, *parts[first:]]


def _layout(
    segments: Sequence[Segment], read: Tensor, dtype: torch.dtype, device: torch.device
) -> Naturals:
    """What the M-step needs to know about φ.

    Args:
        segments: The segments of φ.
        read: The elements of η that any group reads.
        dtype: Of the free parameters.
        device: Where all of it goes.
    """
    rows: list[Tensor] = []
    free: list[Tensor] = []
    may_be_empty: list[bool] = []
    for b in segments:
        width = b.shape[-1] if b.kind.form.is_row else 1
        rows.append(torch.arange(b.numel, device=device) // width + len(may_be_empty))
        free.append(torch.full((b.numel,), b.is_free, device=device))
        may_be_empty += [b.kind.form.is_row or not b.is_free] * (b.numel // width)
    pairs = [i for i, b in enumerate(segments) if b.kind.form.has_complement]
    row = torch.cat(_in_order(segments, rows, [rows[i] for i in pairs]))
    is_free = torch.cat(_in_order(segments, free, [free[i] for i in pairs]))
    unused = torch.ones(len(may_be_empty), dtype=torch.bool, device=device)
    unused[row[read[read < len(row)]]] = False
    n_pairs = sum(segments[i].numel for i in pairs)
    first_rate = len(row) - sum(b.numel for b in segments if b.kind.form.has_rate)
    return Naturals(
        segments,
        row,
        torch.tensor(may_be_empty, device=device) | unused,
        (first_rate - 2 * n_pairs, first_rate - n_pairs, first_rate),
        None if bool(is_free.all()) else is_free,
        None if dtype == torch.float64 else dtype,
    )
