"""A model that was read before, run once more: on the same data, or on others of the same form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pyro_em.distributions import are_finite
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.findings.possible import are_possible
from pyro_em.graph.gaussian_lines.kept_lines import lines_again
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.graph.gaussian_lines.lines_by_rows import are_of_rows
from pyro_em.graph.gaussian_lines.read_lines import differing_lines
from pyro_em.graph.laid_out import LaidOut
from pyro_em.graph.many_rows.given_rows import says_of_all
from pyro_em.graph.many_rows.slices import Slices
from pyro_em.graph.prediction import disagreements
from pyro_em.graph.stacking import forms_of_bindings
from pyro_em.graph.structure import Structure
from pyro_em.plan.building import rebuildable
from pyro_em.plan.conjugates import Conjugates
from pyro_em.plan.continuous import on_conjugates, with_lines, with_routes
from pyro_em.plan.decisions import decided
from pyro_em.plan.first_values import begun
from pyro_em.plan.kept_reading import Kept, LaidProgram, members_of
from pyro_em.plan.program import Program
from pyro_em.plan.task import Task, run_of, traced
from pyro_em.plan.verification import verified
from pyro_em.posteriors.continuous.gaussian_components import Alike
from pyro_em.posteriors.continuous.gaussian_steps import at_zero
from pyro_em.tracing.calls import CallLog
from pyro_em.tracing.given import GivenGaussians, without_values
from pyro_em.tracing.operations import OperationLog
from pyro_em.tracing.parameters import TracedParameter, values_of
from pyro_em.tracing.runs import Begin, Run
from pyro_em.tracing.stored import is_stored


def is_on_the_same_data(program: Program, kept: Kept, task: Task) -> bool:
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


def doing_the_same(task: Task, kept: Kept, program: Program, log: OperationLog) -> Kept | None:
    """What is known, if the model still does what it did, on parameters that are sound.

    Its numbers are compared too: they may come from where no operation shows them, as what numpy
    wrote into a tensor, what a distribution keeps for itself, a draw that was the same by chance.
    """
    is_integrated = program.conjugates is not None or isinstance(task.model, GivenGaussians)
    if program.graph.parted and not is_integrated:
        slices = Slices.of(task.args, task.kwargs, kept.structure)
        if slices is not None:
            return _doing_the_same_by_rows(task, kept, program, log, slices)
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


def _doing_the_same_by_rows(
    task: Task, kept: Kept, program: Program, log: OperationLog, slices: Slices
) -> Kept | None:
    """As `doing_the_same`, of a model that was read some rows at a time, which are compared so."""

    def fresh(own: tuple, part: Structure, log: OperationLog | None = None) -> FactorGraph:
        return traced(replace(task, args=own), part, log, detached=True, may_part=False)

    graph = fresh(*slices.at(slices.first), log)
    known = kept.shown_by(log)
    if known is None or not _are_sound(graph.parameters, kept.structure):
        return None
    values = values_of(graph.parameters)
    same = says_of_all(at_zero(program.graph), slices, fresh, values, exactly=True)
    return known if same else None


def on_other_data(
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
    by_calls = given.look_only and begin is None and isinstance(log, CallLog)
    laid, layout = kept.laid if by_calls else None, None
    if laid is not None:
        seen = run_of(given, structure, log)
        known = kept.shown_by(log)  # before anything is made of it
        graph = laid.layout.graph(structure, seen)
    else:
        is_whole = by_calls and Slices.of(given.args, given.kwargs, structure) is None
        runs: list[Run] | None = [] if is_whole else None
        graph = traced(given, structure, log, kept=kept.selections, begin=begin, runs=runs)
        known = kept.shown_by(log)
        if runs and known is not None and known.calls is not None:
            layout = LaidOut.found(graph, runs[0])
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
        run = given.model, given.args, given.kwargs, structure
        lines = lines_again(kept.lines, *run, graph, log.sites, bound=not given.look_only)
        if graph.parted and not are_of_rows(lines):
            return None  # it was run on some rows at a time, without their means
        alike = Alike() if found is None else found.alike(lines)
        graph = with_lines(given, structure, lines, graph, alike)
    if found is not None:
        graph = found.integrated(graph, task.max_enumeration)
    order, notes = None, None
    if laid is not None and not graph.missing:
        order, notes = laid.contraction, laid.notes
    elif kept.contraction is not None and kept.members == members_of(graph):
        order = kept.contraction  # factors without bindings are grouped, and follow, differently
    program = decided(given, structure, graph, log, order, kept.operations, notes)
    if layout is not None:
        known = replace(known, laid=LaidProgram(layout, program.contraction, program.notes))
    program = rebuildable(task, program)
    if kept.bare is not None and lines:
        program = replace(program, lines=lines, bare=kept.bare, conjugates=found)
        program = with_routes(program)
    elif kept.bare is not None and found is not None:
        program = on_conjugates(program, found, kept.bare)
    if task.look_only:
        return known, program
    if kept.bindings is not None and kept.bindings == forms_of_bindings(graph.groups):
        return known, replace(program, compiled=graph.is_static, is_known=True)
    return known, verified(program)


def _are_sound(parameters: Mapping[str, TracedParameter], structure: Structure) -> bool:
    """Whether the parameters are those that were read, and their values are finite."""
    known = structure.parameters
    same = parameters.keys() == known.keys() and all(
        p.unconstrained is known[n].unconstrained
        and not p.is_foreign
        and len(p.declared) < 2
        and p.initial_shape in (None, p.leaf.shape)
        and type(p.constraint) is type(known[n].constraint)
        for n, p in parameters.items()
    )
    return same and are_finite([p.leaf for p in parameters.values()])
