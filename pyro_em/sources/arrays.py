"""Arrays with a common first dimension: tensors, numpy's, mapped files, whatever can be sliced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyro_em.arguments import shown
from pyro_em.errors import DataError, UsageError, message
from pyro_em.sources.pages import let_go
from pyro_em.sources.source import Arguments, Source
from pyro_em.sources.tensors import form_of_row, is_array, own_tensor, refuse_layout, rows_of


@dataclass(frozen=True, eq=False)
class Arrays(Source):
    """Chunks are slices of the first dimension.

    Attributes:
        arrays: One for each argument.
        rows: Rows of a chunk; the last has those that are left.
    """

    arrays: tuple[Any, ...]
    rows: int

    def __post_init__(self) -> None:
        for i, array in enumerate(self.arrays, start=1):
            if not is_array(array) or not len(array.shape):
                raise _no_rows(i, array)
        lengths = [int(a.shape[0]) for a in self.arrays]
        for i, length in enumerate(lengths, start=1):
            if length != lengths[0]:
                raise DataError(
                    message(
                        "Chunks",
                        f"argument {i} has {length} rows, argument 1 has {lengths[0]}.",
                        "a chunk takes the same rows of every array",
                        ["pass arrays whose first dimension is the data"],
                    )
                )
        for i, array in enumerate(self.arrays, start=1):
            refuse_layout(array, f"Chunks: argument {i}")
            own_tensor(rows_of(array, 0, 0), f"Chunks: argument {i}")

    @property
    def total(self) -> int:
        """See `Source.total`."""
        return int(self.arrays[0].shape[0])

    @property
    def is_ordered(self) -> bool:
        """See `Source.is_ordered`."""
        return True

    def pieces(self) -> Iterator[Arguments]:
        """See `Source.pieces`."""
        for begin in range(0, self.total, self.rows):
            yield tuple(self._slice(i, begin) for i in range(len(self.arrays)))

    def _slice(self, i: int, begin: int) -> Any:
        rows = rows_of(self.arrays[i], begin, begin + self.rows)
        own = own_tensor(rows, f"argument {i + 1}, rows from {begin} on")
        let_go(rows)
        return own

    def __str__(self) -> str:
        """See `Source.__str__`."""
        return ", ".join(form_of_row(a) for a in self.arrays)


def _no_rows(i: int, value: Any) -> UsageError:
    return UsageError(
        message(
            "Chunks",
            f"argument {i}, {shown(value)}, has no rows.",
            "several arguments are arrays with a common first dimension",
            [
                "pass what is the same for all rows to fit, beside the chunks: em.fit(Chunks(x), 3)",
                "make numbers a tensor: torch.as_tensor(y)",
            ],
        )
    )
