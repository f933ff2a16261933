"""One exchange between all processes of a group: numbers are added, errors are raised on all.

Every exchange begins with the same collective, an all-reduce of one vector

    (errors, surprises, the numbers of this rank)

whose length all ranks know, since it follows from the exchanges so far: after one form of numbers the
form is expected that came after it before, or else the same one. Where all numbers have the expected
form, that is all. Otherwise (the first time, an error, another form, ranks in different calls) the
ranks tell each other what they have, and either agree or raise, all of them. So no rank waits for
another in vain, whatever goes wrong on one of them; a process that has died ends the wait by the
time-out of its backend.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_em.errors import GroupError, message
from pyro_em.reduction.told import (
    Form,
    NotAnswering,
    Said,
    answering,
    disagreement,
    problem_of,
    raised_elsewhere,
    require_member,
)
from pyro_em.reduction.uninterrupted import Uninterrupted

END = "the end"  # the call after the last one; an interrupt is not told any more

_ERRORS, _SURPRISES, _HEAD = 0, 1, 2  # places in the vector, and where numbers begin


@dataclass(frozen=True)
class Counts:
    """What exchanges have cost this process.

    Attributes:
        exchanges: How many.
        collectives: Calls of the backend, those to measure the wait excepted.
        bytes: What this process has given to them.
        seconds: Spent inside them, the wait for slower ranks included where it was not measured.
        waiting: Seconds spent waiting for slower ranks; zero where it was not measured.
    """

    exchanges: int = 0
    collectives: int = 0
    bytes: int = 0
    seconds: float = 0.0
    waiting: float = 0.0


@dataclass
class _Past:
    """What all ranks know alike: what was exchanged so far."""

    last: Form | None = None
    following: dict[Form | None, Form] = field(default_factory=dict)


class Exchange:
    """The exchanges of one process with the others of its group.

    Args:
        group: A process group of torch.
        place: Where this process's data lie in all data, in words, for messages.
        timed: Whether to measure the wait for slower ranks, by one more collective each time.

    Attributes:
        rank: Of this process in the group.
        size: How many processes the group has.
        device: Where the backend takes tensors from.
        counts: What it has cost.
        agreed: The last exception that was raised on all ranks.
    """

    def __init__(self, group: Any, place: str = "", timed: bool = False) -> None:
        require_member(group)
        self.group = group
        self.place = place
        self.timed = timed
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self.device = _device_of(group)
        self.counts = Counts()
        self.agreed: BaseException | None = None
        self._past = _Past()
        self._guard = Uninterrupted()

    @property
    def lacking(self) -> tuple[int, ...]:
        """The ranks that had nothing in the last exchange."""
        return () if self._past.last is None else self._past.last.lacking

    def of(self, form: Form | None, numbers: Tensor | None, error: BaseException | None) -> Tensor:
        """The sum over ranks of numbers of one form.

        Args:
            form: What this rank has; None where it has an error instead.
            numbers: As many as the form says, in float64; None where it adds nothing.
            error: What this rank raised instead of making numbers.

        Returns:
            The sums, the same on all ranks, bit by bit.

        Raises:
            BaseException: On all ranks, if one of them has an error, or their forms differ.
            GroupError: If a rank does not answer.
        """
        is_end = form is not None and form.call == END
        if self._guard.pending and not is_end:
            self._guard.pending = False
            error = error or KeyboardInterrupt()
        self.counts = replace(self.counts, exchanges=self.counts.exchanges + 1)
        with self._guard:
            return self._exchanged(form, numbers, error)

    def _exchanged(
        self, form: Form | None, numbers: Tensor | None, error: BaseException | None
    ) -> Tensor:
        expected = self._past.following.get(self._past.last, self._past.last)
        call = "a call" if form is None else form.call
        is_expected = (
            form is not None
            and expected is not None
            and form.agrees(expected)
            and (form.leaves is None) == (self.rank in expected.lacking)
        )
        vector = torch.zeros(
            _HEAD + (0 if expected is None else expected.size),
            dtype=torch.float64,
            device=self.device,
        )
        if error is not None:
            vector[_ERRORS] = 1.0
        elif not is_expected:
            vector[_SURPRISES] = 1.0
        elif numbers is not None:
            vector[_HEAD:] = numbers
        self._add(vector, call)
        if vector[:_HEAD].tolist() == [0.0, 0.0]:
            self._past.last = expected
            return vector[_HEAD:]
        agreed = self._agreed_form(form, error, call)
        self._past.following[self._past.last] = self._past.last = agreed
        vector = torch.zeros(agreed.size, dtype=torch.float64, device=self.device)
        if numbers is not None:
            vector[:] = numbers
        if agreed.size:
            self._add(vector, call)
        return vector

    def _agreed_form(self, form: Form | None, error: BaseException | None, call: str) -> Form:
        """The form of all ranks, or the exception of all ranks."""
        own = Said(form, None if error is None else problem_of(error), self.place)
        said: list[Said] = self.gathered(own, call)
        if any(one.problem is not None for one in said):
            self._raise(said, error)
        forms = [one.form for one in said if one.form is not None]
        full = next((f for f in forms if f.leaves is not None), forms[0])
        if not all(f.agrees(full) for f in forms):
            raise self.known(disagreement(said))
        if full.leaves is None:
            nobody = message(
                f"{full.call} over {self.size} processes",
                "no process has data.",
                fixes=["give at least one process of the group rows"],
            )
            raise self.known(GroupError(nobody))
        return replace(full, lacking=tuple(r for r, f in enumerate(forms) if f.leaves is None))

    def known(self, error: BaseException) -> BaseException:
        """An exception that all ranks raise, so that none has to tell the others of it."""
        self.agreed = error
        return error

    def _raise(self, said: Sequence[Said], error: BaseException | None) -> None:
        """Raise on all ranks what weighs most, the first of these."""
        found = [(one.problem, r) for r, one in enumerate(said) if one.problem is not None]
        problem, rank = max(found, key=lambda pair: (pair[0].weight, -pair[1]))
        others = sum(p.weight == problem.weight for p, _ in found) - 1
        place = said[rank].place
        where = f"rank {rank} of {self.size}" + (f", {place}" if place else "")
        if error is not None and problem_of(error).classes[0] == problem.classes[0]:
            if self.size > 1 and isinstance(error, Exception):
                own = f", {self.place}" if self.place else ""
                error.add_note(f"This was on rank {self.rank} of {self.size}{own}.")
            raise self.known(error)
        raise self.known(raised_elsewhere(problem, where, others)) from error

    def gathered(self, own: Any, call: str) -> list[Any]:
        """What each rank has, by rank: any object that can be pickled."""
        out: list[Any] = [None] * self.size
        with self._guard, self._counted(0, call, collectives=2):
            dist.all_gather_object(out, own, self.group)
        return out

    def broadcast(self, numbers: Tensor, source: int, call: str) -> None:
        """Write a tensor of rank ``source`` into those of the others, where the backend takes them."""
        with self._guard, self._counted(numbers.numel() * numbers.element_size(), call):
            dist.broadcast(numbers, dist.get_global_rank(self.group, source), self.group)

    def _add(self, vector: Tensor, call: str) -> None:
        if self.timed:
            before = self.counts
            with self._counted(0, call, collectives=0):
                dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
            waited = self.counts.seconds - before.seconds
            self.counts = replace(before, waiting=before.waiting + waited)
        with self._counted(vector.numel() * vector.element_size(), call):
            dist.all_reduce(vector, group=self.group)

    @contextmanager
    def _counted(self, size: int, call: str, collectives: int = 1) -> Iterator[None]:
        started = time.perf_counter()
        with answering(call):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        spent = time.perf_counter() - started
        c = self.counts
        self.counts = replace(
            c,
            collectives=c.collectives + collectives,
            bytes=c.bytes + size,
            seconds=c.seconds + spent,
        )

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """A block in which Ctrl-C waits for the next exchange; after the last one it is raised here."""
        with self._guard:
            yield
        if self._guard.pending:
            self._guard.pending = False
            raise KeyboardInterrupt

    def announce(self, error: BaseException) -> None:
        """Tell the others, who are in their next exchange or come to it, what ends it here.

        An exception that all ranks have raised is known to them.
        """
        if self.is_known(error):
            return
        try:
            self.of(None, None, error)
        except BaseException as told:
            if told is not error:  # a rank that did not answer, or a worse error elsewhere
                error.add_note(str(told))

    def is_known(self, error: BaseException | None) -> bool:
        """Whether all ranks have raised an exception, or one of them does not answer."""
        while error is not None:
            if error is self.agreed or isinstance(error, NotAnswering):
                return True
            error = error.__cause__
        return False


def _device_of(group: Any) -> torch.device:
    """Where a backend takes tensors from: gloo from the processor, nccl from the present GPU."""
    backend = str(dist.get_backend(group))
    if "gloo" in backend or "mpi" in backend:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
