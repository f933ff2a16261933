"""What a user passes as data, as tensors: arrays of numpy, DataFrames and Series of pandas.

Tensors stay as they are. All else is copied, so that nothing shares memory with what is the user's, and
keeps its kind of numbers: float64 stays float64, whole numbers stay whole numbers, categories become
their codes. What has no numbers is refused with the line that converts it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.errors import DataError, message
from pyro_em.sources.tensors import own_tensor

_DEPTH = 3  # containers that hold containers
_MANY = 4096  # entries of a container that is looked through


@dataclass
class Given:
    """Arguments of a model with tensors in place of arrays and tables.

    Attributes:
        known: Tensors of calls before, by argument: one with the same numbers is taken again.
        columns: The names of the columns of each DataFrame, by argument.
        notes: What was read as what, in sentences.
    """

    known: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def read(self, value: Any, where: str, depth: int = _DEPTH) -> Any:
        """The same value, with tensors in place of arrays and tables.

        Args:
            value: An argument.
            where: Its name.
            depth: How many containers within containers are looked through.

        Raises:
            DataError: If it holds something else than numbers.

        Example:
            >>> given = Given()
            >>> given.read({"y": np.arange(3)}, "data")
            {'y': tensor([0, 1, 2])}
            >>> given.notes
            ["data['y'] is an array: read as a tensor of int64, of shape (3,), a copy"]
        """
        if isinstance(value, Tensor):
            return value
        if is_table(value):
            return self._kept(self._table(value, where), where)
        if isinstance(value, np.ndarray):
            return self._kept(self._array(value, where), where)
        if depth and len_of(value) <= _MANY:
            if type(value) is dict:
                return {k: self.read(v, f"{where}[{k!r}]", depth - 1) for k, v in value.items()}
            if type(value) in (list, tuple):
                items = [self.read(v, f"{where}[{i}]", depth - 1) for i, v in enumerate(value)]
                return type(value)(items)
        return value

    def _kept(self, tensor: Tensor, where: str) -> Tensor:
        """The tensor of the call before, if the numbers are the same."""
        before = self.known.get(where)
        if before is None or not _are_same(before, tensor):
            self.known[where] = tensor
        return self.known[where]

    def _array(self, value: np.ndarray, where: str) -> Tensor:
        if value.dtype.kind not in "biufc":
            raise _no_numbers(where, f"an array of {_kind(value.dtype)}", _fix(where, value.dtype))
        tensor = own_tensor(value, where)
        self._note(where, "an array", tensor)
        return tensor

    def _table(self, value: Any, where: str) -> Tensor:
        pandas = sys.modules["pandas"]
        if isinstance(value, pandas.DataFrame):
            tensor = _of_columns(value, where)
            self.columns[where] = tuple(value.columns)
            self._note(where, "a DataFrame", tensor)
            return tensor
        what = "an Index" if isinstance(value, pandas.Index) else "a Series"
        numbers, of = _column(value, where, where)
        self._note(where, what + of, torch.from_numpy(numbers))
        return torch.from_numpy(numbers)

    def _note(self, where: str, what: str, tensor: Tensor) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = tuple(tensor.shape)
        self.notes.append(
            f"{where} is {what}: read as a tensor of {dtype}, of shape {shape}, a copy"
        )


def hold_arrays(values: Iterable[Any]) -> bool:
    """Whether any of some values is an array or a table, or a container that holds one.

    Example:
        >>> hold_arrays([3, np.zeros(2)]), hold_arrays([{"a": [np.zeros(2)]}]), hold_arrays([1, [2]])
        (True, True, False)
    """
    return any(map(_holds_arrays, values))


def _holds_arrays(value: Any, depth: int = _DEPTH) -> bool:
    if isinstance(value, (Tensor, int, float, str, bool, type(None))):
        return False
    if isinstance(value, np.ndarray) or is_table(value):
        return True
    if not depth or type(value) not in (dict, list, tuple) or len(value) > _MANY:
        return False
    return any(
        _holds_arrays(v, depth - 1) for v in (value.values() if type(value) is dict else value)
    )


def is_table(value: Any) -> bool:
    """Whether a value is a DataFrame, a Series or an Index of pandas."""
    pandas = sys.modules.get("pandas")
    if pandas is None or not hasattr(pandas, "DataFrame"):
        return False
    return isinstance(value, (pandas.DataFrame, pandas.Series, pandas.Index))


def len_of(value: Any) -> int:
    """The number of entries of a plain container; none of what is no container."""
    return len(value) if type(value) in (dict, list, tuple) else 0


def _are_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN in the same places."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _of_columns(table: Any, where: str) -> Tensor:
    """All columns of a DataFrame side by side: whole numbers where all are. # (rows, columns)"""
    columns, dtypes = [], []
    for i, name in enumerate(table.columns):
        column = table.iloc[:, i]
        if getattr(column.dtype, "name", "") == "category":
            raise _mixed(table, where, name, "categories")
        numbers, _ = _column(column, f"{where}[{name!r}]", where, table)
        columns.append(numbers)
        dtypes.append(numbers.dtype)
    if not columns:
        raise DataError(message(where, "the DataFrame has no columns.", "there are no data in it"))
    common = np.result_type(*dtypes)
    return torch.from_numpy(np.stack([c.astype(common, copy=False) for c in columns], -1))


def _column(column: Any, where: str, argument: str, table: Any = None) -> tuple[np.ndarray, str]:
    """The numbers of a Series in memory of their own, and of what kind it is beyond numbers."""
    dtype = column.dtype
    if getattr(dtype, "name", "") == "category":
        codes = np.array(getattr(column, "cat", column).codes, dtype=np.int64)
        if bool((codes < 0).any()):
            raise DataError(
                message(
                    where,
                    f"{int((codes < 0).sum())} of {len(codes)} categories are missing.",
                    "a code that stands for none would be taken for a category",
                    [f"leave these rows out: {argument}.dropna()", "mask them: obs_mask="],
                )
            )
        shown = list(getattr(column, "cat", column).categories[:4])
        return codes, f" of categories, whose codes are 0, 1, … for {shown}"
    kind = getattr(dtype, "kind", "O")
    if kind not in "biufc":
        if table is not None:
            raise _mixed(table, argument, column.name, _kind(dtype))
        raise _no_numbers(where, f"a Series of {_kind(dtype)}", _fix(argument, dtype))
    if bool(column.isna().any()) and kind in "biu":  # of pandas' own whole numbers
        return np.array(column.to_numpy(dtype="float64", na_value=np.nan)), ""
    plain = dtype if isinstance(dtype, np.dtype) else np.dtype(getattr(dtype, "numpy_dtype", "f8"))
    values = (
        column.to_numpy(dtype=plain, na_value=np.nan) if kind == "f" else column.to_numpy(plain)
    )
    return own_tensor(np.asarray(values), where).numpy(), ""


def _kind(dtype: Any) -> str:
    kinds = {"O": "Python objects", "U": "texts", "S": "texts", "V": "records"}
    kinds |= {"M": "dates", "m": "differences of dates"}
    name = str(dtype)
    if name.startswith(("str", "<U")):
        return "texts"
    return f"{kinds.get(getattr(dtype, 'kind', 'O'), 'values')} ({name})"


def _fix(where: str, dtype: Any) -> str:
    kind, name = getattr(dtype, "kind", "O"), str(dtype)
    if kind in "Mm":
        return f"{where}.astype('int64'), and numbers of a unit that you choose"
    if kind == "V":
        return f"one field of the records: {where}['a']"
    if name.startswith("str") or kind in "US":
        return f"codes of texts: pandas.Series({where}, dtype='category')"
    return f"{where}.astype(float)"


def _no_numbers(where: str, what: str, fix: str) -> DataError:
    return DataError(
        message(
            where,
            f"it is {what}.",
            "densities are computed from numbers",
            [
                f"pass {fix}",
                "let the model have it as it is: annotate the argument with its class, "
                "x: numpy.ndarray or x: pandas.Series",
            ],
        )
    )


def _mixed(table: Any, where: str, name: Any, what: str) -> DataError:
    kinds = [getattr(dtype, "kind", "O") for dtype in table.dtypes]
    numbers = [c for c, kind in zip(table.columns, kinds, strict=True) if kind in "biuf"]
    return DataError(
        message(
            f"{where}[{name!r}]",
            f"the column holds {what}.",
            "a DataFrame becomes one tensor, whose columns are all numbers",
            [
                f"pass the columns with numbers: {where}[{numbers!r}]",
                f"pass it as an argument of its own: {where}[{name!r}].astype('category')",
                "let the model have the DataFrame as it is, and read its columns by itself: annotate "
                f"the argument, def model({where}: pandas.DataFrame)",
            ],
        )
    )


def reads_as_it_is(annotation: Any) -> bool:
    """Whether an argument's annotation says that the model takes an array or a table by itself.

    Example:
        >>> reads_as_it_is(np.ndarray), reads_as_it_is("pd.DataFrame"), reads_as_it_is(Tensor)
        (True, True, False)
    """
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    text = text or str(annotation)
    return any(name in text for name in ("ndarray", "NDArray", "DataFrame", "Series"))


def arguments_read(
    given: Given,
    names: list[str],
    as_they_are: Mapping[str, bool],
    args: tuple,
    kwargs: Mapping[str, Any],
) -> tuple[tuple, dict[str, Any]]:
    """All arguments of a call, each with `Given.read` but for those that a model takes as they are.

    Args:
        given: Reads them.
        names: Of the model's positional arguments.
        as_they_are: By name whether an argument stays what it is.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    named = [names[i] if i < len(names) else f"argument {i + 1}" for i in range(len(args))]
    read_args = tuple(
        a if as_they_are.get(n, False) else given.read(a, n)
        for n, a in zip(named, args, strict=True)
    )
    read_kwargs = {
        n: v if as_they_are.get(n, False) else given.read(v, n) for n, v in kwargs.items()
    }
    return read_args, read_kwargs
