"""One fit, from what the user passed to the result: exact steps, or stochastic ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro

from pyro_em.errors import ModelError, UsageError, message
from pyro_em.fitting import epochs
from pyro_em.fitting.checkpoints import at_beginning, opened, origin_of_state
from pyro_em.fitting.chunked import chunked, chunks_in, first_arguments, refuse_chunks_of_a_guide
from pyro_em.fitting.guarded import Guarded
from pyro_em.fitting.joining import Joined
from pyro_em.fitting.kept_fit import Kept
from pyro_em.fitting.kept_training import KeptTraining
from pyro_em.fitting.origins import with_origin
from pyro_em.fitting.parted import Parted
from pyro_em.fitting.places import Place
from pyro_em.fitting.preconditions import refuse_rows_of_a_guide
from pyro_em.fitting.progress import Bar
from pyro_em.fitting.report import build_result, build_stochastic_result
from pyro_em.fitting.restarts import run_starts
from pyro_em.fitting.result import EMResult, EMStep
from pyro_em.fitting.run import Settings, best_of
from pyro_em.fitting.search import Search
from pyro_em.fitting.session import Session
from pyro_em.fitting.shards import Shards
from pyro_em.fitting.stochastic_run import StochasticRun
from pyro_em.fitting.within_budget import in_chunks, serve
from pyro_em.plan.fit_wishes import (
    FIT_KEYWORDS,
    FitWishes,
    check_acceleration,
    refuse_exact_keywords,
    refuse_stochastic_keywords,
)
from pyro_em.plan.program import Program
from pyro_em.plan.unobserved import unobserved
from pyro_em.plan.wishes import check_collisions, check_loader
from pyro_em.tracing.garbage import fewer_collections
from pyro_em.tracing.parameters import restore, values_of
from pyro_em.tracing.randomness import same_random_state, seeded
from pyro_em.variational.batches import first_batch, is_loader
from pyro_em.variational.trainer import Trainer


@fewer_collections()
def fit(session: Session, wishes: FitWishes, args: tuple, kwargs: dict[str, Any]) -> EMResult:
    """Fit as `ExactPosteriorEM.fit` says.

    Args:
        session: What is known of the model; counts the steps.
        wishes: The keywords.
        args: The model's positional arguments, or a loader of them.
        kwargs: Its keyword arguments.

    Raises:
        PyroEMError: If the model, the data or the keywords cannot be used.
    """
    if wishes.process_group is None:
        return _fit(session, wishes, args, kwargs, None)
    joined = Joined.of(wishes, session.request)
    with joined.over.together():
        return _fit(session, joined.own_wishes(), args, kwargs, joined)


def _fit(
    session: Session, wishes: FitWishes, args: tuple, kwargs: dict[str, Any], joined: Joined | None
) -> EMResult:
    begin, has_rows = time.perf_counter(), True
    if joined is not None:
        wishes, args, kwargs, has_rows = joined.arguments(wishes, args, kwargs)
    looked = _arguments_of(session, args, kwargs)
    check_collisions(session.request.model, looked, FIT_KEYWORDS, "fit", wishes.passed())
    held = frozenset(pyro.get_param_store())
    with seeded(wishes.seed):
        try:
            found = session.ready(looked, kwargs)
        except ModelError as error:
            fewer = in_chunks(error, args, kwargs) if joined is None else None
            if fewer is None or not serve(session, fewer, kwargs):
                raise
            args, looked = fewer, first_arguments(fewer)
            found = session.ready(looked, kwargs)
        shared: Shards | None = None
        if joined is not None:
            shared = joined.shards(found, looked, args, kwargs, has_rows)
        group = None if joined is None else joined.over
        checkpoint = opened(session, wishes, args, kwargs, group)
        if checkpoint is not None:
            found = at_beginning(checkpoint, found, session, wishes, (looked, kwargs))
        origin = session.origin(found, held)
        if checkpoint is not None and checkpoint.saved is not None:
            origin = origin_of_state(checkpoint.saved["origins"])
            session.total_steps = checkpoint.saved["total_before"]
            begin -= checkpoint.saved["seconds"]
        if wishes.callbacks:
            wishes = replace(wishes, callbacks=(_counting(session), *wishes.callbacks))
        if isinstance(found, Trainer):
            steps = None
            if joined is not None and shared is not None:
                found = joined.sharing(shared, found)
                wishes, steps = joined.batches(wishes, shared, args)
            kept = None
            if checkpoint is not None:
                kept = KeptTraining(checkpoint, origin, session)
            with same_random_state(joined is not None):
                result = _stochastic(session, found, wishes, args, kwargs, begin, steps, kept)
        else:
            exact, data = None, None
            if joined is not None and shared is not None:
                data = joined.parted(shared, session, found, args, kwargs)
                wishes = joined.watched(wishes)
            is_resumed = False
            if checkpoint is not None:
                exact = Kept.of(checkpoint, found, session, wishes, origin, begin)
                is_resumed = exact.saved is not None
            # What is resumed has the random state of the first process.
            with same_random_state(joined is not None and is_resumed):
                result = _exact(session, found, wishes, args, kwargs, begin, exact, data)
        return with_origin(result, origin)


def _arguments_of(session: Session, args: tuple, kwargs: dict[str, Any]) -> tuple:
    """The model's positional arguments; with the first batch where there is a loader."""
    if not args or not is_loader(args[0]):
        return first_arguments(args)
    first = first_batch(args[0])
    items = tuple(first) if isinstance(first, (tuple, list)) else (first,)
    check_loader(session.request.model, len(items), args[1:], kwargs)
    return (*items, *args[1:])


def _counting(session: Session) -> Callable[[EMStep], None]:
    """A callback that counts steps for those after it, which may save."""
    before = session.total_steps

    def count(step: EMStep) -> None:
        session.total_steps = before + step.index + 1

    return count


def _exact(
    session: Session,
    program: Program,
    wishes: FitWishes,
    args: tuple,
    kwargs: dict[str, Any],
    begin: float,
    kept: Kept | None,
    data: Parted | None,
) -> EMResult:
    refuse_stochastic_keywords(wishes.stochastic(), session.request.guide is not None)
    check_acceleration(wishes.acceleration, program.is_monotone and program.strategy is None)
    if args and is_loader(args[0]):
        raise UsageError(
            message(
                "fit",
                "a DataLoader was given.",
                "an exact fit uses all data at every step",
                ["pass the data themselves: em.fit(data)"],
            )
        )
    before = session.total_steps
    bar = Bar(wishes.progress, wishes.max_steps, wishes.num_restarts, program.objective_name)
    keeper = None if kept is None else kept.keeper
    settings = Settings(
        wishes.max_steps,
        wishes.tol,
        wishes.callbacks,
        bar,
        begin,
        wishes.acceleration,
        keeper=keeper,
    )
    init, seed = wishes.init, wishes.seed
    chunks = chunks_in(args)
    if chunks is not None and data is None:
        data = chunked(session, program, chunks, args[1:], kwargs, wishes.progress)
    lead = program if data is None else data.lead
    em = Guarded(lead, session.m_step_state, data, remembers=kept is not None)
    if kept is not None:
        kept.take_up(em)
    search = Search.seeded(seed) if keeper is None else keeper.search
    runs = run_starts(em, settings, init, wishes.num_restarts, search)
    if keeper is not None:
        keeper.finish(em)
    best = best_of(runs)
    program = em.program
    restore(program.graph.parameters, best.parameters)
    session.total_steps = before + best.num_steps
    session.last_data.note(args, kwargs)
    later = None if data else unobserved(program, session.request.max_enumeration)
    return build_result(em, best, runs, settings, init, seed, session.total_steps, later)


def _stochastic(
    session: Session,
    trainer: Trainer,
    wishes: FitWishes,
    args: tuple,
    kwargs: dict[str, Any],
    begin: float,
    per_epoch: int | None = None,
    kept: KeptTraining | None = None,
) -> EMResult:
    refuse_exact_keywords(wishes.init, wishes.num_restarts, wishes.acceleration)
    if chunks_in(args) is not None:
        refuse_chunks_of_a_guide()
    batches, held_out = epochs.data_of(wishes, args, kwargs, per_epoch)
    refuse_rows_of_a_guide(trainer.variational, batches, held_out)
    if held_out is not None:
        epochs.look_at_validation(trainer, held_out)
    parameters = trainer.variational.parameters
    before = session.total_steps
    place, run = Place(batches, kept is not None), StochasticRun()
    keeper = None
    if kept is not None:
        run, keeper = kept.taken_up(trainer, place, begin, bool(wishes.callbacks))
    epochs.run(
        trainer,
        place,
        run,
        max_steps=wishes.max_steps,
        num_epochs=wishes.num_epochs,
        schedule=wishes.schedule,
        validation=held_out,
        callbacks=wishes.callbacks,
        parameters=lambda: values_of(parameters),
        progress=wishes.progress,
        begin=begin,
        keeper=keeper,
    )
    session.total_steps = before + len(run.bounds)
    plan = session.planner.plan(trainer.variational)
    return build_stochastic_result(
        trainer, batches, run, plan, wishes.seed, begin, session.total_steps
    )
