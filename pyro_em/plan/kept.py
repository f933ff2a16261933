"""Readings that are kept between calls, so that a model is read once for each form of its data.

What a reading found out (the sites, what reads what, how parameters reach the densities, that no
elements of a plate read each other, ...) follows from what the model does, not from the numbers that
it is given. So a later call runs the model once, with its latents enumerated, and notes every
operation: if it did the same as when it was read, on parameters and data that are sound, all that was
found out still holds. Anything else is read anew, from the beginning.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyro_em.errors import PyroEMError
from pyro_em.graph.factors import FactorGraph, form_of_binding
from pyro_em.graph.structure import Structure, form_of
from pyro_em.graph.trace import note_sites, run_enumerated
from pyro_em.plan.building import Task, are_possible, decided, traced, verify
from pyro_em.plan.program import Program
from pyro_em.portable import StaysHere
from pyro_em.tracing.dependences import names_of, numbers_in
from pyro_em.tracing.operations import OperationLog
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.runs import is_stored

_MOST = 8  # forms of data that are remembered


@dataclass(frozen=True, eq=False)
class Kept(StaysHere):
    """One reading.

    Attributes:
        structure: The skeleton.
        operations: What its enumerated run did.
        numbers: What those names of the model stood for that are numbers or texts.
        program: All that was decided; None where only an E-step was wanted.
    """

    structure: Structure
    operations: tuple[Any, ...]
    numbers: Mapping[str, Any]
    program: Program | None


class Readings(StaysHere):
    """The latest readings of one model, by the form of their data."""

    def __init__(self) -> None:
        self._by_form: dict[Hashable, Kept] = {}

    def forget(self) -> None:
        """Forget all of them."""
        self._by_form.clear()

    def keep(self, task: Task, program: Program) -> None:
        """Remember a reading, whole or for an E-step only."""
        form = _form(task)
        numbers = numbers_in(names_of(task.model, task.args, task.kwargs))
        before = self._by_form.pop(form, None)
        # A copy: what the caller notes on its own, or comes to distrust, is not remembered.
        whole = None if program.look_only else copy.copy(program)
        if whole is None and before is not None and _is_of(before, program):
            whole = before.program
        if whole is not None:  # a program holds its data: one at a time
            self._by_form = {f: replace(k, program=None) for f, k in self._by_form.items()}
        self._by_form[form] = Kept(program.structure, program.operations, numbers, whole)
        while len(self._by_form) > _MOST:
            del self._by_form[next(iter(self._by_form))]

    def again(self, task: Task) -> Program | None:
        """The program for a task, from what is remembered; None where it has to be read anew."""
        kept = self._by_form.get(_form(task))
        if kept is None or not is_stored(kept.structure.parameters):
            return None
        names = names_of(task.model, task.args, task.kwargs)
        if numbers_in(names) != kept.numbers:
            return None
        try:
            log = task.log(names)
            program = kept.program
            if program is not None and _is_on_the_same_data(program, task):
                return copy.copy(program) if _does_the_same(task, kept, log) else None
            return _on_other_data(task, kept, log)
        except PyroEMError:  # reading it anew says what is wrong
            return None


def _is_of(kept: Kept, program: Program) -> bool:
    """Whether a reading is that of a program: the same operations on the same parameters."""
    own = kept.structure.parameters
    others = program.structure.parameters
    return kept.operations == program.operations and all(
        own[n].unconstrained is p.unconstrained for n, p in others.items()
    )


def _form(task: Task) -> Hashable:
    parts, keywords = form_of(task.args, task.kwargs)
    return parts, keywords, id(task.model), torch.get_default_dtype()


def _is_on_the_same_data(program: Program, task: Task) -> bool:
    given = (*task.args, *task.kwargs.values())
    before = (*program.args, *program.kwargs.values())
    same = len(given) == len(before) and all(a is b for a, b in zip(given, before, strict=True))
    return same and program.compiled and not program.is_changed()


def _does_the_same(task: Task, kept: Kept, log: OperationLog) -> bool:
    """Whether the model still does what it did, on parameters that are sound."""
    structure = kept.structure
    run = run_enumerated(
        task.model, task.args, task.kwargs, structure, limit=task.limit, reading=log
    )
    note_sites(log, run)
    return log.finished() == kept.operations and _are_sound(run.parameters, structure)


def _on_other_data(task: Task, kept: Kept, log: OperationLog) -> Program | None:
    """A program from one run of the model on other data, or on data that were changed."""
    structure, before = kept.structure, kept.program
    if structure.by_numbers or structure.random_plates:
        return None
    graph = traced(task, structure, log)
    if log.finished() != kept.operations or not _are_sound(graph.parameters, structure):
        return None
    if not are_possible(log.sites, structure):
        return None
    program = decided(task, structure, graph, log)
    if task.look_only:
        return program
    if before is not None and before.compiled and _bindings_of(before.graph) == _bindings_of(graph):
        program.compiled = graph.is_static
    else:
        verify(program)
    return program


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
        and type(p.constraint) is type(known[n].constraint)
        and bool(torch.isfinite(p.leaf).all())
        for n, p in parameters.items()
    )
