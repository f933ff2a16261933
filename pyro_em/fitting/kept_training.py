"""A stochastic fit with its checkpoint: where it begins, or where another process left it."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_em.fitting.batches import epochs
from pyro_em.fitting.batches.stochastic_keeper import StochasticKeeper, taken_up
from pyro_em.fitting.batches.stochastic_run import StochasticRun
from pyro_em.fitting.checkpoint.checkpoints import Checkpoint, origin_state
from pyro_em.fitting.origins import Origin
from pyro_em.fitting.places import Place
from pyro_em.fitting.session import Session
from pyro_em.tracing.checkpoint import buffers_of
from pyro_em.variational.batches import Batch
from pyro_em.variational.trainer import Trainer


@dataclass(frozen=True, eq=False)
class KeptTraining:
    """What a checkpoint knows of a stochastic fit before its first step.

    Attributes:
        checkpoint: The checkpoint, which has been held against the fit.
        origin: Where the fit began.
        session: What is known of the model.
    """

    checkpoint: Checkpoint
    origin: Origin
    session: Session

    def taken_up(
        self, trainer: Trainer, place: Place, begin: float, is_watched: bool
    ) -> tuple[StochasticRun, StochasticKeeper]:
        """The path so far, with the trainer where another process left it, and the keeper.

        Args:
            trainer: The pair with its optimisers.
            place: The data.
            begin: When the fit began.
            is_watched: Whether callbacks may change data.
        """
        checkpoint, session = self.checkpoint, self.session
        buffers = {n: b.detach() for n, b in buffers_of(session.roots()).items()}
        constant = {"origins": origin_state(self.origin), "total_before": session.total_steps}

        def fingerprint() -> dict[str, object]:
            return checkpoint.fingerprint(looks_again=is_watched and not checkpoint.file.is_shared)

        keeper = StochasticKeeper(
            checkpoint.file, fingerprint, constant, trainer, place, buffers, begin
        )
        if checkpoint.saved is None:
            return StochasticRun(), keeper

        def pass_over(batch: Batch) -> None:
            factors = epochs.factors_at(trainer, batch)
            trainer.training.last = (batch.args, batch.kwargs, factors)

        place.pass_over = pass_over
        rank = checkpoint.file.rank
        return taken_up(checkpoint.saved, trainer, place, buffers, rank), keeper
