"""What is known of a ``torch.utils.data.DataLoader`` without reading it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)


def is_loader(value: Any) -> bool:
    """Whether an argument makes batches itself, as ``torch.utils.data.DataLoader`` does."""
    return isinstance(value, torch.utils.data.DataLoader)


def rows_of_loader(loader: Any) -> int | None:
    """Rows that a loader goes through in one epoch, where it is known."""
    sampler = _sampler_of(loader)
    if sampler is None and getattr(loader, "batch_sampler", None) is None:
        return None  # its items are batches already: their number is not that of the rows
    if isinstance(sampler, SubsetRandomSampler):
        return len(sampler)
    return length_of(getattr(loader, "dataset", None))


def length_of(value: Any) -> int | None:
    """The number of items, where a value knows it."""
    try:
        return len(value)
    except TypeError:  # an iterable without a length
        return None


def rows_of_pass(loader: Any) -> int | None:
    """Rows that a loader gives in each pass, where it is known."""
    if loader.batch_size is None or loader.collate_fn is not default_collate:
        return None
    rows = length_of(loader.sampler)
    return rows // loader.batch_size * loader.batch_size if rows and loader.drop_last else rows


def why_not_all(loader: Any) -> str:
    """Why passes of a loader are not of all rows, in words; empty if nothing speaks against it."""
    sampler, rows = _sampler_of(loader), rows_of_loader(loader)
    if isinstance(sampler, DistributedSampler):
        more = sampler.total_size - (rows or 0)
        return f"its sampler gives {more} rows twice" if more > 0 else ""
    if isinstance(sampler, WeightedRandomSampler) or getattr(sampler, "replacement", False):
        return "its sampler draws rows anew in each pass, some of them several times"
    if not isinstance(sampler, (RandomSampler, SubsetRandomSampler)) or rows is None:
        return ""
    if len(sampler) < rows:
        return f"its sampler draws {len(sampler)} of {rows} rows anew in each pass"
    batch = loader.batch_size
    if loader.drop_last and batch and rows % batch:
        return f"with shuffle and drop_last it leaves out {rows % batch} other rows in each pass"
    return ""


def _sampler_of(loader: Any) -> Any:
    return getattr(getattr(loader, "batch_sampler", None), "sampler", None)
