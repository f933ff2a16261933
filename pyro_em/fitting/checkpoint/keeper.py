"""Keeps where a fit of exact steps stands, in a file, and lets another process go on from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyro_em.fitting.checkpoint.checkpoint_file import CheckpointFile
from pyro_em.fitting.checkpoint.fingerprints import Fingerprint
from pyro_em.fitting.results.history import EMStatus
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.resuming import Between, ended_run, ended_state, standing_state
from pyro_em.fitting.steps.run import EMRun
from pyro_em.fitting.steps.search import Search
from pyro_em.plan.evaluation import Disagreement
from pyro_em.plan.program import Program
from pyro_em.tracing.encoding import encoded
from pyro_em.tracing.randomness import random_state


@dataclass(eq=False)
class ExactKeeper:
    """See `pyro_em.fitting.steps.run.Keeper`.

    Attributes:
        file: The file.
        fingerprint: What the fit is, as it is now.
        constant: What stays the same in the file.
        search: Where the starts of the fit stand.
        limits: ``max_steps`` and ``tol``.
        is_watched: Whether callbacks may write parameters.
        begin: When the fit began, the time before it was resumed included.
    """

    file: CheckpointFile
    fingerprint: Callable[[Program], Fingerprint]
    constant: Mapping[str, Any]
    search: Search
    limits: tuple[int, float]
    is_watched: bool
    begin: float
    _current: EMRun | None = None
    _between: Between | None = None
    _at: tuple[EMRun | None, int] = (None, 0)
    _is_interrupted: bool = False
    _is_lost: bool = False

    def after_step(self, em: Guarded, run: EMRun) -> None:
        """See `pyro_em.fitting.steps.run.Keeper.after_step`."""
        if em.program.may_draw or em.state.optimizers:
            self._between, self._at = Between.of(em), (run, run.num_steps)
        if self.file.is_due():
            self._keep(em, run, self._between)
            self._write(em)

    def at_rest(self, em: Guarded, run: EMRun) -> None:
        """See `pyro_em.fitting.steps.run.Keeper.at_rest`."""
        if run.status is EMStatus.MAX_STEPS and run.num_steps < self.limits[0]:
            return  # it goes on
        if self.search.is_short and run.status is not EMStatus.INTERRUPTED:
            return
        is_broken = run.status in (EMStatus.INTERRUPTED, EMStatus.DEGENERATE, EMStatus.FELL)
        if run.status is EMStatus.INTERRUPTED and (em.program.may_draw or em.state.optimizers):
            known = self._at[1] if self._at[0] is run else 0
            # What a step changes in its midst is known of the last noted one, and of one that is done.
            is_done = run.num_steps > known
            self._is_lost = not is_done and self._at[0] is not run
            if self._is_lost:
                return
            if is_done:
                self._between = None
        self._is_interrupted |= run.status is EMStatus.INTERRUPTED
        self._keep(em, run, self._between if is_broken else None)

    def _keep(self, em: Guarded, run: EMRun, between: Between | None) -> None:
        self._current = run
        self.search.drawn = self.search.generator.get_state()
        run.rest = standing_state(em, run, self.is_watched, between)

    def at_fork(self, em: Guarded, run: EMRun) -> None:
        """See `pyro_em.fitting.steps.run.Keeper.at_fork`."""
        if run.fork is None:
            run.fork = standing_state(em, run, self.is_watched)

    def finish(self, em: Guarded) -> None:
        """Write where the fit ended, unless that is in the file."""
        if not self._is_lost and (self.file.is_behind or self._is_interrupted):
            self._write(em)

    def _write(self, em: Guarded) -> None:
        self.file.write(lambda: self._state(em))

    def _state(self, em: Guarded) -> dict[str, Any]:
        search, current = self.search, self._current
        long = [s for s in map(_of_run, search.runs) if s is not None]
        short = search.left_short
        rest = None if current is None or current in search.runs else current.rest
        if rest is not None and search.is_short:
            short = rest
        elif rest is not None:
            long.append(rest)
        return {
            "kind": "exact",
            "fit": self.fingerprint(em.program),
            **self.constant,
            "limits": list(self.limits),
            "seconds": time.perf_counter() - self.begin,
            "random": encoded(random_state()) if rest is None else rest["random"],
            "doubts": [{"places": off.places, "note": off.note} for off in em.doubts],
            "told": list(em.state.told),
            "search": {
                "generator": search.drawn,
                "at_candidates": search.at_candidates,
                "limits": list(search.limits),
                "stage": search.stage,
                "done": search.done,
                "waiting": [ended_state(r) for r in self._waiting()],
                "long": [*long, *search.left],
                "short": short,
            },
        }

    def _waiting(self) -> list[EMRun]:
        """The short runs; the present one of the first round is not yet one of them."""
        search = self.search
        return search.waiting if search.stage else search.waiting[: search.done]


def _of_run(run: EMRun) -> dict[str, Any] | None:
    """Where a run stood at its end; None where it was interrupted before it made a step."""
    if run.rest is not None:
        rest: dict[str, Any] = run.rest
        return rest
    return None if run.status is EMStatus.INTERRUPTED else ended_state(run)


def search_of(state: Mapping[str, Any], asks_for_more: bool) -> Search:
    """The starts of a fit as another process left them.

    Args:
        state: What the file says of them.
        asks_for_more: Whether ``max_steps`` is larger now, or ``tol`` smaller: runs then go on from
            where their path began to depend on it.
    """
    search = Search(torch.Generator())
    search.generator.set_state(state["generator"])
    search.drawn = state["generator"]
    search.at_candidates, search.limits = state["at_candidates"], tuple(state["limits"])
    search.stage, search.done = state["stage"], state["done"]
    search.waiting = [ended_run(r) for r in state["waiting"]]
    left = list(state["long"])
    if asks_for_more:
        left = [r if r.get("fork") is None else r["fork"] for r in left]
    search.left, search.left_short = left, state["short"]
    return search


def doubts_of(state: Mapping[str, Any]) -> list[Disagreement]:
    """What has shown that the program's bindings are not what the model does."""
    return [
        Disagreement(tuple(tuple(p) for p in off["places"]), off["note"]) for off in state["doubts"]
    ]
