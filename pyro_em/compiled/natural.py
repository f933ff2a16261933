r"""Simplex rows, probabilities and rates of all factors, as one vector.

The step keeps their natural values φ in one vector: elements of simplex rows, probabilities beside
their complements, rates. With η = (log φ, −rates) every log density of `linear` is a sum of elements
of η times features of the data, so with N the posterior expectation of those features

    E-step   Θ = η[columns],   N = Σ_cells r f        M-step   φ ← N / Σ_row N,  or N_n / N_d for rates

and the expected log joint rises by ⟨N, η_new − η⟩: a handful of operations for all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.compiled.linear import Linear, linear, main_argument
from pyro_em.compiled.step import Handover
from pyro_em.families import Kind
from pyro_em.graph import FactorGraph, Group
from pyro_em.m_step import ClosedForm, Fixed, ParameterUpdate
from pyro_em.m_step.updates import bounds

Values = Mapping[str, Tensor]
_IMPOSSIBLE = -1e30  # log 0, such that 0 · log 0 = 0 in a product
_MANY_CELLS = 2**24


@dataclass(frozen=True, eq=False)
class State:
    """φ and η at some parameter values."""

    phi: Tensor
    eta: Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """Where the natural values of a parameter, or constants, are in φ.

    Attributes:
        param: The parameter; empty for constants.
        kind: The functional form.
        start: The first element in φ; the complements of probabilities come after them.
        shape: The parameter's shape.
        dtype: Its dtype.
        is_free: Whether M-steps change it.
        constant: The argument that no parameter reaches.
    """

    param: str
    kind: Kind
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_free: bool
    constant: Tensor | None = None

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """The first element in φ of the next block."""
        return self.start + (2 if self.kind is Kind.PROBABILITY else 1) * self.numel

    def natural(self, values: Values) -> Tensor:
        """Its part of φ at parameter values."""
        out = (values[self.param] if self.constant is None else self.constant).to(torch.float64)
        if self.kind is Kind.SIMPLEX:
            out = out / out.sum(-1, keepdim=True)
        out = out.reshape(-1)
        return torch.cat([out, 1 - out]) if self.kind is Kind.PROBABILITY else out

    def value(self, phi: Tensor) -> Tensor:
        """The parameter's value that stands in φ."""
        return phi[self.start : self.start + self.numel].reshape(self.shape).to(self.dtype)


@dataclass(frozen=True, eq=False)
class Naturals:
    """The layout of φ and its M-step.

    Attributes:
        blocks: What is where.
        row: For each element of φ the row with which it sums to one; a rate is its own. # (|φ|,)
        may_be_empty: Whether a row may be without mass, and then keeps its values. # (rows,)
        rates: The elements of φ that are rates, in the order of the tail of η. # (R,)
        rate_rows: Their rows. # (R,)
        free: Elements that M-steps change; None where all are. # (|φ|,)
        rounding: The dtype of the parameters, where it is coarser than float64.
        halves: Where probabilities are, and their complements. # (P,) each
    """

    blocks: Sequence[Block]
    row: Tensor
    may_be_empty: Tensor
    rates: Tensor
    rate_rows: Tensor
    free: Tensor | None
    rounding: torch.dtype | None
    halves: tuple[Tensor, Tensor]

    @property
    def params(self) -> frozenset[str]:
        """The parameters that are held."""
        return frozenset(b.param for b in self.blocks if b.param)

    @property
    def solved(self) -> frozenset[str]:
        """Those of them that M-steps change."""
        return frozenset(b.param for b in self.blocks if b.is_free)

    def enter(self, values: Values) -> State:
        """φ and η at parameter values."""
        phi = torch.cat([b.natural(values) for b in self.blocks])
        return State(phi, self._eta(phi))

    def _eta(self, phi: Tensor) -> Tensor:
        log = phi.log().clamp_(min=_IMPOSSIBLE)
        return torch.cat([log, -phi[self.rates]]) if len(self.rates) else log

    def m_step(self, state: State, N: Tensor) -> tuple[State, Tensor]:
        """The maximiser, and by how much it raises the expected log joint, in nats.

        Args:
            state: At the E-step.
            N: Expected features. # like η

        Raises:
            Handover: If a probability or a rate has no mass, or rounds to what it is not.
        """
        n = N[: len(state.phi)]
        mass = N.new_zeros(len(self.may_be_empty)).index_add_(0, self.row, n)
        if len(self.rates):
            mass[self.rate_rows] = N[len(state.phi) :]
        phi = n / mass[self.row]
        if not float(mass.amin()) > 0:
            if not bool(((mass > 0) | self.may_be_empty).all()):
                raise Handover
            phi = torch.where((mass > 0)[self.row], phi, state.phi)
        if self.free is not None:
            phi = torch.where(self.free, phi, state.phi)
        if self.rounding is not None:
            phi = phi.to(self.rounding).to(torch.float64)
            if len(self.halves[0]):
                rest = 1 - phi[self.halves[0]]
                if bool(((rest == 0) & (n[self.halves[1]] > 0)).any()):
                    raise Handover
                phi[self.halves[1]] = rest
        eta = self._eta(phi)
        return State(phi, eta), (N * (eta - state.eta)).sum()

    def values(self, state: State) -> dict[str, Tensor]:
        """The parameters that M-steps change, at a state."""
        return {b.param: b.value(state.phi) for b in self.blocks if b.is_free}


@dataclass(frozen=True, eq=False)
class Feature:
    """A feature of one group's data and the elements of η that it multiplies.

    Attributes:
        f: # (members, *sizes or 1s, *to_event, *event)
        columns: # (members or 1, *sizes or 1s, *to_event or 1s, *event)
    """

    f: Tensor
    columns: Tensor


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
    device = graph.groups[0].value.device
    blocks: list[Block] = []
    positions: dict[int, Tensor] = {}
    known: dict[str, Block] = {}
    for g, form in linears.items():
        group, kind = graph.groups[g], form.rule.kind
        binding = group.bindings[form.argument]
        argument = group.arguments[form.argument].detach()
        at = torch.full(argument.shape, -1, dtype=torch.long, device=device)
        for s in binding.selections:
            if s.param not in known:
                value, end = values[s.param], blocks[-1].end if blocks else 0
                free = not isinstance(updates[s.param].update, Fixed)
                known[s.param] = Block(s.param, kind, end, tuple(value.shape), value.dtype, free)
                blocks.append(known[s.param])
            at = torch.where(s.index >= 0, s.index + known[s.param].start, at)
        if bool((at < 0).any()):
            end = blocks[-1].end if blocks else 0
            shape, dtype = tuple(argument.shape), argument.dtype
            blocks.append(Block("", kind, end, shape, dtype, False, argument))
            own = torch.arange(argument.numel(), device=device).reshape(shape) + end
            at = torch.where(at < 0, own, at)
        positions[g] = at
    coarse = {b.dtype for b in blocks if b.is_free}
    if len(coarse) != 1:  # nothing that is free, or more than one rounding
        return None
    complement, tail = _partners(blocks, device)
    features = {
        g: (_features(form, positions[g], complement, tail), form.base)
        for g, form in linears.items()
    }
    read = [f.columns.reshape(-1) for listed, _ in features.values() for f in listed]
    return _layout(blocks, torch.cat(read), coarse.pop(), device), features


def _linears(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate], eligible: Collection[int]
) -> dict[int, Linear]:
    """Linear groups all of whose parameters are fixed or solved by linear groups alone."""
    found: dict[int, Linear] = {}
    for g in eligible:
        if main_argument(graph.groups[g]) is None or _feature_cells(graph.groups[g]) > _MANY_CELLS:
            continue
        form = linear(graph.groups[g])
        if form is not None:
            found[g] = form
    while True:
        keep = {
            g: form
            for g, form in found.items()
            if all(_is_held(p, graph, updates, found) for p in graph.groups[g].params)
        }
        if len(keep) == len(found):
            return found
        found = keep


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
    if kind is Kind.SIMPLEX or isinstance(update.update, Fixed):
        return True
    interval = bounds(graph.parameters[param].constraint)
    if interval is None:
        return False
    return interval[0] <= 0 and interval[1] >= (1 if kind is Kind.PROBABILITY else math.inf)


def _feature_cells(group: Group) -> int:
    """How many numbers the features of a group's data have, about."""
    found = main_argument(group)
    assert found is not None
    name, rule = found
    width = group.arguments[name].shape[-1] if rule.kind is Kind.SIMPLEX else 2
    assert group.family is not None
    return group.value.numel() * (1 if group.family.event_dim else width)


def _partners(blocks: Sequence[Block], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each element of φ, where its complement is in φ, and a rate's place in the tail of η."""
    size = blocks[-1].end
    complement = torch.arange(size, device=device)
    tail = torch.full((size,), -1, dtype=torch.long, device=device)
    at = size
    for b in blocks:
        if b.kind is Kind.PROBABILITY:
            complement[b.start : b.start + b.numel] += b.numel
        elif b.kind is Kind.RATE:
            tail[b.start : b.end] = torch.arange(b.numel, device=device) + at
            at += b.numel
    return complement, tail


def _features(form: Linear, at: Tensor, complement: Tensor, tail: Tensor) -> list[Feature]:
    if form.rule.kind is Kind.SIMPLEX:
        return [Feature(form.n, at)]
    if form.rule.kind is Kind.PROBABILITY:
        return [Feature(form.n, at), Feature(form.d - form.n, complement[at])]
    return [Feature(form.n, at), Feature(form.d, tail[at])]


def _layout(
    blocks: Sequence[Block], read: Tensor, dtype: torch.dtype, device: torch.device
) -> Naturals:
    """What the M-step needs to know about φ.

    Args:
        blocks: What is where.
        read: The elements of η that any group reads.
        dtype: Of the free parameters.
        device: Where all of it goes.
    """
    rows, rates, rate_rows, low, high = [], [], [], [], []
    simplex, free, n_rows = [], [], 0
    for b in blocks:
        each = torch.arange(b.numel, device=device)
        row = each // b.shape[-1] if b.kind is Kind.SIMPLEX else each
        row = row + n_rows
        if b.kind is Kind.PROBABILITY:
            low.append(each + b.start)
            high.append(each + b.start + b.numel)
            row = torch.cat([row, row])
        elif b.kind is Kind.RATE:
            rates.append(each + b.start)
            rate_rows.append(row)
        rows.append(row)
        new = int(row.max()) + 1 - n_rows
        simplex += [b.kind is Kind.SIMPLEX or not b.is_free] * new
        free += [b.is_free] * (b.end - b.start)
        n_rows += new
    none = torch.empty(0, dtype=torch.long, device=device)
    row = torch.cat(rows)
    is_free = torch.tensor(free, device=device)
    unused = torch.ones(n_rows, dtype=torch.bool, device=device)
    unused[row[read[read < len(row)]]] = False
    return Naturals(
        blocks,
        row,
        torch.tensor(simplex, device=device) | unused,
        torch.cat([none, *rates]),
        torch.cat([none, *rate_rows]),
        None if bool(is_free.all()) else is_free,
        None if dtype == torch.float64 else dtype,
        (torch.cat([none, *low]), torch.cat([none, *high])),
    )
