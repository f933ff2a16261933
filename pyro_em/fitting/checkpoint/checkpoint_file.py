"""The file in which a fit keeps where it stands: when it is written, and what is read back.

A file is a dict of tensors, numbers and texts, with a checksum of all the rest. A complete new file
takes the place of the old one at once, so that whoever is killed leaves a whole one.
"""

from __future__ import annotations

import io
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyro_em.errors import FileError, UsageError, message, warn
from pyro_em.reduction.reduction import Reduction, Whole
from pyro_em.tracing.checkpoint import checksum, content_of, damage_of
from pyro_em.tracing.files import at_home, check_writable, read_whole, write_whole

FORMAT = "pyro_em checkpoint 2"

_SHARE = 0.01  # of the time of a fit that writing may take where the user named no number of steps

_FIRST = 0.01  # seconds that the first writing is taken to cost


logger = logging.getLogger("pyro_em")


_ALONE: Reduction[Any] = Whole(None)


class CheckpointFile:
    """Where one fit is kept.

    Args:
        path: The file.
        every: Steps from one writing to the next; None writes as often as costs a hundredth of the
            time.
        raises: Whether a file that cannot be written ends the fit; it is said in a warning otherwise.
        over: The processes that make the fit together. The first one reads and writes the file, and the
            others have from it what it reads.
        rank: The number of this process.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int | None,
        raises: bool,
        over: Reduction[Any] = _ALONE,
        rank: int = 0,
    ) -> None:
        self.path, self.every, self.raises = at_home(path), every, raises
        self.over, self.rank = over, rank
        self._steps, self._has_told, self._has_read_back = 0, False, False
        self._ended, self._cost = time.perf_counter(), _FIRST

    @property
    def writes(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    @property
    def is_shared(self) -> bool:
        """Whether there are other processes."""
        return self.over is not _ALONE

    def is_due(self) -> bool:
        """Count a complete step; whether it is time to write, on all processes."""
        self._steps += 1
        if self.every is not None:
            return self._steps >= self.every
        return self.over.from_first(self._is_time) if self.is_shared else self._is_time()

    def _is_time(self) -> bool:
        return time.perf_counter() - self._ended >= self._cost / _SHARE

    @property
    def is_behind(self) -> bool:
        """Whether there have been steps since the last writing."""
        return self._steps > 0

    def probe(self) -> None:
        """Say at the beginning what can be known of a file that cannot be written.

        Raises:
            FileError: If the fit is to end then.
        """
        self.over.from_first(lambda: self._guarded(lambda: check_writable(self.path)))

    def write(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Write what ``make`` returns, whole or not at all.

        Raises:
            FileError: If it cannot be written and the fit is to end then.
            UsageError: If the state of an optimiser is more than tensors, numbers and texts.
        """
        self._steps = 0
        if not self.writes:
            return
        begin = time.perf_counter()
        self._guarded(lambda: write_whole(self.path, self._bytes(make())))
        self._ended = time.perf_counter()
        self._cost = self._ended - begin

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except FileError as error:
            if self.raises:
                raise
            if not self._has_told:
                self._has_told = True
                warn(f"{error}\n  The fit goes on without a checkpoint, and tries again later.")

    def _bytes(self, state: Mapping[str, Any]) -> bytes:
        """All of a file, read back from memory once."""
        whole = {"format": FORMAT, "versions": versions(), **state}
        whole["checksum"] = checksum(whole)
        content, problem = content_of(whole, reads_back=not self._has_read_back)
        if problem:
            raise UsageError(
                message(
                    "checkpoint",
                    f"what the fit keeps cannot be written: {problem}.",
                    "a file holds tensors, numbers and texts, so that reading it runs no code",
                    ["use an optimiser and schedulers of torch or Pyro whose state is such"],
                )
            )
        self._has_read_back = True
        return content

    def read(self) -> dict[str, Any] | None:
        """What was written, on all processes; None if there is no file.

        Raises:
            UsageError: If it is damaged or something else; it is left as it is.
            FileError: If it cannot be read.
        """
        found: dict[str, Any] | None = self.over.from_first(self._read)
        return found

    def _read(self) -> dict[str, Any] | None:
        if not os.path.lexists(self.path):
            return None
        content = read_whole(self.path)
        problem = "it is empty (0 bytes)" if not content else damage_of(content)
        state: Any = None
        if not problem:
            try:
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            except Exception:  # whatever a reader of other people's bytes may raise
                problem = "it holds other objects than tensors and numbers"
        form = state.get("format") if isinstance(state, dict) else None
        if not problem and form != FORMAT:
            problem = "it is a torch file of another kind"
            if isinstance(form, str) and form.startswith("pyro_em checkpoint "):
                problem = "it was written by another version of pyro_em"
            elif isinstance(form, str) and form.startswith("pyro_em "):
                problem = (
                    "ExactPosteriorEM.save wrote it: it holds parameters, not where a fit stands"
                )
        if not problem and state.get("checksum") != checksum(state):
            problem = "its content does not agree with its checksum"
        if problem:
            raise UsageError(
                message(
                    f"checkpoint '{self.path}'",
                    "it is no whole checkpoint that fit wrote, and was left as it is.",
                    problem,
                    [
                        "name another file: fit(..., checkpoint='other.pt')",
                        "start over and replace it: fit(..., resume=False)",
                    ],
                )
            )
        if state["versions"] != versions():
            logger.info(
                "checkpoint '%s' was written with %s; here are %s: last digits may differ",
                self.path,
                state["versions"],
                versions(),
            )
        assert isinstance(state, dict)
        return state


def versions() -> dict[str, str]:
    """What rounding depends on beside the fit itself."""
    return {
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
    }
