"""A fit of exact steps with its checkpoint: where it begins, or where another process left it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyro_em.fitting.checkpoint.checkpoints import Checkpoint, origin_state
from pyro_em.fitting.checkpoint.fingerprints import Fingerprint
from pyro_em.fitting.checkpoint.keeper import ExactKeeper, doubts_of, search_of
from pyro_em.fitting.origins import Origin
from pyro_em.fitting.session import Session
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.search import Search
from pyro_em.plan.fit_wishes import FitWishes
from pyro_em.plan.program import Program
from pyro_em.tracing.encoding import decoded, encoded
from pyro_em.tracing.parameters import snapshot
from pyro_em.tracing.randomness import set_random_state


@dataclass(frozen=True, eq=False)
class KeptFit:
    """The keeper of a fit, and what its file held.

    Attributes:
        keeper: The keeper.
        saved: What the file held; None where the fit begins.
    """

    keeper: ExactKeeper
    saved: dict[str, Any] | None

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        program: Program,
        session: Session,
        wishes: FitWishes,
        origin: Origin,
        begin: float,
    ) -> KeptFit:
        """The keeper of a fit that has been held against its checkpoint.

        Args:
            checkpoint: The checkpoint.
            program: The model with its data, at the parameters where the fit began.
            session: What is known of the model.
            wishes: The keywords of the fit.
            origin: Where the fit began.
            begin: When the fit began.
        """
        saved, limits = checkpoint.saved, (wishes.max_steps, wishes.tol)
        if saved is None:
            search = Search.seeded(wishes.seed)
        else:
            max_steps, tol = saved["limits"]
            search = search_of(saved["search"], limits[0] > max_steps or limits[1] < tol)
        known = program.dependences

        def fingerprint(now: Program) -> Fingerprint:
            return checkpoint.fingerprint(None if now.dependences is known else now)

        constant = {
            "origin": encoded(snapshot(program.graph.parameters)),
            "origins": origin_state(origin),
            "total_before": session.total_steps,
        }
        is_watched = bool(wishes.callbacks)
        keeper = ExactKeeper(
            checkpoint.file, fingerprint, constant, search, limits, is_watched, begin
        )
        return cls(keeper, saved)

    def take_up(self, em: Guarded) -> None:
        """Bring what a fit changes beside its runs to where another process left it."""
        if self.saved is None:
            return
        for off in doubts_of(self.saved):
            em.distrust(off)
        em.state.told[:] = self.saved["told"]
        set_random_state(decoded(self.saved["random"]))
