"""Batches of a model's arguments, and what makes a batch stand for all data.

A batch of B rows out of N counts its rows N / B times, and everything outside the data plate once:
the bound of a batch is then an unbiased estimate of the bound of all data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import DataError, UsageError, message
from pyro_em.graph.structure import Structure
from pyro_em.sources.chunks import Chunks
from pyro_em.sources.loaders import is_loader, length_of, rows_of_loader
from pyro_em.sources.source import Source
from pyro_em.tracing.sites import Role

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Batch:
    """The arguments of one step.

    Attributes:
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        size: Rows of the batch.
        total: Rows of all data, where known.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int | None = None
    total: int | None = None


class ChunkLoader:
    """Chunks as a loader gives batches: each chunk is one, in the order of their source.

    Args:
        chunks: The chunks.
    """

    def __init__(self, chunks: Chunks) -> None:
        self.chunks = chunks

    @property
    def source(self) -> Source:
        """What they are read from."""
        return self.chunks.source

    @property
    def rows(self) -> int:
        """The number of all rows; where nobody knows it, a pass counts them."""
        total = self.chunks.total
        return sum(chunk.rows for chunk in self.chunks.read()) if total is None else total

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        # Where a source draws, its numbers come between those of steps in one order.
        for chunk in self.chunks.read(ahead=self.chunks.is_ordered):
            yield chunk.args

    def __len__(self) -> int:
        number = self.chunks.number
        if number is None:
            raise TypeError("the chunks have not been counted yet")
        return number


class Batches:
    """All batches of the data, epoch after epoch.

    Args:
        args: The model's positional arguments, or one ``DataLoader`` or `Chunks` of them.
        kwargs: Its keyword arguments.
        batch_size: Rows per batch; all at once where None.
        num_data: Rows of all data, where a loader does not know.
        generator: Source of the order; None keeps the order of the data.
        per_epoch: Batches of arrays in one epoch, where processes of a group take as many steps.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_size: int | None,
        num_data: int | None,
        generator: torch.Generator | None,
        per_epoch: int | None = None,
    ) -> None:
        self.args, self.kwargs, self.generator = args, kwargs, generator
        self._per_epoch = per_epoch
        self.loader: Any = args[0] if args and is_loader(args[0]) else None
        if args and isinstance(args[0], Chunks):
            self.loader = ChunkLoader(args[0])
        self.batch_size = batch_size
        self.total = num_data
        self.rows: int | None = None
        rows_known: int | None = None
        if self.loader is not None:
            if batch_size is not None:
                raise UsageError(_makes_batches(self.loader, batch_size))
            is_chunks = isinstance(self.loader, ChunkLoader)
            rows_known = self.loader.rows if is_chunks else rows_of_loader(self.loader)
            self.total = rows_known if num_data is None else num_data
        elif batch_size is not None:
            rows = {len(a) for a in self._arrays()}
            if len(rows) != 1:
                raise UsageError(
                    message(
                        "fit",
                        "batch_size needs arrays with one number of rows; "
                        + (f"they have {sorted(rows)}." if rows else "there are none."),
                        "a batch takes the same rows of every array",
                        ["pass tensors whose first dimension is the data", "pass a DataLoader"],
                    )
                )
            self.rows = rows_known = rows.pop()
            if not 1 <= batch_size <= rows_known:
                raise UsageError(
                    message(
                        "fit",
                        f"batch_size={batch_size} with {self.rows} rows of data.",
                        "a batch is a part of the data",
                        [f"use a number from 1 to {self.rows}", "leave it out for all at once"],
                    )
                )
            self.total = self.total or self.rows
        _check_num_data(num_data, rows_known)

    def _arrays(self) -> list[Tensor]:
        return [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor) and a.dim()]

    @property
    def per_epoch(self) -> int | None:
        """Batches in one epoch, where known."""
        if self.loader is not None:
            return length_of(self.loader)
        if self._per_epoch is not None:
            return self._per_epoch
        return (
            1 if self.rows is None or self.batch_size is None else -(-self.rows // self.batch_size)
        )

    def epoch(self, shuffle: bool = True) -> Iterator[Batch]:
        """The batches of one epoch."""
        if self.loader is not None:
            for item in self.loader:
                given = tuple(item) if isinstance(item, (tuple, list)) else (item,)
                size = _rows_in(given)
                yield Batch((*given, *self.args[1:]), self.kwargs, size, self.total)
            return
        if self.batch_size is None or self.rows is None:
            size = None
            if self.total is not None:
                size = next((len(a) for a in self._arrays()), None)
            yield Batch(self.args, self.kwargs, size, self.total)
            return
        if shuffle and self.generator is not None:
            order = torch.randperm(self.rows, generator=self.generator)
        else:
            order = torch.arange(self.rows)
        for chosen in self._split(order):
            yield Batch(
                tuple(self._rows(a, chosen) for a in self.args),
                {k: self._rows(a, chosen) for k, a in self.kwargs.items()},
                len(chosen),
                self.total,
            )

    def _split(self, order: Tensor) -> Sequence[Tensor]:
        """The rows of each batch; where there are too few, one row may come again in an epoch."""
        assert self.batch_size is not None
        steps = self._per_epoch
        if steps is None:
            return order.split(self.batch_size)
        return (
            order.tensor_split(steps)
            if len(order) >= steps
            else order[:, None].repeat(-(-steps // len(order)), 1)[:steps].unbind(0)
        )

    @staticmethod
    def _rows(a: Any, chosen: Tensor) -> Any:
        return a[chosen.to(a.device)] if isinstance(a, Tensor) and a.dim() else a


def _makes_batches(loader: Any, batch_size: int) -> str:
    """The sentence on a size of batches that somebody else makes."""
    if isinstance(loader, ChunkLoader):
        return message(
            "fit",
            f"batch_size={batch_size} was given together with Chunks.",
            "each chunk is a batch",
            [f"set the rows of a chunk: Chunks(..., rows={batch_size})"],
        )
    return message(
        "fit",
        f"batch_size={batch_size} was given together with a DataLoader.",
        "the loader makes the batches",
        ["set batch_size in the DataLoader", "pass the arrays themselves"],
    )


def _rows_in(value: Any) -> int | None:
    """Rows of the first tensor inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() else None
    inside = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, (Mapping, tuple, list)):
        return next((n for n in map(_rows_in, inside) if n is not None), None)
    return None


def without_last_row(batch: Batch) -> Batch:
    """The same batch with one row less."""

    def shorter(a: Any) -> Any:
        rows = isinstance(a, Tensor) and a.dim() and len(a) == batch.size
        return a[:-1] if rows else a

    assert batch.size is not None
    return Batch(
        tuple(shorter(a) for a in batch.args),
        {k: shorter(a) for k, a in batch.kwargs.items()},
        batch.size - 1,
        batch.total,
    )


def first_batch(loader: Iterable[Any]) -> Any:
    """The first batch of a loader.

    Raises:
        DataError: If there is none.
    """
    for item in loader:
        return item
    raise DataError(message("fit", "the DataLoader is empty.", "there is nothing to fit"))


def rows_in_batches(batches: Batches) -> int | None:
    """Rows of the data where batches are parts of them; None where each batch is all data."""
    if batches.loader is None:
        return None if batches.batch_size in (None, batches.rows) else batches.rows
    size = next(iter(batches.epoch(shuffle=False))).size
    return None if size == batches.total else size


def _check_num_data(num_data: Any, rows: int | None) -> None:
    """Refuse what cannot be the number of all rows."""
    if num_data is None:
        return
    is_whole = isinstance(num_data, int) and not isinstance(num_data, bool)
    if is_whole and num_data >= max(rows or 1, 1):
        return
    known = "" if rows is None else f" with {rows} rows of data"
    raise UsageError(
        message(
            "fit",
            f"num_data={num_data!r}{known}.",
            "it is the number of rows for which the batches stand",
            ["pass the number of rows of all data", "leave it out for arrays"],
        )
    )


def data_plates(
    structure: Structure, size: int, follows: Callable[[str], bool] | None = None
) -> tuple[str, ...]:
    """Plates over the rows of a batch, each the outermost around an observation.

    Args:
        structure: The model's.
        size: Rows of the batch.
        follows: Whether a plate's size changes with the rows, where that is known.
    """
    names = []
    for info in structure.sites.values():
        if info.role is not Role.DATA or not info.plates:
            continue
        for name in (n for n in info.nested if n in info.plates):  # outermost first
            if size in _sizes(structure, name) and (follows is None or follows(name)):
                names.append(name)
                break
    return tuple(dict.fromkeys(names))


def _sizes(structure: Structure, plate: str) -> tuple[int, int]:
    """The number of a plate's elements in this call, and its full size."""
    return structure.plates[plate].size, structure.plates[plate].full_size


def _says_total(structure: Structure, plate: str, size: int) -> bool:
    """Whether a plate declares the batch a part of more rows: its own scale stands for all."""
    at_hand, full = _sizes(structure, plate)
    return at_hand == size < full


def factors_of(
    structure: Structure, batch: Batch, shorter: Callable[[], Structure] | None = None
) -> Mapping[str, float]:
    """What multiplies the sites of each plate so that a batch stands for all data.

    A plate over the rows that says how many there are (``subsample_size=len(batch)``) has its scale
    already; a plate that draws some of the batch's rows still needs the batch's.

    Args:
        structure: The model's, at this batch.
        batch: The batch.
        shorter: The model's structure at one row less, to tell plates of one size apart.

    Raises:
        UsageError: If the model holds something outside the data plate and the number of data is
            unknown, or no plate has the batch's size.
    """
    if batch.size is None:
        if not _has_subsamples(structure) and _outside(structure, structure.data_plates):
            raise UsageError(
                message(
                    "fit",
                    "the number of rows of a batch is unknown: it holds no tensor.",
                    "what is outside the data's plate would count once per batch",
                    ["let the loader yield tensors, or tuples, lists and dicts of tensors"],
                )
            )
        return {}
    plates = _row_plates(structure, batch, shorter)
    scaled = [p for p in plates if not _says_total(structure, p, batch.size)]
    if batch.total is None:
        outside = _outside(structure, plates)
        if not outside or not scaled:
            return {}
        raise UsageError(
            message(
                "fit",
                f"the number of data is unknown, but site '{outside[0]}' is outside the data's "
                "plate.",
                "global latents and priors would count once per batch instead of once",
                [
                    "pass num_data=",
                    "declare it in the model: pyro.plate(name, N, subsample_size=len(batch))",
                ],
            )
        )
    if batch.total == batch.size:
        return {}
    if not plates:
        raise UsageError(
            message(
                "fit",
                f"no plate of the model has the batch's size {batch.size}.",
                "what belongs to the rows of a batch is what is inside the data's plate",
                ["put the rows into pyro.plate(name, len(x))"],
            )
        )
    return dict.fromkeys(scaled, batch.total / batch.size)


def _row_plates(
    structure: Structure, batch: Batch, shorter: Callable[[], Structure] | None
) -> tuple[str, ...]:
    """The plates over the rows of a batch, told apart from others of that size by chance."""
    size = batch.size
    assert size is not None
    plates = data_plates(structure, size)
    doubtful = len(plates) > 1 or any(_sizes(structure, p) != (size, size) for p in plates)
    if not doubtful or shorter is None or size == 1 or batch.total == size:
        return plates
    other = shorter()
    return data_plates(structure, size, lambda p: size - 1 in _sizes(other, p))


def stands_for_all(structure: Structure, batch: Batch) -> bool:
    """Whether the bound of a batch, with its factors, estimates that of all data."""
    if batch.total is not None:
        return batch.size is not None
    if batch.size is None:
        return _has_subsamples(structure)
    plates = data_plates(structure, batch.size)
    return any(_says_total(structure, p, batch.size) for p in plates)


def _has_subsamples(structure: Structure) -> bool:
    return any(p.full_size > p.size for p in structure.plates.values())


def _outside(structure: Structure, plates: Sequence[str]) -> list[str]:
    """Sites of the model that are in none of some plates."""
    return [
        i.name
        for i in structure.sites.values()
        if i.role is not Role.GUIDE and not set(i.plates) & set(plates)
    ]
