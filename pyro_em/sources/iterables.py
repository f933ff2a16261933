"""Any iterable of argument tuples that can be read again: a DataLoader, a list, a reader of files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from pyro_em.arguments import shown
from pyro_em.errors import UsageError, message
from pyro_em.sources.loaders import is_loader, rows_of_pass, why_not_all
from pyro_em.sources.source import Arguments, Source
from pyro_em.sources.tensors import own_tree, rows_in

_ITEMS = "pass an object whose __iter__ begins anew: a list, a DataLoader, a class that reads files"


@dataclass(frozen=True, eq=False)
class Items(Source):
    """Each item is a chunk: a tuple or list of the model's arguments, or its only argument.

    Attributes:
        items: The iterable.
    """

    items: Any

    def __post_init__(self) -> None:
        problem = _problem_of(self.items)
        if problem is not None:
            what, why, fix = problem
            raise UsageError(message("Chunks", f"{shown(self.items)} {what}.", why, [fix]))

    @property
    def total(self) -> int | None:
        """See `Source.total`."""
        if is_loader(self.items):
            return rows_of_pass(self.items)
        if not isinstance(self.items, (list, tuple)):
            return None
        sizes = [rows_in(item) for item in self.items]
        return None if None in sizes else sum(n for n in sizes if n is not None)

    @property
    def is_ordered(self) -> bool:
        """See `Source.is_ordered`."""
        return isinstance(self.items, (list, tuple))

    def pieces(self) -> Iterator[Arguments]:
        """See `Source.pieces`."""
        for item in self.items:
            several = isinstance(item, (tuple, list))
            given = tuple(item) if several else (item,)
            del item  # only the copy is kept while it is used
            own = tuple(own_tree(a, f"argument {i}") for i, a in enumerate(given, start=1))
            del given
            yield own
            del own

    def __str__(self) -> str:
        """See `Source.__str__`."""
        return f"items of a {type(self.items).__name__}"


def _problem_of(items: Any) -> tuple[str, str, str] | None:
    """What an iterable is, why it does not serve, and what to do; None where it serves."""
    if isinstance(items, Iterator):
        return "is an iterator", "it can be read once only, and every E-step is a pass", _ITEMS
    if isinstance(items, (str, bytes, os.PathLike)):
        return "is a path or a text", "it has no rows", "Chunks.parquet(path, columns) reads a file"
    if isinstance(items, Mapping):
        return "is a mapping", "its items are names", "pass its values: Chunks(*data.values())"
    if isinstance(items, Dataset) and not isinstance(items, IterableDataset):
        fix = "pass a DataLoader of it, or the tensors themselves: Chunks(*dataset.tensors)"
        return "gives one row at a time", "each item is a chunk of rows", fix
    is_iterable = isinstance(items, Iterable) or hasattr(type(items), "__getitem__")
    if not is_iterable or isinstance(items, type):
        return "is neither arrays nor an iterable of arguments", "there is nothing to read", _ITEMS
    change = why_not_all(items) if is_loader(items) else ""
    if change:
        fix = "leave out drop_last and the sampler; shuffle=True may stay"
        return f"does not give each row once: {change}", "each E-step is of all data", fix
    return None
