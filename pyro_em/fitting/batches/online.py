"""Online EM: an M-step after each batch, on sums of the batch and of what came before it.

Stepwise EM averages, with a step size that falls, sums that are scaled to all rows:

    S ← (1 − γ_t) S + γ_t (N / n) S_batch,    θ ← M(S),    γ_t = (t + 2)^−κ,  γ_0 = 1

(Cappé and Moulines 2009). Incremental EM replaces the sums of a batch by new ones when it comes again:
S ← S − S_batch(before) + S_batch (Neal and Hinton 1998).

A batch is a chunk of the data; with several processes the chunks of all of them that have one number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from pyro_em.errors import DataError, DegenerateError, Handover, message, warn
from pyro_em.fitting.batches.online_steps import Steps
from pyro_em.fitting.batches.online_sums import Averaged, Replaced
from pyro_em.fitting.results.history import EMStatus, EMStep
from pyro_em.fitting.steps.parted import Parted
from pyro_em.fitting.steps.run import EMRun
from pyro_em.plan.part import Part
from pyro_em.portable import Given
from pyro_em.reduction.reduction import Reduction
from pyro_em.tracing.parameters import restore, snapshot


@dataclass(eq=False)
class Standing:
    """Where a fit by online EM stands.

    Attributes:
        sums: What stands for all rows.
        epochs: Complete passes over the data.
        number: Batches of the present pass that are done.
        validation: The held-out evidence after each pass, with the number of steps before it.
        best: The largest of these, and the unconstrained parameters there.
    """

    sums: Averaged | Replaced
    epochs: int = 0
    number: int = 0
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: tuple[float, dict[str, Tensor] | None] = (-math.inf, None)


class Watcher:
    """Told of what happens in a fit; this one keeps nothing."""

    def begins_pass(self) -> None:
        """A pass over the data begins."""

    def goes_on(self) -> None:
        """The batches that were done are passed over; the next one is new."""

    def after_step(self) -> None:
        """A step is complete, and callbacks have seen it."""


@dataclass(frozen=True, eq=False)
class OnlineRun:
    """A fit by online EM.

    Attributes:
        steps: Makes the steps.
        data: The data in chunks.
        run: The path so far, which goes on.
        standing: Where it stands.
        num_epochs: Passes over the data, from the very beginning.
        callbacks: Called with each step; one that returns True stops the fit.
        held_out: The log evidence of other data at the parameters in the store, in nats.
        begin: When the fit began.
    """

    steps: Steps
    data: Parted
    run: EMRun
    standing: Standing
    num_epochs: int
    callbacks: Sequence[Callable[[EMStep], Any]]
    held_out: Callable[[], float] | None
    begin: float

    def go(self, watcher: Watcher) -> None:
        """Make the steps.

        Args:
            watcher: Told of them.

        Raises:
            DegenerateError: If the first step has no solution.
        """
        run, standing = self.run, self.standing
        try:
            while standing.epochs < self.num_epochs and run.status is EMStatus.MAX_STEPS:
                for batch in self._batches(watcher):
                    self._step(batch)
                    del batch
                    if run.status is not EMStatus.MAX_STEPS:
                        break
                    standing.number += 1
                    if self._asks_to_stop():
                        run.status = EMStatus.STOPPED
                    watcher.after_step()
                    if run.status is not EMStatus.MAX_STEPS:
                        break
                else:
                    standing.epochs, standing.number = standing.epochs + 1, 0
                    self._validate()
        except KeyboardInterrupt:
            run.status = EMStatus.INTERRUPTED
        if run.status is EMStatus.DEGENERATE:
            if not run.entering:
                raise DegenerateError(run.message)
            warn(run.message)

    def publish(self) -> None:
        """Put the best parameters that were found into the param store."""
        self.steps.publish()
        if self.standing.best[1] is not None:
            restore(self.data.lead.graph.parameters, self.standing.best[1])

    def _batches(self, watcher: Watcher) -> Iterator[Reduction[Part]]:
        """The batches of a pass, or the rest of the one that another process left."""
        watcher.begins_pass()
        batches = self.data.over.each()
        if self.standing.number:
            for _ in range(self.standing.number):
                next(batches)
            watcher.goes_on()
        return batches

    def _step(self, batch: Reduction[Part]) -> None:
        steps, run, standing = self.steps, self.run, self.standing
        total = standing.sums.total
        before = replace(standing.sums)  # what a broken step leaves as it was
        if isinstance(before, Replaced):
            before.batches = list(before.batches)
        state = steps.state()
        try:
            rows, evidence, own = steps.e_step(batch)
            entering = evidence * total / rows + steps.beside()
            gain = steps.m_step(standing.sums.with_batch(steps, own, standing.number, rows))
            if self.data.has_others:
                steps.agree(self.data.over)
        except (Handover, DegenerateError, DataError) as error:
            run.status = EMStatus.DEGENERATE
            run.message = NO_STEP if isinstance(error, Handover) else str(error)
            standing.sums = before
            steps.go_to(state)
            return
        except BaseException:
            standing.sums = before
            steps.go_to(state)
            raise
        run.entering.append(entering)
        run.after.append(entering + gain)

    def _asks_to_stop(self) -> bool:
        """Show a step to the callbacks; whether one of them, on any process, asks to stop."""
        if not self.callbacks:
            return False
        run = self.run
        step = EMStep(
            run.num_steps - 1, run.entering[-1], None, None, dict, time.perf_counter() - self.begin
        )
        step = replace(step, made_params=Given(self.steps.values()))
        asks = self.data.over.gathered(lambda: _any_asks(self.callbacks, step))
        return any(asks)

    def _validate(self) -> None:
        """Take the held-out evidence after a pass; the best parameters are kept."""
        if self.held_out is None:
            return
        self.steps.publish()
        value = sum(self.data.over.gathered(self.held_out))
        self.standing.validation.append((self.run.num_steps, value))
        if value > self.standing.best[0]:
            self.standing.best = value, snapshot(self.data.lead.graph.parameters)


def _any_asks(callbacks: Sequence[Callable[[EMStep], Any]], step: EMStep) -> bool:
    """Whether a callback asks to stop; all of them see the step."""
    return sum(callback(step) is True for callback in callbacks) > 0


NO_STEP = message(
    "online",
    "a step on the sums so far has no solution; the parameters before it were kept.",
    "a component has lost its mass, or its spread has collapsed",
    ["pass larger chunks: Chunks(x, rows=...)", "start elsewhere, or from em.fit(some_rows)"],
)
