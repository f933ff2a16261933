"""One fit: what the user passed becomes a call that has been read, then exact or stochastic steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro

from pyro_em.errors import ModelError
from pyro_em.fitting.batches.online_sums import refuse_with_online
from pyro_em.fitting.call import Call, Together
from pyro_em.fitting.checkpoint.checkpoints import at_beginning, opened, origin_of_state
from pyro_em.fitting.exact_fit import fit_exactly
from pyro_em.fitting.origins import with_origin
from pyro_em.fitting.parts.chunked import chunks_in, first_arguments
from pyro_em.fitting.parts.joining import Joined
from pyro_em.fitting.parts.within_budget import in_chunks, serve
from pyro_em.fitting.results.history import EMStep
from pyro_em.fitting.results.result import EMResult
from pyro_em.fitting.session import Session
from pyro_em.fitting.stochastic_fit import fit_stochastically
from pyro_em.plan.fit_wishes import FIT_KEYWORDS, FitWishes
from pyro_em.plan.program import Program
from pyro_em.plan.wishes import check_collisions, check_loader
from pyro_em.tracing.garbage import fewer_collections
from pyro_em.tracing.randomness import seeded
from pyro_em.variational.batches import first_batch, is_loader
from pyro_em.variational.trainer import Trainer


@fewer_collections()
def fit(session: Session, wishes: FitWishes, args: tuple, kwargs: dict[str, Any]) -> EMResult:
    """Fit as `ExactPosteriorEM.fit` says.

    Args:
        session: What is known of the model; counts the steps.
        wishes: The keywords.
        args: The model's positional arguments, or a loader or chunks of them.
        kwargs: Its keyword arguments.

    Raises:
        PyroEMError: If the model, the data or the keywords cannot be used.
    """
    if wishes.online is not None:
        refuse_with_online(wishes, chunks_in(args) is not None)
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
        args, looked, found = _read(session, args, looked, kwargs, may_part=joined is None)
        together = None
        if joined is not None:
            shards = joined.shards(found, looked, args, kwargs, has_rows)
            together = Together(joined, shards)
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
        call = Call(session, wishes, args, kwargs, begin, origin, checkpoint, together)
        if isinstance(found, Trainer):
            return with_origin(fit_stochastically(call, found), origin)
        return with_origin(fit_exactly(call, found), origin)


def _read(
    session: Session, args: tuple, looked: tuple, kwargs: dict[str, Any], may_part: bool
) -> tuple[tuple, tuple, Program | Trainer]:
    """The model on its arguments; on the first chunk of them where all rows are above the budget.

    Args:
        session: Reads the model.
        args: The model's positional arguments, or a loader or chunks of them.
        looked: Those with which it is read.
        kwargs: Its keyword arguments.
        may_part: Whether arguments may be parted into chunks.

    Returns:
        The arguments as the fit takes them, those with which the model was read, and what it is.
    """
    try:
        return args, looked, session.ready(looked, kwargs)
    except ModelError as error:
        fewer = in_chunks(error, args, kwargs) if may_part else None
        if fewer is None or not serve(session, fewer, kwargs):
            raise
    looked = first_arguments(fewer)
    return fewer, looked, session.ready(looked, kwargs)


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
