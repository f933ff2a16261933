"""What chunks are read from, and what one of them is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

Arguments = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some rows of all data.

    Attributes:
        args: The model's arguments for these rows: tensors that share no memory with anything else.
        begin: The number of the first row among all rows, from zero.
        rows: How many they are.
    """

    args: Arguments
    begin: int
    rows: int


class Source(Protocol):
    """Data that can be read again and again, piece by piece."""

    @property
    def total(self) -> int | None:
        """The number of all rows, where it is known without reading them."""
        ...

    @property
    def is_ordered(self) -> bool:
        """Whether every pass gives the same rows in the same order."""
        ...

    def pieces(self) -> Iterator[Arguments]:
        """One pass: the arguments of a chunk after the other, in memory of their own."""
        ...

    def __str__(self) -> str:
        """What it is in a few words: ``"arrays float32 (8,), int64 ()"``."""
        ...
