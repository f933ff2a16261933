"""Sums of a part's rows through tables of all cells, and the M-step on sums that were kept.

They serve every model whose M-step needs no more than sums of one size, whatever its latents are;
`pyro_em.updates.sums.summable` says which these are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.graph.factors import FactorGraph
from pyro_em.plan.part import Part, is_outside
from pyro_em.plan.program import Program
from pyro_em.posteriors.continuous.gaussian_steps import for_updates
from pyro_em.reduction.reduction import Whole
from pyro_em.tracing.missing import has_missing
from pyro_em.tracing.parameters import values_of
from pyro_em.updates.expectations.statistics import dot
from pyro_em.updates.m_step import MStepState, m_step_over
from pyro_em.updates.sums.data_sums import DataSums
from pyro_em.updates.sums.differing import Differing, differing_arguments, marks_of
from pyro_em.updates.sums.model_sums import ModelSums
from pyro_em.updates.sums.summable import Summable


@dataclass(frozen=True, eq=False)
class RowSums:
    """What the rows of a part say after an E-step; it adds up.

    Attributes:
        rows: How many they are.
        log_evidence: Theirs, in nats.
        sums: Theirs.
    """

    rows: int
    log_evidence: float
    sums: ModelSums


@dataclass(frozen=True, eq=False)
class Beside:
    """What an M-step reads of a part beside the sums of all rows: what is outside of its rows.

    Attributes:
        program: The model with the part.
        data: What it says.
        summable: How its rows are added up.
        log_density: Of all that is outside the rows, priors among it, in nats.
    """

    program: Program
    data: DataSums
    summable: Summable
    log_density: float

    def m_step(self, sums: ModelSums, state: MStepState) -> float:
        """The M-step from the sums of all rows; parameters are written in place.

        Args:
            sums: The sums.
            state: What lasts from one M-step to the next.

        Returns:
            By how much it raises the expected log joint, in nats.

        Raises:
            DegenerateError: Naming parameter and component; all parameters are as before.
        """
        graph, running = self.summable.standing_for(sums, self.data)
        program, touched = self.program, self.summable.touched
        running.evaluate = program.expected_on(graph, self.data.evaluate)
        before = running.expected_by(running.values, touched)
        updates, parameters = running.updates, graph.parameters
        with program.searching():
            m_step_over(lambda: Whole(running), graph, updates, state, expand=False)
        return running.expected_by(values_of(parameters), touched) - before


def rows_summed(
    part: Part, index: int, state: MStepState, like: Summable
) -> tuple[RowSums, Beside]:
    """The E-step of a part through tables at the parameters in the param store.

    Args:
        part: The part.
        index: The number of the step.
        state: What lasts from one M-step to the next.
        like: How rows are added up.
    """
    program = part.program
    evaluation = program.evaluate()
    with part.naming_rows():
        q = program.e_step(evaluation, index)
    assert q.bound is not None
    groups = evaluation.graph.groups
    outside = [g for g, group in enumerate(groups) if is_outside(group, part.plate)]
    beside = sum(float(dot(q.counts[g], evaluation.tables[g])) for g in outside)
    data = program.data_sums(q.counts, evaluation, state, values_of(program.graph.parameters))
    summable = like.on(data.graph, program.updates)
    found = RowSums(part.rows, q.bound - beside, summable.sums(data))
    return found, Beside(program, data, summable, beside)


def summable(part: Part, differing: Differing) -> Summable | Finding:
    """How rows are added up, or why sums of one size do not hold what they say.

    Args:
        part: Some rows.
        differing: By the number of a group its arguments that differ between rows.
    """
    graph, program = for_updates(part.program.graph), part.program
    values = values_of(graph.parameters)
    outside, may_lack = _outside(part, graph), has_missing(program.model)
    return Summable.of(graph, program.updates, part.plate, outside, values, differing, may_lack)


def marks(part: Part) -> dict[int, dict[str, Tensor]]:
    """What tells whether rows of several parts share an argument; see `marks_of`."""
    graph = for_updates(part.program.graph)
    return marks_of(graph, part.plate, _outside(part, graph))


def differing_in(
    high: dict[int, dict[str, Tensor]], low: dict[int, dict[str, Tensor]], part: Part, rows: int
) -> Differing:
    """The arguments that differ between rows; see `differing_arguments`."""
    return differing_arguments(high, low, for_updates(part.program.graph), rows)


def _outside(part: Part, graph: FactorGraph) -> set[int]:
    return {g for g, group in enumerate(graph.groups) if is_outside(group, part.plate)}
