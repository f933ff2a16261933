"""One start of a fit, from its first parameters to its end: steps, and the verification of the last.

Many starts may be run a few steps each before the best ones go on; who runs them is `restarts`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyro_em.errors import DataError, DegenerateError, FileError
from pyro_em.fitting.results.history import EMStatus
from pyro_em.fitting.steps import verified_steps
from pyro_em.fitting.steps.beginnings import Beginning, name_of_start
from pyro_em.fitting.steps.cycles import PLAIN_STEPS, accelerate
from pyro_em.fitting.steps.em_map import values_at
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.loop import calls_stop, has_run_away, iterate, read_anew, settle
from pyro_em.fitting.steps.point import LeftPoint
from pyro_em.fitting.steps.run import EMRun, Settings
from pyro_em.fitting.steps.schemes import AUTO, SCHEMES
from pyro_em.fitting.steps.stopping import is_quick
from pyro_em.fitting.steps.symmetric import is_symmetric, warn_symmetric
from pyro_em.fitting.steps.verified_steps import is_confirmed, may_verify_later
from pyro_em.tracing.parameters import restore, snapshot, values_of
from pyro_em.updates.m_step import apply_floors


def run_start(em: Guarded, settings: Settings, beginning: Beginning, init: Any, r: int) -> EMRun:
    """Run EM from one start until something stops it.

    Args:
        em: The map.
        settings: What all starts share.
        beginning: Makes the first parameters.
        init: The start, as `Beginning.write` takes it.
        r: The start's number; only the first one may raise.

    Returns:
        The run; the parameters in the store are those of its last complete step.
    """
    run = _set_out(em, settings, beginning, init, r)
    if run.last is not None:
        _proceed(em, settings, run, r)
    return run


def short_run(em: Guarded, settings: Settings, beginning: Beginning, init: Any, r: int) -> EMRun:
    """Run EM from one start for as many steps as ``settings`` say, for `continue_run` to go on."""
    run = _set_out(em, settings, beginning, init, r)
    if run.last is not None:
        iterate(em, settings, run, r)
    return run


def lengthen_run(em: Guarded, settings: Settings, run: EMRun, r: int) -> None:
    """Run EM on from where a short run was left for as many steps in all as ``settings`` say."""
    if _taken_up(em, run):
        iterate(em, settings, run, r)


def continue_run(em: Guarded, settings: Settings, run: EMRun, r: int) -> None:
    """Run EM on from where a short run was left until something stops it."""
    if _taken_up(em, run):
        _proceed(em, settings, run, r)


def resume_run(em: Guarded, settings: Settings, run: EMRun, r: int) -> None:
    """Run EM on from where another process left it until something stops it."""
    if run.last is not None:
        _proceed(em, settings, run, r)


def revive(em: Guarded, run: EMRun) -> None:
    """Put a run's parameters into the store, and make the E-step at them again if it was let go."""
    em.start_over()
    restore(em.program.graph.parameters, run.parameters)
    if isinstance(run.last, LeftPoint):
        at = em.e_step()
        at.massless = run.last.massless
        run.record(em.program, at)


def _taken_up(em: Guarded, run: EMRun) -> bool:
    """Whether a run can go on; its parameters are in the store then."""
    if run.last is None or run.status is not EMStatus.MAX_STEPS:
        return False
    try:
        revive(em, run)
    except KeyboardInterrupt:
        run.status = EMStatus.INTERRUPTED
        return False
    return True


def _set_out(em: Guarded, settings: Settings, beginning: Beginning, init: Any, r: int) -> EMRun:
    """The first parameters of a start and the E-step at them; without it, the status says why."""
    em.start_over()
    program = em.program
    graph = program.graph
    run = EMRun(snapshot(graph.parameters), name=name_of_start(init))
    if init is not None:
        run.initial_values = values_of(graph.parameters)
    try:
        if init is not None:
            beginning.write_for_all(init)
        apply_floors(graph, program.updates)
        at = em.e_step()
    except (DegenerateError, DataError) as error:
        if r == 0:
            restore(em.program.graph.parameters, run.parameters)
            raise
        run.status, run.message = EMStatus.DEGENERATE, str(error)
        return run
    except KeyboardInterrupt:
        restore(em.program.graph.parameters, run.parameters)
        if r == 0:
            raise
        run.status = EMStatus.INTERRUPTED
        return run
    run.record(em.program, at)
    if init is None:
        run.initial_values = dict(values_at(at))
    if may_verify_later(em, settings):
        run.verifies_later = True
        run.note_verified()
    run.began_symmetric = is_symmetric(em, at)
    return run


def _goes_on(em: Guarded, settings: Settings, run: EMRun, r: int) -> bool:
    """Take the steps before a later verification, and verify them; whether steps follow.

    They follow from where the run paused, not from what the store has rounded: a fit is the same to the
    bit, whenever it was verified.
    """
    if not run.verifies_later or settings.max_steps <= verified_steps.LATER:
        return True
    at = iterate(em, settings, run, r, verified_steps.LATER)
    if at is None:
        return False
    confirmed = is_confirmed(em, run, "it is not")
    if confirmed:
        run.record(em.program, at)
    return confirmed is not None


def _proceed(em: Guarded, settings: Settings, run: EMRun, r: int) -> None:
    """Steps to the end, which a fresh trace of the model confirms."""
    try:
        if settings.acceleration is None:
            if _goes_on(em, settings, run, r):
                iterate(em, settings, run, r)
        else:
            _alternate(em, settings, run, r)
    except FileError:  # a checkpoint that cannot be written, and ends the fit
        settle(em, run)
        raise
    if settings.callbacks and run.status is not EMStatus.INTERRUPTED and em.program.is_changed():
        read_anew(em, run)  # after the last step
    is_right = is_confirmed(em, run, "at the end of the fit it was not")
    if is_right is None:
        return
    if not is_right:
        iterate(em, settings, run, r)
    program = em.program
    if run.status in (EMStatus.CONVERGED, EMStatus.ROUNDING, EMStatus.MAX_STEPS):
        has_run_away(program, run, run.values(program))
    if not run.began_symmetric or run.last is None or run.status is EMStatus.INTERRUPTED:
        return
    # A prior, a constraint, a constant or a fixed parameter of one component may have parted them.
    if is_symmetric(em, run.last):
        if settings.bar.starts == 1:
            warn_symmetric(em, run.last)
        if run.status in (EMStatus.CONVERGED, EMStatus.ROUNDING):
            run.status = EMStatus.SYMMETRIC


def _alternate(em: Guarded, settings: Settings, run: EMRun, r: int) -> None:
    """A few plain steps, accelerated ones until they promise little, plain steps that may stop.

    With ``"auto"`` plain steps go on for as long as they are quick.
    """
    name = settings.acceleration
    assert name is not None
    is_auto = name == "auto"
    scheme = SCHEMES[AUTO if is_auto else name]
    while True:
        if run.cycle is None:
            run.stretch = run.num_steps if run.stretch is None else run.stretch
            few = min(settings.max_steps, run.stretch + PLAIN_STEPS)
            iterate(em, replace(settings, max_steps=few), run, r)
            if run.status is not EMStatus.MAX_STEPS or run.num_steps >= settings.max_steps:
                return
            assert run.last is not None
            if is_auto and is_quick([*run.plain_path(), run.last.objective]):
                run.stretch = None
                continue
        run.stretch, run.is_resumed = None, False
        stopped = accelerate(
            em, settings, run, r, scheme, lambda step: calls_stop(em, settings, run, step)
        )
        if stopped is not None and settings.keeper is not None:
            run.status = stopped
            settings.keeper.at_rest(em, run)
        interrupted = settle(em, run, anew=stopped is not None)  # plain steps follow otherwise
        if not interrupted:
            run.plain_from, run.cycle = run.num_steps, None
        if stopped is not None:
            run.status = stopped
        if interrupted or stopped is not None:
            return
