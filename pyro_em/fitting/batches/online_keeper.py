"""Keeps where a fit by online EM stands, in a file, and lets another process go on from there."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyro_em.fitting.batches.online import OnlineRun, Watcher
from pyro_em.fitting.batches.online_sums import Averaged
from pyro_em.fitting.checkpoint.checkpoint_file import CheckpointFile
from pyro_em.fitting.checkpoint.fingerprints import Fingerprint
from pyro_em.fitting.places import generators_of
from pyro_em.fitting.results.history import EMStatus
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.resuming import optimizers_state, restore_optimizers
from pyro_em.tracing.encoding import decoded, encoded
from pyro_em.tracing.parameters import snapshot
from pyro_em.tracing.randomness import random_state, set_random_state


@dataclass(eq=False)
class OnlineKeeper(Watcher):
    """Writes the checkpoint of a fit by online EM.

    Attributes:
        file: The file.
        fingerprint: What the fit is, as it is now.
        constant: What stays the same in the file.
        em: The map.
        of: The fit.
        source: What the chunks are read from.
        begin: When the fit began, the time before it was resumed included.
    """

    file: CheckpointFile
    fingerprint: Callable[[], Fingerprint]
    constant: Mapping[str, Any]
    em: Guarded
    of: OnlineRun
    source: Any
    begin: float
    _pass: Any = None
    _now: Any = None

    def begins_pass(self) -> None:
        """See `Watcher.begins_pass`."""
        sources = generators_of(self.source)
        if self._pass is not None and self.of.standing.number:
            self._now = random_state(), [g.get_state() for g in sources]
            random, states = self._pass
            set_random_state(random)
            for generator, state in zip(sources, states, strict=True):
                generator.set_state(state)
        else:
            self._pass = random_state(), [g.get_state() for g in sources]

    def goes_on(self) -> None:
        """See `Watcher.goes_on`."""
        if self._now is not None:
            set_random_state(self._now[0])
            self._now = None

    def after_step(self) -> None:
        """See `Watcher.after_step`."""
        if self.file.is_due():
            self.write()

    def finish(self) -> None:
        """Write where the fit ended, unless that is in the file."""
        if self.file.is_behind and self.of.run.status is not EMStatus.DEGENERATE:
            self.write()

    def write(self) -> None:
        """Write where the fit stands."""
        each = self._of_all()
        self.file.write(lambda: self._state(each))

    def _of_all(self) -> list[Any]:
        """The random states of each process, as a file holds them."""
        own = {"now": encoded(random_state()), "pass": encoded(self._pass)}
        if not self.file.is_shared:
            return [own]

        def content() -> bytes:
            stream = io.BytesIO()
            torch.save(own, stream)
            return stream.getvalue()

        each = self.file.over.gathered(content)
        return [torch.load(io.BytesIO(one), map_location="cpu", weights_only=True) for one in each]

    def _state(self, each: list[Any]) -> dict[str, Any]:
        run, standing = self.of.run, self.of.standing
        sums = standing.sums
        if isinstance(sums, Averaged):
            kept: dict[str, Any] = {"sums": encoded(sums.sums), "steps": sums.steps}
        else:
            kept = {
                "sums": encoded(sums.sums),
                "batches": encoded(sums.batches),
                "seen": sums.seen,
            }
        is_stopped = run.status is EMStatus.STOPPED
        return {
            "kind": "online",
            "fit": self.fingerprint(),
            **self.constant,
            "seconds": time.perf_counter() - self.begin,
            "each": each,
            "kept": kept,
            "steps": self.of.steps.state(),
            "parameters": encoded(run.parameters),
            "initial_values": encoded(run.initial_values),
            "name": run.name,
            "store": encoded(snapshot(self.em.program.graph.parameters)),
            "entering": torch.tensor(run.entering, dtype=torch.float64),
            "after": torch.tensor(run.after, dtype=torch.float64),
            "place": [standing.epochs, standing.number],
            "all_data": encoded(self.of.data.all_data),
            "is_stopped": is_stopped,
            "validation": [tuple(v) for v in standing.validation],
            "best": encoded(standing.best),
            "optimizers": optimizers_state(self.em.state),
            "told": list(self.em.state.told),
        }

    def take_up(self, saved: Mapping[str, Any]) -> None:
        """Bring the fit to where another process left it."""
        run, standing, rank = self.of.run, self.of.standing, self.file.rank
        self.of.steps.go_to(saved["steps"])
        restore_optimizers(self.em, saved["optimizers"])
        self.em.state.told[:] = saved["told"]
        run.parameters, run.name = decoded(saved["parameters"]), saved["name"]
        run.initial_values = decoded(saved["initial_values"])
        run.entering, run.after = saved["entering"].tolist(), saved["after"].tolist()
        run.status = EMStatus.STOPPED if saved["is_stopped"] else EMStatus.MAX_STEPS
        for name, value in decoded(saved["kept"]).items():
            setattr(standing.sums, name, value)
        standing.epochs, standing.number = saved["place"]
        standing.validation = [(int(n), float(v)) for n, v in saved["validation"]]
        standing.best = decoded(saved["best"])
        own = saved["each"][rank]
        self._pass = decoded(own["pass"])
        set_random_state(decoded(own["now"]))
