"""Gaussian latents of rows that are all alike: a few rows with the same sums stand for all of them.

Where coefficients, offsets and spreads are the same in every row, the evidence depends on the data only
through their number n, mean x̄ and scatter S = RᵀR,

    Σ_n log N(x_n; μ, Σ) = −½ (n log det 2πΣ + tr Σ⁻¹ (S + n (x̄ − μ)(x̄ − μ)ᵀ)).

So do all sums of the M-step. D + 1 rows x̄ + √(1/w) U R, each counted w = n / (D + 1) times, have the
same number, mean and scatter if U has orthonormal columns that sum to zero. An iteration costs the
same whatever n is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, Handover
from pyro_em.graph.all_data import Vectors
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.posteriors.at_values import (
    AtValues,
    ThetaByValues,
    no_densities,
    with_own_parameters,
)
from pyro_em.posteriors.continuous.gaussian_steps import in_m_step
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.posteriors.gaussians.integrated import Solution
from pyro_em.tracing.parameters import values_of
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.gaussian_rows import event_shape, rows_of
from pyro_em.updates.expectations.statistics import Expectation
from pyro_em.updates.m_step import MStepState, m_step
from pyro_em.updates.update import ClosedForm, Fixed, LeastSquares, ParameterUpdate

_ROWS = 2**16  # whose data are added up at once


@dataclass(frozen=True, eq=False)
class Solved(Expectation):
    """The evidence with the posterior behind it.

    Attributes:
        solution: Of the rows that stand for all.
    """

    solution: Solution | None = None


@dataclass(frozen=True, eq=False)
class CollapsedTheta(ThetaByValues[Solved]):
    """The parameters of a collapsed block and their M-step.

    Attributes:
        graph: One group that integrates the rows that stand for all.
        updates: What was decided per parameter.
        weight: How often each row counts.
    """

    updates: Mapping[str, ParameterUpdate]
    weight: float

    @property
    def group(self) -> Group:
        """The group that integrates the rows."""
        return self.graph.groups[0]

    def e_step(self, at: AtValues[Solved]) -> Solved:
        """The evidence, and the posterior of the rows.

        Raises:
            Handover: If the step through tables has to look.
        """
        if not at.expectation:
            block = self.group.nested
            assert isinstance(block, GaussianBlock)
            try:
                found = block.solve(self.group.evaluate_arguments(at.values))
            except DegenerateError as error:
                raise Handover from error
            total = self.weight * float(block.table(found).sum())
            if not abs(total) < float("inf"):
                raise Handover
            at.expectation.append(Solved(total, {}, solution=found))
        return at.expectation[0]

    def m_step(self, at: AtValues[Solved], expectation: Solved) -> tuple[AtValues[Solved], float]:
        """The maximiser, and the gain in nats.

        Raises:
            Handover: If the step through tables has to look.
        """
        assert expectation.solution is not None
        self.write(at)
        arguments = [self.group.evaluate_arguments(at.values)]
        counts = [torch.full((1,), self.weight, dtype=torch.float64)]
        own = in_m_step(self.graph, counts, arguments, {0: expectation.solution})
        try:
            m_step(own[0], self.updates, own[1], own[2], no_densities, MStepState())
        except DegenerateError as error:
            raise Handover from error
        after = self.enter(values_of(self.graph.parameters))
        return after, self.e_step(after).log_evidence - expectation.log_evidence


@dataclass(frozen=True, eq=False)
class Collapsed:
    """Gaussian latents of rows that are all alike.

    Attributes:
        theta: The parameters with their steps.
        latents: The latents.
        rows: How many rows there are.
    """

    theta: CollapsedTheta
    latents: tuple[str, ...]
    rows: int
    name: str = "Gaussian"
    words: str = "Gaussian blocks, on sums over rows"

    def e_step(self, at: AtValues[Solved]) -> Solved:
        """The E-step at some parameters."""
        return self.theta.e_step(at)


def collapsed_rows(graph: FactorGraph, updates: Mapping[str, ParameterUpdate]) -> Collapsed | None:
    """The block of a model whose rows are all alike; None where they are not.

    Args:
        graph: Of the E-step.
        updates: What was decided per parameter.
    """
    exact = (ClosedForm, LeastSquares, Fixed)
    if len(graph.groups) != 1 or not all(isinstance(u.update, exact) for u in updates.values()):
        return None
    if all(isinstance(u.update, Fixed) for u in updates.values()):
        return None
    (group,) = graph.groups
    block = group.nested
    if not isinstance(block, GaussianBlock) or not are_alike(block):
        return None
    found = vectors_of(graph)
    if found is None or not found.rows > 2 * (len(found.mean) + 1):
        return None
    rows, data = found.rows, _observed(block)
    few, weight = _with_equal_sums(found, _root(graph, found))
    parts = dict(
        zip(
            (g.members[0] for g in data),
            few.split([event_shape(g).numel() for g in data], -1),
            strict=True,
        )
    )
    narrow = replace(
        block,
        groups=tuple(_narrowed(g, parts.get(g.members[0]), len(few)) for g in block.groups),
        lines=tuple(_narrow_line(line, len(few)) for line in block.lines),
        plates=(),
        sizes=(),
        traced=(),
    )
    own = replace(group, dims=((),), n_plates=0, sizes=(), raw=torch.zeros(1), nested=narrow)
    theta = CollapsedTheta(replace(with_own_parameters(graph), groups=(own,)), updates, weight)
    return Collapsed(theta, tuple(block.latents), rows)


def vectors_of(graph: FactorGraph) -> Vectors | None:
    """Number, mean and scatter of the rows of a graph whose Gaussian latents' rows are all alike.

    Args:
        graph: Of the E-step; where it holds a part of the data, those of all are known.
    """
    if graph.all_data is not None:
        return graph.all_data.vectors
    columns = _columns(graph)
    if columns is None:
        return None
    rows = max(len(c) for c in columns)
    total = sum(part.sum(0) for part in _in_parts(columns, rows))
    assert isinstance(total, Tensor)
    if not bool(torch.isfinite(total).all()):
        return None
    mean, scatter = total / rows, total.new_zeros(len(total), len(total))
    for part in _in_parts(columns, rows):
        centred = part - mean
        scatter += centred.mT @ centred
    return Vectors(rows, mean, scatter)


def own_vectors(graph: FactorGraph) -> Tensor | None:
    """All observed entries of each row at hand; None where rows are not all alike. # (rows, D)"""
    columns = _columns(graph)
    if columns is None:
        return None
    (out,) = _in_parts(columns, max(len(c) for c in columns), math.inf)
    return out


def _columns(graph: FactorGraph) -> list[Tensor] | None:
    """The same site by site, of one row where all are the same. # (rows or 1, width) each"""
    block = graph.groups[0].nested if len(graph.groups) == 1 else None
    if not isinstance(block, GaussianBlock) or not are_alike(block):
        return None
    data = _observed(block)
    if not data:
        return None
    rows = block.groups[0].sizes[0]
    return [rows_of(g, g.value)[0].expand(rows, -1) for g in data]


def _in_parts(columns: Sequence[Tensor], rows: int, most: float = _ROWS) -> Iterator[Tensor]:
    """Some rows at a time, in double precision. # (part, D) each"""
    for begin in range(0, rows, int(min(most, rows))):
        own = slice(begin, int(min(begin + most, rows)))
        yield torch.cat([c[own].to(torch.float64) for c in columns], -1)


def form_of_rows(graph: FactorGraph) -> dict[str, Any]:
    """What rows that are all alike have in common: how each argument is made of parameters and numbers.

    Args:
        graph: Of the E-step; of its rows `own_vectors` knows that they are alike.
    """
    block = graph.groups[0].nested
    assert isinstance(block, GaussianBlock)
    return {
        f"{group.members[0]}.{argument}": {
            "constant": binding.constant,
            "selections": [
                (s.param, [m.name for m in s.maps], s.index, s.factor) for s in binding.selections
            ],
            "slopes": {n: j.dense for n, j in (binding.jacobians or {}).items()},
            "products": {n: j.dense for n, j in (binding.pairs or {}).items()},
        }
        for group in block.groups
        for argument, binding in group.bindings.items()
    }


def _observed(block: GaussianBlock) -> list[Group]:
    return [g for g in block.groups if g.role is not Role.GAUSSIAN]


def are_alike(block: GaussianBlock) -> bool:
    """Whether every site has one row for each element of one plate, all with equal arguments."""
    if block.scope or any(len(g.members) > 1 for g in block.groups):
        return False
    plates = {g.dims[0][: g.n_plates] for g in block.groups}
    if len(plates) != 1 or len(next(iter(plates))) != 1:
        return False
    for group, line in zip(block.groups, block.lines, strict=True):
        if not (group.mask is None and group.elements is None and group.is_unscaled):
            return False
        if not group.is_static or any(t.shape[1] > 1 for t in group.arguments.values()):
            return False
        for read in line.reads:
            there = torch.arange(len(read.elements), device=read.elements.device)
            if not torch.equal(read.elements, there):
                return False
    return True


def _with_equal_sums(x: Vectors, root: Tensor) -> tuple[Tensor, float]:
    """D + 1 rows with the mean and scatter of all, and how often each counts. # (D + 1, D)"""
    mean, width = x.mean, len(x.mean)
    weight = x.rows / (width + 1)
    # Helmert's matrix: orthonormal columns that sum to zero.
    k = torch.arange(1, width + 1, dtype=mean.dtype, device=mean.device)
    helmert = torch.ones(width + 1, width, dtype=mean.dtype, device=mean.device).triu()
    helmert = torch.cat([helmert[:width], helmert.new_zeros(1, width)])
    helmert[torch.arange(1, width + 1), torch.arange(width)] = -k
    helmert = helmert / (k * (k + 1)).sqrt()
    return mean + helmert @ root / weight**0.5, weight


def _root(graph: FactorGraph, x: Vectors) -> Tensor:
    """R with RᵀR = S, of the rows themselves where they are at hand, which rounds less. # (D, D)"""
    columns = _columns(graph) if graph.all_data is None else None
    if columns is None:
        return root_of(x.scatter)
    root = x.scatter.new_zeros(0, len(x.mean))
    for part in _in_parts(columns, x.rows):
        root = torch.linalg.qr(torch.cat([root, part - x.mean]), mode="r")[1]
    return root


def root_of(scatter: Tensor) -> Tensor:
    """R with RᵀR = S, zero where features do not vary. # (D, D)"""
    squares, vectors = torch.linalg.eigh((scatter + scatter.mT) / 2)
    return squares.clamp(min=0).sqrt().unsqueeze(-1) * vectors.mT


def _narrowed(group: Group, value: Tensor | None, rows: int) -> Group:
    """A site over other rows; of a latent the values are zero."""
    event = event_shape(group)
    if value is None:
        value = group.value.new_zeros(rows, event.numel())
    return replace(group, sizes=(rows,), value=value.reshape(1, rows, *event))


def _narrow_line(line: Line, rows: int) -> Line:
    device = line.offset.constant.device
    reads = tuple(replace(r, elements=torch.arange(rows, device=device)) for r in line.reads)
    return replace(line, sizes=(rows,), reads=reads)
