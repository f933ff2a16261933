"""Parts that other processes hold, on this machine or on others: `torch.distributed` adds them up."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_em.errors import GroupError, PyroEMError, UsageError, message, of_rows
from pyro_em.reduction.exchange import END, Counts, Exchange
from pyro_em.reduction.flat import flat, form, unflat
from pyro_em.reduction.reduction import OneProcess, Reduction
from pyro_em.reduction.told import Form
from pyro_em.reduction.trees import leaves, mapped

P = TypeVar("P", covariant=True)
Q = TypeVar("Q")
T = TypeVar("T")


class OverGroup(Reduction[P]):
    """The parts of all processes of a group; each makes the same calls in the same order.

    A sum is one all-reduce of all its numbers in float64 and is the same on all ranks, bit by bit.
    What one rank raises is raised on all of them.

    Args:
        inner: This process's parts; None where it has none.
        group: A process group of torch, for instance ``torch.distributed.group.WORLD``.
        is_empty: Whether the parts of ``inner`` count nothing: they show the form of values where a
            process has no rows.
        place: Where this process's data lie in all data, in words, for messages.
        timed: Whether the wait for slower ranks is measured, by one more collective each time.
        first: The rank whose values are taken where one makes them for all.

    Attributes:
        rank: Of this process in the group.
        size: How many processes the group has.
    """

    def __init__(
        self,
        inner: Reduction[P] | None,
        group: Any,
        *,
        is_empty: bool = False,
        place: str = "",
        timed: bool = False,
        first: int = 0,
    ) -> None:
        self._inner, self._first = inner, first
        self._begin: int | None = None
        self._is_empty = is_empty or inner is None
        self._exchange = Exchange(group, place, timed)
        self.rank = self._exchange.rank
        self.size = self._exchange.size

    def with_parts(
        self, inner: Reduction[Q] | None, *, is_empty: bool = False, first: int = 0
    ) -> OverGroup[Q]:
        """The same group, which goes on where it is, with other parts of this process."""
        other: OverGroup[Q] = object.__new__(OverGroup)
        other._first, other._begin = first, self._begin
        other._inner, other._is_empty = inner, is_empty or inner is None
        other._exchange, other.rank, other.size = self._exchange, self.rank, self.size
        return other

    @property
    def is_whole(self) -> bool:
        """See `Reduction.is_whole`."""
        return False

    @property
    def place(self) -> str:
        """Where this process's data lie in all data, in words, for messages."""
        return self._exchange.place

    def at_rows(self, begin: int, place: str = "") -> None:
        """Note where this process's data lie in all data, for messages.

        Args:
            begin: The number of its first row among all.
            place: The same in words.
        """
        self._begin, self._exchange.place = begin, place

    @property
    def counts(self) -> Counts:
        """What exchanges have cost this process so far."""
        return self._exchange.counts

    def sum(self, of: Callable[[P], T]) -> T:
        """See `Reduction.sum`.

        Raises:
            GroupError: If values of the ranks have different forms, or a rank does not answer.
            UsageError: If a whole number is too large to be exact in float64.
        """

        def own(parts: Reduction[P]) -> tuple[T, Tensor]:
            value = parts.sum(of)
            return value, flat(leaves(value), self._exchange.device)

        value, total = self._exchanged("a sum", own)
        return self._like(value, total)

    def max(self, of: Callable[[P], T]) -> T:
        """See `Reduction.max`; NaN on any rank is NaN on all."""

        def own(parts: Reduction[P]) -> tuple[T, Tensor]:
            value = parts.max(of)
            numbers = flat(leaves(value), self._exchange.device)
            rows = numbers.new_zeros(self.size, 1 + len(numbers))  # this rank's row and none else
            rows[self.rank] = torch.cat([numbers.new_ones(1), numbers])
            return value, rows.reshape(-1)

        value, total = self._exchanged("a maximum", own)
        rows = total.reshape(self.size, -1)
        return self._like(value, rows[rows[:, 0] > 0, 1:].amax(0))

    def any(self, of: Callable[[P], bool]) -> bool:
        """See `Reduction.any`."""
        error, holds = None, False
        try:
            holds = self._inner is not None and not self._is_empty and self._inner.any(of)
        except BaseException as raised:
            error = self._with_row(raised)
        return bool(self._one("a question", float(holds), error) > 0)

    @property
    def number(self) -> int | None:
        """See `Reduction.number`."""
        return 0 if self._is_empty or self._inner is None else self._inner.number

    def each(self) -> Iterator[Reduction[P]]:
        """See `Reduction.each`: the first parts of all processes, the second ones, …

        A process that has fewer parts than another has none in the last ones. How many there are is
        exchanged once in each pass.

        Raises:
            GroupError: If a process has not gone through its parts before.
        """
        numbers = self.gathered(lambda: self.number)
        if None in numbers:
            raise self.refusal(GroupError(message("group", "nobody has counted the parts yet.")))
        own = iter(()) if self._is_empty or self._inner is None else self._inner.each()
        for _ in range(max(numbers)):
            one: Reduction[P] | None
            try:
                one = next(own, None)
            except BaseException as raised:  # to be raised on all ranks, in the call that follows
                one = Failing(raised)
            yield self.with_parts(one, is_empty=one is None, first=self._first)
            del one
        # The thread that reads, and what counts parts, see the end of the pass.
        next(own, None)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """See `Reduction.from_first`; anything that can be pickled."""
        return self.from_rank(self._first, make)

    def alike(self, value: T) -> T:
        """See `Reduction.alike`; one all-reduce to which the other ranks add zeros."""
        call, numbers = "a value of all", flat(leaves(value), self._exchange.device)
        said = Form(call, form(leaves(value)), len(numbers))
        own = numbers if self.rank == self._first else None
        return unflat(value, self._exchange.of(said, own, None))

    def from_rank(self, source: int, make: Callable[[], Any]) -> Any:
        """What one rank makes: on that rank itself, and as a copy on the others.

        Args:
            source: The rank.
            make: Called on that rank only; makes anything that can be pickled.
        """
        return self._from(source, make, f"a value of rank {source}")

    def refusal(self, error: BaseException) -> BaseException:
        """An exception that all ranks are about to raise, so that none has to tell the others."""
        return self._exchange.known(error)

    def agree(self, digests: Mapping[str, str], fixes: tuple[str, ...] = ()) -> None:
        """Refuse, on all ranks, what differs between them.

        Args:
            digests: By name, a checksum of what all must have alike.
            fixes: What to try where something differs.

        Raises:
            UsageError: If something does; it names the first difference and the ranks.
        """
        call = "a comparison"
        self._one(call, 0.0, None)
        all_of_them: list[Mapping[str, str]] = self._exchange.gathered(dict(digests), call)
        first = all_of_them[0]
        names = dict.fromkeys(name for one in all_of_them for name in one)
        for name in names:
            others = [r for r, one in enumerate(all_of_them) if one.get(name) != first.get(name)]
            if others:
                ranks = ", ".join(map(str, others[:5])) + (", …" if len(others) > 5 else "")
                raise self._exchange.known(
                    UsageError(
                        message(
                            f"group of {self.size} processes",
                            f"{name} differs: rank{'s' if len(others) > 1 else ''} {ranks} "
                            f"{'have' if len(others) > 1 else 'has'} another than rank 0.",
                            "only what lies along the outermost plate is split over processes; "
                            "all else has to be the same everywhere",
                            fixes,
                        )
                    )
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """See `Reduction.together`.

        Outside a call of this class, an exception reaches the others at their next call, and so does
        Ctrl-C, which waits for this rank's next call; a second one does not wait.
        """
        with self._exchange.uninterrupted():
            try:
                yield
            except BaseException as raised:
                error = raised if self._exchange.is_known(raised) else self._with_row(raised)
                self._exchange.announce(error)
                if error is raised:
                    raise
                raise error from raised
            self._exchange.of(Form(END, (), 0), None, None)

    def gathered(self, make: Callable[[], Any]) -> list[Any]:
        """See `Reduction.gathered`; by rank, anything that can be pickled."""
        call, made, error = "a gathering", None, None
        try:
            made = make()
        except BaseException as raised:
            error = raised
        self._one(call, 0.0, error)
        return self._exchange.gathered(made, call)

    def _exchanged(
        self, call: str, own: Callable[[Reduction[P]], tuple[T, Tensor]]
    ) -> tuple[T | None, Tensor]:
        """This rank's value, where it has one, and the sum of all ranks' numbers."""
        value: T | None = None
        numbers: Tensor | None = None
        said: Form | None = Form(call, None, 0)
        error: BaseException | None = None
        if self._inner is not None:
            try:
                value, numbers = own(self._inner)
                said = Form(call, form(leaves(value)), len(numbers))
            except BaseException as raised:
                said, error = None, self._with_row(raised)
        total = self._exchange.of(said, None if self._is_empty else numbers, error)
        return value, total

    def _like(self, value: T | None, numbers: Tensor) -> T:
        """Numbers in the form of a value; a rank without parts takes the form of another's."""
        lacking = self._exchange.lacking
        if lacking:
            source = next(r for r in range(self.size) if r not in lacking)
            form_of_all = self._from(source, lambda: mapped(value, _emptied), "the form of a value")
            value = form_of_all if value is None else value
        return unflat(value, numbers)  # type: ignore[return-value]

    def _from(self, source: int, make: Callable[[], Any], call: str) -> Any:
        made, content, error = None, b"", None
        if self.rank == source:
            try:
                made = make()
                content = _bytes_of(made)
            except BaseException as raised:
                error = raised
        size = int(self._one(call, float(len(content)), error))
        if self.rank == source:
            numbers = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        else:
            numbers = torch.zeros(size, dtype=torch.uint8)
        numbers = numbers.to(self._exchange.device)
        self._exchange.broadcast(numbers, source, call)
        return made if self.rank == source else self._read(numbers)

    def _with_row(self, error: BaseException) -> BaseException:
        """An error about a row of this process, with its number among all rows."""
        problems = error.problems if isinstance(error, PyroEMError) else ()
        if self._begin is None or not any(p.row is not None for p in problems):
            return error
        assert isinstance(error, PyroEMError)
        return error if error.names_rows else of_rows(error, self._begin)

    def _one(self, call: str, number: float, error: BaseException | None) -> float:
        """The sum of one number of each rank."""
        numbers = torch.tensor([number], dtype=torch.float64, device=self._exchange.device)
        said = Form(call, ("float",), 1) if error is None else None
        return float(self._exchange.of(said, numbers, error)[0])

    def _read(self, numbers: Tensor) -> Any:
        device = self._exchange.device
        content = io.BytesIO(numbers.cpu().numpy().tobytes())
        return torch.load(
            content,
            map_location=lambda stored, at: stored if at == "cpu" else stored.to(device),
            weights_only=False,
        )


class Failing(OneProcess[Any]):
    """Parts that could not be made: whoever asks for them meets the exception.

    Args:
        error: The exception.
    """

    def __init__(self, error: BaseException) -> None:
        self.error = error

    @property
    def is_whole(self) -> bool:
        """See `Reduction.is_whole`."""
        return False

    @property
    def number(self) -> int:
        """See `Reduction.number`."""
        raise self.error

    def each(self) -> Iterator[Reduction[Any]]:
        """See `Reduction.each`."""
        raise self.error

    def sum(self, of: Callable[[Any], T]) -> T:
        """See `Reduction.sum`."""
        raise self.error

    def max(self, of: Callable[[Any], T]) -> T:
        """See `Reduction.max`."""
        raise self.error

    def any(self, of: Callable[[Any], bool]) -> bool:
        """See `Reduction.any`."""
        raise self.error


def _emptied(leaf: Any) -> Any:
    """A leaf of the same form, which takes no room in a message."""
    return leaf.new_zeros(()).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf


def _bytes_of(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()
