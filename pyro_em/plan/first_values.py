"""How parameters get their first values when a model is run whose form was seen before.

Pyro's first run of a model gives them theirs, and draws all latents; what is random in initial values
follows from the random state that it meets. So does the first run here: a plain one, or, where it can
be the same in every draw, the enumerated run that is due in any case.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import pyro
import torch

from pyro_em.graph.findings.initial import forget_bad_starts, start_problems, tell_of_starts
from pyro_em.graph.findings.value_checks import parameter_problems
from pyro_em.graph.structure import Structure
from pyro_em.plan.loops import needs_all_steps
from pyro_em.plan.task import Task
from pyro_em.tracing.allocation import NumbersNeeded
from pyro_em.tracing.loops import NotVectorized, Series, vectorizing
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.randomness import random_state, set_random_state
from pyro_em.tracing.runs import Run, RunFailed, first_run_again
from pyro_em.tracing.stored import forget_all_but


def with_first_values(
    task: Task, structure: Structure, *, first_look: bool, is_held: bool, few: bool
) -> Structure | None:
    """A skeleton with parameters that a plain run has given their values; None if they are others.

    Args:
        task: The model with its data.
        structure: The skeleton that is known of it.
        first_look: Whether the run may advance the random state, as Pyro's first run does.
        is_held: Whether a look at the numbers of an enumerated run finds all that validation finds.
        few: Whether few steps of a long loop over indices do, as in the first run.
    """
    unrolling = structure.series
    if unrolling is not None and needs_all_steps(unrolling.template):
        return None
    series = None if unrolling is None else Series(unrolling.way, few=few)
    begin = random_state()
    try:
        with vectorizing(series):
            plain = first_run_again(
                task.model,
                task.args,
                task.kwargs,
                keep_random_state=not first_look,
                shadowed=structure.unchecked,
                validated=not is_held,
                begin=begin,
            )
    except (RunFailed, NumbersNeeded, NotVectorized):
        return None
    tell_of_starts(plain.parameters)
    starts = start_problems(plain.parameters)
    if parameter_problems(plain, starts) or plain.cleared or plain.changed_masks:
        forget_bad_starts(plain.parameters, starts)
        set_random_state(begin)
        return None
    return _with_parameters(structure, plain.parameters)


def _with_parameters(
    structure: Structure, parameters: Mapping[str, TracedParameter]
) -> Structure | None:
    """A skeleton with these parameters; None where they are not of the kind of its own."""
    known = structure.parameters
    same = parameters.keys() == known.keys() and all(
        p.leaf.shape == known[n].leaf.shape
        and p.leaf.dtype == known[n].leaf.dtype
        and p.leaf.device == known[n].leaf.device
        and (p.constraint is known[n].constraint or repr(p.constraint) == repr(known[n].constraint))
        for n, p in parameters.items()
    )
    return replace(structure, parameters=parameters) if same else None


def may_begin_enumerated(structure: Structure, gaussians: Collection[str]) -> bool:
    """Whether an enumerated run can draw what a plain run would, and nothing is there yet.

    A discrete latent whose distribution reads another one is drawn at one value of that in a plain
    run. Of Gaussian latents, which have values here, shapes say how many numbers it would draw.

    Args:
        structure: The skeleton of the model that is run.
        gaussians: Its Gaussian latents.
    """
    store, series = pyro.get_param_store(), structure.series
    if series is not None and (not gaussians or needs_all_steps(series.template)):
        return False
    as_run = structure.as_run  # of a loop over indices its template, which names no single step
    return (
        bool(structure.parameters)
        and not (gaussians and as_run.latents)
        and not (as_run.unchecked or as_run.barren or as_run.masked_pairs)
        and not (as_run.random_plates or as_run.kept_values)
        and all(as_run.sites[z].scope == (z,) for z in as_run.latents)
        and not any(
            n in store or isinstance(p.unconstrained, torch.nn.Parameter)
            for n, p in structure.parameters.items()
        )
    )


class NotBegun(Exception):
    """What has begun in an enumerated run is no first run of the model that is known."""


@contextmanager
def undone_on_failure() -> Iterator[None]:
    """A block in which parameters may get first values: any exception leaves all as it was."""
    known, begin = frozenset(pyro.get_param_store()._params), random_state()
    try:
        yield
    except BaseException:
        forget_all_but(known)
        set_random_state(begin)
        raise


def begun(structure: Structure, parameters: Mapping[str, TracedParameter]) -> Structure:
    """A skeleton with the parameters that an enumerated run has given their values.

    Raises:
        NotBegun: If they are others, or there is anything to say of their values.
    """
    found = _with_parameters(structure, parameters)
    if found is None or parameter_problems(Run({}, dict(parameters))):
        raise NotBegun
    return found
