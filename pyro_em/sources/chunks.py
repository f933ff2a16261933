"""Chunks: data larger than memory as a model's arguments, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pyro_em.arguments import whole
from pyro_em.errors import DataError, FileError, PyroEMError, UsageError, message
from pyro_em.sources.ahead import one_ahead
from pyro_em.sources.arrays import Arrays
from pyro_em.sources.form import Digest, Form
from pyro_em.sources.iterables import Items
from pyro_em.sources.parquet import parquet_files
from pyro_em.sources.source import Arguments, Chunk, Source
from pyro_em.sources.tensors import arrays_in, is_array, rows_in

_ROWS = 100_000

T = TypeVar("T")


class Chunks:
    """Data in chunks of rows, for what is larger than memory.

    What is read are copies: at any time two chunks of them are in memory, the one that is computed
    with and the next one, which a background thread reads meanwhile.

    Args:
        *data: Arrays with a common first dimension, one for each argument of the model: tensors,
            arrays of numpy, ``numpy.memmap``, and what can be sliced like these. Or one iterable
            whose items are tuples or lists of arguments, or the only argument, and that can be
            iterated over again and again: a ``DataLoader``, a list, an object with ``__iter__`` that
            reads files. # (rows, ...)
        rows: Rows of a chunk of arrays, 100,000 by default; the last chunk has those that are left.

    Raises:
        UsageError: If there is nothing to read again and again, or no numbers in it.
        DataError: If arrays differ in their number of rows, or there are none.

    Example:
        >>> import torch
        >>> x, y = torch.arange(10.0).reshape(5, 2), torch.arange(5)
        >>> chunks = Chunks(x, y, rows=3)
        >>> chunks
        Chunks(float32 (2,), int64 (): 5 rows, 3 in a chunk)
        >>> [(c.begin, c.rows, c.args[1].tolist()) for c in chunks.read()]
        [(0, 3, [0, 1, 2]), (3, 2, [3, 4])]
        >>> Chunks([(x, y), (x, y)]).total
        10
    """

    def __init__(self, *data: Any, rows: int | None = None) -> None:
        if not data:
            raise UsageError(
                message("Chunks", "no data were given.", fixes=["pass arrays: Chunks(x, y)"])
            )
        if len(data) > 1 or is_array(data[0]):
            self._begin(Arrays(data, whole("Chunks", "rows", _ROWS if rows is None else rows)))
            return
        if isinstance(data[0], Chunks):
            raise UsageError(
                message("Chunks", "the data are Chunks already.", "", ["pass them on"])
            )
        source = Items(data[0])
        if rows is not None:
            raise UsageError(
                message(
                    "Chunks",
                    f"rows={rows} was given together with an iterable.",
                    "its items are the chunks",
                    ["leave it out, and make items of the size that you want"],
                )
            )
        self._begin(source)

    @classmethod
    def parquet(cls, paths: Any, columns: Any, rows: int | None = None) -> Chunks:
        """Columns of Parquet files, which are read some rows at a time, whatever their row groups are.

        Args:
            paths: A file, a folder (all its ``*.parquet``, by name), or a list of these.
            columns: One item for each argument of the model: a column's name, # (rows,), or a list
                of names, # (rows, D). Nulls are NaN in floating-point columns. A column of lists of
                one fixed length D is # (rows, D).
            rows: Rows of a chunk, 100,000 by default.

        Returns:
            The chunks.

        Raises:
            UsageError: If pyarrow is not installed, or a column is not there.
            FileError: If a file cannot be read.
            DataError: If a column does not hold numbers, or there are no rows.
        """
        rows = whole("Chunks.parquet", "rows", _ROWS if rows is None else rows)
        out = cls.__new__(cls)
        out._begin(parquet_files(paths, columns, rows))
        return out

    def _begin(self, source: Source) -> None:
        self._source = source
        self._counted: int | None = None
        self._number: int | None = None
        if source.total == 0:
            raise _empty()

    @property
    def total(self) -> int | None:
        """The number of all rows; None where it takes a pass to know it, until there was one."""
        return self._source.total if self._counted is None else self._counted

    @property
    def number(self) -> int | None:
        """How many chunks there are; None where it takes a pass to know it, until there was one."""
        return self._number

    @property
    def source(self) -> Source:
        """What they are read from."""
        return self._source

    @property
    def is_ordered(self) -> bool:
        """Whether every pass has the rows in the same order, as far as that is known."""
        return self._source.is_ordered

    def read(self, ahead: bool = True) -> Iterator[Chunk]:
        """One pass over the data.

        Args:
            ahead: Whether a thread is one chunk ahead of who asks.

        Yields:
            Chunks, of one row at least.

        Raises:
            DataError: If a chunk cannot be read, or does not go with the first; if there are no
                rows, or not as many as in the last pass.
            FileError: If the operating system says so.
        """
        return self.made_ahead(_itself) if ahead else self._pass(_itself)

    def made_ahead(self, make: Callable[[Chunk], T]) -> Iterator[T]:
        """One pass over the data, of what the thread that reads makes of each chunk.

        Args:
            make: From a chunk to what is wanted of it.

        Raises:
            DataError: As `read`.
        """
        return one_ahead(lambda: self._pass(make))

    def form(self) -> Form:
        """What the data are, in one pass: rows, dtypes, shapes and a checksum.

        Example:
            >>> import torch
            >>> x = torch.arange(6.0)
            >>> Chunks(x, rows=2).form().checksum == Chunks(x, rows=4).form().checksum
            True
            >>> Chunks(x, rows=2).form().checksum == Chunks(x.flip(0), rows=2).form().checksum
            False
        """
        digest = Digest(self.is_ordered)
        for chunk in self.read():
            digest.add(chunk)
        return digest.form()

    def __repr__(self) -> str:
        known = "rows not counted yet" if self.total is None else f"{self.total:,} rows"
        rows = getattr(self._source, "rows", None)
        return f"Chunks({self._source}: {known}{f', {rows:,} in a chunk' if rows else ''})"

    def _pass(self, make: Callable[[Chunk], T]) -> Iterator[T]:
        begin, number, count, first = 0, 0, 0, ""
        pieces = self._source.pieces()
        while True:
            number += 1
            try:
                args = next(pieces, None)
            except PyroEMError as error:
                raise type(error)(f"chunk {number}, {error}") from error
            except Exception as error:  # whatever files, libraries and the user's iterable say
                raise _unreadable(number, begin, error) from error
            if args is None:
                break
            rows = rows_in(args)
            if rows is None:
                raise _without_rows(number)
            if not rows:
                continue
            form = _form_of(args)
            first = first or form
            if form != first:
                raise _other_form(number, form, first)
            made = make(Chunk(args, begin, rows))
            del args
            begin, count = begin + rows, count + 1
            yield made
            del made
        if not begin:
            raise _empty()
        if self._counted not in (None, begin):
            raise _other_number(begin, self._counted)
        self._counted, self._number = begin, count


def _itself(chunk: Chunk) -> Chunk:
    return chunk


def _form_of(args: Arguments) -> str:
    """What arguments have to agree in from chunk to chunk, in words."""
    forms = [
        " and ".join(f"{str(a.dtype).removeprefix('torch.')} of {a.dim()}" for a in arrays_in(arg))
        for arg in args
    ]
    return ", ".join(form or "no array" for form in forms)


def _unreadable(number: int, begin: int, error: Exception) -> PyroEMError:
    kind = FileError if isinstance(error, OSError) else DataError
    return kind(
        message(
            f"chunk {number}, rows from {begin} on",
            f"reading it failed: {type(error).__name__}: {error}",
            "what was raised stands above",
            ["run it by itself: for chunk in chunks.read(): pass"],
        )
    )


def _without_rows(number: int) -> DataError:
    return DataError(
        message(
            f"chunk {number}",
            "it holds no array with rows.",
            "an item is a tuple or list of the model's arguments, or the only argument",
            ["let the iterable give tensors, or tuples of tensors: [(x1, y1), (x2, y2)]"],
        )
    )


def _other_form(number: int, form: str, first: str) -> DataError:
    return DataError(
        message(
            f"chunk {number}",
            f"its arguments are {form} dimensions; those of the first are {first}.",
            "all chunks are of one kind",
            ["give dtypes where files are read: pandas.read_csv(file, dtype=...)"],
        )
    )


def _empty() -> DataError:
    return DataError(
        message(
            "Chunks",
            "there are no rows.",
            "nothing was read, or an iterator that can be read once only was read before",
            ["let __iter__ begin anew each time: a generator function, not a generator"],
        )
    )


def _other_number(rows: int, before: int | None) -> DataError:
    return DataError(
        message(
            "Chunks",
            f"this pass had {rows} rows, the one before {before}.",
            "each E-step is of all data",
            ["let __iter__ give the same rows in each pass; their order may change"],
        )
    )
