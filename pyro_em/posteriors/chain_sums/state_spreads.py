"""The M-step of Gaussian chains from sums: closed forms of spreads, about coefficients that are solved.

As `pyro_em.updates.closed_forms.closed_form` has it, decided once and solved in numpy: variances of
numbers, and covariances of vectors, each shared by as many sites, steps and series as read its
parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_em.distributions import bounds
from pyro_em.errors import Handover
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.chain_sums.state_arguments import Numbers, Picked, Places, Unlike
from pyro_em.posteriors.chain_sums.state_sites import Site
from pyro_em.posteriors.continuous.gaussian_steps import for_updates
from pyro_em.updates.expectations.scatter import data_magnitude
from pyro_em.updates.update import ClosedForm, ParameterUpdate

_ROUNDING = 1e-14  # of the size of data: a deviation that small may be none
LOST = 1e-7  # of the variance before: what little data leave of it


@dataclass(frozen=True, eq=False)
class _Deviation:
    """Elements of θ that are deviations of the entries of one site.

    Attributes:
        site: Its number.
        part: Which of its numbers they are.
        row: By chain, rank and number, as one. # (entries,)
        column: The elements of θ. # (entries,)
        weight: What squares are multiplied by, for known factors; None if by one. # (entries,)
    """

    site: int
    part: Picked
    row: Places
    column: Places
    weight: Numbers | None


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A parameter's matrices that are covariances of sites, or their factors.

    Attributes:
        name: The parameter.
        uses: Sites, each with the event of the parameter for each chain and rank. # (lead, K)
        begin: Where the parameter begins in θ.
        events: How many matrices it has.
        size: D.
        is_factor: Whether it holds the lower triangles.
        magnitude: What rounding is relative to. # (events, D)
        count: How many data each has. # (events,)
    """

    name: str
    uses: tuple[tuple[int, Places], ...]
    begin: int
    events: int
    size: int
    is_factor: bool
    magnitude: Numbers
    count: Numbers


@dataclass(frozen=True, eq=False)
class Limits:
    """What bounds spreads: their constraints, and what the rounding of data leaves of them.

    Attributes:
        low: By element of θ the end of its constraint. # (elements,)
        high: # (elements,)
        magnitude: What the rounding of a deviation is relative to. # (elements,)
        of_matrices: The same of parameters that are matrices, by name. # (events,) or (events, D)
    """

    low: Numbers
    high: Numbers
    magnitude: Numbers
    of_matrices: Mapping[str, Numbers]

    @classmethod
    def of(
        cls,
        graph: FactorGraph,
        updates: Mapping[str, ParameterUpdate],
        begins: Mapping[str, int],
        size: int,
    ) -> Limits:
        """Those of all parameters with a closed form.

        Args:
            graph: The graph of the E-step.
            updates: What was decided per parameter.
            begins: Where each parameter begins in θ.
            size: Elements of θ.
        """
        own = for_updates(graph)
        low, high = np.full(size, -math.inf), np.full(size, math.inf)
        magnitude, of_matrices = np.zeros(size), {}
        for name, update in updates.items():
            if not isinstance(update.update, ClosedForm) or not _is_of_spread(update):
                continue
            leaf = graph.parameters[name].leaf
            large = data_magnitude(update, own, leaf).detach().cpu().double().numpy()
            if update.kind is not None and update.kind.event_dim:
                of_matrices[name] = large
                continue
            part = slice(begins[name], begins[name] + leaf.numel())
            interval = bounds(graph.parameters[name].constraint)
            if interval is not None:
                low[part], high[part] = interval
            magnitude[part] = large.reshape(-1)
        return cls(low, high, magnitude, of_matrices)


def _is_of_spread(update: ParameterUpdate) -> bool:
    return update.kind is not None and update.kind.is_spread


@dataclass(frozen=True, eq=False)
class Spreads:
    """Closed forms of all spreads.

    Attributes:
        deviations: Those that are numbers.
        chosen: Elements of θ that deviations are. # (p,)
        low: Their limits. # (p,)
        high: # (p,)
        magnitude: What the rounding of each is relative to. # (p,)
        count: How many data each has. # (p,)
        matrices: Those that are matrices.
    """

    deviations: tuple[_Deviation, ...]
    chosen: Places
    low: Numbers
    high: Numbers
    magnitude: Numbers
    count: Numbers
    matrices: tuple[_Matrix, ...]

    @classmethod
    def of(
        cls,
        sites: Sequence[Site],
        updates: Mapping[str, ParameterUpdate],
        begins: Mapping[str, int],
        shapes: Mapping[str, torch.Size],
        limits: Limits,
    ) -> Spreads:
        """Decide them.

        Args:
            sites: The sites.
            updates: What was decided per parameter.
            begins: Where each parameter begins in θ.
            shapes: Of these parameters.
            limits: What bounds them.

        Raises:
            Unlike: If a spread has another form.
        """
        size, matrices = len(limits.low), []
        is_scalar = np.zeros(size, np.bool_)
        for name, update in updates.items():
            if not isinstance(update.update, ClosedForm):
                continue
            if not _is_of_spread(update):
                raise Unlike(f"'{name}' is no spread and no coefficient")
            large = limits.of_matrices.get(name)
            if large is None:
                is_scalar[begins[name] : begins[name] + shapes[name].numel()] = True
            else:
                matrices.append(_matrix_of(name, sites, begins[name], shapes[name], large))
        deviations, count = [], np.zeros(size)
        for i, site in enumerate(sites):
            if site.spread.is_matrix:
                continue
            for picked in site.spread.picked:
                if not is_scalar[picked.column].any():
                    continue
                row, column = _over_chains(site, picked)
                times = len(row) // max(len(picked.row), 1)
                factor = np.tile(picked.factor, times)
                weight = None if bool((factor == 1).all()) else factor**-2
                deviations.append(_Deviation(i, picked, row, column, weight))
                of_entries = site.count if site.by_entry else site.count[..., None]
                of_entries = np.broadcast_to(of_entries, (site.lead, site.ranks, site.width))
                count += np.bincount(column, of_entries.reshape(-1)[row], size)
        read = [d.column for d in deviations]
        chosen = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *read]))
        return cls(
            tuple(deviations),
            chosen,
            limits.low[chosen],
            limits.high[chosen],
            limits.magnitude[chosen],
            count[chosen],
            tuple(matrices),
        )

    def within(self, limits: Limits) -> Spreads:
        """The same within other limits."""
        low, high, magnitude = (x[self.chosen] for x in (limits.low, limits.high, limits.magnitude))
        matrices = tuple(
            replace(m, magnitude=_of_events(limits.of_matrices[m.name], m.events, m.size))
            for m in self.matrices
        )
        return replace(self, low=low, high=high, magnitude=magnitude, matrices=matrices)

    def solve(self, theta: Numbers, second: Sequence[Numbers]) -> tuple[Places, Numbers]:
        """The maximisers, and which elements of θ they are.

        Args:
            theta: The parameters before.
            second: Σ E[r rᵀ] of each at the new coefficients, or its diagonal.

        Raises:
            Handover: If one is near a collapse.
        """
        where, found = [], []
        if len(self.chosen):
            where.append(self.chosen)
            found.append(self._deviations(theta, second))
        for m in self.matrices:
            values = _covariances(m, theta, second)
            where.append(m.begin + np.arange(values.size))
            found.append(values.reshape(-1))
        none = np.empty(0, dtype=np.int64)
        return np.concatenate([none, *where]), np.concatenate([np.empty(0), *found])

    def _deviations(self, theta: Numbers, second: Sequence[Numbers]) -> Numbers:
        size, count = len(theta), self.count
        total = np.zeros(size)
        for d in self.deviations:
            own = second[d.site].reshape(-1).take(d.row)
            total += np.bincount(d.column, own if d.weight is None else own * d.weight, size)
        total = total.take(self.chosen)
        if not bool(((count > 0) & (total > 0)).all()):
            raise Handover
        natural = np.sqrt(total / count)
        low = natural <= self.rounding
        if bool(self.few.any()):
            low |= self.few & (total < LOST * count * self._natural(theta) ** 2)
        if bool(low.any()):
            raise Handover
        return self.limited(natural)

    def limited(self, natural: Numbers) -> Numbers:
        """Elements of parameters whose maps give some deviations, within their limits. # (p,)"""
        out: Numbers = np.minimum(np.maximum(self._inverse(natural), self.low), self.high)
        return out

    @cached_property
    def rounding(self) -> Numbers:
        """What rounding may be of each deviation. # (p,)"""
        return _ROUNDING * self.magnitude

    def entries_of(self, i: int) -> tuple[Places, Places, Numbers]:
        """Which numbers of r rᵀ of a site are summed for which elements of θ, and by what factor.

        Args:
            i: Its number.
        """
        rows, columns = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        factors = [np.empty(0)]
        for d in self.deviations:
            if d.site == i:
                rows.append(d.row)
                columns.append(d.column)
                factors.append(np.ones(len(d.row)) if d.weight is None else d.weight)
        for m in self.matrices:
            for site, event in m.uses:
                if site == i:
                    size = m.size**2
                    to = m.begin + event[..., None] * size + np.arange(size)
                    rows.append(np.arange(to.size))
                    columns.append(to.reshape(-1))
                    factors.append(np.ones(to.size))
        return np.concatenate(rows), np.concatenate(columns), np.concatenate(factors)

    @cached_property
    def few(self) -> NDArray[np.bool_]:
        """Which have a single one. # (p,)"""
        return self.count < 2

    def before(self, theta: Numbers) -> Numbers:
        """The deviations before, where any has a single datum. # (p,)"""
        return self._natural(theta) if bool(self.few.any()) else self.count

    def _natural(self, theta: Numbers) -> Numbers:
        """The deviations that elements of parameters are, but for known factors."""
        out = theta[self.chosen]
        for d in self.deviations:
            if d.part.maps:
                at = np.searchsorted(self.chosen, d.part.column)
                out[at] = d.part.forward(theta) / d.part.factor
        return out

    def _inverse(self, natural: Numbers) -> Numbers:
        """Elements of parameters whose maps give some deviations."""
        out = natural.copy()
        for d in self.deviations:
            if d.part.maps:
                at = np.searchsorted(self.chosen, d.part.column)
                out[at] = d.part.inverse(natural[at])
        return out


def _over_chains(site: Site, picked: Picked) -> tuple[Places, Places]:
    """The numbers of a site that are elements of parameters, for each chain with sums of its own."""
    if site.lead == 1 or site.spread.linear.constant.shape[1] > 1:
        return picked.row, picked.column
    size = site.ranks * site.width
    row = (picked.row + size * np.arange(site.lead)[:, None]).reshape(-1)
    return row, np.tile(picked.column, site.lead)


def _of_events(magnitude: Numbers, events: int, size: int) -> Numbers:
    """Magnitudes of each matrix. # (events, D)"""
    return np.broadcast_to(magnitude.reshape(events, -1), (events, size)).copy()


def _matrix_of(
    name: str, sites: Sequence[Site], begin: int, shape: Sequence[int], magnitude: Numbers
) -> _Matrix:
    """A parameter's matrices and the sites that read them."""
    size = int(shape[-1])
    events = int(np.prod(shape[:-2]))
    uses, argument = [], ""
    for i, site in enumerate(sites):
        for picked in site.spread.picked if site.spread.is_matrix else ():
            element = picked.column - begin
            if not bool(((element >= 0) & (element < events * size**2)).any()):
                continue
            flat: Places = np.full(site.spread.linear.constant[0].size, -1)
            flat[picked.row] = element
            index = flat.reshape(*site.spread.linear.constant.shape[1:3], -1)
            event = index[..., 0] // size**2
            every = event[..., None] * size**2 + np.arange(size**2)
            if picked.maps or bool((picked.factor != 1).any()) or bool((index != every).any()):
                raise Unlike(f"'{name}' is read as another matrix than it is")
            uses.append((i, np.broadcast_to(event, (site.lead, site.ranks))))
            argument = site.spread.argument
    if not uses:
        raise Unlike(f"'{name}' is no matrix of one site")
    large = _of_events(magnitude, events, size)
    count: Numbers = np.zeros(events)
    for i, event in uses:
        np.add.at(count, event, sites[i].count)
    return _Matrix(name, tuple(uses), begin, events, size, argument == "scale_tril", large, count)


def _covariances(m: _Matrix, theta: Numbers, second: Sequence[Numbers]) -> Numbers:
    """The values of a parameter that holds covariances. # (events, D, D)"""
    total: Numbers = np.zeros((m.events, m.size, m.size))
    count = m.count
    for i, event in m.uses:
        if m.events == 1:
            total = total + second[i].sum((0, 1))
        else:
            np.add.at(total, event, second[i])
    if not bool((count > 0).all()):
        raise Handover
    found: Numbers = total / count[:, None, None]
    found = (found + found.swapaxes(-1, -2)) / 2
    few = count < m.size + 1.1
    if bool(few.any()):
        before = theta[m.begin : m.begin + found.size].reshape(found.shape)[few]
        if m.is_factor:
            before = before @ before.swapaxes(-1, -2)
        least, was = (np.linalg.eigvalsh(x)[:, 0] for x in (found[few], before))
        if not bool((least > LOST * was).all()):
            raise Handover
    low: Numbers = np.asarray(np.linalg.cholesky(found), dtype=np.float64)
    variances, pivots = found.diagonal(0, -2, -1), low.diagonal(0, -2, -1)
    clear = (pivots**2 > 1e-10 * variances) & (variances > 1e-8 * m.magnitude**2)
    if not bool(clear.all()):
        raise Handover
    return low if m.is_factor else found
