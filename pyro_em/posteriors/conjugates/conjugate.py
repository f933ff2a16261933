"""The conjugate block: a latent rate, probability or simplex, with all sites that read it.

Its log evidence at parameters takes the place of the sites' factors: one group of the graph, whose
arguments are those of all sites at the latent's unit, each bound to the parameters as ever. In the
M-step the sites stand for themselves, with expected statistics.

    χ' = χ + Σ Δχ,     log evidence = A(χ') − A(χ) + Σ log base        (`families.conjugate_pairs`)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pyro_em.families.conjugate_kernels import Few, PriorKernel, matrix_of
from pyro_em.graph.conjugate_children.conjugate_record import ConjugateRead
from pyro_em.graph.factors import Group
from pyro_em.posteriors.conjugates.conjugate_cells import (
    ElementsRead,
    alike,
    in_cells,
    in_order,
    plus,
    rows_of,
)
from pyro_em.posteriors.conjugates.conjugate_elements import elements_of_latent
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution
from pyro_em.posteriors.gaussians.gaussian import counts_once, elements_in, is_within, piece
from pyro_em.updates.expectations.conjugate_beliefs import (
    MANY_ROWS,
    ChildBelief,
    PriorBelief,
    PriorInRows,
    as_wide,
    is_plugged,
    wide,
    with_factor,
)
from pyro_em.updates.expectations.gaussian_rows import is_matrix

Arguments = Mapping[str, Tensor]

# Σ Δχ and Σ log base of sites that no parameter reaches, and which elements are alike.
Known = tuple[Tensor, tuple[Tensor, ...], Tensor | None, Few | None]

_MANY = 1024  # elements from which on it is looked whether some are alike


@dataclass(frozen=True, eq=False)
class Shared:
    """What all parts of the data say of a latent outside their rows (`shared_conjugates`).

    Attributes:
        total: Σ Δχ of all parts. # (elements, 1, P)
        is_first: Whether the log evidence A(χ') − A(χ) counts with this part.
        counts: Which of the sites count with this part.
    """

    total: Tensor
    is_first: bool
    counts: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class ConjugateBlock:
    """A conjugate latent and the sites that read it.

    Attributes:
        groups: The latent's site, then those that read it, one group each, over plates and the whole
            scope; arguments are as the latent's unit shows them.
        reads: What each of the latter reads, over plates and the whole scope.
        kernel: The form of prior and posterior.
        scope: Discrete latents that any of the sites depends on.
        states: How many values each of these has.
        plates: Plates of the table.
        sizes: Their sizes.
        traced: The sites as a run with the latent at its unit shows them.
        weight: How often each element of the plates counts; None where it counts once.
            # (*sizes or 1s)
        apart: How many of the sites, the first below the latent, others sum up.
        shared: What all parts of the data say, where this is one and the latent is outside its rows.
    """

    groups: tuple[Group, ...]
    reads: tuple[ConjugateRead, ...]
    kernel: PriorKernel
    scope: tuple[str, ...] = ()
    states: tuple[int, ...] = ()
    plates: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    traced: tuple[Group, ...] = ()
    weight: Tensor | None = None
    apart: int = 0
    shared: Shared | None = None
    _sums: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _equal: list[Known] = field(default_factory=list)

    @property
    def latent(self) -> str:
        """The latent's name."""
        return self.groups[0].members[0]

    @property
    def words(self) -> str:
        """See `pyro_em.graph.factors.Nested`."""
        return "conjugate latents"

    @cached_property
    def count(self) -> int:
        """How many elements the latent has."""
        value = self.groups[0].value
        return value.numel() // value.shape[value.dim() - self.kernel.event_dim :].numel()

    @cached_property
    def readings(self) -> tuple[ElementsRead, ...]:
        """Which element each row of a site below the latent reads."""
        out = []
        for group, read in zip(self.groups[1:], self.reads, strict=True):
            rows = math.prod(rows_of(group.value.new_zeros(()), group, full=True).shape[:1])
            full = read.elements.numel() > 1
            out.append(ElementsRead.of(rows_of(read.elements, group, full=full), rows, self.count))
        return tuple(out)

    def counted(self, i: int) -> Group:
        """A site as it counts in one of the rows that a weight stands for."""
        group = self.groups[i]
        return group if self.weight is None else replace(group, scale=(1.0,))

    def of_site(self, i: int, arguments: Arguments) -> dict[str, Tensor]:
        """The arguments of one site among those of all."""
        group = self.groups[i]
        return {a: arguments[piece(group.members[0], a)] for a in group.arguments}

    # ------------------------------------------------------------------ the E-step

    @property
    def summed(self) -> range:
        """The numbers of the sites below the latent that the block sums up itself."""
        return range(1 + self.apart, len(self.groups))

    def solve(self, arguments: Arguments, given: Tensor | None = None) -> ConjugateSolution:
        """The posterior of the latent, for each state of the scope.

        Args:
            arguments: Those of all sites.
            given: Σ Δχ of the sites that others sum up. # (elements, cells or 1, P)
        """
        own = self.of_site(0, arguments)
        prior = rows_of(self.kernel.chi(wide(own)), self.groups[0], 1)
        if self.shared is not None:
            here = [i for i in self.summed if self.shared.counts[i]]
            constants = tuple(self._sums_of(i, arguments)[1] for i in here)
            return ConjugateSolution(self.kernel, prior, self.shared.total, constants)
        known = self._equal[0] if self._equal else None
        if known is not None and given is None and prior.shape[0] == 1:
            total, constants, place, few = known
            return ConjugateSolution(self.kernel, prior, total, constants, place, few)
        deltas = [] if given is None else [given]
        parts = []
        for i in self.summed:
            delta, constant = self._sums_of(i, arguments)
            deltas.append(delta)
            parts.append(constant)
        total, constants = sum(deltas[1:], deltas[0]), tuple(parts)
        fixed = given is None and all(i in self._sums for i in self.summed)
        if fixed and prior.shape[0] == 1 and self.count > _MANY:
            self._sums.clear()
            del deltas, delta, parts
            total, place, few = alike(total, self.kernel.kind == "gamma")
            self._equal.append((total, constants, place, few))
            return ConjugateSolution(self.kernel, prior, total, constants, place, few)
        return ConjugateSolution(self.kernel, prior, total, constants)

    def naturals(self, arguments: Arguments, counts: Sequence[bool]) -> Tensor:
        """Σ Δχ of the sites that count. # (elements, 1, P)

        Args:
            arguments: Those of all sites.
            counts: Which of the sites count.
        """
        own = self.of_site(0, arguments)
        chi = rows_of(self.kernel.chi(wide(own)), self.groups[0], 1)
        out = chi.new_zeros(self.count, 1, chi.shape[-1])
        for i in self.summed:
            if counts[i]:
                out = out + self._sums_of(i, arguments)[0]
        return out

    def sharing(self, shared: Shared) -> ConjugateBlock:
        """The same in a part of the data, with what all parts say; what it knows of itself is kept."""
        return replace(self, shared=shared)

    def _sums_of(self, i: int, arguments: Arguments) -> tuple[Tensor, Tensor]:
        """Σ Δχ onto the elements of the latent, Σ log base onto the table."""
        if i in self._sums:
            return self._sums[i]
        out = self._summed(i, self.of_site(i, arguments))
        group = self.groups[i]
        if group.is_static and all(b.how == "constant" for b in group.bindings.values()):
            self._sums[i] = out
        return out

    def _summed(self, i: int, arguments: Arguments) -> tuple[Tensor, Tensor]:
        return self.added(i, arguments), self.onto_table(i, self.bases(i, arguments))

    def added(self, i: int, arguments: Arguments) -> Tensor:
        """Σ Δχ of a site's rows onto the elements of the latent. # (elements, cells or 1, P)"""
        group, read, reading = self.counted(i), self.reads[i - 1], self.readings[i - 1]
        delta = read.pair.delta(as_wide(group.value), wide(arguments))
        if read.order is not None:
            shape = torch.broadcast_shapes(delta.shape, read.order.shape)
            order = read.order.expand(shape)
            delta = delta.new_zeros(shape).scatter(-1, order, delta.expand(shape))
        if not reading.whole:
            delta = torch.where((read.elements >= 0).unsqueeze(-1), delta, 0.0)
        weight = self.weights_of_cells(i)
        if weight is not None:
            delta = torch.where(weight.unsqueeze(-1) == 0, 0.0, weight.unsqueeze(-1) * delta)
        return reading.summed(rows_of(delta, group, 1, full=True))

    def bases(self, i: int, arguments: Arguments) -> Tensor:
        """log base of a site's rows, and the log densities of those that read no latent.

        Returns:
            In nats. # (rows, cells or 1)
        """
        group, read = self.counted(i), self.reads[i - 1]
        own, value = wide(arguments), as_wide(group.value)
        constant = read.pair.log_base(value, own)
        if not self.readings[i - 1].whole:
            assert group.family is not None
            constant = torch.where(read.elements >= 0, constant, group.family.log_prob(value, own))
        weight = self.weights_of_cells(i)
        if weight is not None:
            constant = torch.where(weight == 0, 0.0, weight * constant)
        return rows_of(constant, group, full=True)

    def weights_of_cells(self, i: int) -> Tensor | None:
        """How much each number of a site counts; None where all count once.

        Returns:
            # (1, *plates or 1s, *states or 1s, *to_event or 1s)
        """
        group = self.counted(i)
        if counts_once(group):
            return None
        weight = as_wide(group.weights())
        lead = 1 + len(group.sizes) + group.event_dims
        return weight.reshape(weight.shape + (1,) * (lead - weight.dim()))

    def onto_table(self, i: int, rows: Tensor) -> Tensor:
        """Numbers of a site's rows summed onto the plates of the table. # (elements, cells or 1)"""
        return self._summed_onto(i, rows)

    def _summed_onto(self, i: int, rows: Tensor) -> Tensor:
        """# (rows, cells) summed onto (elements of the table, cells)"""
        count = math.prod(self.sizes)
        if count == 1:
            return rows.sum(0, keepdim=True)
        if self._are_elements[i][1] and len(rows) == count:
            return rows
        out = rows.new_zeros(count, *rows.shape[1:])
        return out.index_add(0, self.element_of_row(i, events=True), rows)

    def element_of_row(self, i: int, *, events: bool = False) -> Tensor:
        """For each row of a site the element of the table's plates to which it belongs.

        Args:
            i: The site's number.
            events: Whether elements of its event are rows of their own.

        Returns:
            # (rows,)
        """
        return self._elements[i][int(events)]

    @cached_property
    def _are_elements(self) -> tuple[tuple[bool, bool], ...]:
        """For each site whether its rows are the elements of the table in order; so its numbers."""
        count = math.prod(self.sizes)
        out = []
        for i, group in enumerate(self.groups):
            n = group.n_plates
            if (group.dims[0][:n], group.sizes[:n]) == (self.plates, self.sizes):
                out.append((True, self.rows_of_site(i) == count))
            else:
                rows, numbers = self._elements[i]
                out.append((in_order(rows, count), in_order(numbers, count)))
        return tuple(out)

    @cached_property
    def _elements(self) -> tuple[tuple[Tensor, Tensor], ...]:
        out = [self._elements_of(0, None)]
        out += [self._elements_of(i, out[0][1]) for i in range(1, len(self.groups))]
        return tuple(out)

    def _elements_of(self, i: int, of_latent: Tensor | None) -> tuple[Tensor, Tensor]:
        group = self.groups[i]
        rows = math.prod(group.sizes[: group.n_plates])
        width = self.rows_of_site(i) // max(rows, 1)
        device = group.value.device
        if is_within(group, self.plates):
            own = elements_in(group, self.plates).to(device)
        elif i == 0:
            own = elements_of_latent(self.groups, self.readings, self.count, self.plates)[0]
            return own[::width], own
        else:
            assert of_latent is not None
            at = self.readings[i - 1].elements
            own = of_latent[at.amax(-1).clamp(min=0)].expand(rows * width)[::width]
        return own, own.repeat_interleave(width) if width > 1 else own

    def rows_of_site(self, i: int) -> int:
        """How many rows a site has, elements of its event included."""
        if i == 0:
            return self.count
        return rows_of(self.groups[i].value.new_zeros(()), self.groups[i], full=True).shape[0]

    def table(self, solution: ConjugateSolution) -> Tensor:
        """The log evidence in nats, per element of the plates and state of the scope.

        Returns:
            # (1, *sizes, *states)
        """
        count, cells = math.prod(self.sizes), math.prod(self.states)
        out = self._summed_onto(0, solution.log_evidence)
        if self.shared is not None and not self.shared.is_first:
            out = 0.0 * out  # which parameters reach all the same
        for constant in solution.constants:
            out = plus(out, constant)
        return out.expand(count, cells).reshape(1, *self.sizes, *self.states)

    def log_evidence(self, arguments: Arguments) -> Tensor:
        """See `pyro_em.graph.factors.Nested`."""
        return self.table(self.solve(arguments))

    # ------------------------------------------------------------------ the M-step

    def believed(
        self,
        solution: ConjugateSolution,
        arguments: Arguments,
        counts: Tensor,
        complete: bool = True,
    ) -> list[tuple[Group, Tensor]]:
        """The sites with what is known of the latent, and how often each cell counts.

        Args:
            solution: The posterior of the latent.
            arguments: At which it was computed.
            counts: The posterior of the scope. # (1, *sizes, *states)
            complete: Whether sites are as an M-step wants them; otherwise as a bound does.
        """
        own = (0, *self.summed)
        return [self._believed(i, solution, arguments, counts, complete) for i in own]

    def _believed(
        self,
        i: int,
        solution: ConjugateSolution,
        arguments: Arguments,
        counts: Tensor,
        complete: bool,
    ) -> tuple[Group, Tensor]:
        group, own = self.counted(i), self.of_site(i, arguments)
        full, of_rows = (len(group.members), *group.sizes), counts.reshape(-1, *self.states)
        if not self._are_elements[i][0]:
            of_rows = of_rows[self.element_of_row(i)]
        cells = of_rows.reshape(full).to(torch.float64)
        if self.shared is not None and not self.shared.counts[i]:
            cells = torch.zeros_like(cells)
        site = replace(group, arguments=own)
        if i == 0:
            site = replace(site, belief=self._of_prior(solution))
        elif group.params or not complete:
            site = self._child(i, site, solution, complete)
        if group.is_unscaled and group.mask is None:
            return site, cells
        weight = replace(group, elements=None).weights().detach()
        return site, (cells * weight).expand(full)

    def _of_prior(self, solution: ConjugateSolution) -> PriorBelief | PriorInRows:
        group = self.groups[0]
        alone = not self.states and not group.event_dims
        if self.count > MANY_ROWS and alone and group.elements is None:
            known = solution.expected(), lambda: in_cells(solution.t, group), solution.place
            return PriorInRows(self.kernel, *known)
        return PriorBelief(self.kernel, in_cells(solution.t, group))

    def _child(self, i: int, group: Group, solution: ConjugateSolution, complete: bool) -> Group:
        read, reading = self.reads[i - 1], self.readings[i - 1]
        t = reading.taken(solution.t)
        if complete and is_plugged(group, read, self.kernel):
            return self.at_mean(i, group, t)
        reads, cells = None if reading.whole else read.elements >= 0, in_cells(t, group)
        if read.order is not None:
            shape = torch.broadcast_shapes(cells.shape, read.order.shape)
            cells = cells.expand(shape).gather(-1, read.order.expand(shape))
        return replace(group, belief=ChildBelief(read.pair, cells, reads))

    def at_mean(self, i: int, group: Group, t: Tensor) -> Group:
        """A site with the mean of the latent in its argument, and in the binding where that is known.

        Args:
            i: Its number.
            group: The site, the latent at its unit.
            t: E[t] of what each row reads. # (rows or 1, cells or 1, P)
        """
        read, own = self.reads[i - 1], self.groups[i]
        name = read.pair.argument
        if self.kernel.kind == "wishart":
            # Of what the unit has, which no element of is zero.
            mean = in_cells(-2 * matrix_of(t), own)
            factor = mean / self.kernel.unit(mean)
        else:
            factor = in_cells((-t[..., 1]) ** (read.power * self.kernel.power), own)
            if not self.readings[i - 1].whole:
                factor = torch.where(read.elements >= 0, factor, 1.0)
            factor = _once_per_cell(factor, read.elements, own)
            if is_matrix(group):
                factor = factor[..., None, None]
        binding, argument = with_factor(group.bindings[name], factor), group.arguments[name]
        return replace(
            group,
            arguments={**group.arguments, name: argument * factor.to(argument)},
            bindings=group.bindings if binding is None else {**group.bindings, name: binding},
        )


def _once_per_cell(factor: Tensor, elements: Tensor, group: Group) -> Tensor:
    """A factor of each entry of a vector, once where all entries of a cell read the same element."""
    for axis in range(1 + len(group.sizes), min(factor.dim(), elements.dim())):
        if bool((elements == elements.narrow(axis, 0, 1)).all()):
            factor = factor.narrow(axis, 0, 1)
    return factor
