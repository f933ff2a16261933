"""The loop: E-step, M-step, E-step, …, with its stopping rule and its starts."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pyro_em.errors import DataError, DegenerateError, FileError, message, sites_in_words, warn
from pyro_em.fitting import looks
from pyro_em.fitting.beginnings import Beginning, name_of_start
from pyro_em.fitting.cycles import PLAIN_STEPS, accelerate
from pyro_em.fitting.em_map import values_at, write
from pyro_em.fitting.em_on_sums import tells_apart
from pyro_em.fitting.guarded import Fell, Guarded, Step
from pyro_em.fitting.history import EMStatus, EMStep
from pyro_em.fitting.looks import is_confirmed, may_look_later
from pyro_em.fitting.point import LeftPoint, Point, SumsPoint, Values
from pyro_em.fitting.run import Run, Settings
from pyro_em.fitting.schemes import AUTO, SCHEMES
from pyro_em.fitting.stopping import crawls, is_quick, should_stop
from pyro_em.plan.hyperparameters import run_away
from pyro_em.plan.program import Program
from pyro_em.posteriors.posterior import Posterior
from pyro_em.tracing.parameters import restore, snapshot, values_of
from pyro_em.updates.m_step import apply_floors

# ---------------------------------------------------------------- the loop


def iterate(
    em: Guarded, settings: Settings, run: Run, r: int, until: float = math.inf
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
        while run.num_steps < until and not _is_over(em, settings, run):
            # Who keeps where runs stand has to see the last step as if others followed it.
            is_last = settings.max_steps - len(run.entering) == 1 and keeper is None
            step = advance(em, run, bool(settings.callbacks), settings.verify, is_last)
            if settings.bar.bar is not None:
                settings.bar.update(r, step.after.objective)
            if settings.callbacks and _calls_stop(em, settings, run, step):
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
    pauses = run.num_steps >= until and run.status is EMStatus.MAX_STEPS
    at = run.last if pauses else None
    settle(em, run)
    return at


def _is_over(em: Guarded, settings: Settings, run: Run) -> bool:
    """Whether no step follows the last one; the run's status says why."""
    if run.status is EMStatus.STOPPED:
        return True
    if settings.tol and run.judges and run.last is not None:
        path = [*run.plain_path(), run.last.objective]
        status = should_stop(path, settings.tol, em.program.graph.eps, run.last.noise)
        if status is not None and em.program.may_stop(len(run.entering)):
            run.status = status
            return True
        if crawls(path, settings.tol) and _has_run_away(em, run, values_at(run.last)):
            return True
    return len(run.entering) >= settings.max_steps


def _has_run_away(em: Guarded, run: Run, values: Values) -> bool:
    """Whether there is no maximum, by where the parameters have come; the run says so then."""
    away = run_away(em.program.graph, run.initial_values, values)
    if away:
        run.status, run.message = EMStatus.UNBOUNDED, away
    return bool(away)


def advance(
    em: Guarded, run: Run, is_watched: bool, verify: bool = True, is_last: bool = False
) -> Step:
    """One step of a run, noted in it.

    Args:
        em: The map.
        run: Where it stands.
        is_watched: Whether somebody looks at parameters and data between steps, and may write them.
        verify: Whether the step at which a run looks is held against a fresh trace of the model.
        is_last: Whether no other follows.
    """
    touched = is_watched and _look(em, run)
    assert run.last is not None
    index = len(run.entering)
    looks = index == run.verify_at and not run.looks_later
    last = is_last and not (is_watched or looks)
    step = em.step(run.last, index, verify=looks and verify, touched=touched, last=last)
    is_public = is_watched or looks or last
    if is_public:
        em.publish(step, was_public=is_watched and run.recorded is step.before)
    run.take(step.before.objective, step.bound, step.after)
    if is_public or not isinstance(step.after, SumsPoint):
        run.record(em.program, step.after)
    if looks:
        run.note_verified()
    return step


def _look(em: Guarded, run: Run) -> bool:
    """Go on with the data as they are; returns whether somebody has written parameters."""
    if em.program.is_changed():
        read_anew(em, run)
        return False
    touched = run.seen is not None and run.seen.is_changed()
    if touched:
        em.stay_sound()
    return touched


def read_anew(em: Guarded, run: Run) -> None:
    """Read the model on the data as they are now, and make the E-step there."""
    em.reread()
    at = em.e_step()
    run.record(em.program, at)
    run.plain_from = run.verify_at = run.num_steps
    run.verified, run.looks_later = None, False


def settle(em: Guarded, run: Run, *, anew: bool = True) -> bool:
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
                write(em.program, values_at(run.last))
                run.record(em.program, run.last)
            return interrupted
        except KeyboardInterrupt:
            run.status, interrupted = EMStatus.INTERRUPTED, True
            if last:
                raise
    return interrupted


def _calls_stop(em: Guarded, settings: Settings, run: Run, step: Step) -> bool:
    """Show a step to the callbacks; returns whether one of them asks to stop."""
    if not settings.callbacks:
        return False
    shown = as_step(run, em.program, run.num_steps - 1, step, settings.begin)

    def asks() -> bool:
        return any(callback(shown) is True for callback in settings.callbacks)

    return asks() if em.data is None else any(em.data.over.gathered(asks))


def as_step(run: Run, program: Program, index: int, step: Step, begin: float) -> EMStep:
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
    run = Run(snapshot(em.program.graph.parameters))
    at = em.e_step()
    run.record(em.program, at)
    for index in itertools.count():
        try:
            step = advance(em, run, True)
        except Fell:
            return
        yield as_step(run, em.program, index, step, begin)


# ---------------------------------------------------------------- its starts


def run_start(em: Guarded, settings: Settings, beginning: Beginning, init: Any, r: int) -> Run:
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


def short_run(em: Guarded, settings: Settings, beginning: Beginning, init: Any, r: int) -> Run:
    """Run EM from one start for as many steps as ``settings`` say, for `continue_run` to go on."""
    run = _set_out(em, settings, beginning, init, r)
    if run.last is not None:
        iterate(em, settings, run, r)
    return run


def lengthen_run(em: Guarded, settings: Settings, run: Run, r: int) -> None:
    """Run EM on from where a short run was left for as many steps in all as ``settings`` say."""
    if _taken_up(em, run):
        iterate(em, settings, run, r)


def continue_run(em: Guarded, settings: Settings, run: Run, r: int) -> None:
    """Run EM on from where a short run was left until something stops it."""
    if _taken_up(em, run):
        _proceed(em, settings, run, r)


def _taken_up(em: Guarded, run: Run) -> bool:
    """Whether a run can go on; its parameters are in the store then."""
    if run.last is None or run.status is not EMStatus.MAX_STEPS:
        return False
    try:
        revive(em, run)
    except KeyboardInterrupt:
        run.status = EMStatus.INTERRUPTED
        return False
    return True


def revive(em: Guarded, run: Run) -> None:
    """Put a run's parameters into the store, and make the E-step at them again if it was let go."""
    em.start_over()
    restore(em.program.graph.parameters, run.parameters)
    if isinstance(run.last, LeftPoint):
        at = em.e_step()
        at.massless = run.last.massless
        run.record(em.program, at)


def _set_out(em: Guarded, settings: Settings, beginning: Beginning, init: Any, r: int) -> Run:
    """The first parameters of a start and the E-step at them; without it, the status says why."""
    em.start_over()
    run = Run(snapshot(em.program.graph.parameters), name=name_of_start(init))
    if init is not None:
        run.initial_values = values_of(em.program.graph.parameters)
    try:
        beginning.write_for_all(init)
        apply_floors(em.program.graph, em.program.updates)
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
    if may_look_later(em, settings):
        run.looks_later = True
        run.note_verified()
    run.began_symmetric = _is_symmetric(em, at)
    return run


def resume_run(em: Guarded, settings: Settings, run: Run, r: int) -> None:
    """Run EM on from where another process left it until something stops it."""
    if run.last is not None:
        _proceed(em, settings, run, r)


def _goes_on(em: Guarded, settings: Settings, run: Run, r: int) -> bool:
    """Take the steps before a later look, and the look; whether steps follow.

    They follow from where the run paused, not from what the store has rounded: a fit is the same to the
    bit, whenever the model was looked at.
    """
    if not run.looks_later or settings.max_steps <= looks.LATER:
        return True
    at = iterate(em, settings, run, r, looks.LATER)
    if at is None:
        return False
    confirmed = is_confirmed(em, run, "it is not")
    if confirmed:
        run.record(em.program, at)
    return confirmed is not None


def _proceed(em: Guarded, settings: Settings, run: Run, r: int) -> None:
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
    if run.status in (EMStatus.CONVERGED, EMStatus.ROUNDING, EMStatus.MAX_STEPS):
        _has_run_away(em, run, run.values(em.program))
    if not run.began_symmetric or run.last is None or run.status is EMStatus.INTERRUPTED:
        return
    # A prior, a constraint, a constant or a fixed parameter of one component may have parted them.
    if _is_symmetric(em, run.last):
        if settings.bar.starts == 1:
            _warn_symmetric(_at_hand(em, run.last))
        if run.status in (EMStatus.CONVERGED, EMStatus.ROUNDING):
            run.status = EMStatus.SYMMETRIC


def _alternate(em: Guarded, settings: Settings, run: Run, r: int) -> None:
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
            em, settings, run, r, scheme, lambda step: _calls_stop(em, settings, run, step)
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


# ---------------------------------------------------------------- symmetric starts


def _is_symmetric(em: Guarded, at: Point) -> bool:
    """`is_symmetric`, without tables where the arguments already tell the components apart."""
    if isinstance(at, SumsPoint) and (not at.program.graph.latents or tells_apart(at)):
        return False
    return is_symmetric(_at_hand(em, at))


def _at_hand(em: Guarded, at: Point) -> Posterior:
    """The E-step at a point, of the part at hand where the data come in parts."""
    if em.data is None:
        return at.q
    return em.program.posterior(em.program.evaluate())


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
