"""What ranks of a group tell each other where something is not as expected, and raise for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from pyro_em.errors import GroupError, PyroEMError, message


@dataclass(frozen=True)
class Form:
    """What ranks exchange.

    Attributes:
        call: What they are in, in words.
        leaves: What is exchanged, in words; None on a rank that has nothing and takes any.
        size: How many numbers.
        lacking: Of a form that all ranks have agreed upon, those that have nothing.
    """

    call: str
    leaves: tuple[str, ...] | None
    size: int
    lacking: tuple[int, ...] = ()

    def agrees(self, other: Form) -> bool:
        """Whether two ranks are in one call with numbers of one form, or one has none."""
        if self.call != other.call:
            return False
        return self.leaves is None or other.leaves is None or self.leaves == other.leaves


@dataclass(frozen=True)
class Problem:
    """An exception, as another process can raise it."""

    classes: tuple[tuple[str, str], ...]  # module and name, the most special one first
    text: str
    weight: int  # which of several is raised on all


@dataclass(frozen=True)
class Said:
    """What a rank tells the others, where something is not as expected."""

    form: Form | None
    problem: Problem | None
    place: str


class NotAnswering(GroupError):
    """A rank that has died, or that did not come in time."""


@contextmanager
def answering(call: str) -> Iterator[None]:
    """What a backend raises when a rank does not answer, in a sentence."""
    started = time.perf_counter()
    try:
        yield
    except RuntimeError as error:
        seconds = time.perf_counter() - started
        raise NotAnswering(
            message(
                f"{call} over processes",
                f"another process of the group did not answer; waited {seconds:.1f} s.",
                "it has ended, or took longer than the time-out of the group: "
                + str(error).strip().partition("\n")[0],
                [
                    "look at what the other processes printed: one of them ended first",
                    "start all again: with a checkpoint the fit goes on where it was, and "
                    "torchrun --max-restarts=3 may do so by itself",
                    "allow more time, if one process has more to do: "
                    "init_process_group(..., timeout=timedelta(hours=1))",
                ],
            )
        ) from error


def require_member(group: Any) -> None:
    """Refuse a group that this process cannot work with.

    Raises:
        GroupError: If it is none, or this process is no member of it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise GroupError(
            message(
                "process_group",
                "torch.distributed has no process group yet.",
                fixes=[
                    'call torch.distributed.init_process_group("gloo") first, or "nccl" on GPUs',
                    "start the script with torchrun --nproc-per-node=4 script.py",
                ],
            )
        )
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise GroupError(
            message(
                "process_group",
                f"{type(group).__name__} is no process group that this process is a member of.",
                fixes=["pass torch.distributed.group.WORLD, or what new_group returns to members"],
            )
        )


def problem_of(error: BaseException) -> Problem:
    """An exception in a form that other processes can read."""
    classes = tuple((c.__module__, c.__qualname__) for c in type(error).__mro__)
    return Problem(classes, str(error), _weight(error))


def _weight(error: BaseException) -> int:
    """An interrupt is of more weight than an error, that more than what only changes the path."""
    if not isinstance(error, Exception):
        return 2
    own = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
    return 0 if own and not isinstance(error, PyroEMError) else 1


def raised_elsewhere(problem: Problem, where: str, others: int) -> BaseException:
    """The exception of another rank, as this one raises it."""
    kind = next(k for k in map(_class_of, problem.classes) if k is not None)
    more = f" (and {others} other rank{'s' if others > 1 else ''})" if others else ""
    if issubclass(kind, KeyboardInterrupt):
        return KeyboardInterrupt(f"{where}{more} was interrupted")
    if not issubclass(kind, Exception):
        return GroupError(
            message(f"{where}{more}", f"the process ended: {kind.__name__} {problem.text}".rstrip())
        )
    if problem.weight == 0:
        return kind(problem.text)
    name = "" if issubclass(kind, PyroEMError) else f"{problem.classes[0][1]}: "
    text = f"{where}{more}: {name}{problem.text}"
    if issubclass(kind, PyroEMError):
        return kind(text)
    both = type(kind.__name__, (PyroEMError, kind), {"__str__": lambda self: text})
    try:
        return both(text)  # type: ignore[no-any-return]
    except TypeError:  # a class whose exceptions are made of something else
        return GroupError(text)


def _class_of(named: tuple[str, str]) -> type[BaseException] | None:
    """An exception class that this process knows, too."""
    found: Any = sys.modules.get(named[0])
    for part in named[1].split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def disagreement(said: Sequence[Said]) -> GroupError:
    """Ranks that are in different calls, or whose numbers differ in form."""
    forms = [(r, one.form) for r, one in enumerate(said) if one.form is not None]
    calls = dict.fromkeys(f.call for _, f in forms)
    if len(calls) > 1:
        at = "; ".join(
            f"{_ranks([r for r, f in forms if f.call == call])} in {call}" for call in calls
        )
        return GroupError(
            message(
                f"group of {len(said)} processes",
                f"the processes are in different calls: {at}.",
                "they have decided differently, so that nothing can be added",
                [
                    "make the same calls with the same arguments on all processes; "
                    "only the rows differ"
                ],
            )
        )
    known = [(r, f.leaves) for r, f in forms if f.leaves is not None]
    first, usual = known[0]
    rank, other = next((r, leaves) for r, leaves in known if leaves != usual)
    if len(usual) != len(other):
        what = f"{len(usual)} values on rank {first} and {len(other)} on rank {rank}"
    else:
        i = next(i for i, pair in enumerate(zip(usual, other, strict=True)) if pair[0] != pair[1])
        what = f"value {i + 1} is {usual[i]} on rank {first} and {other[i]} on rank {rank}"
    return GroupError(
        message(
            f"{forms[0][1].call} over {len(said)} processes",
            f"what the processes would add has different forms: {what}.",
            "something that is not split over processes differs between them",
            ["give all processes the same model and arguments; only the rows differ"],
        )
    )


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:5])) + (", …" if len(ranks) > 5 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
