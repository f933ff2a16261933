"""The loop: E-step, M-step, E-step, …, with its promises, its stopping rule and its starts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pyro_em.errors import DataError, DegenerateError, message, sites_in_words, warn
from pyro_em.fitting.beginnings import Beginning, name_of_start
from pyro_em.fitting.em_map import (
    advance,
    advance_compiled,
    after_m_step,
    as_step,
    compiled_iteration,
    e_step,
    enter,
    fell,
    warn_disagreement,
    watched_step,
)
from pyro_em.fitting.em_on_sums import Iteration
from pyro_em.fitting.result import EMStatus, EMStep
from pyro_em.fitting.run import Deferred, Iterate, Left, Run, Seen, Settings
from pyro_em.fitting.squarem import PLAIN_STEPS, accelerate
from pyro_em.fitting.stopping import should_stop
from pyro_em.plan.hyperparameters import run_away
from pyro_em.plan.planner import distrust
from pyro_em.plan.program import Program
from pyro_em.posteriors.posterior import Posterior
from pyro_em.tracing.parameters import restore, snapshot, values_of
from pyro_em.updates.m_step import apply_floors

_MANY_HANDOVERS = 3


def run_start(program: Program, settings: Settings, beginning: Beginning, init: Any, r: int) -> Run:
    """Run EM from one start until something stops it.

    Args:
        program: The model with its data.
        settings: What all starts share.
        beginning: Makes the first parameters.
        init: The start, as `Beginning.write` takes it.
        r: The start's number; only the first one may raise.

    Returns:
        The run; the parameters in the store are those of its last complete step.
    """
    run, iteration = _set_out(program, settings, beginning, init, r)
    if run.last is not None:
        _proceed(program, settings, run, iteration, r)
    return run


def short_run(program: Program, settings: Settings, beginning: Beginning, init: Any, r: int) -> Run:
    """Run EM from one start for as many steps as ``settings`` say, for `continue_run` to go on."""
    run, iteration = _set_out(program, settings, beginning, init, r)
    if run.last is not None:
        _iterate(program, settings, run, iteration, r)
    return run


def lengthen_run(program: Program, settings: Settings, run: Run, r: int) -> None:
    """Run EM on from where a short run was left for as many steps in all as ``settings`` say."""
    if _taken_up(program, run):
        _iterate(program, settings, run, compiled_iteration(program), r)


def continue_run(program: Program, settings: Settings, run: Run, r: int) -> None:
    """Run EM on from where a short run was left until something stops it."""
    if _taken_up(program, run):
        _proceed(program, settings, run, compiled_iteration(program), r)


def _taken_up(program: Program, run: Run) -> bool:
    """Whether a run can go on; its parameters are in the store then."""
    if run.last is None or run.status is not EMStatus.MAX_STEPS:
        return False
    try:
        revive(program, run)
    except KeyboardInterrupt:
        run.status = EMStatus.INTERRUPTED
        return False
    return True


def revive(program: Program, run: Run) -> None:
    """Put a run's parameters into the store, and make the E-step at them again if it was let go."""
    restore(program.graph.parameters, run.parameters)
    if isinstance(run.last, Left):
        at = first_e_step(program, compiled_iteration(program))
        at.massless = run.last.massless
        run.record(program, at)


def _set_out(
    program: Program, settings: Settings, beginning: Beginning, init: Any, r: int
) -> tuple[Run, Iteration | None]:
    """The first parameters of a start and the E-step at them; without it, the status says why."""
    run = Run(snapshot(program.graph.parameters), name=name_of_start(init))
    run.initial_values = values_of(program.graph.parameters)
    iteration = compiled_iteration(program)
    try:
        beginning.write(init)
        apply_floors(program.graph, program.updates)
        at = first_e_step(program, iteration)
    except (DegenerateError, DataError) as error:
        if r == 0:
            restore(program.graph.parameters, run.parameters)
            raise
        run.status, run.message = EMStatus.DEGENERATE, str(error)
        return run, iteration
    except KeyboardInterrupt:
        restore(program.graph.parameters, run.parameters)
        if r == 0:
            raise
        run.status = EMStatus.INTERRUPTED
        return run, iteration
    run.record(program, at)
    run.began_symmetric = _is_symmetric(at, iteration)
    return run, iteration


def _proceed(
    program: Program, settings: Settings, run: Run, iteration: Iteration | None, r: int
) -> None:
    """Steps to the end, which a fresh trace of the model confirms."""
    if settings.acceleration is None:
        _iterate(program, settings, run, iteration, r)
    else:
        _alternate(program, settings, run, iteration, r)
    if settings.callbacks and run.status is not EMStatus.INTERRUPTED and program.is_changed():
        read_anew(program, run)  # after the last step
    if program.compiled and run.num_steps > run.verify_at + 1 and run.verified is not None:
        try:
            off = program.disagreements()
        except KeyboardInterrupt:
            run.status = EMStatus.INTERRUPTED
            return
        if off:
            warn_disagreement(off[0], "at the end of the fit it was not")
            distrust(program, off)
            run.go_back(program)
            run.record(program, e_step(program, run.num_steps))
            _iterate(program, settings, run, None, r)
    if run.status in (EMStatus.CONVERGED, EMStatus.ROUNDING, EMStatus.MAX_STEPS):
        away = run_away(program.graph, run.initial_values)
        if away:
            run.status, run.message = EMStatus.UNBOUNDED, away
    if not run.began_symmetric or run.last is None or run.status is EMStatus.INTERRUPTED:
        return
    # A prior, a constraint, a constant or a fixed parameter of one component may have parted them.
    if _is_symmetric(run.last, None if program.readings else iteration):
        if settings.bar.starts == 1:
            _warn_symmetric(run.last.q)
        if run.status in (EMStatus.CONVERGED, EMStatus.ROUNDING):
            run.status = EMStatus.SYMMETRIC


def first_e_step(program: Program, iteration: Iteration | None) -> Iterate:
    """The E-step at the parameters in the store, compiled where that is possible."""
    at = None if iteration is None else enter(program, iteration)
    return e_step(program) if at is None else at


def _is_symmetric(at: Iterate, iteration: Iteration | None) -> bool:
    """`is_symmetric`, without tables where the arguments already tell the components apart."""
    if iteration is not None and isinstance(at, Deferred):
        return not iteration.tells_apart(at.point) and is_symmetric(at.q)
    return is_symmetric(at.q)


def _iterate(
    program: Program, settings: Settings, run: Run, iteration: Iteration | None, r: int
) -> None:
    """Steps from the run's last iterate until one of the rules stops the run."""
    run.status = EMStatus.MAX_STEPS
    handovers = 0
    if iteration is not None and program.readings:
        iteration = compiled_iteration(program)  # the caller's is of data that were changed since
    try:
        while run.num_steps < settings.max_steps:
            if settings.callbacks and program.is_changed():
                read_anew(program, run)  # a callback wrote data: go on with them as they are
                iteration = compiled_iteration(program)
            if iteration is not None and program.compiled and handovers < _MANY_HANDOVERS:
                if settings.callbacks and run.seen is not None and run.seen.is_changed():
                    iteration = None  # a callback writes parameters: full steps from here
                    continue
                if not isinstance(run.last, Deferred):
                    again = enter(program, iteration)
                    if again is not None:
                        again.massless = run.last.massless if run.last is not None else {}
                        run.record(program, again)
                if isinstance(run.last, Deferred) and settings.callbacks:
                    done = _watched_step(program, settings, run, iteration, r)
                    if done is not None:
                        if done:
                            return
                        continue
                    handovers += 1
                elif isinstance(run.last, Deferred):
                    if advance_compiled(program, iteration, settings, run, r):
                        return
                    handovers += 1
            if _full_step(program, settings, run, r):
                return
    except (DegenerateError, DataError) as error:
        run.status, run.message = EMStatus.DEGENERATE, str(error)
    except KeyboardInterrupt:
        run.status = EMStatus.INTERRUPTED
        restore(program.graph.parameters, run.parameters)


def read_anew(program: Program, run: Run) -> None:
    """Read the model on the data as they are now, and make the E-step there."""
    program.reread()
    run.record(program, first_e_step(program, compiled_iteration(program)))
    run.plain_from = run.verify_at = run.num_steps
    run.verified = None


def _alternate(
    program: Program, settings: Settings, run: Run, iteration: Iteration | None, r: int
) -> None:
    """A few plain steps, cycles of SQUAREM until they promise little, plain steps that may stop."""
    while True:
        few = min(settings.max_steps, run.num_steps + PLAIN_STEPS)
        _iterate(program, replace(settings, max_steps=few), run, iteration, r)
        if run.status is not EMStatus.MAX_STEPS or run.num_steps >= settings.max_steps:
            return
        quick = program.compiled and not settings.callbacks
        accelerate(program, settings, run, iteration if quick else None, r)
        if run.status is not EMStatus.MAX_STEPS:
            return


def _full_step(program: Program, settings: Settings, run: Run, r: int) -> bool:
    """One step of the generic path; returns whether the run is over."""
    assert run.last is not None
    before = run.last.judged() if isinstance(run.last, Deferred) else run.last
    first = run.num_steps == run.verify_at and settings.verify
    # Who writes parameters between steps may lower the objective; that is no rounding.
    touched = bool(settings.callbacks) and run.seen is not None and run.seen.is_changed()
    at = advance(program, before, index=run.num_steps, verify=first)
    if not touched and fell(program, before, at):
        restore(program.graph.parameters, run.parameters)
        run.status = EMStatus.FELL
        return True
    bound = after_m_step(before, at.evaluation.tables)
    return _complete(program, settings, run, before, bound, at, r)


def _watched_step(
    program: Program, settings: Settings, run: Run, iteration: Iteration, r: int
) -> bool | None:
    """One compiled step that callbacks see; None where a full step is due."""
    before = run.last
    assert isinstance(before, Deferred)
    first = run.num_steps == run.verify_at and settings.verify
    found = watched_step(program, iteration, before, verify=first)
    if found is None:
        return None
    at, bound = found
    return _complete(program, settings, run, before, bound, at, r, at.point.expectation.noise)


def _complete(
    program: Program,
    settings: Settings,
    run: Run,
    before: Iterate,
    bound: float,
    at: Iterate,
    r: int,
    noise: float = 0.0,
) -> bool:
    """Note a step whose parameters are in the store; returns whether the run is over."""
    step = as_step(program, run.num_steps, before, bound, settings.begin)
    run.entering.append(step.elbo)
    run.after.append(bound)
    run.record(program, at)
    if run.num_steps == run.verify_at + 1:
        run.verified = run.parameters
    settings.bar.update(r, at.objective)
    if any(callback(step) is True for callback in settings.callbacks):
        run.status = EMStatus.STOPPED
        return True
    path = [*run.plain_path(), at.objective]
    status = should_stop(path, settings.tol, program.graph.eps, noise)
    if status is not None and program.may_stop(run.num_steps):
        run.status = status
        return True
    return False


def endless_steps(program: Program) -> Iterator[EMStep]:
    """Steps without an end; their parameters are in the store when they are yielded.

    Args:
        program: The model with its data.

    Yields:
        Each step, on the data as they are when it is asked for. The end comes only if the objective
        falls on data and from parameters that nobody has changed, which is said in a warning.
    """
    begin = time.perf_counter()
    iteration = compiled_iteration(program)
    at, handovers, verify_at = first_e_step(program, iteration), 0, 0
    seen = Seen(program, snapshot(program.graph.parameters))
    for index in itertools.count():
        touched = seen.is_changed()
        if program.is_changed():
            program.reread()
            iteration = compiled_iteration(program)
            at, handovers, verify_at, touched = first_e_step(program, iteration), 0, index, False
        elif touched:
            iteration = None  # who watches writes parameters: full steps from here on
        origin, before, found = snapshot(program.graph.parameters), at, None
        if iteration is not None and isinstance(at, Deferred):
            found = watched_step(program, iteration, at, verify=index == verify_at)
        if found is not None:
            at, bound = found
        else:
            before = at.judged() if isinstance(at, Deferred) else at
            full = advance(program, before, index=index, verify=index == verify_at)
            if not touched and fell(program, before, full):
                restore(program.graph.parameters, origin)
                return
            bound = after_m_step(before, full.evaluation.tables)
            handovers += 1
            if not program.compiled or handovers >= _MANY_HANDOVERS:
                iteration = None
            at = (None if iteration is None else enter(program, iteration)) or full
        seen = Seen(program, snapshot(program.graph.parameters))
        yield as_step(program, index, before, bound, begin)


def is_symmetric(q: Posterior) -> bool:
    """Whether the data say nothing of any latent: each of its values explains them equally well."""
    if not q.graph.latents:
        return False
    for name, mask in q.graph.structure.masked_pairs.items():
        if f"{name}_unobserved" in q.graph.latents and bool(mask.any()):
            return False  # rows where it is observed tell its values apart
    informative = False
    for group, table in zip(q.graph.groups, q.tables, strict=True):
        if not group.observed or (group.mask is not None and not bool(group.mask.any())):
            continue
        for i, dims in enumerate(group.dims):
            axes = [k for k, d in enumerate(dims) if d in q.graph.latents and table[i].shape[k] > 1]
            if not axes:
                continue
            informative = True
            low, high = table[i].amin(axes), table[i].amax(axes)
            near = high - low <= 1e-9 * high.abs().clamp(min=1.0)
            if not bool((near | (low == high)).all()):
                return False
    return informative


def _warn_symmetric(q: Posterior) -> None:
    warn(
        message(
            sites_in_words(list(q.graph.latents)),
            "the start is symmetric: every value explains the data equally well.",
            "EM cannot leave such a saddle; all components stay equal",
            [
                "fit(..., init='random', seed=0)",
                "give the components different initial values",
            ],
        ),
    )
