"""Readings that are kept between calls, so that a model is read once for each form of its data.

What a reading found out (the sites, what reads what, how parameters reach the densities, that no
elements of a plate read each other, ...) follows from what the model does, not from the numbers that
it is given. So a later call runs the model once, with its latents enumerated, and notes what it
does: if that is the same as when it was read, on parameters and data that are sound, all that was
found out still holds. Anything else is read anew, from the beginning. Where parameters have no values
yet, a plain run gives them theirs before.

Numbers are always those of the call's own run. What may be stale is what the reading found out, and
each way in which it can become so shows somewhere:

* a number that a name of the model stands for: `numbers_in`; one in a distribution, a plate, a mask
  or a scale: the notes of sites;
* another parameter, constant, index or operation, a branch on the data or on what nobody can look up,
  rows that come to read each other: the notes of what is done, in which a tensor is known by what made
  it, by its name, or by its content, and numbers that leave torch are noted;
* data outside a support, arguments outside a constraint, parameters that are others, not finite, or
  declared otherwise: `are_possible`, `_are_sound`;
* what no note shows, where a call wants to go on from the latest program: its numbers, to the bit.

What is done is noted as the operations of torch (`OperationLog`) until a run of the same form has been
noted both so and as the calls of torch's functions, and from then on as the latter alone, at a fifth
of the cost (`pyro_em.tracing.calls` says when these tell as much). Where calls differ, operations
decide.

A model whose Gaussian or conjugate latents are integrated is run with these at values of reference. On
the same data a run at other values confirms how they enter. Where the data are others, that is read
again, unless it holds no number of the data.

Readings belong to the model and are shared by all objects that were given the same one. The latest
program belongs to one object, since it holds the data: asked again on the very same ones, it serves as
it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_em.distributions import is_finite
from pyro_em.errors import PyroEMError
from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.graph.conjugate_record import NotConjugate
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.initial import tell_of_starts
from pyro_em.graph.kept_lines import lines_again, may_be_kept
from pyro_em.graph.lines import Line, NotLinear
from pyro_em.graph.possible import are_possible, finds_all
from pyro_em.graph.prediction import disagreements
from pyro_em.graph.read_lines import differing_lines
from pyro_em.graph.readable import refuse_inference_mode
from pyro_em.graph.signatures import KeptSelections
from pyro_em.graph.stacking import form_of_binding
from pyro_em.graph.structure import Structure, form_of
from pyro_em.plan.building import rebuildable
from pyro_em.plan.conjugates import Conjugates
from pyro_em.plan.continuous import on_conjugates, with_lines, with_routes
from pyro_em.plan.decisions import decided
from pyro_em.plan.first_values import (
    NotBegun,
    begun,
    may_begin_enumerated,
    undone_on_failure,
    with_first_values,
)
from pyro_em.plan.program import Program
from pyro_em.plan.task import Noting, Task, traced
from pyro_em.plan.verification import verified
from pyro_em.portable import StaysHere
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.gaussian_components import Alike, NotSeparate
from pyro_em.posteriors.gaussian_steps import at_zero
from pyro_em.posteriors.kept_layouts import forget_layouts
from pyro_em.tracing.calls import CallLog
from pyro_em.tracing.given import GivenGaussians, References, references_in, without_values
from pyro_em.tracing.loops import NotVectorized
from pyro_em.tracing.names import names_of, numbers_in
from pyro_em.tracing.operations import OperationLog
from pyro_em.tracing.parameters import TracedParameter, values_of
from pyro_em.tracing.runs import Begin, Run
from pyro_em.tracing.stored import is_stored

_MOST = 8  # forms of data that are remembered of one model

_Found = TypeVar("_Found")

_FormOfValue = tuple[torch.Size, torch.dtype, torch.device]


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


_by_model: MutableMapping[Any, dict[Hashable, Kept]] = weakref.WeakKeyDictionary()


def forget_readings() -> None:
    """Forget what is known of all models, and let go of what was kept for it."""
    _by_model.clear()
    forget_layouts()


class Readings(StaysHere):
    """What one object knows of its model: the readings of the model, and the latest program.

    Attributes:
        latest: The latest program that an M-step can follow.
    """

    def __init__(self) -> None:
        self.latest: Program | None = None
        self._own: dict[Hashable, Kept] = {}  # of a model that nothing else can refer to

    def forget(self) -> None:
        """Forget what belongs to one object."""
        self.latest = None

    def _of(self, model: Any) -> dict[Hashable, Kept]:
        try:
            return _by_model.setdefault(model, {})
        except Exception:  # no weak references, no hash, or a comparison of its own that raises
            return self._own

    def keep(self, task: Task, program: Program) -> None:
        """Remember a reading, whole or for an E-step only."""
        form, readings = _form(task), self._of(task.model)
        numbers = numbers_in(names_of(task.model, task.args, task.kwargs))
        before = readings.pop(form, None)
        bindings = _bindings_of(program.graph) if program.compiled else None
        lines = program.lines if may_be_kept(program.lines) else {}
        if program.look_only and before is not None and before.operations == program.operations:
            bindings, lines = before.bindings, before.lines
        order, members = None, tuple[tuple[str, ...], ...]()
        if program.structure.series is None:
            order, members = program.contraction, _members_of(program.graph)
        is_held = finds_all(at_zero(program.graph), program.structure)
        at = references_in(program.model)
        kernels = {} if program.conjugates is None else program.conjugates.kernels
        readings[form] = Kept(
            program.structure,
            program.operations,
            numbers,
            bindings,
            order,
            members,
            is_held,
            program.bare,
            {n: (v.shape, v.dtype, v.device) for n, v in at.zeros.items()},
            {n: (v.shape, v.dtype, v.device) for n, v in at.units.items()},
            kernels,
            lines,
            program.selections or KeptSelections(),
        )
        while len(readings) > _MOST:
            del readings[next(iter(readings))]
        self._keep_program(program)

    def again(self, task: Task, first_look: bool) -> Program | None:
        """The program for a task, from what is remembered; None where it has to be read anew.

        Args:
            task: What is wanted.
            first_look: Whether this is the first look of an object, whose plain run may advance the
                random state, as Pyro's first run does.
        """
        kept = self._of(task.model).get(_form(task))
        if kept is None or kept.structure.by_numbers:
            return None
        if kept.bare is not None and task.strategy is not None:  # which is refused by name
            return None
        names = names_of(task.model, task.args, task.kwargs)
        if numbers_in(names) != kept.numbers:
            return None
        latest = self.latest
        try:
            refuse_inference_mode(task.args, task.kwargs)
            if first_look or not is_stored(kept.structure.parameters):
                program = self._begun_enumerated(task, kept, names, first_look)
                if program is not None:
                    return program
                begun = with_first_values(
                    task, kept.structure, first_look=first_look, is_held=kept.is_held
                )
                if begun is None:
                    return None
                kept, latest = replace(kept, structure=begun), None
                self._of(task.model)[_form(task)] = kept
            if latest is not None and _is_on_the_same_data(latest, kept, task):
                # What is read is known: only the graph is wanted, without its bindings.
                again = replace(task, look_only=True)

                def same(kept: Kept) -> Kept | None:
                    log = again.log(names, noting=kept.noting)
                    return _doing_the_same(kept.task(again), kept, latest, log)

                known = _shown(kept, same)
                if known is None:
                    return None
                self._of(task.model)[_form(task)] = known
                return replace(latest, is_known=True)
            found = _shown(kept, lambda k: _on_other_data(task, k, task.log(names, True, k.noting)))
        except (PyroEMError, NotVectorized, NotLinear, NotSeparate, NotConjugate):
            return None  # reading it anew says what is wrong
        return None if found is None else self._noted(task, *found)

    def _begun_enumerated(
        self, task: Task, kept: Kept, names: Mapping[str, Any], first_look: bool
    ) -> Program | None:
        """The program from the one run in which parameters get their first values; None otherwise."""
        if not kept.is_held or kept.bare is not None or not may_begin_enumerated(kept.structure):
            return None
        begin = Begin(keep_random_state=not first_look)

        def begun(kept: Kept) -> tuple[Kept, Program]:
            with undone_on_failure():
                found = _on_other_data(task, kept, task.log(names, True, kept.noting), begin)
                if found is None:
                    raise NotBegun
                return found

        try:
            kept, program = _shown(kept, begun)
        except (PyroEMError, NotBegun):
            return None  # a plain run says what is wrong, or begins otherwise
        tell_of_starts(program.graph.parameters)
        return self._noted(task, replace(kept, structure=program.structure), program)

    def _noted(self, task: Task, kept: Kept, program: Program) -> Program:
        """The program, after it and what a later run has found are remembered."""
        if not task.look_only:
            bindings = _bindings_of(program.graph) if program.compiled else None
            kept = replace(kept, bindings=bindings)
        self._of(task.model)[_form(task)] = kept
        self._keep_program(program)
        return program

    def _keep_program(self, program: Program) -> None:
        if not program.look_only:
            self.latest = program


def _zeros(form: _FormOfValue) -> Tensor:
    return torch.zeros(form[0], dtype=form[1], device=form[2])


def _form(task: Task) -> Hashable:
    parts, keywords = form_of(task.args, task.kwargs)
    budgets = (task.max_plate_nesting, task.max_enumeration)
    return parts, keywords, budgets, torch.get_default_dtype()


def _is_on_the_same_data(program: Program, kept: Kept, task: Task) -> bool:
    """Whether a program is that of a reading, and its data are the very ones, unchanged."""
    given = (*task.args, *task.kwargs.values())
    before = (*program.args, *program.kwargs.values())
    return (
        program.compiled
        and program.operations == kept.operations
        and is_stored(program.graph.parameters)
        and (without_values(program.model), program.strategy) == (task.model, task.strategy)
        and len(given) == len(before)
        and all(a is b for a, b in zip(given, before, strict=True))
        and not program.is_changed()
    )


def _shown(kept: Kept, look: Callable[[Kept], _Found]) -> _Found:
    """What a look at a run finds; at its operations where its calls do not show what is done."""
    try:
        return look(kept)
    except NotShown:
        return look(replace(kept, calls=None, has_calls=False))


def _doing_the_same(task: Task, kept: Kept, program: Program, log: OperationLog) -> Kept | None:
    """What is known, if the model still does what it did, on parameters that are sound.

    Its numbers are compared too: they may come from where no operation shows them, as what numpy
    wrote into a tensor, what a distribution keeps for itself, a draw that was the same by chance.
    """
    # The run itself is wanted of conjugate latents alone.
    runs: list[Run] | None = None if program.conjugates is None else []
    graph = traced(task, kept.structure, log, runs=runs, detached=runs is None)
    known = kept.shown_by(log)
    if known is None or not _are_sound(graph.parameters, kept.structure):
        return None
    values = values_of(graph.parameters)
    if disagreements(at_zero(program.graph), graph, values, exactly=True):
        return None
    run = task.args, task.kwargs, kept.structure
    found = program.conjugates
    if found is not None and runs and found.differing(*run, None, runs[0]):
        return None
    if isinstance(task.model, GivenGaussians):
        bent = differing_lines(program.lines, task.model, *run, values, once=True)
        return None if bent else known
    return known


def _on_other_data(
    task: Task, kept: Kept, log: OperationLog, begin: Begin | None = None
) -> tuple[Kept, Program] | None:
    """A program from one run of the model on other data, or on data that were changed.

    With it comes what is known of the model then.

    Args:
        task: What is wanted.
        kept: What is known of the model.
        log: Where the run is noted.
        begin: How parameters get their first values in it; None where they have values.

    Raises:
        NotBegun: If these values are none to begin with.
        NotShown: If the run may do what is known, for all that its calls tell.
    """
    structure, given = kept.structure, kept.task(task)
    if structure.as_run.masked_pairs or structure.random_plates:
        return None
    graph = traced(given, structure, log, kept=kept.selections, begin=begin)
    known = kept.shown_by(log)
    if known is None:
        return None
    if begin is not None:
        structure = begun(structure, graph.parameters)
        graph = replace(graph, structure=structure)
    if not _are_sound(graph.parameters, structure):
        return None
    if not are_possible(log.sites, structure, log.forms):
        return None
    lines: Mapping[str, Line] = {}
    found = None
    if kept.kernels:
        model = kept.references.for_reads(task.model)
        found = Conjugates.of(model, kept.kernels, task.args, task.kwargs, structure)
    if isinstance(given.model, GivenGaussians):
        run = given.model, given.args, given.kwargs, kept.structure
        lines = lines_again(kept.lines, *run, graph, log.sites, bound=not given.look_only)
        alike = Alike() if found is None else found.alike(lines)
        graph = with_lines(given, structure, lines, graph, alike)
    if found is not None:
        graph = found.integrated(graph, task.max_enumeration)
    order = None
    if kept.contraction is not None and kept.members == _members_of(graph):
        order = kept.contraction  # factors without bindings are grouped, and follow, differently
    program = rebuildable(task, decided(given, structure, graph, log, order, kept.operations))
    if kept.bare is not None and lines:
        program = replace(program, lines=lines, bare=kept.bare, conjugates=found)
        program = with_routes(program)
    elif kept.bare is not None and found is not None:
        program = on_conjugates(program, found, kept.bare)
    if task.look_only:
        return known, program
    if kept.bindings is not None and kept.bindings == _bindings_of(graph):
        return known, replace(program, compiled=graph.is_static, is_known=True)
    return known, verified(program)


def _members_of(graph: FactorGraph) -> tuple[tuple[str, ...], ...]:
    """The sites of each group."""
    return tuple(tuple(g.members) for g in graph.groups)


def _bindings_of(graph: FactorGraph) -> list[Any]:
    """How parameters reach the arguments, without the numbers."""
    return [
        (g.members, [(a, form_of_binding(b)) for a, b in g.bindings.items()]) for g in graph.groups
    ]


def _are_sound(parameters: Mapping[str, TracedParameter], structure: Structure) -> bool:
    """Whether the parameters are those that were read, and their values are finite."""
    known = structure.parameters
    return parameters.keys() == known.keys() and all(
        p.unconstrained is known[n].unconstrained
        and not p.is_foreign
        and len(p.declared) < 2
        and p.initial_shape in (None, p.leaf.shape)
        and type(p.constraint) is type(known[n].constraint)
        and is_finite(p.leaf.detach())
        for n, p in parameters.items()
    )
