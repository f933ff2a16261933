"""Columns of Parquet files; pyarrow is an extra (``pip install 'pyro-em[parquet]'``)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_em.arguments import shown
from pyro_em.errors import DataError, FileError, UsageError, message
from pyro_em.sources.source import Arguments, Source
from pyro_em.sources.tensors import refuse_large

_BUFFER = 2**20  # bytes of a column that are read at once, however large its row groups are


@dataclass(frozen=True)
class Columns:
    """The columns of one argument.

    Attributes:
        names: Their names.
        dtype: The dtype of the argument, which holds the numbers of all of them in all files.
        width: Its columns; None where it has none, # (rows,).
    """

    names: tuple[str, ...]
    dtype: np.dtype
    width: int | None

    def __str__(self) -> str:
        return f"{self.dtype} {() if self.width is None else (self.width,)}"


@dataclass(frozen=True, eq=False)
class ParquetFiles(Source):
    """Rows of files one after the other; a chunk goes across row groups, and from file to file.

    Attributes:
        paths: The files.
        arguments: The columns of each argument.
        rows: Rows of a chunk; the last has those that are left.
        count: The number of all rows.
    """

    paths: tuple[Path, ...]
    arguments: tuple[Columns, ...]
    rows: int
    count: int

    @property
    def total(self) -> int:
        """See `Source.total`."""
        return self.count

    @property
    def is_ordered(self) -> bool:
        """See `Source.is_ordered`."""
        return True

    def pieces(self) -> Iterator[Arguments]:
        """See `Source.pieces`."""
        begin = filled = 0
        chunk = self._empty(begin)
        for path, batch, offset in self._batches():
            taken = 0
            while taken < batch.num_rows:
                count = min(batch.num_rows - taken, self.rows - filled)
                part = batch.slice(taken, count)
                for columns, out in zip(self.arguments, chunk, strict=True):
                    _fill(out[filled : filled + count], part, columns, path, offset + taken)
                taken, filled = taken + count, filled + count
                if filled == self.rows:
                    yield tuple(map(torch.from_numpy, chunk))
                    begin, filled = begin + filled, 0
                    del chunk  # it is the consumer's; the next one takes as much
                    chunk = self._empty(begin)
        if filled:
            yield tuple(torch.from_numpy(out[:filled]) for out in chunk)

    def _empty(self, begin: int) -> list[np.ndarray]:
        rows = max(0, min(self.rows, self.total - begin))
        return [
            np.empty((rows,) if a.width is None else (rows, a.width), a.dtype)
            for a in self.arguments
        ]

    def _batches(self) -> Iterator[tuple[Path, Any, int]]:
        """Each file with some of its rows, and the number in the file of the first of them."""
        wanted = sorted({name for a in self.arguments for name in a.names})
        for path in self.paths:
            offset = 0
            with _opened(path) as file:
                for batch in file.iter_batches(batch_size=self.rows, columns=wanted):
                    yield path, batch, offset
                    offset += batch.num_rows

    def __str__(self) -> str:
        """See `Source.__str__`."""
        return ", ".join(map(str, self.arguments))


def parquet_files(paths: Any, columns: Any, rows: int) -> ParquetFiles:
    """The source for columns of files.

    Raises:
        UsageError: If pyarrow is missing, or a column is.
        FileError: If a file cannot be read.
        DataError: If a column holds no numbers.
    """
    files = _files_of(paths)
    each = [columns] if isinstance(columns, str) else list(_names_checked(columns))
    named = [_names_of(c) for c in each]
    total = 0
    kinds: dict[str, list[_Kind]] = {}
    for path in files:
        with _opened(path) as file:
            total += file.metadata.num_rows
            for name in (n for names in named for n in names):
                kinds.setdefault(name, []).append(_kind_of(file.schema_arrow, name, path))
    arguments = tuple(
        _argument(names, kinds, is_nested=not isinstance(c, str))
        for names, c in zip(named, each, strict=True)
    )
    return ParquetFiles(files, arguments, rows, total)


_Kind = tuple[np.dtype, int | None]


def _argument(names: tuple[str, ...], kinds: dict[str, list[_Kind]], *, is_nested: bool) -> Columns:
    found = [kind for name in names for kind in kinds[name]]
    dtype = np.result_type(*(d for d, _ in found))
    widths = {name: {w for _, w in kinds[name]} for name in names}
    for name, several in widths.items():
        if len(several) > 1 or (is_nested and several != {None}):
            raise DataError(
                message(
                    "Chunks.parquet",
                    f"column '{name}' holds lists of numbers.",
                    "it is an argument by itself, and its lists are of one length in all files",
                    [f"columns=['{name}']"],
                )
            )
    return Columns(names, dtype, len(names) if is_nested else widths[names[0]].pop())


def _names_of(column: Any) -> tuple[str, ...]:
    names = (column,) if isinstance(column, str) else _names_checked(column)
    if not all(isinstance(n, str) for n in names):
        raise _no_columns(column)
    return tuple(names)


def _names_checked(columns: Any) -> Sequence[Any]:
    if not isinstance(columns, (list, tuple)) or not columns:
        raise _no_columns(columns)
    return columns


def _no_columns(value: Any) -> UsageError:
    return UsageError(
        message(
            "Chunks.parquet",
            f"columns: {shown(value)} is neither a column's name nor a list of names.",
            "each item is one argument: a column, or columns side by side",
            ["columns=['y']", "columns=[['x1', 'x2'], 'y']"],
        )
    )


def _files_of(paths: Any) -> tuple[Path, ...]:
    """The files that paths name, those in a folder by their names."""
    one = isinstance(paths, (str, os.PathLike))
    several: Sequence[Any] = [paths] if one else paths
    if not isinstance(several, (list, tuple)) or not several:
        raise UsageError(
            message(
                "Chunks.parquet",
                f"{shown(paths)} is neither a path nor a list of paths.",
                "",
                ["pass 'data.parquet', ['a.parquet', 'b.parquet'], or a folder of such files"],
            )
        )
    out: list[Path] = []
    for path in (Path(os.path.expanduser(p)) for p in several):
        inside = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not inside:
            raise FileError(
                message("Chunks.parquet", f"folder '{path}' holds no file '*.parquet'.")
            )
        out += inside
    return tuple(out)


def _opened(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UsageError(
            message(
                "Chunks.parquet",
                "files of this kind are read by pyarrow, which is not installed.",
                "",
                ["pip install 'pyro-em[parquet]', or pip install pyarrow"],
            )
        ) from error
    try:
        return ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
    except (OSError, ArrowException) as error:
        raise FileError(
            message(f"file '{path}'", f"it cannot be read as a Parquet file: {error}")
        ) from error


def _kind_of(schema: Any, name: str, path: Path) -> _Kind:
    """The dtype of a column, and the length of its lists where it holds some."""
    where = f"file '{path}'"
    index = schema.get_field_index(name)
    if index < 0:
        there = ", ".join(f"'{n}'" for n in schema.names[:12])
        more = ", …" if len(schema.names) > 12 else ""
        raise UsageError(
            message(where, f"it has no column '{name}'.", f"its columns are {there}{more}")
        )
    kind, width = schema.field(index).type, None
    types = _arrow().types
    if types.is_fixed_size_list(kind):
        kind, width = kind.value_type, kind.list_size
    if types.is_decimal(kind):
        return np.dtype("float64"), width
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise DataError(
            message(
                where,
                f"column '{name}' holds {kind}, not numbers.",
                "",
                [
                    "write codes of categories: pandas.factorize(table[column])",
                    "write lists as columns, or with a fixed length",
                ],
            )
        )
    dtype = np.dtype(kind.to_pandas_dtype())
    wider = {np.dtype("u2"): "i4", np.dtype("u4"): "i8", np.dtype("u8"): "i8"}
    return np.dtype(wider.get(dtype, dtype)), width


def _arrow() -> Any:
    import pyarrow

    return pyarrow


def _fill(out: np.ndarray, batch: Any, columns: Columns, path: Path, offset: int) -> None:
    """Write columns of some rows into an argument; nulls are NaN."""
    for i, name in enumerate(columns.names):
        column = batch.column(batch.schema.get_field_index(name))
        target = out
        if _arrow().types.is_fixed_size_list(column.type):
            _refuse_nulls(column, name, path, offset)  # a list has no NaN of its own
            column, target = column.flatten(), out.reshape(-1)
        elif columns.width is not None:
            target = out[:, i]
        if _arrow().types.is_decimal(column.type):
            column = column.cast(_arrow().float64())
        if column.null_count and out.dtype.kind != "f":
            _refuse_nulls(column, name, path, offset)
        values = column.to_numpy(zero_copy_only=False)
        refuse_large(values, f"file '{path}', column '{name}'")
        target[:] = values


def _refuse_nulls(column: Any, name: str, path: Path, offset: int) -> None:
    if not column.null_count:
        return
    row = offset + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
    raise DataError(
        message(
            f"file '{path}'",
            f"column '{name}' has a null in row {row}.",
            f"what is missing is NaN, which {column.type} does not have",
            ["write the column as floating-point numbers", "leave out rows with nulls"],
        )
    )
