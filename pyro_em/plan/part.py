"""One part of the data of a fit: its program, and what it says of values that all parts share.

Rows of the outermost plate are independent given the parameters, so that what parts say adds up:

    log p(x; θ) = Σ_parts log p(x_part; θ),    S = Σ_parts S_part.

Factors outside that plate, priors among them, count once: with the first part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import Handover, PyroEMError, of_rows
from pyro_em.graph.all_data import AllData
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.structure import Structure
from pyro_em.plan.evaluation import Evaluation
from pyro_em.plan.program import Program
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.chain_sums.state_steps import ChainSums
from pyro_em.posteriors.conjugates.shared_conjugates import OutsideRows, shared_blocks
from pyro_em.posteriors.exact import log_evidence_of
from pyro_em.tracing.parameters import parameters_at, values_of
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.statistics import Expectation, dot
from pyro_em.updates.m_step import MStepState
from pyro_em.updates.sums.data_sums import DataSums

Unconstrained = Mapping[str, Tensor]

Totals = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Summary:
    """What an E-step on one part says; it adds up.

    Attributes:
        bound: ELBO(q, θ) in nats, log prior included.
        log_evidence: log p(x; θ) in nats.
        after_m_step: ELBO(q, θ_new) in nats of the q before, where there is one.
    """

    bound: float
    log_evidence: float
    after_m_step: float = 0.0


@dataclass(frozen=True, eq=False)
class Made:
    """What an E-step through tables was made from, so that it can be made again to the last bit.

    Attributes:
        unconstrained: The parameters in the param store.
        index: The number of the step.
        random: The random states, where the E-step may draw.
        totals: What all parts of the data say of latents outside their rows, there.
    """

    unconstrained: Unconstrained
    index: int
    random: Any = None
    totals: Totals = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the data.

    Attributes:
        program: The model with this part of the data.
        is_first: Whether what is outside the rows counts with it.
        begin: The number of its first row among all.
        is_kept: Whether it outlives a pass over the data, so that its last E-step does, too.
    """

    program: Program
    is_first: bool = True
    begin: int = 0
    is_kept: bool = False
    _remembered: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def plate(self) -> str:
        """The plate whose elements are parted."""
        plate = plate_of_rows(self.program.structure)
        assert plate is not None
        return plate

    @property
    def rows(self) -> int:
        """How many elements of the plate it has."""
        return self.program.structure.plates[self.plate].size

    @property
    def has_data_outside(self) -> bool:
        """Whether any factor but priors of point estimates is outside the plate."""
        groups = self.program.graph.groups
        return any(is_outside(g, self.plate) for g in groups if g.role is not Role.POINT)

    def left_out(self, graph: FactorGraph) -> tuple[int, ...]:
        """Groups that do not count with this part."""
        if self.is_first:
            return ()
        # What is shared of latents outside the rows counts as its block says.
        shared = shared_blocks(graph, self.plate)
        groups = [(g, group) for g, group in enumerate(graph.groups) if g not in shared]
        return tuple(g for g, group in groups if is_outside(group, self.plate))

    def naturals(self) -> dict[str, Tensor]:
        """What the part adds to latents outside its rows at the parameters in the param store."""
        return self.program.naturals(self.plate, self.is_first)

    def evaluate(self, totals: Totals) -> Evaluation:
        """The factors at the parameters in the param store.

        Args:
            totals: What all parts say of latents outside their rows, there.
        """
        return self.program.evaluate(outside=self.outside(totals))

    def outside(self, totals: Totals) -> OutsideRows | None:
        """How this part takes part in latents outside its rows; None where there are none.

        Args:
            totals: What all parts say of them.
        """
        return OutsideRows(self.plate, self.is_first, totals) if totals else None

    def counted_tables(self, tables: Sequence[Tensor]) -> list[Tensor]:
        """Log densities per group, zero for what counts with another part."""
        left_out = self.left_out(self.program.graph)
        return [torch.zeros_like(t) if g in left_out else t for g, t in enumerate(tables)]

    def _counted(self, graph: FactorGraph, counts: Sequence[Tensor]) -> list[Tensor]:
        """Counts, zero for what counts with another part."""
        out = list(counts)
        for g in self.left_out(graph):
            out[g] = torch.zeros_like(out[g])
        return out

    def expectation(self, values: Mapping[str, Tensor]) -> Expectation:
        """The E-step on sums at parameter values.

        Raises:
            Handover: If an E-step through tables has to look.
        """
        block = self.program.kernel.adding
        if block is None:
            raise Handover
        with torch.inference_mode():
            try:
                return block.e_step(block.theta.enter(values))
            except torch.linalg.LinAlgError as error:
                raise Handover from error

    def log_evidence(self, totals: Totals | None = None) -> float:
        """log p(x; θ) of the part at the parameters in the param store, in nats.

        Args:
            totals: What all parts say of latents outside their rows, there.
        """
        evaluation = self.evaluate(totals or {})
        with self.naming_rows():
            q = self.program.posterior(evaluation)
        assert q.log_evidence is not None
        groups = evaluation.graph.groups
        other = [g for g in self.left_out(evaluation.graph) if groups[g].role is not Role.POINT]
        return q.log_evidence - sum(float(dot(q.counts[g], evaluation.tables[g])) for g in other)

    def log_evidence_at(self, values: Mapping[str, Tensor]) -> float:
        """log p(x; θ) of the part at other parameters, through the bindings, in nats."""
        block = self.program.kernel.block
        if isinstance(block, ChainSums):  # which has all that counts
            with suppress(Handover), torch.inference_mode():
                return block.theta.log_evidence(block.theta.enter(values))
        at = self.program.evaluate(values)
        return log_evidence_of(at.graph, self.program.contraction, self.counted_tables(at.tables))

    def summary(
        self, index: int, before: Made | None = None, totals: Totals | None = None
    ) -> Summary:
        """The E-step through tables at the parameters in the param store.

        Args:
            index: The number of the step that it begins.
            before: Where the E-step was made that an M-step has followed.
            totals: What all parts say of latents outside their rows, at the parameters.
        """
        after = 0.0
        evaluation = self.evaluate(totals or {})
        if before is not None:
            earlier, q = self._e_step_at(before)
            counts = self._counted(earlier.graph, q.counts)
            pairs = zip(counts, evaluation.tables, strict=True)
            after = sum(float(dot(c, t)) for c, t in pairs) + q.entropy_value
        with self.naming_rows():
            q = self.program.e_step(evaluation, index)
        assert q.bound is not None and q.log_evidence is not None
        bound, evidence = q.bound, q.log_evidence
        for g in self.left_out(evaluation.graph):
            own = float(dot(q.counts[g], evaluation.tables[g]))
            bound -= own
            evidence -= 0.0 if evaluation.graph.groups[g].role is Role.POINT else own
        return Summary(bound, evidence, after)

    def data_sums(self, at: Made, state: MStepState) -> DataSums:
        """What an M-step asks of this part.

        Args:
            at: Where the E-step was made.
            state: What lasts from one M-step to the next.
        """
        evaluation, q = self._e_step_at(at)
        counts = self._counted(evaluation.graph, q.counts)
        with self._parameters_at(at.unconstrained):
            values = values_of(self.program.graph.parameters)
        return self.program.data_sums(counts, evaluation, state, values)

    def given_sums(
        self, counts: Sequence[Tensor], evaluation: Evaluation, state: MStepState
    ) -> DataSums:
        """What an M-step asks of this part where its counts are given.

        Args:
            counts: Expected counts per group.
            evaluation: The factors.
            state: What lasts from one M-step to the next.
        """
        return self.program.data_sums(self._counted(evaluation.graph, counts), evaluation, state)

    def _e_step_at(self, at: Made) -> tuple[Evaluation, Posterior]:
        known = self._remembered.get("E-step")
        if known is not None and known[0] is at:
            return known[1], known[2]
        with self._parameters_at(at.unconstrained):
            evaluation = self.evaluate(at.totals)
            q = self.program.e_step(evaluation, at.index)
        if self.is_kept:
            self._remembered["E-step"] = at, evaluation, q
        return evaluation, q

    @contextmanager
    def naming_rows(self) -> Iterator[None]:
        """A block whose errors about a row say which one of all data it is."""
        try:
            yield
        except PyroEMError as error:
            has_row = any(problem.row is not None for problem in error.problems)
            if not self.begin or error.names_rows or not has_row:
                raise
            raise of_rows(error, self.begin) from error

    def _parameters_at(self, unconstrained: Unconstrained) -> AbstractContextManager[None]:
        parameters = self.program.graph.parameters
        if all(torch.equal(p.unconstrained, unconstrained[n]) for n, p in parameters.items()):
            return nullcontext()
        return parameters_at(parameters, unconstrained, unconstrained=True)

    def told(self, all_data: AllData) -> Part:
        """The same, which knows what is known of all data."""
        if self.program.graph.all_data is all_data:
            return self
        known = self._remembered.get("told")
        if known is not None and known[0] is all_data:
            part: Part = known[1]
            return part
        graph = replace(self.program.graph, all_data=all_data)
        part = replace(self, program=self.program.on(graph), _remembered={})
        if self.is_kept:
            self._remembered["told"] = all_data, part
        return part


def plate_of_rows(structure: Structure) -> str | None:
    """The outermost plate that all observations in plates share; None where it is a loop, or none.

    Args:
        structure: The skeleton of a model.
    """
    data = [i for i in structure.sites.values() if i.role is Role.DATA and i.nested]
    if not data:
        return None
    shared = set.intersection(*(set(i.nested) for i in data))
    outermost = next((p for p in data[0].nested if p in shared), None)
    return outermost if outermost in structure.plates else None


def is_outside(group: Group, plate: str) -> bool:
    """Whether a group's factors are outside a plate.

    Args:
        group: The group.
        plate: The name of the plate.
    """
    if group.nested is not None:
        return any(is_outside(site, plate) for site in group.nested.groups)
    return any(plate not in dims for dims in group.dims)
