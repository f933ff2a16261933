"""The calls of torch's functions in a run, written down: a quicker look than one at its operations.

A `CallLog` notes what a model asks of torch, where an `OperationLog` notes what torch does then: a
call of ``torch.cov`` is one note here and twelve there, and is seen at a fifth of the cost. What a
function of torch does follows from what it is given, so that two runs with equal notes do the same
operations, as far as

* every tensor is known by the call that made it, by its name, or by its content: all that has been
  noted stays alive until the run is over, so that no memory is used again for something else;
* nothing but torch's own functions has a part in it: what hands memory to others (``numpy()``),
  exchanges it (``resize_``), or runs code of the user's where nobody sees it (a hook, ``backward``)
  makes the notes incomplete, and with them nothing is shown.

A log of operations is needed to tell that two runs are the same in the first place; where that has
been shown, and calls were noted beside it, later runs are held against the calls alone.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import EllipsisType, FunctionType, MethodWrapperType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from pyro_em.tracing.constructed import (
    begin_constructing,
    end_constructing,
    is_left_to,
    tensors_made,
)
from pyro_em.tracing.dependences import Reading, checksum
from pyro_em.tracing.operations import (
    HELD,
    MADE,
    PARAMETER,
    PART,
    OperationLog,
    Unwatched,
    within,
)

_MOST_CALLS = 4096  # of a run; what is longer is known by its operations


_MOST_BYTES = 2**20  # that the tensors of a run may hold, which stay alive until it is over


# What says nothing but the form of a tensor, which is noted where the tensor is used.
_OF_THE_FORM = frozenset(
    {
        Tensor.size,
        Tensor.dim,
        Tensor.ndimension,
        Tensor.numel,
        Tensor.nelement,
        Tensor.stride,
        Tensor.element_size,
        Tensor.is_contiguous,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.is_signed,
        Tensor.__len__,
        torch.is_floating_point,
        torch.is_complex,
        torch.is_tensor,
        torch.numel,
        torch.broadcast_shapes,
        torch._C._set_grad_enabled,
    }
)


# What exchanges memory, hands it to others, or runs code that nobody sees.
_OPAQUE = frozenset(
    {
        Tensor.resize_,
        Tensor.resize_as_,
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.data_ptr,
        Tensor.untyped_storage,
        Tensor.storage,
        Tensor.apply_,
        Tensor.map_,
        Tensor.map2_,
        Tensor.backward,
        Tensor.share_memory_,
        Tensor.register_hook,
        torch.autograd.backward,
        torch.autograd.grad,
    }
)


_HANDING = frozenset({vars(Tensor)["__cuda_array_interface__"]})  # the memory of a tensor


_OF_TORCH = (
    type(torch.add),
    type(Tensor.add),
    type(Tensor.__getitem__),
    MethodWrapperType,  # which sets an attribute
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)


_ITERATOR = type(iter(()))  # of a tensor's parts


_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.Size})


_COUNTING = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


_TENSORS = (Tensor, torch.nn.Parameter)


_NAMES = (
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    type(None),
    EllipsisType,
)


class CallLog(OperationLog):
    """Notes the calls of torch's functions in one run.

    Args:
        given: Tensors that exist before the run, and their names.
        reading: Notes what the run reads that was there before it; the log beneath does, if any.
        beneath: Notes the operations of the same run.

    Attributes:
        is_complete: Whether equal notes show that two runs do the same.
    """

    def __init__(
        self,
        given: Iterable[tuple[str, Tensor]],
        reading: Reading | None = None,
        beneath: OperationLog | None = None,
    ) -> None:
        self._alive: list[torch.UntypedStorage] = []  # which outlives what a tensor is made to be
        self._bytes = self._limit = 0
        self._mode: _Calls | None = None
        self.beneath: OperationLog | None = None
        self.is_complete = True
        super().__init__(given, reading)
        self.beneath = beneath

    def noting(self, limit: int) -> AbstractContextManager[Any]:
        """A block whose calls are noted; an output of more cells than the limit is refused.

        Raises:
            OutputTooLarge: From the midst of the block.
        """
        kind = _CallsBesideDynamo if "torch._dynamo" in sys.modules else _Calls
        self._limit, self._mode = limit, kind(self)
        return self._mode if self.beneath is None else self._noting_both(self._mode, self.beneath)

    @contextmanager
    def _noting_both(self, mode: _Calls, beneath: OperationLog) -> Iterator[None]:
        with beneath.noting(self._limit), mode:
            yield

    def over(self) -> None:
        """The block has ended."""
        self._mode = None

    def constructed(self, cls: type, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """A distribution of Pyro, noted as one call; None where all calls have to be noted."""
        if self.is_aside or not self.is_complete:
            return None
        depth = torch._C._len_torch_function_stack()
        if not depth or torch._C._get_function_stack_at(depth - 1) is not self._mode:
            return None  # another mode sees the calls before
        if not is_left_to(self.constructed, cls, args, kwargs):
            return None
        mode = _pop_mode()
        try:
            noted = cls, *[self._other(a) for a in args]
            noted += tuple([(k, self._other(v)) for k, v in kwargs.items()])
            out = type.__call__(cls, *args, **kwargs)
            self.entries.append(noted)
            self._parts(tensors_made(out))
            return out
        finally:
            _push_mode(mode)

    def aside(self) -> AbstractContextManager[None]:
        """A block that does nothing of the model's."""
        return _Aside(self)

    def call(self, function: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Call a function of torch and note it."""
        if not self.is_complete:
            return within(self._limit, function(*args, **kwargs))
        noted: list[Any] = [function]
        for a in args:
            noted.append(self.origin(a) if isinstance(a, Tensor) else self._other(a))
        if kwargs:
            noted += [(k, self._other(v)) for k, v in kwargs.items()]
        if function in _OPAQUE or not _is_of_torch(function):
            self.is_complete = False
        out = function(*args, **kwargs)
        if isinstance(out, Tensor):
            self._made(out)
        else:
            noted.append(self._parts(out))
        self.entries.append(tuple(noted))
        if len(self.entries) > _MOST_CALLS:
            self._give_up()
        return out

    def _made(self, out: Tensor) -> bool:
        """Note whence a tensor comes that a call returned, if its memory is new: the known is alive."""
        if type(out) not in _TENSORS:
            self._unknown()
            return False
        if out.layout is not torch.strided:
            return False
        try:
            memory = out.untyped_storage()
        except NotImplementedError:  # one of many in a vmap
            self._unknown()
            return False
        at = memory.data_ptr()
        if at in self._origin:
            return False
        self._origin[at] = len(self.entries)
        self._hold(memory)
        if out.numel() > self._limit:
            within(self._limit, out)
        return True

    def _hold(self, memory: torch.UntypedStorage) -> None:
        self._alive.append(memory)
        self._bytes += memory.nbytes()
        if self._bytes > _MOST_BYTES:
            self._give_up()

    def _give_up(self) -> None:
        self.is_complete = False
        self._alive.clear()

    def _parts(self, out: Any) -> Any:
        """What a call returned that is no tensor; each of several has a place of its own."""
        if isinstance(out, Tensor):
            if self._made(out):
                self.entries.append(PART)
            return Tensor
        if isinstance(out, (list, tuple)):
            return tuple(self._parts(p) for p in out)
        return _ITERATOR if type(out) is _ITERATOR else self._other(out)

    def give(self, tensor: Tensor, name: str) -> None:
        """Note the name of a tensor that no call of the run makes."""
        super().give(tensor, name)
        if tensor.layout is torch.strided:
            self._alive.append(tensor.untyped_storage())
        if self.beneath is not None:
            self.beneath.give(tensor, name)

    def know(self, tensor: Tensor, parameter: str) -> None:
        """Note that a tensor, made aside, is the value of a parameter."""
        super().know(tensor, parameter)
        self._alive.append(tensor.untyped_storage())
        if self.beneath is not None:
            self.beneath.know(tensor, parameter)

    def make(self, tensor: Tensor, form: Hashable) -> None:
        """Note that a tensor, made aside, holds numbers that its form tells."""
        super().make(tensor, form)
        self._alive.append(tensor.untyped_storage())
        if self.beneath is not None:
            self.beneath.make(tensor, form)

    def origin(self, tensor: Tensor, is_fresh: bool = False) -> Hashable:
        """Whence a tensor comes, and how it lies in its memory."""
        if type(tensor) not in _TENSORS:  # as the steps of a loop together: it hides what it holds
            return self._unknown()
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            return self._unknown()
        try:
            memory = tensor.untyped_storage()
        except NotImplementedError:  # one of many in a vmap
            return self._unknown()
        at = memory.data_ptr()
        known = self._origin.get(at)
        if type(known) is int:
            known -= len(self.entries) if self._end is None else self._end
        else:
            if known is None:
                known = self._origin[at] = (HELD, checksum(tensor))
                self._hold(memory)
            if self.reading is not None and known[0] not in (MADE, PARAMETER):
                self.reading.note(tensor)
        dtype = tensor.dtype
        is_given = type(known) is str
        offset = self._since_begin(tensor, at) if is_given else tensor.storage_offset()
        laid = (tensor.shape, tensor.stride(), offset, dtype, tensor.requires_grad)
        if dtype in _COUNTING and tensor.numel() == 1:
            return known, laid, int(tensor)  # torch may read it as a size, a bound or a shift
        return known, laid

    def add_sites(self, sites: Mapping[str, Mapping[str, Any]]) -> None:
        """Note all sites of the run, which is over."""
        super().add_sites(sites)
        if self.beneath is not None:
            self.beneath.add_sites(sites)
        self._alive.clear()

    def _other(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return (kind, value)
        if isinstance(value, Tensor):
            return self.origin(value)
        if isinstance(value, (list, tuple)):
            return (kind is list, *[self._other(v) for v in value])
        if isinstance(value, _NAMES):
            return value
        if kind is slice:
            return (slice, *[self._other(v) for v in (value.start, value.stop, value.step)])
        if kind is np.ndarray and value.dtype != object:
            return (value.dtype, value.shape, zlib.crc32(value.tobytes()))
        if isinstance(value, np.generic):
            return (kind, value.item())
        if isinstance(
            value,
            (torch.distributions.Distribution, torch.distributions.Transform, torch.Generator),
        ):
            return super()._other(value)
        return self._unknown()

    def _unknown(self) -> Any:
        """What stands for something of which nothing is known: equal to nothing."""
        self.is_complete = False
        return object()


def _is_of_torch(function: Any) -> bool:
    """Whether a function does what it does by its arguments alone, as far as its kind tells."""
    if isinstance(function, _OF_TORCH):
        return True
    return isinstance(function, FunctionType) and function.__module__.partition(".")[0] == "torch"


class _Calls(TorchFunctionMode):
    """Every call of one of torch's functions inside goes through a log."""

    def __init__(self, log: CallLog) -> None:
        super().__init__()
        self.log = log

    def __enter__(self) -> _Calls:
        begin_constructing(self.log.constructed)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        end_constructing(self.log.constructed)
        self.log.over()  # each would keep the other alive

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if type(func) is MethodWrapperType and func.__name__ == "__get__":
            if func.__self__ in _HANDING:
                self.log.is_complete = False
            return func(*args)  # an attribute: the form of a tensor, or the tensor seen otherwise
        if func in _OF_THE_FORM or self.log.is_aside:
            return func(*args, **(kwargs or {}))
        return self.log.call(func, args, kwargs or {})


class _CallsBesideDynamo(_Calls):
    """The same where ``torch.compile`` is in use, which must not compile the noting itself."""

    __torch_function__ = torch._disable_dynamo(_Calls.__torch_function__)


class _Aside:
    """A block that does nothing of the model's whose calls a log notes."""

    def __init__(self, log: CallLog) -> None:
        self.log = log
        self._beneath = None if log.beneath is None else Unwatched(log.beneath)
        self._mode: _Calls | None = None

    def __enter__(self) -> None:
        log, depth = self.log, torch._C._len_torch_function_stack()
        if depth and torch._C._get_function_stack_at(depth - 1) is log._mode:
            self._mode = _pop_mode()
        log.is_aside = True
        if self._beneath is not None:
            self._beneath.__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self._beneath is not None:
            self._beneath.__exit__(*exception)
        self.log.is_aside = False
        mode, self._mode = self._mode, None
        if mode is not None:
            _push_mode(mode)
