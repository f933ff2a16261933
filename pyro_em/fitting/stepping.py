"""Steps for callers that loop by themselves: one, or one after the other without an end."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from pyro_em.errors import Handover, PyroEMError, UsageError, message
from pyro_em.fitting.batches import epochs
from pyro_em.fitting.results.history import EMStep
from pyro_em.fitting.session import Session
from pyro_em.fitting.steps.em_on_sums import on_sums
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.loop import endless_steps
from pyro_em.plan.program import Program
from pyro_em.tracing.parameters import write
from pyro_em.tracing.randomness import same_random_state
from pyro_em.updates.m_step import apply_floors
from pyro_em.variational.batches import first_batch, is_loader
from pyro_em.variational.trainer import Trainer


def step(session: Session, args: tuple, kwargs: dict[str, Any]) -> float:
    """One E-step and M-step, or one stochastic step; the loss at the parameters entering it.

    Args:
        session: What is known of the model; counts the step.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.

    Raises:
        PyroEMError: If the model or the data cannot be used, or an update was degenerate.
    """
    if args and is_loader(args[0]):
        raise UsageError(_no_loader(session, args, kwargs))
    found = session.ready(args, kwargs)
    if isinstance(found, Trainer):
        session.last_data.warn_of_batches(found.variational, args, kwargs)
        loss = found.step(args, kwargs)
    else:
        session.last_data.warn_of_others(found, args, kwargs)
        apply_floors(found.graph, found.updates)
        quick = _loss_on_sums(found) if found.has_many_rows else None
        loss = _loss_through_tables(found, session) if quick is None else quick
    session.total_steps += 1
    return loss


def _loss_through_tables(program: Program, session: Session) -> float:
    """−ELBO before a step through tables of all cells, in nats."""
    evaluation = program.evaluate()
    q = program.e_step(evaluation, session.total_steps)
    program.m_step(q.counts, evaluation, session.m_step_state)
    assert q.bound is not None
    return -q.bound


def _loss_on_sums(program: Program) -> float | None:
    """−ELBO before a step on sums over the data, in nats; None where one through tables is due.

    To find what steps so takes a while, which a single step makes up for where rows are many.
    """
    if program.strategy is not None or not program.compiled:
        return None
    steps = on_sums(program)
    if steps is None:
        return None
    try:
        at = steps.e_step()
        loss = -at.objective
        values, _ = steps.m_step(at)
    except Handover:
        return None
    write(program.graph.parameters, values)
    return loss


def steps(session: Session, args: tuple, kwargs: dict[str, Any]) -> Generator[EMStep, None, None]:
    """Steps without an end, each counted in the session; what cannot be fitted is refused at once.

    Raises:
        PyroEMError: If the model or the data cannot be used.
    """
    found = session.ready(args, kwargs)
    if isinstance(found, Trainer):
        return session.counted(epochs.endless_steps(found, args, kwargs))
    apply_floors(found.graph, found.updates)
    session.last_data.note(args, kwargs)
    return session.counted(endless_steps(Guarded(found, session.m_step_state)))


def _no_loader(session: Session, args: tuple, kwargs: dict[str, Any]) -> str:
    """Why ``step`` takes no DataLoader, and what to do with this model."""
    if _is_exact_on(session, args, kwargs):
        return message(
            "step",
            "a DataLoader was given.",
            "a step of an exact model takes all data at once: every M-step forgets what the "
            "batches before it said",
            ["pass the data themselves: em.fit(data)"],
        )
    return message(
        "step",
        "a DataLoader was given.",
        "one step takes one batch",
        ["for batch in loader: em.step(batch)", "em.fit(loader, num_epochs=...)"],
    )


def _is_exact_on(session: Session, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether no guide draws for the batches of a loader."""
    if session.planner.guide_now is None:
        return True
    batch = first_batch(args[0])
    items = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    try:
        with same_random_state():
            found = session.look((*items, *args[1:]), kwargs, look_only=True)
    except PyroEMError:  # the next call with a batch names it
        return False
    return isinstance(found, Program)
