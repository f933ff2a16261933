"""Opens the checkpoint of a fit, and holds what it belongs to against the call that found it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro_em.errors import UsageError, message
from pyro_em.fitting.checkpoint.checkpoint_file import CheckpointFile
from pyro_em.fitting.checkpoint.fingerprints import (
    Fingerprint,
    first_difference,
    of_arguments,
    of_data_seen,
    of_numbers,
    of_pair,
    of_program,
    of_ranks,
    of_request,
    of_tensors,
    of_wishes,
)
from pyro_em.fitting.origins import Origin
from pyro_em.fitting.parts.chunked import chunks_in
from pyro_em.fitting.places import same_order
from pyro_em.fitting.session import Session
from pyro_em.plan.fit_wishes import FitWishes
from pyro_em.plan.program import Program
from pyro_em.reduction.over_group import OverGroup
from pyro_em.tracing.parameters import restore, snapshot
from pyro_em.variational.trainer import Trainer

logger = logging.getLogger("pyro_em")


@dataclass(eq=False)
class Checkpoint:
    """The checkpoint of one fit.

    Attributes:
        file: The file.
        saved: What it held; None where the fit begins.
        call: The model's arguments.
        numbers: What names in the model stand for, as they are now.
        fixed: What the fit is, the data excepted.
        data: The data, as the call gave them.
        has_changed: Whether a callback has changed the data since.
    """

    file: CheckpointFile
    saved: dict[str, Any] | None
    call: tuple[tuple, dict[str, Any]]
    numbers: Callable[[], Fingerprint]
    fixed: Fingerprint = field(default_factory=dict)
    data: Fingerprint = field(default_factory=dict)
    has_changed: bool = False
    _names: Fingerprint = field(default_factory=dict)

    def note(self, found: Program | Trainer, session: Session, wishes: FitWishes) -> None:
        """Take note of what the fit is, before its first step."""
        args, kwargs = self.call
        request, guide = session.request, session.planner.guide_now
        if isinstance(found, Program):
            model = of_program(found)
        else:
            model = of_pair(found.variational, session.planner.saved_name)
        self.fixed = {
            **model,
            **of_wishes(wishes),
            **of_request(request, session.num_particles),
            **of_tensors(request, guide, args, kwargs),
        }
        self._names = self.numbers()
        self.data = self._data(found if isinstance(found, Program) else None)
        if self.file.is_shared:
            each = self.file.over.gathered(lambda: self.fixed)
            self.fixed = {"the number of processes": str(len(each)), **of_ranks(each)}

    def _data(self, program: Program | None) -> Fingerprint:
        """The data of all processes."""
        args, kwargs = self.call

        def own() -> Fingerprint:
            # Which rows a program holds is up to the order of a pass where that is drawn.
            chunks = chunks_in(args)
            is_one = chunks is None or chunks.is_ordered
            seen = of_data_seen(program.graph) if program is not None and is_one else {}
            with same_order(None if chunks is None else chunks.source):
                return {**of_arguments(args, kwargs), **seen}

        return of_ranks(self.file.over.gathered(own)) if self.file.is_shared else own()

    def fingerprint(
        self, program: Program | None = None, looks_again: bool = False
    ) -> dict[str, Any]:
        """What the fit is, with the data as they are now.

        Args:
            program: The model with its data, where a callback has changed them.
            looks_again: Whether a callback may have changed the data.
        """
        # What changes by itself while the fit goes on is no part of what the fit is.
        now = self.numbers()
        self._names = {n: v for n, v in self._names.items() if now.get(n) == v}
        # Chunks are read from where no callback has them at hand.
        looks_again = looks_again and chunks_in(self.call[0]) is None
        if program is not None or looks_again:
            data = self._data(program)
            self.has_changed |= bool(first_difference(self.data, data))
            self.data = data
        return {
            "fixed": self.fixed,
            "data": self.data,
            "names": self._names,
            "has_changed": self.has_changed,
        }

    def require_same(self) -> None:
        """Refuse a checkpoint of another fit, on all processes; it is left as it is.

        Raises:
            UsageError: With the first difference.
        """
        if self.saved is not None:
            self.file.over.from_first(self._require_same)

    def _require_same(self) -> None:
        assert self.saved is not None
        there, why = self.saved["fit"], "the path of a fit depends on it"
        now = self.numbers()
        known = {n: v for n, v in there["names"].items() if n in now}
        difference = (
            first_difference(_forms(there["data"]), _forms(self.data))
            or first_difference(there["fixed"], self.fixed)
            or first_difference(known, {n: now[n] for n in known})
        )
        if not difference:
            difference = first_difference(there["data"], self.data)
            if there["has_changed"]:
                why = (
                    "a callback changed the data while that fit went on, and it goes on with the data "
                    "as they were then"
                )
        if difference:
            raise UsageError(
                message(
                    f"checkpoint '{self.file.path}'",
                    f"it belongs to another fit: {difference}.",
                    f"{why}; nothing was changed, the file neither",
                    [
                        "make the call that wrote it: max_steps, num_epochs, tol, progress and the "
                        "options of checkpoints may be others",
                        "start over and replace it: fit(..., resume=False)",
                        "name another file: fit(..., checkpoint='other.pt')",
                    ],
                )
            )
        logger.info("fit: goes on from checkpoint '%s'", self.file.path)


def _forms(data: Mapping[str, Any]) -> Fingerprint:
    """The forms of data, without their values."""
    return {n: v for n, v in data.items() if not n.startswith("values of ")}


def opened(
    session: Session,
    wishes: FitWishes,
    args: tuple,
    kwargs: dict[str, Any],
    group: OverGroup[Any] | None,
) -> Checkpoint | None:
    """The checkpoint that the user named; None where there is none.

    Args:
        session: What is known of the model.
        wishes: The keywords of the fit.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        group: The processes that make the fit together, where there are several.

    Raises:
        UsageError: If the file is something else, or damaged.
        FileError: If it cannot be read, or not be written and the user wants to know.
    """
    if wishes.checkpoint is None:
        return None
    every, raises = wishes.checkpoint_every, wishes.on_checkpoint_error == "raise"
    file = CheckpointFile(wishes.checkpoint, every, raises)
    if group is not None:
        file = CheckpointFile(wishes.checkpoint, every, raises, group, group.rank)
    saved = file.read() if wishes.resume else None
    file.probe()
    guide = session.planner.guide_now

    def numbers() -> Fingerprint:
        return of_numbers(session.request, guide, args, kwargs) if file.writes else {}

    return Checkpoint(file, saved, (args, kwargs), numbers)


def at_beginning(
    checkpoint: Checkpoint,
    found: Program | Trainer,
    session: Session,
    wishes: FitWishes,
    looked: tuple[tuple, dict[str, Any]],
) -> Program | Trainer:
    """Hold a fit against its checkpoint, and read the model where the fit began.

    Args:
        checkpoint: The checkpoint.
        found: The model with its data, as it has been read.
        session: What is known of the model.
        wishes: The keywords of the fit.
        looked: The arguments with which the model is read.

    Returns:
        What was found, at the parameters at which the fit began.

    Raises:
        UsageError: If the checkpoint belongs to another fit; parameters are as before.
    """
    saved = checkpoint.saved
    if saved is None or not isinstance(found, Program):
        checkpoint.note(found, session, wishes)
        checkpoint.require_same()
        return found
    parameters = found.graph.parameters
    before, origin = snapshot(parameters), saved.get("origin", {})
    same_forms = before.keys() == origin.keys() and all(
        v.shape == origin[n].shape for n, v in before.items()
    )
    again: Program | Trainer = found
    try:
        if same_forms:
            restore(parameters, origin)
            if any(not bool((before[n] == origin[n].to(before[n])).all()) for n in before):
                again = session.ready(*looked)
        checkpoint.note(again, session, wishes)
        checkpoint.require_same()
    except BaseException:
        restore(parameters, before)
        raise
    return again


def origin_state(origin: Origin) -> dict[str, list[str]]:
    """Where a fit began, in names."""
    return {"stored": list(origin.stored), "foreign": list(origin.foreign)}


def origin_of_state(state: Mapping[str, Any]) -> Origin:
    """The origin that `origin_state` made a state of."""
    return Origin(tuple(state["stored"]), tuple(state["foreign"]))
