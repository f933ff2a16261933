"""The loop: E-step, M-step, E-step, …, with its stopping rule."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator

from pyro_em.errors import DataError, DegenerateError
from pyro_em.fitting.results.history import EMStatus, EMStep
from pyro_em.fitting.steps.em_map import values_at
from pyro_em.fitting.steps.em_on_sums import SumsPoint
from pyro_em.fitting.steps.guarded import Fell, Guarded, Step
from pyro_em.fitting.steps.point import Point, Values
from pyro_em.fitting.steps.run import EMRun, Settings
from pyro_em.fitting.steps.stopping import crawls, should_stop
from pyro_em.plan.hyperparameters import run_away
from pyro_em.plan.program import Program
from pyro_em.tracing.parameters import restore, snapshot, write


def iterate(
    em: Guarded, settings: Settings, run: EMRun, r: int, until: float = math.inf
) -> Point | None:
    """Steps from where a run stands until a rule stops it; then its parameters are in the store.

    Args:
        em: The map.
        settings: Those of the fit.
        run: Where it stands.
        r: The number of the start.
        until: How many complete steps it pauses at.

    Returns:
        Where it pauses, as steps go on from there; None where a rule or an error has stopped it.
    """
    keeper = settings.keeper
    if run.is_resumed:
        run.is_resumed = False
    else:
        run.status, run.judges, em.handovers = EMStatus.MAX_STEPS, False, 0
    try:
        while len(run.entering) < until and not _is_over(em, settings, run):
            # Who keeps where runs stand has to see the last step as if others followed it.
            is_last = settings.max_steps - len(run.entering) == 1 and keeper is None
            step = advance(em, run, bool(settings.callbacks), settings.verify, is_last)
            if settings.bar.bar is not None:
                settings.bar.update(r, step.after.objective)
            if settings.callbacks and calls_stop(em, settings, run, step):
                run.status = EMStatus.STOPPED
            if keeper is not None:
                keeper.after_step(em, run)
    except Fell:
        run.status = EMStatus.FELL
    except (DegenerateError, DataError) as error:
        run.status, run.message = EMStatus.DEGENERATE, str(error)
    except KeyboardInterrupt:
        run.status = EMStatus.INTERRUPTED
    if keeper is not None:
        keeper.at_rest(em, run)
    pauses = len(run.entering) >= until and run.status is EMStatus.MAX_STEPS
    at = run.last if pauses else None
    settle(em, run)
    return at


def _is_over(em: Guarded, settings: Settings, run: EMRun) -> bool:
    """Whether no step follows the last one; the run's status says why."""
    if run.status is EMStatus.STOPPED:
        return True
    if settings.tol and run.judges and run.last is not None:
        path = [*run.plain_path(), run.last.objective]
        status = should_stop(path, settings.tol, em.program.graph.eps, run.last.noise)
        if status is not None and em.program.may_stop(len(run.entering)):
            run.status = status
            return True
        if crawls(path, settings.tol) and has_run_away(em.program, run, values_at(run.last)):
            return True
    return len(run.entering) >= settings.max_steps


def has_run_away(program: Program, run: EMRun, values: Values) -> bool:
    """Whether there is no maximum, by where the parameters have come; the run says so then."""
    away = run_away(program.graph, run.initial_values, values)
    if away:
        run.status, run.message = EMStatus.UNBOUNDED, away
    return bool(away)


def advance(
    em: Guarded, run: EMRun, is_watched: bool, verify: bool = True, is_last: bool = False
) -> Step:
    """One step of a run, noted in it.

    Args:
        em: The map.
        run: Where it stands.
        is_watched: Whether somebody looks at parameters and data between steps, and may write them.
        verify: Whether the step at which a run is verified is held against a fresh trace of the model.
        is_last: Whether no other follows.
    """
    touched = is_watched and _is_touched(em, run)
    assert run.last is not None
    index = len(run.entering)
    is_due = index == run.verify_at and not run.verifies_later
    last = is_last and not (is_watched or is_due)
    held = run.held if last else None
    step = em.step(run.last, index, verify=is_due and verify, touched=touched, last=last, held=held)
    is_public = is_watched or is_due or last
    if is_public and not step.is_public:
        em.publish(step, was_public=is_watched and run.recorded is step.before)
    run.take(step.before.objective, step.bound, step.after)
    if is_public or not isinstance(step.after, SumsPoint):
        run.record(em.program, step.after)
    if is_due:
        run.note_verified()
    return step


def _is_touched(em: Guarded, run: EMRun) -> bool:
    """Whether somebody has written parameters; where data were written, the model is read anew."""
    if em.program.is_changed():
        read_anew(em, run)
        return False
    touched = run.seen is not None and run.seen.is_changed()
    if touched:
        em.stay_sound()
    return touched


def read_anew(em: Guarded, run: EMRun) -> None:
    """Read the model on the data as they are now, and make the E-step there."""
    em.reread()
    at = em.e_step()
    run.record(em.program, at)
    run.plain_from = run.verify_at = run.num_steps
    run.verified, run.verifies_later = None, False


def settle(em: Guarded, run: EMRun, *, anew: bool = True) -> bool:
    """Put a run's parameters into the store, whole, even if an interrupt comes in between.

    Args:
        em: The map.
        run: Where it stands.
        anew: Whether the E-step is made again at what the store holds, where a transform may round.

    Returns:
        Whether there was an interrupt; the run's status says so then.
    """
    interrupted = False
    for last in (False, True):
        try:
            if run.recorded is run.last:
                restore(em.program.graph.parameters, run.parameters)
            elif isinstance(run.last, SumsPoint) and anew:
                run.record(em.program, em.published(run.last))
            elif run.last is not None:
                write(em.program.graph.parameters, values_at(run.last))
                run.record(em.program, run.last)
            return interrupted
        except KeyboardInterrupt:
            run.status, interrupted = EMStatus.INTERRUPTED, True
            if last:
                raise
    return interrupted


def calls_stop(em: Guarded, settings: Settings, run: EMRun, step: Step) -> bool:
    """Show a step to the callbacks; returns whether one of them asks to stop."""
    if not settings.callbacks:
        return False
    shown = as_step(run, em.program, run.num_steps - 1, step, settings.begin)

    def asks() -> bool:
        return any(callback(shown) is True for callback in settings.callbacks)

    return asks() if em.data is None else any(em.data.over.gathered(asks))


def as_step(run: EMRun, program: Program, index: int, step: Step, begin: float) -> EMStep:
    """A step as users see it: the bound entering it and the bound after its M-step."""
    parameters, held = program.graph.parameters, run.parameters
    return EMStep(
        index,
        step.before.objective,
        step.before.log_evidence,
        step.bound,
        lambda: {name: p.value(held[name]) for name, p in parameters.items()},
        time.perf_counter() - begin,
        lambda: step.before.q,
    )


def endless_steps(em: Guarded) -> Iterator[EMStep]:
    """Steps without an end; their parameters are in the store when they are yielded.

    Args:
        em: The map.

    Yields:
        Each step, on the data as they are when it is asked for. The end comes only if the objective
        falls on data and from parameters that nobody has changed, which is said in a warning.
    """
    begin = time.perf_counter()
    run = EMRun(snapshot(em.program.graph.parameters))
    at = em.e_step()
    run.record(em.program, at)
    for index in itertools.count():
        try:
            step = advance(em, run, True)
        except Fell:
            return
        yield as_step(run, em.program, index, step, begin)
