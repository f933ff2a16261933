"""Tensors of their own memory from whatever holds numbers: tensors, arrays of numpy, and the like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.errors import DataError, UsageError, message

# What torch has no operations for goes to the next wider type.
_WIDER = {"u2": "i4", "u4": "i8", "f16": "f8", "f12": "f8", "c32": "c16", "c24": "c16"}


def is_array(value: Any) -> bool:
    """Whether a value holds numbers in dimensions, the first of which can be sliced.

    Example:
        >>> is_array(torch.zeros(2)), is_array(np.zeros(2)), is_array([0.0, 0.0])
        (True, True, False)
    """
    if isinstance(value, (Tensor, np.ndarray)):
        return True
    has_form = hasattr(value, "dtype") or hasattr(value, "iloc")  # a table of pandas has no dtype
    return has_form and hasattr(value, "shape") and hasattr(value, "__getitem__")


def rows_of(array: Any, begin: int, end: int) -> Any:
    """Rows of an array, without a copy where it can give a view."""
    return getattr(array, "iloc", array)[begin:end]


def own_tensor(value: Any, where: str) -> Tensor:
    """A tensor of its own, contiguous memory, on the device and of the dtype of an array.

    Args:
        value: What `is_array` accepts.
        where: Its name in messages.

    Raises:
        UsageError: If it holds something else than numbers, or has no rows in memory.
        DataError: If entries are masked or too large.

    Example:
        >>> x = np.arange(3, dtype=">u2")
        >>> own_tensor(x, "argument 1")
        tensor([0, 1, 2], dtype=torch.int32)
    """
    if isinstance(value, Tensor):
        refuse_layout(value, where)
        return value.detach().clone(memory_format=torch.contiguous_format)
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    if np.ma.isMaskedArray(array):
        array = _filled(array, where)
    refuse_large(array, where)
    # A copy is made in any case: a page of a file is no memory of ours.
    return torch.from_numpy(np.array(array, dtype=_torchs(array.dtype, where), order="C"))


def refuse_layout(array: Any, where: str) -> None:
    """Refuse tensors whose numbers do not lie in memory one after the other."""
    if not isinstance(array, Tensor):
        return
    if array.layout is not torch.strided or array.is_meta or array.is_quantized:
        raise _no_numbers(where, _layout_in_words(array), "x.to_dense(), x.dequantize()")


def refuse_large(array: np.ndarray, where: str) -> None:
    """Refuse integers that torch does not have."""
    if array.dtype.kind == "u" and array.itemsize == 8 and array.size and array.max() >= 2**63:
        raise DataError(message(where, "it holds integers of 2**63 and more.", "torch has none"))


def _torchs(dtype: np.dtype, where: str) -> np.dtype:
    """The dtype of this computer's and torch's that holds the numbers of another one."""
    if dtype.kind not in "biufc":
        what = {"O": "Python objects", "U": "texts", "S": "texts", "V": "records"}
        what |= {"M": "dates", "m": "differences of dates"}
        fix = (
            "one column of a record: x['a']" if dtype.kind == "V" else "codes: pandas.factorize(x)"
        )
        raise _no_numbers(where, f"{what.get(dtype.kind, 'values')} ({dtype})", fix)
    if dtype == np.dtype("u8"):
        return np.dtype("i8")
    code = f"{dtype.kind}{dtype.itemsize}"
    return np.dtype(_WIDER.get(code, code))


def _no_numbers(where: str, what: str, fix: str) -> UsageError:
    return UsageError(
        message(
            where,
            f"it holds {what}.",
            "a chunk is made of rows of numbers in memory",
            [f"pass numbers, for instance {fix}"],
        )
    )


def _layout_in_words(value: Tensor) -> str:
    kind = "meta" if value.is_meta else str(value.layout).removeprefix("torch.")
    return f"a tensor that is {'quantized' if value.is_quantized else kind}"


def _filled(array: Any, where: str) -> np.ndarray:
    """A masked array with NaN where it is masked."""
    if array.dtype.kind == "f":
        return np.asarray(array.filled(np.nan))
    if not np.ma.is_masked(array):
        return np.asarray(array.data)
    raise DataError(
        message(
            where,
            "entries are masked.",
            f"what is missing is NaN, which {array.dtype} does not have",
            ["pass it as floating-point numbers: x.astype(float)"],
        )
    )


def own_tree(value: Any, where: str) -> Any:
    """The same tuples, lists and mappings with `own_tensor` of each array; other values stay."""
    if is_array(value):
        return own_tensor(value, where)
    if isinstance(value, Mapping):
        return {k: own_tree(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        items = [own_tree(v, f"{where}[{i}]") for i, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def arrays_in(value: Any) -> list[Any]:
    """The arrays in tuples, lists and mappings.

    Example:
        >>> len(arrays_in(({"x": torch.zeros(2), "n": 3}, [torch.zeros(2)])))
        2
    """
    if is_array(value):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [a for item in value for a in arrays_in(item)]
    return []


def rows_in(value: Any) -> int | None:
    """Rows of the first array in a value that has any dimension."""
    return next((int(a.shape[0]) for a in arrays_in(value) if len(a.shape)), None)


def form_of_row(value: Any) -> str:
    """The dtype and the shape of a row of an array.

    Example:
        >>> form_of_row(torch.zeros(5, 2))
        'float32 (2,)'
    """
    dtype = str(getattr(value, "dtype", "table")).removeprefix("torch.")
    return f"{dtype} {tuple(value.shape[1:])}"
