"""EM steps of any latents of the rows of a plate, through tables of some rows at a time.

    log p(x) = Σ_parts log p(x_part),     S = Σ_parts E_q[T(x_part)]

The tables of a contraction have a number for each row and value of its latents, and many of these live
at once. Rows are independent given the parameters: where an M-step reads sums alone, the E-step is made
of some thousand rows after the others, in tables that stay in the cache, and what is kept is the sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from pyro_em.densities.tying import Arguments, arguments_of
from pyro_em.errors import Finding, Handover, PyroEMError
from pyro_em.expanded import once_each
from pyro_em.graph.factors import FactorGraph, Group, Nested
from pyro_em.graph.many_rows.given_rows import slice_of
from pyro_em.posteriors.at_values import AtValues, Values, no_densities, with_own_parameters
from pyro_em.posteriors.conjugates.conjugate import ConjugateBlock
from pyro_em.posteriors.conjugates.conjugate_slices import RowSlices, even_slices
from pyro_em.posteriors.continuous.gaussian_steps import for_updates, in_m_step, tables_of
from pyro_em.posteriors.continuous.summed_theta import Summed, SummedTheta
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.enumeration import contraction_of, e_step
from pyro_em.posteriors.gaussians.gaussian import GaussianBlock
from pyro_em.posteriors.gaussians.row_slices import GaussianSlices, width_of
from pyro_em.tracing.sites import Role
from pyro_em.updates.regressions.expansion import expansions_of
from pyro_em.updates.regressions.shift import shifts_of
from pyro_em.updates.sums.data_sums import DataSums
from pyro_em.updates.sums.summable import Summable
from pyro_em.updates.update import (
    ClosedForm,
    Fixed,
    LeastSquares,
    NewtonOnSums,
    ParameterUpdate,
    at_other_rows,
)

_MANY = 2**21  # cells of all rows, or numbers of their matrices, from which on parts are worth it

_CELLS = 2**16  # of the largest table of a part

_MATRICES = 2**20  # numbers of the matrices of a part


@dataclass(frozen=True, eq=False)
class TableSlices:
    """A graph, some of its rows at a time.

    Attributes:
        graph: Of the E-step.
        rows: How many a part has.
        blocks: By group the conjugate latents that it integrates.
    """

    graph: FactorGraph
    rows: tuple[slice, ...]
    blocks: Mapping[int, RowSlices | GaussianSlices]

    @classmethod
    def of(
        cls, graph: FactorGraph, *, as_traced: bool = False, cells: int = _CELLS
    ) -> TableSlices | None:
        """That of a graph of many rows; None where rows do not stand by themselves, or are few.

        Args:
            graph: The graph of an E-step.
            as_traced: Whether it is asked for at the parameters of its trace alone.
            cells: How many cells the largest table of a part may have.
        """
        plate = graph.structure.data_plate
        if plate is None or graph.all_data is not None:
            return None
        if any(plate not in latent.plates for latent in graph.latents.values()):
            return None
        if not all(_is_of_rows(g, plate, as_traced) for g in graph.groups):
            return None
        total = graph.dim_size(plate)
        width = max(_width(group) for group in graph.groups)
        matrices = [g.nested for g in graph.groups if isinstance(g.nested, GaussianBlock)]
        # Below no discrete latent matrices of all rows are large though their table is not.
        dear = max([width, *(width_of(b) for b in matrices if not b.scope)])
        if dear * total < _MANY:
            return None
        blocks: dict[int, RowSlices | GaussianSlices] = {}
        for g, group in enumerate(graph.groups):
            if group.nested is None:
                continue
            slices = _slices_of(group.nested)
            if slices is None:
                return None
            blocks[g] = slices
        most = [cells // width]
        most += [
            _MATRICES // width_of(b.block) for b in blocks.values() if isinstance(b, GaussianSlices)
        ]
        rows = even_slices(total, max(2, min(most)))
        return cls(graph, tuple(rows), blocks)

    def parts(self) -> Iterator[FactorGraph]:
        """The graph of the rows of each part, in memory that it shares."""
        return (self.part(rows) for rows in self.rows)

    def part(self, rows: slice) -> FactorGraph:
        """The graph of some rows."""
        groups = [slice_of(group, rows) for group in self.graph.groups]
        for g, slices in self.blocks.items():
            groups[g] = replace(groups[g], nested=slices.part(rows))
        structure = self.graph.structure
        plate = structure.plates[structure.data_plate or ""]
        plates = {**structure.plates, plate.name: replace(plate, size=rows.stop - rows.start)}
        return replace(
            self.graph, groups=tuple(groups), structure=replace(structure, plates=plates)
        )


def _slices_of(block: Nested) -> RowSlices | GaussianSlices | None:
    """The parts of latents that a group integrates; None where rows do not stand by themselves."""
    if isinstance(block, ConjugateBlock):
        return RowSlices.of(block, scoped=True)
    return GaussianSlices.of(block) if isinstance(block, GaussianBlock) else None


def _is_of_rows(group: Group, plate: str, as_traced: bool) -> bool:
    """Whether a group's first plate is that of the rows, and nothing of it has to be run for."""
    if as_traced and group.nested is not None:
        return False
    if group.raw is not None and group.nested is None:
        return False
    sites = (group,) if group.nested is None else group.nested.groups
    for site in sites:
        if site.belief is not None or site.role is Role.POINT:
            return False
        moves = site.value_binding is not None or site.raw_params or not site.is_static
        if moves and not as_traced:
            return False
        if any(dims[:1] != (plate,) for dims in site.dims):
            return False
    return group.dims[0][:1] == (plate,)


def _width(group: Group) -> int:
    """How many numbers a row has in the larger of a group's table and its data."""
    rows = max(group.sizes[0], 1)
    sites = group.nested.groups if group.nested is not None else (group,)
    events = max(g.value.numel() // max(math.prod(g.sizes[: g.n_plates]), 1) for g in sites)
    return len(group.members) * math.prod(group.sizes) // rows * max(events, 1)


@dataclass(frozen=True, eq=False)
class TableTheta(SummedTheta):
    """The parameters of latents whose tables are gone through some rows at a time.

    Attributes:
        slices: The graph of the E-step, in parts.
        contraction: The order in which the latents of a part are summed.
        expanded: Whether the parameters of Gaussian latents are expanded, as a step through tables of
            all rows does.
    """

    slices: TableSlices
    contraction: ContractionPlan
    expanded: bool = False

    @property
    def expands(self) -> bool:
        """See `SummedTheta.expands`."""
        return self.expanded

    def e_step(self, at: AtValues[Summed]) -> Summed:
        """See `SummedTheta.e_step`."""
        if not at.expectation:
            evidence, model = 0.0, None
            for part in self.slices.parts():
                own, data = expected(part, self.graph, self.updates, self.contraction, at.values)
                sums = self.summable.on(data.graph, data.updates).sums(data)
                evidence += own
                model = sums if model is None else model + sums
            assert model is not None
            if not abs(evidence) < math.inf:
                raise Handover
            at.expectation.append(Summed(evidence, {}, model=model))
        return at.expectation[0]

    @cached_property
    def evaluators(self) -> tuple[dict[str, Arguments], ...]:
        """How arguments are computed, per group; see `pyro_em.densities.theta.Theta`."""
        values = {n: p.value().detach() for n, p in self.graph.parameters.items()}
        return tuple(arguments_of(group, values) for group in self.graph.groups)


def expected(
    part: FactorGraph,
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    contraction: ContractionPlan,
    values: Values,
) -> tuple[float, DataSums]:
    """The log evidence of some rows in nats, and what an M-step asks of them.

    Args:
        part: Their graph.
        graph: That of an M-step, whose parameters it has.
        updates: What was decided per parameter.
        contraction: The order in which their latents are summed.
        values: The parameters.

    Raises:
        Handover: If a step through tables of all rows has to look.
    """
    with torch.no_grad():
        arguments = [g.evaluate_arguments(values) for g in part.groups]
        tables, solved = tables_of(part, arguments, [g.value for g in part.groups])
    try:
        # A table that was made in inference mode takes no part in a gradient.
        with torch.inference_mode(False):
            found = e_step(part, contraction, [t.clone() for t in tables])
    except PyroEMError as error:
        raise Handover from error
    counts = [
        c if g.mask is None else c * g.mask for g, c in zip(part.groups, found.cells, strict=True)
    ]
    own = replace(part, parameters=graph.parameters)
    with torch.no_grad():
        seen, all_counts, all_arguments = in_m_step(own, counts, arguments, solved)
        updates = at_other_rows(updates, seen)
        data = DataSums(seen, updates, all_counts, all_arguments, no_densities, values)
    return float(found.log_evidence), data


@dataclass(frozen=True, eq=False)
class TableRows:
    """Latents of many rows, whose tables are gone through some rows at a time.

    Attributes:
        theta: The parameters with their steps.
        name: What the plan calls it.
        words: What the plan says of an iteration.
    """

    theta: TableTheta
    name: str
    words: str

    def e_step(self, at: AtValues[Summed]) -> Summed:
        """The E-step at some parameters."""
        return self.theta.e_step(at)


def table_rows(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Values,
    name: str,
    words: str,
) -> TableRows | None:
    """Steps through tables of some rows at a time; None of models whose M-steps read the rows.

    Args:
        graph: Of the E-step.
        updates: What was decided per parameter.
        values: Parameter values.
        name: What the plan calls it.
        words: What the plan says of an iteration.
    """
    moved = {n for n, u in updates.items() if not isinstance(u.update, Fixed)}
    exact = (ClosedForm, LeastSquares, NewtonOnSums, Fixed)
    if not moved or not all(isinstance(u.update, exact) and not u.priors for u in updates.values()):
        return None
    if any(u.needs_data and not u.is_end for u in updates.values()):
        return None
    slices = TableSlices.of(graph)
    if slices is None:
        return None
    first = with_own_parameters(slices.part(slices.rows[0]))
    contraction, plate = contraction_of(graph), graph.structure.data_plate
    assert plate is not None
    try:
        _, data = expected(first, first, updates, contraction, values)
    except Handover:
        return None
    differing = {g: _differing(group) for g, group in enumerate(data.graph.groups)}
    # Below discrete latents steps are not expanded: moments of all their values would be added up.
    expanded = any(
        isinstance(b, GaussianSlices) and not b.block.scope for b in slices.blocks.values()
    )
    beside = [s.group for s in shifts_of(data.graph, data.updates)] if expanded else []
    summable = Summable.of(data.graph, data.updates, plate, (), values, differing, beside=beside)
    if isinstance(summable, Finding):
        return None
    if not all(_reads_the_same(data.updates[name], slices.graph) for name in summable.solved):
        return None
    if expanded and not _may_expand(summable, data):
        return None
    theta = TableTheta(for_updates(first), data.updates, summable, slices, contraction, expanded)
    return TableRows(theta, name, words)


def _may_expand(summable: Summable, data: DataSums) -> bool:
    """Whether the parameters that an M-step expands on some rows are expanded on their sums, too."""
    if any(site.precise or site.scaled for site in summable.lines.values()):
        return False  # these weigh a latent's mean otherwise than rows do
    graph, running = summable.standing_for(summable.sums(data), data)
    pairs = ((data.graph, data.updates), (graph, running.updates))
    scales = [
        [(e.latent, e.parameter, e.form, e.children) for e in expansions_of(*pair)]
        for pair in pairs
    ]
    means = [[(s.group, s.children, s.block) for s in shifts_of(*pair)] for pair in pairs]
    return scales[0] == scales[1] and means[0] == means[1]


def _reads_the_same(update: ParameterUpdate, graph: FactorGraph) -> bool:
    """Whether each row reads the same elements of a parameter, by whatever it multiplies them."""
    for use in update.uses:
        for selection in graph.groups[use.group].bindings[use.argument].selections:
            index = once_each(selection.index, 2)
            if index.shape[1] > 1 and not bool((index == index[:, :1]).all()):
                return False
    return True


def _differing(group: Group) -> frozenset[str]:
    """The arguments of a group that differ between rows; of a mean that is a line all its parts."""
    own = {a for a, t in group.outlines.items() if t.dim() > 1 and t.shape[1] > 1}
    return frozenset(own | set(group.lines) if own.intersection(group.lines) else own)
