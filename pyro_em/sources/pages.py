"""Pages of mapped files: read pages count as memory of a process until they are let go."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np


def let_go(array: Any) -> None:
    """Let go the pages behind rows of a ``numpy.memmap`` that have been read.

    The file is not touched: whoever reads the rows again gets its pages back. Pages of a mapping
    with changes of its own (``mode="c"``) stay.

    Args:
        array: Rows of any array; nothing is done for those that are not of a mapped file.
    """
    mapping = _mapping_of(array)
    if mapping is None or not array.size:
        return
    start = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
    at = array.ctypes.data - start
    steps = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    first = at + sum(s for s in steps if s < 0)
    last = at + sum(s for s in steps if s > 0) + array.itemsize
    page = mmap.PAGESIZE
    begin, end = -(-first // page) * page, last // page * page
    if end > begin and hasattr(mapping, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _mapping_of(array: Any) -> mmap.mmap | None:
    """The mapping that holds an array, where it holds what the file does."""
    is_shared = False
    while isinstance(array, np.ndarray):
        is_shared = is_shared or getattr(array, "mode", None) in ("r", "r+", "w+")
        array = array.base
    return array if is_shared and isinstance(array, mmap.mmap) else None
