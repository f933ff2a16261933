"""What the C library does with memory that tensors have freed: keeps it, or gives it back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_MANY = 2**19  # numbers of a tensor from which on runs of a model leave much


@cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 62 MB of freed memory, once per process.

    glibc gives the end of the heap back to the system where more is free than twice the largest
    block that was mapped and freed so far, and each page that is taken again costs a fault: between
    a sixth and a third of the time where steps make some MB of temporaries. One block just below
    the limit of 32 MiB, freed before it is touched, raises what is kept. Other C libraries take no
    notice.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def return_freed_memory(beside: Iterable[Tensor]) -> None:
    """Give what a run of a model has freed back to the system, before much else is held.

    Holes between what is kept stay resident otherwise, and what comes next rarely fits into them. It
    takes some milliseconds, so that it is done beside large data only.

    Args:
        beside: Tensors of the data.
    """
    give_back = _trim()
    if give_back is not None and any(t.numel() >= _MANY and t.device.type == "cpu" for t in beside):
        give_back(0)


@cache
def _trim() -> Callable[[int], Any] | None:
    """glibc's ``malloc_trim``; None where the C library has none."""
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (OSError, AttributeError, TypeError):
        return None
