"""What outlives a fit: files, pickles, copies, and the way back to the beginning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pyro_em.arguments import check_path
from pyro_em.fitting.from_arrays import from_arrays
from pyro_em.fitting.session import Session
from pyro_em.portable import deep_copied, require_picklable
from pyro_em.tracing.turns import alone


class Keeping:
    """The methods of `pyro_em.ExactPosteriorEM` that keep what was fitted, or forget it."""

    _session: Session

    @alone("save")
    def save(self, path: str | Path) -> None:
        """Save all parameters; the file loads under ``torch.load(weights_only=True)``.

        A complete new file takes the place of the old one at once: a process that is killed, or a
        full disk, leaves the old one as it was. No folder is made.

        Args:
            path: The file.

        Raises:
            UsageError: If the model has not been run yet, or a parameter is not finite.
            FileError: If the file cannot be written; also a `UsageError` and an ``OSError``.
        """
        check_path("save", path)
        self._session.save(path)

    @alone("pickling")
    def __getstate__(self) -> dict[str, Any]:
        """For another process: what the constructor was given, and what was fitted.

        Raises:
            UsageError: If the model, the guide or something else does not pickle, by name.
        """
        given = self._session.given()
        require_picklable("ExactPosteriorEM", given)
        return {"given": given, "fitted": self._session.fitted()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(**state["given"])  # type: ignore[misc]
        self._session.pending = state["fitted"]

    def __copy__(self) -> Self:
        """Another object of the same parts."""
        return type(self)(**self._session.given())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Another object with copies of what the constructor was given; the param store is one."""
        copied = type(self)(**deep_copied("ExactPosteriorEM", self._session.given(), memo))
        memo[id(self)] = copied
        return copied

    @alone("load")
    @from_arrays
    def load(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Load parameters that ``save`` wrote, with this version of the library or an earlier one.

        They are checked against the model at once where the model has been run or its arguments are
        given here, else at the next call with data.

        Args:
            path: The file.
            *args: The model's arguments, optional.
            **kwargs: The model's keyword arguments, optional.

        Raises:
            UsageError: If the file belongs to another model (names the first difference), is
                damaged, of a newer version or something else, or has numbers that are not finite.
            FileError: If it is missing or cannot be read; also a `UsageError` and an ``OSError``.
        """
        check_path("load", path)
        self._session.load(path, args, kwargs)

    @alone("reset")
    def reset(self) -> None:
        """Forget what was fitted.

        Parameters that the model initialises leave the param store, so that its next run makes them
        anew; each ``nn.Parameter`` returns to the value at which it was first seen.
        """
        self._session.reset()
