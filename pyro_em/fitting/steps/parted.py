"""The data of a fit in parts: chunks that are read one after the other, or what each process holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_em.densities.density import NormalRows
from pyro_em.densities.regression import Lines
from pyro_em.densities.vector_regression import VectorLines
from pyro_em.errors import UsageError, message
from pyro_em.graph.all_data import AllData
from pyro_em.plan.agreement import disagreements_of
from pyro_em.plan.evaluation import Disagreement, Evaluation
from pyro_em.plan.over_all import all_data_of, require_partable
from pyro_em.plan.part import Part
from pyro_em.plan.program import Program
from pyro_em.plan.verification import distrusted
from pyro_em.posteriors.conjugates.shared_conjugates import shared_blocks
from pyro_em.posteriors.continuous.collapsed import Collapsed
from pyro_em.posteriors.continuous.factor_rows import FactorRows
from pyro_em.posteriors.continuous.gaussian_steps import for_updates
from pyro_em.posteriors.quick import QuickBlock
from pyro_em.reduction.reduction import Reduction
from pyro_em.reduction.seen_as import SeenAs
from pyro_em.tracing.parameters import restore, snapshot
from pyro_em.updates.m_step import MStepState, m_step_over
from pyro_em.updates.sums.data_sums import DataSums


@dataclass(frozen=True, eq=False)
class Parted:
    """The parts of the data, one of which is at hand as a program.

    Attributes:
        over: The parts.
        part: The part at hand, which knows what is known of all data.
        all_data: What is known of all.
        how: How the data are parted, in words: ``in chunks``.
        is_quick: Whether steps on sums serve.
        is_at_hand: Whether each process has one part, which it keeps.
        is_known: Whether the part at hand knows all sums that these steps need, so that no other is
            visited.
        has_others: Whether other processes have parts, too.
    """

    over: Reduction[Part]
    part: Part
    all_data: AllData
    how: str
    is_quick: bool
    is_at_hand: bool = False
    is_known: bool = False
    has_others: bool = False

    @property
    def has_shared(self) -> bool:
        """Whether latents outside the rows are found from what all parts say."""
        return bool(shared_blocks(self.lead.graph, self.part.plate))

    @property
    def lead(self) -> Program:
        """The program of the part at hand."""
        return self.part.program

    @classmethod
    def of(cls, over: Reduction[Part], lead: Part, how: str, is_at_hand: bool = False) -> Parted:
        """Go through the parts once, and see what they have in common.

        Args:
            over: The parts.
            lead: The one at hand.
            how: How the data are parted, in words.
            is_at_hand: Whether each process has one part, which it keeps.

        Raises:
            PyroEMError: If the model's rows are not independent, or a part cannot be used.
        """
        require_partable(lead.program, how, adds=True)
        all_data = all_data_of(over, lead.program)
        lead = lead.told(all_data)
        program = lead.program
        parts = SeenAs(over, lambda part: part.told(all_data))
        # What is outside the rows would count once per part in sums: tables know better.
        is_known = isinstance(program.kernel.block, (FactorRows, Collapsed))
        form = _form_of_sums(program)
        quick = form is not None and not lead.has_data_outside
        quick = not parts.any(lambda part: _form_of_sums(part.program) != form) and quick
        # Where processes differ in what they could do, all take the steps that all can take.
        each = over.gathered(lambda: (quick, repr(form), is_known))
        quick = all(able for able, _, _ in each) and len({own for _, own, _ in each}) == 1
        known = all(own for _, _, own in each)
        others = len(each) > 1
        return cls(parts, lead, all_data, how, quick or known, is_at_hand, known, others)

    def knowing(self, all_data: AllData) -> Parted:
        """The same where something else is known of all data: numbers that differ by rounding."""

        def told(part: Part) -> Part:
            return part.told(all_data)

        over = SeenAs(self.over, told)
        return replace(self, over=over, part=told(self.part), all_data=all_data)

    def begin(self, write: Callable[[], None], generator: torch.Generator) -> None:
        """Let the first process write the parameters of a start, and give them to all.

        Args:
            write: Writes them.
            generator: Whose numbers it uses.
        """
        parameters = self.lead.graph.parameters

        def made() -> tuple[dict[str, Tensor], Tensor]:
            write()
            return snapshot(parameters), generator.get_state()

        values, state = self.over.from_first(made)
        restore(parameters, values)
        generator.set_state(state)

    def m_step(self, counts: Sequence[Tensor], evaluation: Evaluation, state: MStepState) -> None:
        """The M-step from what each process knows of its own rows; parameters are written in place.

        Args:
            counts: Expected counts per group, of the part at hand.
            evaluation: Its factors.
            state: What lasts from one M-step to the next.
        """
        graph = for_updates(evaluation.graph)

        def parts() -> Reduction[DataSums]:
            sums = cache(lambda: self.part.given_sums(counts, evaluation, state))
            return SeenAs(self.over, lambda part: sums())

        m_step_over(parts, graph, self.lead.updates, state, expand=False)

    def disagreements(self) -> Disagreement:
        """Where a fresh trace of the part at hand differs from what the bindings predict."""
        found = self.over.gathered(lambda: disagreements_of(self.lead))
        return next((off for off in found if off), Disagreement())

    def distrusted(self, off: Disagreement) -> Parted:
        """The same with programs that run the model at each step."""

        def to(part: Part) -> Part:
            return replace(part, program=distrusted(part.program, off), is_kept=False)

        parts = SeenAs(self.over, to)
        return replace(self, over=parts, part=to(self.part), is_quick=False)

    def refuse_changes(self) -> None:
        """Data that are parted are read once.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            message(
                "fit",
                f"data were changed during a fit whose data are given {self.how}.",
                "what is known of all parts was found before the first step",
                ["leave the data as they are while the fit runs", "pass all data at once"],
            )
        )


def _form_of_sums(program: Program) -> Any:
    """What the sums of parts have to agree in to be added; None where no kernel makes them."""
    block = program.kernel.adding
    if not isinstance(block, QuickBlock):
        return None
    return block.name, {g: _form_of_rule(rule) for g, rule in block.normals.items()}


def _form_of_rule(rule: NormalRows) -> tuple[str, list[list[int]]]:
    """What its sums are of; of lines which coefficients their covariates multiply."""
    return type(rule).__name__, rule.columns.tolist() if isinstance(
        rule, (Lines, VectorLines)
    ) else []
