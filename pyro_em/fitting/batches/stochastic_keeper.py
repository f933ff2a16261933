"""Keeps where a stochastic fit stands, in a file, and lets another process go on from there."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_em.fitting.batches.stochastic_run import StochasticRun
from pyro_em.fitting.checkpoint.checkpoint_file import CheckpointFile
from pyro_em.fitting.checkpoint.fingerprints import Fingerprint
from pyro_em.fitting.places import Place
from pyro_em.fitting.results.history import EMStatus
from pyro_em.tracing.encoding import decoded, encoded
from pyro_em.tracing.parameters import restore, snapshot
from pyro_em.tracing.randomness import random_state, set_random_state
from pyro_em.updates.gradients.optimizers import Steppers
from pyro_em.variational.trainer import Trainer
from pyro_em.variational.training import Stage

_LEARNING = 3  # steps after which it is known what random states they change


@dataclass(eq=False)
class StochasticKeeper:
    """Writes the checkpoint of a stochastic fit.

    Attributes:
        file: The file.
        fingerprint: What the fit is, as it is now.
        constant: What stays the same in the file.
        trainer: The pair with its optimisers.
        place: Where it stands in its data.
        buffers: Tensors of modules that steps write and that are no parameters, by name.
        begin: When the fit began, the time before it was resumed included.
    """

    file: CheckpointFile
    fingerprint: Callable[[], Fingerprint]
    constant: Mapping[str, Any]
    trainer: Trainer
    place: Place
    buffers: Mapping[str, Tensor]
    begin: float
    _random: Any = None
    _buffers: dict[str, Tensor] = field(default_factory=dict)
    _baselines: dict[str, float] = field(default_factory=dict)
    _steps: tuple[int, int] = (0, 0)
    _epoch: Any = None
    _done: int = 0
    _draws_elsewhere: bool = True
    _seen: int = 0

    def start(self, out: StochasticRun) -> None:
        """Take note of where a fit begins, or goes on."""
        self._note(out)

    def after_step(self, out: StochasticRun) -> None:
        """Called after each complete step, when callbacks have seen it."""
        self._note(out)
        if self.file.is_due():
            self._write(out)

    def finish(self, out: StochasticRun) -> None:
        """Write where the fit ended, unless that is in the file, or a broken step has changed it."""
        if self.file.is_shared and out.status is EMStatus.INTERRUPTED:
            return  # processes may have been interrupted at different steps
        training, (steps, bounds) = self.trainer.training, self._steps
        new = len(out.bounds) - bounds
        is_broken = out.status in (EMStatus.INTERRUPTED, EMStatus.DEGENERATE)
        if new and training.steps == steps + new:  # a complete step, that a callback interrupted
            self._note(out)
            self._write(out)
        elif not self.file.is_behind or out.status is EMStatus.DEGENERATE:
            return
        elif not is_broken:
            self._note(out)
            self._write(out)
        elif training.steps == steps and not new and training.stage is not Stage.MOVED:
            # The step that was broken off has changed no parameter yet; its batch comes again.
            self.place.done = self._done if self.place.begin is self._epoch else 0
            training.baselines.clear()
            training.baselines.update(self._baselines)
            with torch.no_grad():
                for name, buffer in self.buffers.items():
                    buffer.copy_(self._buffers[name])
            self._write(out)

    def _note(self, out: StochasticRun) -> None:
        """Copy what the next step changes before it changes parameters."""
        training = self.trainer.training
        training.stage = Stage.ENTERED
        self._steps = training.steps, len(out.bounds)
        self._epoch, self._done = self.place.begin, self.place.done
        self._baselines = dict(training.baselines)
        self._buffers = {n: b.detach().clone() for n, b in self.buffers.items()}
        self._note_random()

    def _note_random(self) -> None:
        if not self._draws_elsewhere:
            # To ask Python and numpy takes much of the time of a small step.
            self._random = _with_torch(self._random)
            return
        before, self._random = self._random, random_state()
        if before is not None:
            self._seen += 1
            self._draws_elsewhere = not _same_elsewhere(before, self._random)
            self._draws_elsewhere |= self._seen < _LEARNING

    def _write(self, out: StochasticRun) -> None:
        if not self._draws_elsewhere and out.status is not EMStatus.INTERRUPTED:
            live = random_state()
            if not _same_elsewhere(live, self._random):
                self._random, self._draws_elsewhere = live, True
        each = [self._own()] if not self.file.is_shared else self._of_all()
        self.file.write(lambda: self._state(out, each))

    def _own(self) -> dict[str, Any]:
        """What each process has of its own."""
        return {
            "random": encoded(self._random),
            "place": self.place.state(),
            "buffers": encoded(self.buffers),
        }

    def _of_all(self) -> list[dict[str, Any]]:
        """The same of all processes, sent as a file would hold it: not all tensors can be pickled."""

        def content() -> bytes:
            stream = io.BytesIO()
            torch.save(self._own(), stream)
            return stream.getvalue()

        each = self.file.over.gathered(content)
        return [torch.load(io.BytesIO(one), map_location="cpu", weights_only=True) for one in each]

    def _state(self, out: StochasticRun, each: list[dict[str, Any]]) -> dict[str, Any]:
        training = self.trainer.training
        recovery, saved = training.recovery, training.saved_name
        status = EMStatus.MAX_STEPS if out.status is EMStatus.INTERRUPTED else out.status
        sharing = self.trainer.sharing
        return {
            "kind": "stochastic",
            "fit": self.fingerprint(),
            **self.constant,
            "seconds": time.perf_counter() - self.begin,
            "each": each,
            "bounds": torch.tensor(out.bounds, dtype=torch.float64),
            "validation": [tuple(v) for v in out.validation],
            "status": status.name,
            "epochs": out.epochs,
            "parameters": {saved(n): encoded(v) for n, v in self._parameters().items()},
            "training": training.state(),
            "recovery": {
                "step": recovery.step,
                "is_unbroken": recovery.is_unbroken,
                "copies": {saved(n): encoded(copy) for n, (_, copy) in recovery.copies.items()},
            },
            "draws": None if sharing is None else [sharing.seed, sharing.draws],
        }

    def _parameters(self) -> dict[str, Tensor]:
        read = {n: p for n, (p, _) in self.trainer.training.recovery.copies.items()}
        return {**read, **snapshot(self.trainer.variational.parameters)}


def taken_up(
    saved: Mapping[str, Any],
    trainer: Trainer,
    place: Place,
    buffers: Mapping[str, Tensor],
    rank: int,
) -> StochasticRun:
    """Bring a trainer to where another process left it.

    Args:
        saved: What the file holds.
        trainer: The pair with its optimisers.
        place: Where it stands in its data.
        buffers: Tensors of modules that steps write and that are no parameters, by name.
        rank: The number of this process.

    Returns:
        The path so far.
    """
    training, own = trainer.training, saved["each"][rank]
    name_of = training.saved_name
    parameters = trainer.variational.parameters
    values = decoded(saved["parameters"])
    restore(parameters, {n: values[name_of(n)] for n in parameters})
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(decoded(own["buffers"][name]))
    training.optimizers = Steppers(name_of)
    training.baselines.clear()
    training.restore(saved["training"])
    kept, recovery = saved["recovery"], training.recovery
    recovery.step, recovery.is_unbroken = kept["step"], kept["is_unbroken"]
    places = {name_of(n): (n, p) for n, p in pyro.get_param_store()._params.items()}
    places |= {name_of(n): (n, p.unconstrained) for n, p in parameters.items()}
    recovery.copies = {
        places[n][0]: (places[n][1], decoded(copy))
        for n, copy in kept["copies"].items()
        if n in places
    }
    if trainer.sharing is not None:
        trainer.sharing.seed, trainer.sharing.draws = saved["draws"]
    place.go_to(own["place"])
    set_random_state(decoded(own["random"]))
    validation = [(int(step), float(bound)) for step, bound in saved["validation"]]
    status = EMStatus[saved["status"]]
    return StochasticRun(saved["bounds"].tolist(), validation, status, "", saved["epochs"])


def _with_torch(state: tuple[Any, Any]) -> tuple[Any, Any]:
    """A random state with that of torch as it is now."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {**state[0], "torch": torch.get_rng_state()}, cuda


def _same_elsewhere(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    """Whether two random states differ in that of torch alone."""
    if a[0]["random"] != b[0]["random"]:
        return False
    both = zip(a[0]["numpy"], b[0]["numpy"], strict=True)
    return all(np.array_equal(x, y) for x, y in both)
