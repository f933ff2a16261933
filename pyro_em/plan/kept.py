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
  declared otherwise: `are_possible`, `read_again`;
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
from dataclasses import replace
from typing import Any, TypeVar

import torch

from pyro_em.errors import PyroEMError
from pyro_em.graph.conjugate_children.conjugate_record import NotConjugate
from pyro_em.graph.findings.initial import tell_of_starts
from pyro_em.graph.findings.readable import refuse_inference_mode
from pyro_em.graph.gaussian_lines.lines import NotLinear
from pyro_em.graph.stacking import forms_of_bindings
from pyro_em.graph.structure import form_of
from pyro_em.plan.first_values import (
    NotBegun,
    may_begin_enumerated,
    undone_on_failure,
    with_first_values,
)
from pyro_em.plan.kept_reading import Kept, NotShown
from pyro_em.plan.program import Program
from pyro_em.plan.read_again import doing_the_same, is_on_the_same_data, on_other_data
from pyro_em.plan.task import Task
from pyro_em.portable import StaysHere
from pyro_em.posteriors.continuous.gaussian_components import NotSeparate
from pyro_em.posteriors.states.kept_layouts import forget_layouts
from pyro_em.tracing.loops import NotVectorized
from pyro_em.tracing.names import names_of, numbers_in
from pyro_em.tracing.runs import Begin
from pyro_em.tracing.stored import is_stored

_Found = TypeVar("_Found")

_MOST = 8  # forms of data that are remembered of one model

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
        readings[form] = Kept.of(task, program, readings.pop(form, None))
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
        form, readings = _form(task), self._of(task.model)
        kept = readings.get(form)
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
                program = self._begun_enumerated(task, kept, form, names, first_look)
                if program is not None:
                    return program
                begun = with_first_values(
                    task,
                    kept.structure,
                    first_look=first_look,
                    is_held=kept.is_held,
                    few=kept.bare is None,
                )
                if begun is None:
                    return None
                kept, latest = replace(kept, structure=begun), None
                readings[form] = kept
            if latest is not None and is_on_the_same_data(latest, kept, task):
                # What is read is known: only the graph is wanted, without its bindings.
                again = replace(task, look_only=True)

                def same(kept: Kept) -> Kept | None:
                    log = again.log(names, noting=kept.noting)
                    return doing_the_same(kept.task(again), kept, latest, log)

                known = _shown(kept, same)
                if known is None:
                    return None
                readings[form] = known
                return replace(latest, is_known=True)
            found = _shown(kept, lambda k: on_other_data(task, k, task.log(names, True, k.noting)))
        except (PyroEMError, NotVectorized, NotLinear, NotSeparate, NotConjugate):
            return None  # reading it anew says what is wrong
        return None if found is None else self._noted(task, form, *found)

    def _begun_enumerated(
        self, task: Task, kept: Kept, form: Hashable, names: Mapping[str, Any], first_look: bool
    ) -> Program | None:
        """The program from the one run in which parameters get their first values; None otherwise."""
        if not kept.is_held or kept.kernels:
            return None
        if not may_begin_enumerated(kept.structure, kept.gaussians):
            return None
        begin = Begin(keep_random_state=not first_look)

        def begun(kept: Kept) -> tuple[Kept, Program]:
            with undone_on_failure():
                found = on_other_data(task, kept, task.log(names, True, kept.noting), begin)
                if found is None:
                    raise NotBegun
                return found

        try:
            kept, program = _shown(kept, begun)
        except (PyroEMError, NotBegun):
            return None  # a plain run says what is wrong, or begins otherwise
        tell_of_starts(program.graph.parameters)
        return self._noted(task, form, replace(kept, structure=program.structure), program)

    def _noted(self, task: Task, form: Hashable, kept: Kept, program: Program) -> Program:
        """The program, after it and what a later run has found are remembered."""
        if not (task.look_only or program.is_known):  # whose bindings are those that are kept
            bindings = forms_of_bindings(program.graph.groups) if program.compiled else None
            kept = replace(kept, bindings=bindings)
        self._of(task.model)[form] = kept
        self._keep_program(program)
        return program

    def _keep_program(self, program: Program) -> None:
        if not program.look_only:
            self.latest = program


def _form(task: Task) -> Hashable:
    parts, keywords = form_of(task.args, task.kwargs)
    budgets = (task.max_plate_nesting, task.max_enumeration)
    return parts, keywords, budgets, torch.get_default_dtype()


def _shown(kept: Kept, look: Callable[[Kept], _Found]) -> _Found:
    """What a look at a run finds; at its operations where its calls do not show what is done."""
    try:
        return look(kept)
    except NotShown:
        return look(replace(kept, calls=None, has_calls=False))
