"""Shapes of what operations make of shadows, found without torch's own functions for ``meta`` tensors.

Those are written in Python, and the first of them imports torch's compilers: a second or two, and
70 MB that stay. What models do to their rows is mostly arithmetic, look-ups and sums, whose shapes
follow from those of their arguments; the dtype is that of the operation on tensors of single numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor

Shape = tuple[int, ...]

_aten = torch.ops.aten

_REDUCTIONS = frozenset(
    {
        _aten.sum.dim_IntList,
        _aten.sum.default,
        _aten.mean.dim,
        _aten.mean.default,
        _aten.prod.dim_int,
        _aten.logsumexp.default,
        _aten.amax.default,
        _aten.amin.default,
        _aten.all.dim,
        _aten.all.default,
        _aten.any.dim,
        _aten.any.default,
    }
)

_OF_FIRST = frozenset(
    {
        _aten._softmax.default,
        _aten._log_softmax.default,
        _aten.cumsum.default,
        _aten.zeros_like.default,
        _aten.ones_like.default,
        _aten.full_like.default,
        _aten.empty_like.default,
        _aten._to_copy.default,
    }
)

_INDICES = (torch.int64, torch.int32)

# What is laid out anew, in whatever order arguments are.
_LAID_ANEW = frozenset(
    {
        _aten.mm.default,
        _aten.bmm.default,
        _aten.mv.default,
        _aten.addmm.default,
        _aten.embedding.default,
        _aten.index_select.default,
    }
)


def shadow_from(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The shadow of an operation's result, laid out as torch lays out the result; None if unknown.

    Args:
        func: The operation.
        args: Its positional arguments, shadows in place of tensors.
        kwargs: Its keyword arguments, likewise.
    """
    given = _named(func, args, kwargs)
    if given is None:
        return None
    packed = func in _LAID_ANEW or given.get("memory_format") == torch.contiguous_format
    if not packed and not all(_is_in_order(t) for t in _tensors(given.values())):
        return None
    own = _OWN.get(func)
    if own is not None:
        return own(given)
    shape = _shape(func, given)
    if shape is None:
        return None
    one = func(*map(_single, args), **{n: _single(a) for n, a in kwargs.items()})
    return _shadow(shape, one.dtype) if one.dim() == len(shape) else None


def _named(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments by their names; None of an operation that is not looked at."""
    schema, tags = func._schema, func.tags
    if torch.Tag.nondeterministic_seeded in tags:
        return None
    if kwargs.get("layout") not in (None, torch.strided):
        return None
    if kwargs.get("memory_format") not in (None, torch.contiguous_format, torch.preserve_format):
        return None
    if any(a.alias_info is not None for a in (*schema.arguments, *schema.returns)):
        return None
    names = [a.name for a in schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _shape(func: Any, given: dict[str, Any]) -> Shape | None:
    """The shape of the one tensor that an operation makes; None if it is not known here."""
    if func in _REDUCTIONS:
        return _reduced(given)
    if func in _OF_FIRST:
        return tuple(given["self"].shape)
    returns = func._schema.returns
    if torch.Tag.pointwise not in func.tags or [str(r.type) for r in returns] != ["Tensor"]:
        return None
    return tuple(broadcast_shape(*(t.shape for t in _tensors(given.values()))))


def _reduced(given: dict[str, Any]) -> Shape:
    sizes, dim = tuple(given["self"].shape), given.get("dim")
    dims = list(range(len(sizes))) if dim is None or dim == [] else dim
    gone = {d % len(sizes) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if given.get("keepdim", False):
        return tuple(1 if d in gone else n for d, n in enumerate(sizes))
    return tuple(n for d, n in enumerate(sizes) if d not in gone)


def _looked_up(given: dict[str, Any]) -> Tensor | None:
    """Of ``source[:, index, index]``: slices before, after, or on neither side of the indices."""
    source, indices = given["self"], list(given["indices"])
    at = [i for i, index in enumerate(indices) if index is not None]
    found = [indices[i] for i in at]
    if not found or at != list(range(at[0], at[-1] + 1)) or at[-1] >= source.dim():
        return None
    if any(i.dtype not in _INDICES for i in found) or (at[0] and len(at) > 1):
        return None
    rows = broadcast_shape(*(i.shape for i in found))
    return _shadow((*source.shape[: at[0]], *rows, *source.shape[at[-1] + 1 :]), source.dtype)


def _made(given: dict[str, Any]) -> Tensor:
    """What ``t.new_zeros(shape)`` and its like make."""
    return _shadow(tuple(given["size"]), given.get("dtype") or given["self"].dtype)


def _gathered(given: dict[str, Any]) -> Tensor:
    return _shadow(tuple(given["index"].shape), given["self"].dtype)


def _rows_of(given: dict[str, Any]) -> Tensor:
    """What an embedding and ``index_select`` look up."""
    if "weight" in given:
        source, dim, index = given["weight"], 0, given["indices"]
    else:
        source, dim, index = given["self"], given["dim"] % given["self"].dim(), given["index"]
    shape = (*source.shape[:dim], *index.shape, *source.shape[dim + 1 :])
    return _shadow(shape, source.dtype)


def _made_of_nothing(given: dict[str, Any]) -> Tensor:
    """What ``torch.zeros(shape)`` and its like make."""
    made = {"dtype": given.get("dtype"), "device": "cpu"}
    if "fill_value" in given:
        one = torch.full((), given["fill_value"], **made)
    else:
        one = torch.zeros((), **made)
    return _shadow(tuple(given["size"]), one.dtype)


def _joined(given: dict[str, Any]) -> Tensor | None:
    tensors, dim = given["tensors"], given.get("dim", 0)
    if any(t.dim() != tensors[0].dim() or t.dtype != tensors[0].dtype for t in tensors):
        return None
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return _shadow(tuple(shape), tensors[0].dtype)


def _stacked(given: dict[str, Any]) -> Tensor | None:
    tensors, dim = given["tensors"], given.get("dim", 0)
    first = tensors[0]
    if any(t.shape != first.shape or t.dtype != first.dtype for t in tensors):
        return None
    shape = list(first.shape)
    shape.insert(dim % (len(shape) + 1), len(tensors))
    return _shadow(tuple(shape), first.dtype)


def _product(given: dict[str, Any]) -> Tensor | None:
    """A product of matrices, of stacks of them, or of a matrix with a vector."""
    a: Tensor = given["mat1"] if "mat1" in given else given["self"]
    b: Tensor = given["vec"] if "vec" in given else given["mat2"]
    if a.dtype != b.dtype or a.shape[-1] != b.shape[max(0, b.dim() - 2)]:
        return None
    return _shadow((*a.shape[:-1], *(b.shape[-1:] if b.dim() > 1 else ())), a.dtype)


def _root(given: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Cholesky's factors, which LAPACK writes column by column, and whether each was found."""
    a = given["self"]
    if given.get("check_errors", False):
        return None
    return _shadow(tuple(a.shape), a.dtype).mT, _shadow(tuple(a.shape[:-2]), torch.int32)


_OWN: dict[Any, Callable[[dict[str, Any]], Any]] = {
    _aten.index.Tensor: _looked_up,
    _aten.new_zeros.default: _made,
    _aten.new_ones.default: _made,
    _aten.new_full.default: _made,
    _aten.new_empty.default: _made,
    _aten.gather.default: _gathered,
    _aten.cat.default: _joined,
    _aten.stack.default: _stacked,
    _aten.mm.default: _product,
    _aten.bmm.default: _product,
    _aten.mv.default: _product,
    _aten.addmm.default: _product,
    _aten.embedding.default: _rows_of,
    _aten.index_select.default: _rows_of,
    _aten.zeros.default: _made_of_nothing,
    _aten.ones.default: _made_of_nothing,
    _aten.full.default: _made_of_nothing,
    _aten.linalg_cholesky_ex.default: _root,
}


def _shadow(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in arguments, those in lists too."""
    out: list[Tensor] = []
    for v in values:
        if isinstance(v, Tensor):
            out.append(v)
        elif isinstance(v, (list, tuple)):
            out += _tensors(v)
    return out


def _single(value: Any) -> Any:
    """An argument with tensors of single numbers in place of shadows."""
    if isinstance(value, Tensor):
        return torch.ones((1,) * value.dim(), dtype=value.dtype)
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, (list, tuple)):
        return [_single(v) for v in value]
    return value


def _is_in_order(t: Tensor) -> bool:
    """Whether later dimensions lie closer in memory, as in what operations make of such tensors."""
    before = math.inf
    for n, s in zip(t.shape, t.stride(), strict=True):
        if n != 1 and s:
            if s > before:
                return False
            before = s
    return True
