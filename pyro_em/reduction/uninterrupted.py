"""Ctrl-C does not come between a process and the others that wait for it: it waits itself."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Uninterrupted:
    """A block that the first interrupt does not leave; it is remembered, to be told to all.

    Attributes:
        pending: Whether an interrupt came in such a block.

    Example:
        >>> guard = Uninterrupted()
        >>> with guard:
        ...     signal.raise_signal(signal.SIGINT)
        >>> guard.pending
        True
    """

    def __init__(self) -> None:
        self.pending = False
        self._before: Any = None
        self._depth = 0

    def __enter__(self) -> None:
        self._depth += 1
        # Only the main thread gets signals; another handler than Python's own is the user's choice.
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            self._before = signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending:  # who asks twice does not wait for others
            raise KeyboardInterrupt
        self.pending = True

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._before is not None and not self._depth:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
