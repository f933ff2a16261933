"""Tensors of all steps of a loop that behave as those of one step: its index, and what it selects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.tracing.each_step import REDUCING, SHAPING, reduced, shaped
from pyro_em.tracing.loops import (
    PLAIN,
    Loop,
    NotVectorized,
    Series,
    current_series,
)
from pyro_em.tracing.step_places import events_beside, laid_out, own_events


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


_SHOWN = _words("size dim ndimension numel __len__ stride is_floating_point get_device")


# A body that lays an index out itself takes it for a tensor of one dimension.
_LAID_OUT = _words("unsqueeze reshape view expand flatten squeeze tolist numpy")

_BY_ELEMENT = _words("""
    add sub rsub mul div true_divide floor_divide remainder fmod pow neg abs exp log sqrt sin cos
    tanh sigmoid eq ne lt le gt ge float double long int to clamp minimum maximum floor ceil round
    logical_and logical_or logical_not square where bool bitwise_and bitwise_or bitwise_not
    isnan isfinite isinf nan_to_num log1p expm1 rsqrt sign
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __mod__
    __pow__ __rpow__ __neg__ __abs__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__
    __invert__ __rfloordiv__ __rmod__
    """)


# Of whole numbers they are whole numbers, or truth values.
_WHOLE = _words("""
    add radd sub rsub mul rmul floordiv floor_divide rfloordiv mod rmod remainder fmod pow neg abs eq
    ne lt le gt ge long int clamp minimum maximum logical_and logical_or logical_not square where
    bool and or invert bitwise_and bitwise_or bitwise_not floor ceil round to
    """)


# What mixes the steps with other dimensions, or goes through them.
_MOVES_STEPS = _words("""
    nonzero argwhere unique flatten ravel masked_select __iter__ unbind split chunk tolist
    """)


_NUMBERS = _words("item __int__ __float__ __index__ __complex__")


class PerStep(Tensor):
    """A tensor per step. It is laid out beside plates where it meets other tensors.

    Attributes:
        raw: Steps first. # (steps, *shape of one step)
        series: How indices are read.
        loop: Whose steps.
        is_number: Whether it is made of steps and numbers of Python alone, which leave the dtype
            of a tensor as it is.
    """

    raw: Tensor
    series: Series
    loop: Loop
    is_number: bool

    @classmethod
    def of(cls, raw: Tensor, series: Series, loop: Loop, is_number: bool = False) -> Tensor:
        """A tensor per step, from one whose first dimension is that of steps."""
        shown = laid_out(raw, series, loop)
        out = getattr(shown, "_t", shown).as_subclass(PerStep)
        out.raw, out.series, out.loop, out.is_number = raw, series, loop, is_number
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation with the meaning that it has at each step."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        own = _first((*args, *kwargs.values()))
        assert own is not None
        if current_series.get() is None:  # kept by the model, and looked at when no loop runs
            return _as_plain(func, args, kwargs, own)
        if name == "__get__":
            shown = own.raw if isinstance(own, Index) else placed(own)
            out = func(shown)
            return (
                out if not isinstance(out, Tensor) or isinstance(own, Index) else func(placed(own))
            )
        if name in _NUMBERS:
            raise NotVectorized("the body makes a number of Python of its index")
        if name == "__bool__":
            return _decided(own)
        if name in _SHOWN:
            return func(own.raw if isinstance(own, Index) else placed(own), *args[1:], **kwargs)
        if name == "__getitem__" and own.series.way != PLAIN:
            return _looked_up(args[0], args[1], own.series, own.loop)
        if isinstance(own, Index) and (own.series.way == PLAIN or name in _LAID_OUT):
            return _as_plain(func, args, kwargs, own)
        if args and args[0] is own and own.series.way != PLAIN:
            if name == "unbind" and not any(args[1:]) and not kwargs and own.raw.dim() > 1:
                return tuple(PerStep.of(r, own.series, own.loop) for r in own.raw.unbind(1))
            raw = _at_each_step(func, name, own, args[1:], kwargs)
            if raw is not None:
                return PerStep.of(raw, own.series, own.loop)
        if name in _BY_ELEMENT and all(_is_per_step(a, own) for a in (*args, *kwargs.values())):
            return _by_element(func, args, kwargs, own)
        given = (*args, *kwargs.values())
        dtype = _dtype_of(given) or torch.get_default_dtype()
        events = _events_beside(given, own) if name in _BY_ELEMENT else None
        how = dtype, events, device_of(given)
        out = func(*_mapped(args, *how), **{k: _mapped(a, *how) for k, a in kwargs.items()})
        if own.series.way != PLAIN and _is_of_all_steps(name, out, own.loop):
            own.series.is_hopeless = True
            raise NotVectorized(
                f"the body calls '{name}' on what one step reads: index tensors hold all steps"
            )
        return out


class Index(PerStep):
    """The steps themselves, or whole numbers made of them: of one dimension, and with a short name."""

    token: str | None

    @classmethod
    def of(  # type: ignore[override]
        cls, raw: Tensor, series: Series, loop: Loop, token: str | None = None
    ) -> Index:
        """An index tensor. # (steps,)"""
        out = getattr(raw, "_t", raw).as_subclass(Index)
        out.raw, out.series, out.loop, out.token = raw, series, loop, token
        out.is_number = True
        return out

    def __format__(self, spec: str) -> str:
        if spec == "":
            return str(self)
        if current_series.get() is None:
            return format(self.raw, spec)
        raise NotVectorized("the name of a site gives its step in a format of its own")

    def __str__(self) -> str:
        if current_series.get() is None:
            return str(self.raw)
        if self.token is None or self.series.loops.get(self.loop.name, self.loop) is None:
            raise NotVectorized("a name is made of a number that is computed from the step")
        return self.token

    __repr__ = __str__

    def __hash__(self) -> int:
        if current_series.get() is not None:
            raise NotVectorized("the body looks its index up in a dict or set")
        return id(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.raw.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.raw.clone()


def _first(values: Any) -> PerStep | None:
    """The first tensor per step among the arguments of an operation."""
    for v in values:
        if isinstance(v, PerStep):
            return v
        if isinstance(v, (tuple, list)):
            found = _first(v)
            if found is not None:
                return found
        elif isinstance(v, slice) and _first((v.start, v.stop, v.step)) is not None:
            raise NotVectorized("the body takes a slice that ends at its index")
    return None


def _is_of_all_steps(name: str, out: Any, loop: Loop) -> bool:
    """Whether a result is one for all steps, which a body could branch on."""
    if name in _MOVES_STEPS:
        return True
    if isinstance(out, (tuple, list)):
        return any(_is_of_all_steps(name, o, loop) for o in out)
    if isinstance(out, Tensor):
        # Further left by dimensions of events.
        places = out.shape[: max(0, out.dim() + loop.dim + 1)]
        has_steps = any(n in (1, loop.rest) for n in places)
        return not (has_steps or name.startswith("_"))
    shows = name.startswith(("is_", "_is_")) and name != "is_nonzero"
    return isinstance(out, (int, float, np.ndarray)) and not shows


def _at_each_step(
    func: Any, name: str, own: PerStep, how: Sequence[Any], by_name: dict[str, Any]
) -> Tensor | None:
    """An operation that counts the dimensions of one step; None for any other."""
    if name in SHAPING and not by_name:
        out = shaped(name, own.raw, how, -own.loop.dim)
        if out is None and name in ("view", "reshape") and own.loop.rest not in _flat(how):
            own.series.is_hopeless = True
            raise NotVectorized("the body gives what a step reads another shape")
        return out
    return reduced(func, own.raw, how, by_name) if name in REDUCING else None


def _flat(how: Sequence[Any]) -> Sequence[Any]:
    return how[0] if len(how) == 1 and isinstance(how[0], (tuple, list)) else how


def _is_per_step(value: Any, own: PerStep) -> bool:
    """Whether a value is one per step, or the same at all of them.

    A plain tensor has no dimension of steps where it has too few dimensions for it.
    """
    if isinstance(value, Tensor) and not isinstance(value, PerStep):
        return own.series.way != PLAIN and value.dim() < -own.loop.dim
    return value is None or isinstance(value, (PerStep, int, float, bool, torch.dtype))


def _by_element(func: Any, args: Any, kwargs: Any, own: PerStep) -> Any:
    given = (*args, *kwargs.values())
    most = max(
        v.raw.dim() if isinstance(v, PerStep) else v.dim() + 1
        for v in given
        if isinstance(v, Tensor)
    )

    def plain(v: Any) -> Any:
        if not isinstance(v, PerStep):
            return v
        raw = v.raw.reshape(v.raw.shape[0], *(1,) * (most - v.raw.dim()), *v.raw.shape[1:])
        if not v.is_number:
            return raw
        if numbers:  # of Python: in double precision until they meet a tensor
            return raw.to(torch.float64) if raw.dtype == torch.int64 and real else raw
        raw = _of_dtype(raw, dtype)
        return raw if device is None else raw.to(device)

    numbers = all(isinstance(v, PerStep) and v.is_number for v in given if isinstance(v, Tensor))
    real = func.__name__.strip("_") not in _WHOLE or any(isinstance(v, float) for v in given)
    dtype, device = _dtype_of(given) or torch.get_default_dtype(), device_of(given)
    out = func(*map(plain, args), **{k: plain(v) for k, v in kwargs.items()})
    if numbers and out.dim() == 1 and not out.is_floating_point():
        return Index.of(out, own.series, own.loop)
    return PerStep.of(out, own.series, own.loop, numbers)


def _as_plain(func: Any, args: Any, kwargs: Any, own: PerStep) -> Any:
    """An operation on the index as a tensor like any other."""

    def plain(v: Any) -> Any:
        if isinstance(v, Index):
            return v.raw
        if isinstance(v, PerStep):
            return placed(v)
        if isinstance(v, (tuple, list)):
            return type(v)(map(plain, v))
        return v

    out = func(*map(plain, args), **{k: plain(v) for k, v in kwargs.items()})
    name = getattr(func, "__name__", "")
    whole_numbers = isinstance(out, Tensor) and out.shape == own.raw.shape
    if whole_numbers and name in _BY_ELEMENT and all(_is_per_step(a, own) for a in args):
        return Index.of(out, own.series, own.loop)
    return out


def _mapped(value: Any, *how: Any) -> Any:
    """Arguments with plain tensors in them."""
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(v, *how) for v in value)
    return placed(value, *how)


def placed(
    value: Any,
    dtype: torch.dtype | None = None,
    events: int | None = None,
    device: torch.device | None = None,
) -> Any:
    """A tensor per step as a plain one, laid out beside the plates; anything else as it is.

    Args:
        value: Anything.
        dtype: Of real numbers that were numbers of Python at each step; the default one if None.
        events: How many dimensions of an event there are to the right of the plates; told by the
            sizes of plates if None.
        device: Where to put it, other than in the processor's memory.
    """
    if not isinstance(value, PerStep):
        return value
    raw = value.raw if device is None else value.raw.to(device)
    if isinstance(value, Index) and value.series.way == PLAIN:
        return raw
    if value.is_number:
        raw = _of_dtype(raw, dtype or torch.get_default_dtype())
    if events is not None and value.series.way != PLAIN:
        right = max(-1 - value.loop.dim + events, raw.dim() - 1)
        return raw.reshape(raw.shape[0], *(1,) * (right - raw.dim() + 1), *raw.shape[1:])
    return laid_out(raw, value.series, value.loop)


def device_of(values: Any) -> torch.device | None:
    """The device of the first tensor that has one of its own; None for the processor's memory."""
    for v in values:
        if isinstance(v, Tensor):
            device = v.raw.device if isinstance(v, PerStep) else v.device
            if device.type not in ("cpu", "meta"):
                return device
        elif isinstance(v, (tuple, list)):
            found = device_of(v)
            if found is not None:
                return found
    return None


def _events_beside(values: Any, own: PerStep) -> int | None:
    """How many dimensions of an event the plain tensors have that an operation meets."""
    loop, series = own.loop, own.series
    tensors = [v for v in values if isinstance(v, Tensor) and not isinstance(v, PerStep)]
    shapes = [tuple(t.shape) for t in tensors if t.dim()]
    if not shapes:
        return None
    own_ones = [own_events(v.raw, series, loop) for v in values if isinstance(v, PerStep)]
    return max(*own_ones, *(events_beside(shape, series, loop) for shape in shapes))


def _of_dtype(raw: Tensor, dtype: torch.dtype) -> Tensor:
    return raw.to(dtype) if raw.is_floating_point() and raw.dtype != dtype else raw


def _dtype_of(values: Any) -> torch.dtype | None:
    """The dtype of the first tensor of real numbers among the arguments of an operation."""
    for v in values:
        if isinstance(v, Tensor):
            number = isinstance(v, PerStep) and v.is_number
            if not number and v.is_floating_point():
                return v.dtype
        elif isinstance(v, (tuple, list)):
            found = _dtype_of(v)
            if found is not None:
                return found
    return None


def _looked_up(target: Any, index: Any, series: Series, loop: Loop) -> Any:
    """``target[index]`` at each step."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(p, (list, bool)) for p in parts):
        raise NotVectorized("the body indexes with a list")
    tensors = [p for p in parts if isinstance(p, Tensor) and not isinstance(p, PerStep) and p.dim()]
    steps = [i for i, p in enumerate(parts) if isinstance(p, PerStep)]
    if isinstance(target, Index):
        return target.raw[_mapped(index)]
    if isinstance(target, PerStep):
        raw = target.raw
        if not tensors and not steps:
            return PerStep.of(raw[(slice(None), *parts)], series, loop)
        at = laid_out(torch.arange(len(raw), device=raw.device), series, loop)
        return raw[(at, *map(placed, parts))]
    if any(parts[i].raw.dim() != 1 or parts[i].raw.dtype == torch.bool for i in steps):
        return target[_mapped(index)]
    if tensors:
        return _looked_up_together(target, parts, series, loop)
    if len(steps) > 1:
        if steps != list(range(len(steps))):
            raise NotVectorized("the body indexes with its index in several places")
        return PerStep.of(
            target[tuple(p.raw if isinstance(p, PerStep) else p for p in parts)], series, loop
        )
    (k,) = steps
    at = _to(parts[k].raw, target)
    if k == 0:
        looked = target[(at, *parts[1:])] if len(parts) > 1 else target[at]
        return PerStep.of(looked, series, loop)
    if Ellipsis in parts:
        i = next(i for i, p in enumerate(parts) if p is Ellipsis)
        own = sum(p is not None and p is not Ellipsis for p in parts)
        parts[i : i + 1] = [slice(None)] * (target.dim() - own)
        k = next(i for i, p in enumerate(parts) if isinstance(p, PerStep))
    parts[k] = slice(None)
    dim = sum(p is None or isinstance(p, slice) for p in parts[:k])
    looked = target[tuple(parts)][(*(slice(None),) * dim, at)]
    return PerStep.of(looked.movedim(dim, 0), series, loop)


def _looked_up_together(target: Tensor, parts: list[Any], series: Series, loop: Loop) -> Any:
    """``target[parts]`` at each step, where indices per step stand beside tensors."""
    at = [i for i, p in enumerate(parts) if isinstance(p, Tensor)]
    known = all(isinstance(parts[i], PerStep) or parts[i].dim() < -loop.dim for i in at)
    whole_numbers = all(parts[i].dtype != torch.bool for i in at)
    if series.way == PLAIN or not known or not whole_numbers or at[-1] - at[0] >= len(at):
        return target[tuple(_to(placed(p), target) for p in parts)]
    most = max(parts[i].dim() for i in at if not isinstance(parts[i], PerStep))
    most = max([most, *(p.raw.dim() - 1 for p in parts if isinstance(p, PerStep))])

    def beside(p: Any) -> Any:
        if not isinstance(p, PerStep):
            return _to(p, target)
        steps, *own = p.raw.shape
        return _to(p.raw.reshape(steps, *(1,) * (most - len(own)), *own), target)

    dim = sum(p is None or isinstance(p, slice) for p in parts[: at[0]])
    if Ellipsis in parts[: at[0]]:
        dim += target.dim() - sum(p is not None and p is not Ellipsis for p in parts)
    return PerStep.of(target[tuple(map(beside, parts))].movedim(dim, 0), series, loop)


def _to(value: Any, target: Tensor) -> Any:
    """An index on the device of what it looks up."""
    if isinstance(value, Tensor) and not value.is_meta and value.device != target.device:
        return value.to(target.device)
    return value


def _decided(condition: PerStep) -> bool:
    """``if`` on a condition of the steps: what all of them say, or the last where none counts."""
    said = getattr(condition.raw, "_t", condition.raw).reshape(-1) != 0
    if current_series.get() is None:
        return bool(said)
    first = bool(said[0])
    if bool((said == first).all()):
        return first
    if condition.loop.shift is not None and condition.loop.shift < condition.loop.history:
        return bool(said[-1])
    condition.series.is_hopeless = True
    raise NotVectorized("the body branches on its index, and not all steps go the same way")
