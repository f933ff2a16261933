"""One thread at a time: Pyro's param store, handlers and random state belong to the whole process.

A second thread is refused at once, before it has changed anything. The thread that is inside may
enter again: a callback asks for a bound, a comparison fits.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, ParamSpec, TypeVar

from pyro_em.errors import UsageError, message
from pyro_em.tracing.whole import LeftWhole
from pyro_em.tracing.without_sympy import PlainShapes

P = ParamSpec("P")


T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Turn:
    what: str
    thread: int
    frame: FrameType

    def is_on(self) -> bool:
        """Whether its thread is still inside.

        An interrupt can come between entering and leaving; what it left behind keeps nobody out.
        """
        frame = sys._current_frames().get(self.thread)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


_turns: list[_Turn] = []  # of one thread, the outermost first


_changing = threading.Lock()


class Alone:
    """A block that no other thread may enter meanwhile.

    It is to stand in a function, not in a generator, whose frame is not on the stack all the time.

    Args:
        what: What is done there, for instance ``"fit"``.

    Raises:
        UsageError: If another thread is inside such a block.

    Example:
        >>> with Alone("fit"), Alone("elbo"):
        ...     pass
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.turn: _Turn | None = None
        self.whole, self.shapes = LeftWhole(), PlainShapes()

    def __enter__(self) -> Alone:
        turn = _Turn(self.what, threading.get_ident(), sys._getframe(1))
        with _changing:
            others = [t for t in _turns if t.thread != turn.thread]
            if others and others[0].is_on():
                raise UsageError(_refusal(self.what, others[0]))
            _turns[:] = [t for t in _turns if t.thread == turn.thread and t.is_on()]
            self.turn = turn
            _turns.append(turn)
        self.whole.__enter__()
        self.shapes.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self.shapes.__exit__()
            self.whole.__exit__(*exception)
        finally:
            with _changing:
                _turns[:] = [t for t in _turns if t is not self.turn]
            self.turn = None


def alone(what: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function that no other thread may enter meanwhile; see `Alone`.

    Example:
        >>> @alone("fit")
        ... def fit() -> int:
        ...     return 1
        >>> fit()
        1
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> T:
            with Alone(what):
                return function(*args, **kwargs)

        return inside

    return decorate


class AloneAtEachStep(Iterator[T], Generic[T]):
    """An iterator that no other thread may disturb while it advances; in between all may go on.

    A refusal does not end it.

    Example:
        >>> list(AloneAtEachStep("steps", (i for i in range(2))))
        [0, 1]
    """

    def __init__(self, what: str, inner: Generator[T, None, None]) -> None:
        self.what, self.inner = what, inner

    def __next__(self) -> T:
        with Alone(self.what):
            return next(self.inner)

    def close(self) -> None:
        """End it."""
        self.inner.close()


def _refusal(what: str, other: _Turn) -> str:
    names = {t.ident: t.name for t in threading.enumerate()}
    thread = names.get(other.thread, str(other.thread))
    return message(
        what,
        f"another thread ('{thread}') is inside {other.what}; nothing was done.",
        "Pyro's param store, handlers, validation and random state are shared by all threads of a "
        "process, so that two at once would spoil each other's numbers",
        [
            "use processes, whose results come back: concurrent.futures.ProcessPoolExecutor",
            "do one after the other, for instance under a threading.Lock of your own",
            "look at a running fit from its callbacks: fit(..., callbacks=[...])",
        ],
    )


def _in_child() -> None:
    """After a fork only the forking thread is there; a lock may have been held by another."""
    global _changing
    _changing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
