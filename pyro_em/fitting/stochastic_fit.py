"""A fit of stochastic steps, from a call that has been read to its result."""

from __future__ import annotations

from dataclasses import replace

from pyro_em.fitting.batches import epochs
from pyro_em.fitting.batches.stochastic_run import StochasticRun
from pyro_em.fitting.call import Call
from pyro_em.fitting.kept_training import KeptTraining
from pyro_em.fitting.places import Place
from pyro_em.fitting.preconditions import refuse_rows_of_a_guide
from pyro_em.fitting.report import build_stochastic_result
from pyro_em.fitting.results.result import EMResult
from pyro_em.plan.fit_wishes import refuse_exact_keywords
from pyro_em.tracing.parameters import values_of
from pyro_em.tracing.randomness import same_random_state
from pyro_em.variational.trainer import Trainer


def fit_stochastically(call: Call, trainer: Trainer) -> EMResult:
    """Train a pair on batches until its steps or epochs are done.

    Args:
        call: The call.
        trainer: The pair with its optimisers.

    Raises:
        PyroEMError: If the data or the keywords are not those of a stochastic fit.
    """
    per_epoch = None
    if call.together is not None:
        joined, shards = call.together.joined, call.together.shards
        trainer = joined.sharing(shards, trainer)
        wishes, per_epoch = joined.batches(call.wishes, shards, call.args)
        call = replace(call, wishes=wishes)
    with same_random_state(call.together is not None):
        return _fit(call, trainer, per_epoch)


def _fit(call: Call, trainer: Trainer, per_epoch: int | None) -> EMResult:
    session, wishes = call.session, call.wishes
    refuse_exact_keywords(wishes.init, wishes.num_restarts, wishes.acceleration)
    batches, held_out = epochs.data_of(wishes, call.args, call.kwargs, per_epoch)
    refuse_rows_of_a_guide(trainer.variational, batches, held_out)
    if held_out is not None:
        epochs.look_at_validation(trainer, held_out)
    parameters = trainer.variational.parameters
    before = session.total_steps
    place, run, keeper = Place(batches, call.checkpoint is not None), StochasticRun(), None
    if call.checkpoint is not None:
        kept = KeptTraining(call.checkpoint, call.origin, session)
        run, keeper = kept.taken_up(trainer, place, call.begin, bool(wishes.callbacks))
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
        begin=call.begin,
        keeper=keeper,
    )
    session.total_steps = before + len(run.bounds)
    plan = session.planner.plan(trainer.variational)
    return build_stochastic_result(
        trainer, batches, run, plan, wishes.seed, call.begin, session.total_steps
    )
