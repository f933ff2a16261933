"""A mixture whose parameters a known group of each row chooses, in chunks of rows.

    log p(x_n) = log Σ_k π(g_n, k) f(x_n; θ(g_n, k)),     g_n known

Where only what no row's data reach depends on the group, ``z ~ Categorical(p[g])``, each row takes its
row of a table, and the posterior is added up by groups. Where densities of the data depend on it,
``x ~ Normal(mu[g, z], s)``, rows are put in the order of their groups, so that a chunk is of one group
and reads its components alone.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pyro_em.densities.counts import CountRows
from pyro_em.densities.density import Divisible
from pyro_em.densities.exponential import Exponential
from pyro_em.densities.gaussian import Gaussian
from pyro_em.densities.layout import Layout
from pyro_em.densities.student import StudentRows
from pyro_em.densities.theta import At, Theta
from pyro_em.densities.weibull import WeibullRows
from pyro_em.errors import Finding
from pyro_em.posteriors.block import Component
from pyro_em.posteriors.contracted import Contraction
from pyro_em.posteriors.mixtures.mixture import IMPOSSIBLE, Mixture, theta_of_linear
from pyro_em.posteriors.mixtures.responsibilities import sum_of_logs, unnormalised
from pyro_em.posteriors.mixtures.row_factors import Collected, RowFactors
from pyro_em.posteriors.mixtures.row_groups import reads_by_rows, row_groups
from pyro_em.posteriors.mixtures.rows import (
    distinct,
    row_weights,
    shape_of_rows,
    why_no_rows,
    why_not_constant,
    with_rows,
)
from pyro_em.posteriors.quick import EMSteps, Outline
from pyro_em.updates.expectations.statistics import Expectation

_ROWS = 16  # of a group on average, below which chunks of one group would be too small

# Rows of which some components can be evaluated.
_DIVISIBLE = (Gaussian, Exponential, StudentRows, WeibullRows, CountRows)


class GroupedRows(Mixture):
    """A mixture over the rows of one plate with known groups of rows.

    Attributes:
        codes: The group of each row; ascending where densities of the data depend on it. # (N,)
        ends: Where the rows of each group end, where these are in order; else None.
    """

    words: ClassVar[str] = "mixture kernel with known groups of rows, in chunks of rows"
    codes: Tensor
    ends: tuple[int, ...] | None

    @classmethod
    def outline(cls, component: Component) -> Outline[Self] | Finding:
        """See `pyro_em.posteriors.quick.QuickBlock.outline`."""
        graph = component.graph
        finding = why_no_rows(graph.latents)
        shape = finding or shape_of_rows(graph)
        if isinstance(shape, Finding):
            return shape
        if not any(reads_by_rows(graph.groups[g]) for g in shape.rowwise):
            where = f"site '{component.latents[0]}'"
            return Finding(where, "no parameter is chosen by a known group of rows: no kernel")
        weight = row_weights(graph, shape)
        found = weight if isinstance(weight, Finding) else row_groups(graph, shape)
        if isinstance(found, Finding):
            return found
        assert not isinstance(weight, Finding)
        graph, shape = found.graph, found.shape
        if not shape.rowwise:
            return Finding(f"site '{component.latents[0]}'", "its rows have no data of their own")
        rows = distinct(graph, shape, weight, found.codes)
        graph, counts = rows.graph, rows.counts
        codes = found.codes if rows.first is None else found.codes[rows.first]
        ends = None
        if any(0 in shape.reads[g] for g in shape.rowwise):
            if _ROWS * shape.sizes[0] > len(codes):
                g = next(g for g in shape.rowwise if 0 in shape.reads[g])
                return why_not_constant(graph.groups[g])
            if bool((codes[1:] < codes[:-1]).any()):
                for g in shape.rowwise:  # data are put in order, what is known of rows is not
                    own = graph.groups[g]
                    if any(t.shape[1] > 1 for t in own.outlines.values()):
                        return why_not_constant(own)
                order = codes.argsort(stable=True)
                graph, codes = with_rows(graph, shape, order), codes[order]
                counts = None if counts is None else counts[order]
            ends = tuple(torch.bincount(codes, minlength=shape.sizes[0]).cumsum(0).tolist())
        sizes = {g: shape.size_of(g) for g in range(len(graph.groups))}
        finish = partial(cls._finished, graph, shape, counts, codes, ends)
        return Outline(graph, shape.eligible(graph), finish, sizes=sizes)

    @classmethod
    def _finished(
        cls,
        graph: Any,
        shape: Any,
        counts: Tensor | None,
        codes: Tensor,
        ends: tuple[int, ...] | None,
        layout: Layout,
    ) -> Self | Finding:
        """The kernel, or why there is none after all."""
        for g in () if ends is None else shape.rowwise:
            if g in layout.lines:  # covariates are not in the order of the groups
                return why_not_constant(graph.groups[g])
        block = cls.of(graph, shape, counts, layout)
        if isinstance(block, Finding):
            return block
        for f in block.factors:
            if 0 not in f.reads:
                continue
            if f.others or not all(type(r) in _DIVISIBLE for r in f.normals.values()):
                return why_not_constant(graph.groups[shape.rowwise[0]])
        block.codes, block.ends = codes, ends
        return block

    def _width(self) -> int:
        """See `Mixture._width`: of factors that read the group a chunk has the cells of one."""
        count = self.shape.sizes[0]
        return sum(f.width(self.graph) // (count if 0 in f.reads else 1) for f in self.factors)

    @property
    def _cells(self) -> int:
        return math.prod(self.shape.sizes[1:])

    @property
    def adds(self) -> bool:
        """Whether the sums of parts of the data add up: other rows may be of other groups."""
        if any(0 in self.shape.reads[g] for g in (*self.normals, *self.tables)):
            return False
        return super().adds

    def steps(self, theta: Theta) -> EMSteps:
        """Its rows are in groups, however few they are."""
        return self

    def e_step(self, at: At) -> Expectation:
        """Evidence and sums at some parameters.

        Raises:
            Handover: If a row is impossible, a density is not a number, or mass was lost.
        """
        eta = None if at.natural is None else at.natural.eta
        table = self._constant(at, eta).reshape(self.shape.sizes[0], self._cells)
        may_clamp = all(f.linear is None and not f.others for f in self.factors)
        may_clamp = may_clamp and self._is_single() and bool((table > IMPOSSIBLE).all())
        sums = Collected(self.N)
        if self.ends is None:
            self._add_in_any_order(at, eta, table, may_clamp, sums)
        else:
            self._add_by_groups(at, eta, table, may_clamp, sums)
        return self._summed(at, eta, sums)

    def _add_in_any_order(
        self, at: At, eta: Tensor | None, table: Tensor, may_clamp: bool, sums: Collected
    ) -> None:
        """Add all rows, each with its row of a table of groups."""
        thetas = [theta_of_linear(eta, f.linear) for f in self.factors]
        mass = torch.zeros_like(table)
        for begin in range(0, self.N, self.chunk):
            rows = slice(begin, min(begin + self.chunk, self.N))
            codes = self.codes[rows]
            joint = table.index_select(0, codes).T.contiguous()
            weights = self._chunk(at, self.factors, thetas, rows, joint, may_clamp, sums)
            mass.index_add_(0, codes, weights.T.to(torch.float64))
        sums["mass"] = mass.reshape(-1)

    def _add_by_groups(
        self, at: At, eta: Tensor | None, table: Tensor, may_clamp: bool, sums: Collected
    ) -> None:
        """Add the rows of each group with its own components."""
        assert self.ends is not None
        parts: dict[int | str, list[Tensor]] = {}
        corrections: list[Tensor | float] = []
        begins = (0, *self.ends[:-1])
        for number, (first, end) in enumerate(zip(begins, self.ends, strict=True)):
            cells = slice(number * self._cells, (number + 1) * self._cells)
            factors = [_of_cells(f, cells, self._cells) for f in self.factors]
            thetas = [theta_of_linear(eta, f.linear) for f in factors]
            own, by_group = self._at_cells(at, cells), Collected(self.N)
            constant = table[number].unsqueeze(-1)
            mass = torch.zeros_like(table[0])
            for begin in range(first, end, self.chunk):
                rows = slice(begin, min(begin + self.chunk, end))
                weights = self._chunk(own, factors, thetas, rows, constant, may_clamp, by_group)
                mass += weights.sum(1, dtype=torch.float64)
            parts.setdefault("mass", []).append(mass)
            for i, f in enumerate(self.factors):
                keys: list[int | str] = [f"linear {i}"] if f.linear is not None else []
                keys += [*f.normals, *(f"mass of {g}" for g in f.counted)]
                for key in keys:
                    found = by_group[key]
                    if 0 not in f.reads:
                        sums.add(key, found)
                        continue
                    if isinstance(key, int):
                        counts = by_group[f"mass of {key}"] if key in f.counted else mass
                        found, lost = super()._over_rows(own, key, found, counts)
                        corrections.append(lost)
                    parts.setdefault(key, []).append(found)
                for g in f.others:
                    sums.add_statistics(g, by_group.statistics[g])
            sums.add("evidence", by_group["evidence"])
        for key, each in parts.items():
            sums[key] = torch.cat(each)
        for lost in corrections:
            sums["evidence"] = sums["evidence"] + lost

    def _chunk(
        self,
        at: At,
        factors: tuple[RowFactors, ...] | list[RowFactors],
        thetas: list[tuple[Tensor, Tensor | None] | None],
        rows: slice,
        joint: Tensor,
        may_clamp: bool,
        sums: Collected,
    ) -> Tensor:
        """Add some rows; their posterior, counted as often as they are. # (cells of a row, rows)"""
        here = [f.at(self.graph, at, rows) for f in factors]
        for f, theta, own in zip(factors, thetas, here, strict=True):
            joint = f.log_density(at, theta, own, joint)
        top, weights, mass = unnormalised(joint, may_clamp)
        if self.repeats is None:
            weights.div_(mass)
            sums.add("evidence", top.sum(dtype=torch.float64) + sum_of_logs(mass))
        else:
            often = self.repeats[rows]
            weights.mul_(often / mass)
            log_p = mass.log().to(torch.float64).add_(top)
            sums.add("evidence", torch.dot(log_p, often))
        for i, (f, own) in enumerate(zip(factors, here, strict=True)):
            f.collect(at, weights, own, sums, i)
        return weights

    def _at_cells(self, at: At, cells: slice) -> At:
        """Parameters as the rows of one group read them."""
        own: dict[int, Any] = dict(at.prepared)
        for f in self.factors:
            for g in f.normals if 0 in f.reads else ():
                prepared = at.prepared[g]
                assert isinstance(prepared, Divisible)
                own[g] = prepared.part(cells)
        return replace(at, prepared=own)

    def _over_rows(
        self, at: At, g: int, collected: Tensor, mass: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """See `Mixture._over_rows`; by groups it is done already."""
        if 0 in self.shape.reads[g]:
            return collected, 0.0
        return super()._over_rows(at, g, collected, mass)

    @property
    def by_cell(self) -> Contraction:
        """By contraction."""
        return self.contraction


def _of_cells(f: RowFactors, cells: slice, count: int) -> RowFactors:
    """Factors as the rows of one group read them."""
    if 0 not in f.reads:
        return f
    linear = None if f.linear is None else f.linear.at_cells(cells)
    return replace(f, K=count, linear=linear)
