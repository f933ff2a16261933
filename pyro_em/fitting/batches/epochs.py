"""A stochastic fit: epochs of batches, a bar, validation, interruption, a result."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_em.errors import DegenerateError, PyroEMError, UsageError, message, warn
from pyro_em.fitting.batches.stochastic_keeper import StochasticKeeper
from pyro_em.fitting.batches.stochastic_run import StochasticRun
from pyro_em.fitting.places import Place
from pyro_em.fitting.results.history import EMStatus, EMStep
from pyro_em.graph.structure import Structure
from pyro_em.plan.fit_wishes import FitWishes
from pyro_em.portable import Given
from pyro_em.tracing.parameters import values_of
from pyro_em.tracing.randomness import same_random_state
from pyro_em.variational.batches import Batch, Batches, factors_of, stands_for_all, without_last_row
from pyro_em.variational.trainer import Alternating, Trainer


def data_of(
    wishes: FitWishes, args: tuple, kwargs: dict[str, Any], per_epoch: int | None = None
) -> tuple[Batches, Batches | None]:
    """The data of a stochastic fit in batches, in an order drawn now, and the held-out data.

    Args:
        wishes: The keywords of the fit.
        args: The model's positional arguments, or a loader of them.
        kwargs: Its keyword arguments.
        per_epoch: Batches in one epoch, where other processes take as many steps.

    Raises:
        UsageError: If the schedule, the batches or the held-out data are not understood.
    """
    schedule, validation = wishes.schedule, wishes.validation
    if schedule is not None and not isinstance(schedule, Alternating):
        raise UsageError(
            message(
                "fit",
                f"schedule={schedule!r} is not understood.",
                fixes=["use None or Alternating(guide_steps, model_steps)"],
            )
        )
    order = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    batches = Batches(args, kwargs, wishes.batch_size, wishes.num_data, order, per_epoch)
    if validation is None:
        return batches, None
    if any(isinstance(v, Tensor) and v.dim() for v in kwargs.values()):
        raise UsageError(
            message(
                "fit",
                "validation was given together with data by keyword.",
                "keywords go to every call of the model, validation included",
                ["pass data by position: fit(x, y, validation=(x_val, y_val))"],
            )
        )
    several = isinstance(validation, (tuple, list))
    aside = tuple(validation) if several else (validation,)
    return batches, Batches(aside, kwargs, None, None, None)


def factors_at(trainer: Trainer, batch: Batch) -> Mapping[str, float]:
    """What multiplies the plates of a batch so that it stands for all data."""
    if batch.size is None and batch.total is None:
        return {}
    structure_of = trainer.variational.structure
    if trainer.sharing is not None:
        return trainer.sharing.factors(structure_of(batch.args, batch.kwargs))

    def shorter() -> Structure:
        other = without_last_row(batch)
        return structure_of(other.args, other.kwargs)

    return factors_of(structure_of(batch.args, batch.kwargs), batch, shorter)


def steps(
    trainer: Trainer,
    batches: Iterable[Batch],
    schedule: Alternating | None,
    begin: float,
    first: int = 0,
) -> Iterator[EMStep]:
    """Stochastic steps without an end of their own.

    Args:
        trainer: The pair with its optimisers.
        batches: The data of each step.
        schedule: How guide and model take turns.
        begin: When the fit began.
        first: The number of the first step.

    Yields:
        Each step after its update; ``elbo`` is the bound of its batch, scaled to all data.
    """
    for index, batch in enumerate(batches, first):
        factors = factors_at(trainer, batch)
        loss = trainer.step(batch.args, batch.kwargs, factors, schedule)
        yield EMStep(index, -loss, None, None, dict, time.perf_counter() - begin)


def endless_steps(
    trainer: Trainer, args: tuple, kwargs: dict[str, Any]
) -> Generator[EMStep, None, None]:
    """Steps on the same data without an end, with the parameters after each."""
    same = itertools.repeat(Batch(args, kwargs))
    for step in steps(trainer, same, None, time.perf_counter()):
        yield replace(step, made_params=Given(values_of(trainer.variational.parameters)))


def run(
    trainer: Trainer,
    place: Place,
    out: StochasticRun,
    *,
    max_steps: int,
    num_epochs: int | None,
    schedule: Alternating | None,
    validation: Batches | None,
    callbacks: Sequence[Callable[[EMStep], Any]],
    parameters: Callable[[], Mapping[str, Tensor]],
    progress: bool | None,
    begin: float,
    keeper: StochasticKeeper | None = None,
) -> None:
    """Train until the steps or epochs are done, a callback stops it, or something breaks.

    Args:
        trainer: The pair with its optimisers.
        place: The data, and where the fit stands in them.
        out: The path so far, which goes on.
        max_steps: Steps at most where ``num_epochs`` is None.
        num_epochs: Epochs.
        schedule: How guide and model take turns.
        validation: Data whose bound is taken after each epoch.
        callbacks: Called with each step; one that returns True stops the run.
        parameters: Current constrained values, for callbacks.
        progress: Whether to show a bar.
        begin: When the fit began.
        keeper: Keeps where it stands.
    """
    is_stopped = out.status is EMStatus.STOPPED
    if is_stopped or (num_epochs is None and len(out.bounds) >= max_steps):
        return
    if not out.bounds:
        # What an earlier fit copied may have been changed since.
        trainer.training.recovery.is_unbroken = False
    if keeper is not None:
        keeper.start(out)
    per_epoch = place.batches.per_epoch
    total = max_steps if num_epochs is None else (per_epoch and per_epoch * num_epochs)
    disable = None if progress is None else not progress
    bar = tqdm(total=total, disable=disable, desc="SVI", unit="step")
    smoothed: float | None = None

    def endless() -> Iterator[Batch]:
        while num_epochs is None or out.epochs < num_epochs:
            yield from place.epoch()
            value = None if validation is None else bound_of(trainer, validation)
            out.epochs += 1
            place.end()
            if value is not None:
                out.validation.append((len(out.bounds), value))

    try:
        for step in steps(trainer, endless(), schedule, begin, len(out.bounds)):
            out.bounds.append(step.elbo)
            smoothed = step.elbo if smoothed is None else 0.95 * smoothed + 0.05 * step.elbo
            label = f"bound {smoothed:.4f}"
            if out.validation:
                label += f", validation {out.validation[-1][1]:.4f}"
            bar.set_postfix_str(label, refresh=False)
            bar.update()
            if callbacks:
                held_out = out.validation[-1] if out.validation else None
                reported = replace(step, made_params=Given(parameters()), validation=held_out)
                if _asks_to_stop(trainer, callbacks, reported):
                    out.status = EMStatus.STOPPED
            if keeper is not None:
                keeper.after_step(out)
            is_last = num_epochs is None and len(out.bounds) >= max_steps
            if is_last or out.status is EMStatus.STOPPED:
                break
    except DegenerateError as error:
        if not out.bounds:
            raise
        out.status, out.message = EMStatus.DEGENERATE, str(error)
        warn(out.message)
    except KeyboardInterrupt:
        out.status = EMStatus.INTERRUPTED
    finally:
        bar.close()
    if keeper is not None:
        keeper.finish(out)


def _asks_to_stop(
    trainer: Trainer, callbacks: Sequence[Callable[[EMStep], Any]], step: EMStep
) -> bool:
    """Show a step to the callbacks; whether one of them, on any process, asks to stop."""

    def asks() -> bool:
        return any(callback(step) is True for callback in callbacks)

    return asks() if trainer.sharing is None else trainer.sharing.any(asks)


def look_at_validation(trainer: Trainer, held_out: Batches) -> None:
    """Take the bound of one batch of held-out data before anything is trained.

    Raises:
        PyroEMError: If the pair cannot be run on it.
    """
    with torch.no_grad(), same_random_state():
        batch = next(iter(held_out.epoch(shuffle=False)), None)
        if batch is None:
            raise UsageError(message("validation", "it is empty.", "there is no bound to take"))
        try:
            factors = factors_at(trainer, batch)
            trainer.variational.loss(batch.args, batch.kwargs, 1, factors)
        except PyroEMError:
            raise
        except Exception as error:  # whatever the user's functions do with other data
            raise UsageError(
                message(
                    "validation",
                    f"model and guide cannot be run on it: {type(error).__name__}: {error}.",
                    "held-out data are the model's arguments, with rows of their own",
                    [
                        "call guide(*validation) and model(*validation) by themselves to see where",
                        "make plates as long as the data: pyro.plate(name, len(x))",
                        "let a network serve all rows: AutoAmortizedNormal",
                    ],
                )
            ) from error


def bound_of(trainer: Trainer, batches: Batches, num_particles: int = 1) -> float:
    """The bound of all data at the current parameters, batch by batch, in nats."""
    if trainer.sharing is None:
        return _bound_here(trainer, batches, num_particles)
    with same_random_state():
        return trainer.sharing.mean(lambda: _bound_here(trainer, batches, num_particles))


def _bound_here(trainer: Trainer, batches: Batches, num_particles: int) -> float:
    total, rows = 0.0, 0
    # Evaluating the bound must not change the path of a seeded fit.
    with torch.no_grad(), same_random_state():
        for batch in batches.epoch(shuffle=False):
            factors = factors_at(trainer, batch)
            with nullcontext() if trainer.sharing is None else trainer.sharing.drawing():
                loss = trainer.variational.loss(batch.args, batch.kwargs, num_particles, factors)
            # Each batch's bound estimates that of all data; their weighted mean is it.
            structure = trainer.variational.structure(batch.args, batch.kwargs)
            share = (batch.size or 1) if stands_for_all(structure, batch) else 0
            total -= float(loss) * (share or 1)
            rows += share
    return total / rows if rows else total
