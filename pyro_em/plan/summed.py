"""Sums of a part's rows through tables of all cells, and the M-step on sums that were kept.

They serve every model whose M-step needs no more than sums of one size, whatever its latents are;
`pyro_em.updates.running_sums` says which these are.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyro_em.errors import Finding
from pyro_em.graph.factors import FactorGraph
from pyro_em.plan.part import Part, is_outside
from pyro_em.plan.program import Program
from pyro_em.posteriors.gaussian_steps import for_updates
from pyro_em.reduction.reduction import Whole
from pyro_em.tracing.missing import has_missing
from pyro_em.tracing.parameters import values_of
from pyro_em.updates.data_sums import DataSums
from pyro_em.updates.m_step import MStepState, m_step_over
from pyro_em.updates.running_sums import ModelSums, Summable
from pyro_em.updates.statistics import dot


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
        before = float(running.expected_log_joint(running.values, touched).detach())
        updates, parameters = running.updates, graph.parameters
        with program.searching():
            m_step_over(lambda: Whole(running), graph, updates, state, expand=False)
        after = running.expected_log_joint(values_of(parameters), touched)
        return float(after.detach()) - before


def rows_summed(part: Part, index: int, state: MStepState) -> tuple[RowSums, Beside]:
    """The E-step of a part through tables at the parameters in the param store.

    Args:
        part: The part.
        index: The number of the step.
        state: What lasts from one M-step to the next.
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
    summable = _summable(data.graph, program, part.plate)
    assert isinstance(summable, Summable)
    found = RowSums(part.rows, q.bound - beside, summable.sums(data))
    return found, Beside(program, data, summable, beside)


def not_summable(part: Part) -> Finding | None:
    """Why sums of one size do not hold what the rows of a part say; None where they do."""
    found = _summable(for_updates(part.program.graph), part.program, part.plate)
    return found if isinstance(found, Finding) else None


def _summable(graph: FactorGraph, program: Program, plate: str) -> Summable | Finding:
    outside = {g for g, group in enumerate(graph.groups) if is_outside(group, plate)}
    values = values_of(graph.parameters)
    may_lack = has_missing(program.model)
    return Summable.of(graph, program.updates, plate, outside, values, may_lack)
