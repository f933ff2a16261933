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

from pyro_em._errors import DataError, UsageError, message
from pyro_em._pyro import Role
from pyro_em.structure import Structure

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


class Batches:
    """All batches of the data, epoch after epoch.

    Args:
        args: The model's positional arguments, or one ``DataLoader``.
        kwargs: Its keyword arguments.
        batch_size: Rows per batch; all at once where None.
        num_data: Rows of all data, where a loader does not know.
        generator: Source of the order; None keeps the order of the data.
    """

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch_size: int | None,
        num_data: int | None,
        generator: torch.Generator | None,
    ) -> None:
        self.args, self.kwargs, self.generator = args, kwargs, generator
        self.loader = args[0] if args and is_loader(args[0]) else None
        self.batch_size = batch_size
        self.total = num_data
        if self.loader is not None:
            if batch_size is not None:
                raise UsageError(
                    message(
                        "fit",
                        f"batch_size={batch_size} was given together with a DataLoader.",
                        "the loader makes the batches",
                        ["set batch_size in the DataLoader", "pass the arrays themselves"],
                    )
                )
            if self.total is None:
                self.total = _length_of(getattr(self.loader, "dataset", None))
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
            self.rows = rows.pop()
            if not 1 <= batch_size <= self.rows:
                raise UsageError(
                    message(
                        "fit",
                        f"batch_size={batch_size} with {self.rows} rows of data.",
                        "a batch is a part of the data",
                        [f"use a number from 1 to {self.rows}", "leave it out for all at once"],
                    )
                )
            self.total = self.total or self.rows

    def _arrays(self) -> list[Tensor]:
        return [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor) and a.dim()]

    @property
    def per_epoch(self) -> int | None:
        """Batches in one epoch, where known."""
        if self.loader is not None:
            return _length_of(self.loader)
        return 1 if self.batch_size is None else -(-self.rows // self.batch_size)

    def epoch(self, shuffle: bool = True) -> Iterator[Batch]:
        """The batches of one epoch."""
        if self.loader is not None:
            for item in self.loader:
                given = tuple(item) if isinstance(item, (tuple, list)) else (item,)
                size = _rows_in(given)
                yield Batch((*given, *self.args[1:]), self.kwargs, size, self.total)
            return
        if self.batch_size is None:
            size = None
            if self.total is not None:
                size = next((len(a) for a in self._arrays()), None)
            yield Batch(self.args, self.kwargs, size, self.total)
            return
        if shuffle and self.generator is not None:
            order = torch.randperm(self.rows, generator=self.generator)
        else:
            order = torch.arange(self.rows)
        for chosen in order.split(self.batch_size):
            yield Batch(
                tuple(self._rows(a, chosen) for a in self.args),
                {k: self._rows(a, chosen) for k, a in self.kwargs.items()},
                len(chosen),
                self.total,
            )

    @staticmethod
    def _rows(a: Any, chosen: Tensor) -> Any:
        return a[chosen.to(a.device)] if isinstance(a, Tensor) and a.dim() else a


def is_loader(value: Any) -> bool:
    """Whether an argument makes batches itself, as ``torch.utils.data.DataLoader`` does."""
    return isinstance(value, torch.utils.data.DataLoader)


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


def _length_of(value: Any) -> int | None:
    try:
        return len(value)
    except TypeError:  # an iterable without a length
        return None


def data_plates(structure: Structure, size: int) -> tuple[str, ...]:
    """Plates over the rows of a batch: of its size, around an observation, not subsampled."""
    found = []
    for info in structure.sites.values():
        if info.role is not Role.DATA or not info.plates:
            continue
        for name in (n for n in info.nested if n in info.plates):  # outermost first
            plate = structure.plates[name]
            if plate.size == size and plate.full_size == plate.size:
                found.append(name)
                break
    return tuple(dict.fromkeys(found))


def factors_of(
    structure: Structure, batch: Batch, shorter: Callable[[], Structure] | None = None
) -> Mapping[str, float]:
    """What multiplies the sites of each plate so that a batch stands for all data.

    Args:
        structure: The model's, at this batch.
        batch: The batch.
        shorter: The model's structure at one row less, to tell plates of one size apart.

    Raises:
        UsageError: If the model holds something outside the data plate and the number of data is
            unknown, or no plate has the batch's size.
    """
    subsampled = [p for p in structure.plates.values() if p.full_size > p.size]
    if subsampled:
        return {}
    if batch.size is None:
        if _outside(structure, structure.data_plates):
            raise UsageError(
                message(
                    "fit",
                    "the number of rows of a batch is unknown: it holds no tensor.",
                    "what is outside the data's plate would count once per batch",
                    ["let the loader yield tensors, or tuples, lists and dicts of tensors"],
                )
            )
        return {}
    plates = data_plates(structure, batch.size)
    if len(plates) > 1 and shorter is not None and batch.size > 1 and batch.total != batch.size:
        other = shorter()
        plates = tuple(p for p in plates if other.plates[p].size == batch.size - 1)
    if batch.total is None:
        outside = _outside(structure, plates)
        if not outside or not plates:
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
    return dict.fromkeys(plates, batch.total / batch.size)


def _outside(structure: Structure, plates: Sequence[str]) -> list[str]:
    """Sites of the model that are in none of some plates."""
    return [
        i.name
        for i in structure.sites.values()
        if i.role is not Role.GUIDE and not set(i.plates) & set(plates)
    ]
