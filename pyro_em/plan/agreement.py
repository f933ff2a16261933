"""Whether a model still does what its bindings say: a fresh trace beside what they predict."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pyro_em.errors import ModelError
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.graph.gaussian_lines.lines_by_rows import line_of_rows
from pyro_em.graph.gaussian_lines.read_lines import differing_lines
from pyro_em.graph.many_rows.given_rows import some_rows
from pyro_em.graph.many_rows.slices import Slices, on_rows_of
from pyro_em.graph.prediction import disagreements
from pyro_em.graph.structure import Structure
from pyro_em.graph.trace import Resized
from pyro_em.plan.evaluation import Disagreement
from pyro_em.plan.program import Program
from pyro_em.posteriors.continuous.gaussian_steps import at_zero, of_lines
from pyro_em.tracing.freed import return_freed_memory
from pyro_em.tracing.given import GivenGaussians
from pyro_em.tracing.parameters import values_of
from pyro_em.tracing.runs import Run

_FEW = 4096  # rows of a graph that was read by rows with which a fresh trace is compared


def disagreements_of(
    program: Program,
    values: Mapping[str, Tensor] | None = None,
    random_seed: int | None = None,
    current: Mapping[str, Tensor] | None = None,
) -> Disagreement:
    """Where a fresh trace differs from what the bindings predict.

    Args:
        program: A model with its data.
        values: Constrained values to trace at; the current ones where None.
        random_seed: Trace from another random state.
        current: The current ones, where they are known.
    """
    return_freed_memory([group.value for group in program.graph.groups])
    current = values_of(program.graph.parameters) if current is None else current
    predicted_at = {**current, **(values or {})}
    graph, given = program.graph, (program.args, program.structure)
    if program.lines or program.conjugates is not None:
        graph = at_zero(graph)
    slices = Slices.of(program.args, program.kwargs, program.structure) if graph.parted else None
    off: list[tuple[str, str]] = []
    try:
        if slices is not None and program.lines:
            # Each row's latents have other values: all rows are looked at, some at a time.
            for rows in slices:
                own = some_rows(graph, slices.plate, rows)
                lines = {n: line_of_rows(line, rows) for n, line in program.lines.items()}
                there = slices.at(rows)
                found = _in_runs(program, own, lines, there, values, random_seed, predicted_at)
                off += [place for place in found if place not in off]
            return Disagreement(tuple(off))
        if slices is not None:  # a few rows say of all what the model does
            rows = slices.spread(_FEW)
            graph, given = some_rows(graph, graph.parted, rows), slices.at(rows)
        off = _in_runs(program, graph, program.lines, given, values, random_seed, predicted_at)
    except Resized as error:
        return Disagreement((("model", "the size of a plate or a support"),), str(error))
    except ModelError:
        return Disagreement((("model", "its sites"),))
    if program.conjugates is not None and values is not None:
        off += program.conjugates.differing(program.args, program.kwargs, program.structure, values)
    return Disagreement(tuple(off))


def _in_runs(
    program: Program,
    graph: FactorGraph,
    lines: Mapping[str, Line],
    given: tuple[tuple, Structure],
    values: Mapping[str, Tensor] | None,
    random_seed: int | None,
    predicted_at: Mapping[str, Tensor],
) -> list[tuple[str, str]]:
    """Sites and arguments that differ in runs of the model.

    Args:
        program: A model with its data.
        graph: What is predicted of the rows at hand, with Gaussian latents at zero.
        lines: How Gaussian latents enter these rows.
        given: The arguments with these rows, and the skeleton of the model there.
        values: Constrained values at which to run; the current ones where None.
        random_seed: Run from another random state.
        predicted_at: Constrained values of all parameters.
    """
    # One run shows both: at other values of Gaussian latents all but means is as it was.
    at_others = bool(lines) and program.conjugates is None
    runs: list[Run] | None = [] if at_others else None
    fresh = program.fresh_trace(values, random_seed, False, detached=True, given=given, runs=runs)
    moved = of_lines(program.graph) if at_others else ()
    off = disagreements(graph, fresh, predicted_at, moved=moved)
    if lines:
        assert isinstance(program.model, GivenGaussians)
        args, structure = given
        run = (on_rows_of(program.model, structure), args, program.kwargs, structure)
        # Where parameters were moved, thresholds were looked for.
        seen = runs[0] if runs else None
        once = values is None
        found = differing_lines(lines, *run, predicted_at, values, once=once, seen=seen)
        off += [(s, "loc") for s in found]
    return off
