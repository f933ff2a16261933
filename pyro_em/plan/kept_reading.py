"""What is kept of one reading of a model, and by what a later run shows that it still holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.graph.bindings.signatures import KeptSelections
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.findings.possible import finds_all
from pyro_em.graph.gaussian_lines.kept_lines import may_be_kept
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.graph.laid_out import LaidOut
from pyro_em.graph.stacking import forms_of_bindings
from pyro_em.graph.structure import Structure
from pyro_em.plan.program import Program
from pyro_em.plan.task import Noting, Task
from pyro_em.posteriors.continuous.gaussian_steps import at_zero
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.tracing.calls import CallLog
from pyro_em.tracing.given import References, references_in
from pyro_em.tracing.names import names_of, numbers_in
from pyro_em.tracing.operations import OperationLog

_FormOfValue = tuple[torch.Size, torch.dtype, torch.device]


@dataclass(frozen=True, eq=False)
class LaidProgram:
    """How a run becomes a program for an E-step only; a later run with equal notes becomes the same.

    Attributes:
        layout: How it becomes a graph.
        contraction: The order of its sums.
        notes: What there is to say of it, where nothing is missing.
    """

    layout: LaidOut
    contraction: ContractionPlan
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Kept:
    """One reading.

    Attributes:
        structure: The skeleton.
        operations: What its enumerated run did.
        numbers: What those names of the model stood for that are numbers or texts.
        bindings: How parameters reach the arguments, where another run confirmed it; else None.
        contraction: The order of its sums; None where that is made when it is asked for.
        members: The order of the factors that it is of.
        is_held: Whether a look at the numbers of its enumerated run finds all that validation finds.
        bare: The skeleton of the user's model where Gaussian or conjugate latents are integrated: the
            other one is that of the model with these given.
        gaussians: Shape, dtype and device of the values of Gaussian ones.
        units: The same of conjugate ones.
        kernels: The kernel of the prior of each of the latter.
        lines: How they enter means, where a run on other data can tell that it is the same there.
        selections: How its runs showed which elements of parameters arguments are.
        calls: What a later run that did the same operations asked of torch; None where no run has
            been noted so.
        has_calls: Whether runs of this form may be known by their calls.
        laid: How such a run becomes a program for an E-step only, where that is plain.
    """

    structure: Structure
    operations: tuple[Any, ...]
    numbers: Mapping[str, Any]
    bindings: Any
    contraction: ContractionPlan | None
    members: tuple[tuple[str, ...], ...]
    is_held: bool
    bare: Structure | None = None
    gaussians: Mapping[str, _FormOfValue] = field(default_factory=dict)
    units: Mapping[str, _FormOfValue] = field(default_factory=dict)
    kernels: Mapping[str, PriorKernel] = field(default_factory=dict)
    lines: Mapping[str, Line] = field(default_factory=dict)
    selections: KeptSelections = field(default_factory=KeptSelections)
    calls: tuple[Any, ...] | None = None
    has_calls: bool = True
    laid: LaidProgram | None = None

    @classmethod
    def of(cls, task: Task, program: Program, before: Kept | None) -> Kept:
        """What is known of a model once it has been read, whole or for an E-step only.

        Args:
            task: What was wanted.
            program: What was read.
            before: What was known of the same form.
        """
        numbers = numbers_in(names_of(task.model, task.args, task.kwargs))
        bindings = forms_of_bindings(program.graph.groups) if program.compiled else None
        lines = program.lines if may_be_kept(program.lines) else {}
        if program.look_only and before is not None and before.operations == program.operations:
            bindings, lines = before.bindings, before.lines
        order, members = None, tuple[tuple[str, ...], ...]()
        if program.structure.series is None:
            order, members = program.contraction, members_of(program.graph)
        at = references_in(program.model)
        return cls(
            program.structure,
            program.operations,
            numbers,
            bindings,
            order,
            members,
            finds_all(at_zero(program.graph), program.structure),
            program.bare,
            {n: (v.shape, v.dtype, v.device) for n, v in at.zeros.items()},
            {n: (v.shape, v.dtype, v.device) for n, v in at.units.items()},
            {} if program.conjugates is None else program.conjugates.kernels,
            lines,
            program.selections or KeptSelections(),
        )

    @property
    def noting(self) -> Noting:
        """What is to be noted of the next run."""
        if not self.has_calls:
            return Noting.OPERATIONS
        return Noting.BOTH if self.calls is None else Noting.CALLS

    def shown_by(self, log: OperationLog) -> Kept | None:
        """What is known after a run that did what is known; None after one that did not.

        Raises:
            NotShown: If its operations may be the same, for all that its calls tell.
        """
        if not isinstance(log, CallLog):
            return self if log.finished() == self.operations else None
        if log.beneath is None:
            if not log.is_complete or log.finished() != self.calls:
                raise NotShown
            return self
        if log.beneath.finished() != self.operations:
            raise NotShown  # what is noted of calls keeps memory, by which operations are known, too
        calls = log.finished() if log.is_complete else None
        return replace(self, calls=calls, has_calls=log.is_complete)

    def task(self, task: Task) -> Task:
        """A task with the model that is run, whose integrated latents are given."""
        if self.bare is None:
            return task
        at = self.references
        model = at.for_lines(task.model) if at.zeros else at.for_reads(task.model)
        return replace(task, model=model)

    @property
    def references(self) -> References:
        """The values of the latents that are integrated."""
        units = {
            name: self.kernels[name].units(shape, torch.empty(0, dtype=dtype, device=device))
            for name, (shape, dtype, device) in self.units.items()
        }
        return References({n: _zeros(form) for n, form in self.gaussians.items()}, units)


class NotShown(Exception):
    """The calls of a run are others than those of the run that is known."""


def _zeros(form: _FormOfValue) -> Tensor:
    return torch.zeros(form[0], dtype=form[1], device=form[2])


def members_of(graph: FactorGraph) -> tuple[tuple[str, ...], ...]:
    """The sites of each group."""
    return tuple(tuple(g.members) for g in graph.groups)
