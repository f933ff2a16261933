"""What data are, in a few words and a checksum: whether a later pass reads the same."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.sources.source import Chunk
from pyro_em.sources.tensors import arrays_in, form_of_row

_BLOCK = 2**18  # numbers that are hashed at once


@dataclass(frozen=True)
class Form:
    """What two passes over the same data agree in.

    Attributes:
        rows: The number of all rows.
        arguments: The dtype and the shape of a row of each array.
        chunks: The number of chunks.
        splits: A checksum of the rows of each chunk: sums are rounded as data are split.
        checksum: A checksum of the content. It is the same however rows are split into chunks, and
            where passes have orders of their own in whatever order they come.

    Example:
        >>> x = torch.arange(6.0)
        >>> whole, halves = Digest(), Digest()
        >>> whole.add(Chunk((x,), 0, 6))
        >>> halves.add(Chunk((x[:3],), 0, 3)); halves.add(Chunk((x[3:],), 3, 3))
        >>> whole.form().checksum == halves.form().checksum
        True
    """

    rows: int
    arguments: tuple[str, ...]
    chunks: int
    splits: str
    checksum: str


class Digest:
    """The form of data, taken in one pass.

    Args:
        is_ordered: Whether rows in another order are other data.
    """

    def __init__(self, is_ordered: bool = True) -> None:
        self._is_ordered = is_ordered
        self._rows = self._chunks = self._splits = 0
        self._arguments: tuple[str, ...] = ()
        self._sum = np.uint64(0)

    def add(self, chunk: Chunk) -> None:
        """Add the next chunk."""
        arrays = arrays_in(chunk.args)
        if not self._chunks:
            self._arguments = tuple(form_of_row(a) for a in arrays)
        self._rows += chunk.rows
        self._chunks += 1
        self._splits = zlib.crc32(f"{chunk.rows} ".encode(), self._splits)
        begin = chunk.begin if self._is_ordered else None
        with np.errstate(over="ignore"):  # sums are those of 64 bits
            tall = [a for a in arrays if a.dim() and len(a) == chunk.rows]
            self._sum += _sum_of_rows(tall, begin)
            rest = [a.reshape(1, -1) for a in arrays if not (a.dim() and len(a) == chunk.rows)]
            for i, array in enumerate(rest):
                self._sum += _sum_of_rows([array], i if begin is None else begin + i)
            others = [a for a in chunk.args if not arrays_in(a)]
            self._sum += np.uint64(zlib.crc32(repr(others).encode()) if others else 0)

    def form(self) -> Form:
        """The form of all chunks so far."""
        checksum = f"{int(self._sum):016x}"
        return Form(self._rows, self._arguments, self._chunks, f"{self._splits:08x}", checksum)


def _sum_of_rows(arrays: list[Tensor], begin: int | None) -> Any:
    """The sum of a hash of each row, which its number enters where there is one."""
    if not arrays:
        return np.uint64(0)
    flat = [_as_integers(a) for a in arrays]
    width = sum(f.shape[1] for f in flat)
    weights = _mixed(np.arange(1, width + 1, dtype=np.uint64)) | np.uint64(1)
    rows = len(flat[0])
    total = np.uint64(0)
    step = max(1, _BLOCK // max(width, 1))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        numbers = np.zeros(last - first, dtype=np.uint64)
        if begin is not None:
            numbers += _mixed(np.arange(begin + first, begin + last, dtype=np.uint64))
        at = 0
        for f in flat:
            numbers += f[first:last].astype(np.uint64) @ weights[at : at + f.shape[1]]
            at += f.shape[1]
        total += _mixed(numbers).sum(dtype=np.uint64)
    return total


def _as_integers(array: Tensor) -> np.ndarray:
    """The bits of each number as an unsigned integer. # (rows, numbers of a row)"""
    t = array.detach().cpu()
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    t = t.contiguous().reshape(len(t), t[:1].numel()).view(sizes[t.element_size()])
    whole = t.numpy()
    return whole.view(f"u{whole.dtype.itemsize}")


def _mixed(x: Any) -> Any:
    """Sixty-four bits of which each depends on all (SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
