"""What a reading of a model depends on beside its parameters, and whether it has changed since.

One list per reading, in two parts. *Memory*: tensors and arrays among the arguments, the closure,
the globals and the attributes of a model, and every tensor that its operations read and do not make:
observed values, masks, scales, exposures, covariates, buffers, wherever the model has them from. It is
known by the count of in-place writes that torch keeps, and by a checksum of its content, which also
shows what numpy or ``.data`` wrote. *Names*: those of the closure, the globals and the attributes,
and the entries of arguments, which may come to stand for something else.

What the model itself changes while it runs (statistics of a batch normalisation, a counter) is on
neither list.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.errors import message
from pyro_em.portable import StaysHere
from pyro_em.tracing.names import NUMBERS, Trail, names_of, tensors_within

_WHOLE = 2**24  # bytes of one tensor that are all in its checksum


_SMALL = 2**12  # bytes of a tensor whose checksum costs next to nothing


_BLOCK = 2**16  # bytes of the blocks, spread over a larger one, that are in its checksum


_MANY_VIEWS = 32  # of one piece of memory that are kept each by itself


_COMMON = (torch.float64, torch.float32, torch.int64, torch.int32, torch.bool)


@dataclass(eq=False)
class Memory:
    """A piece of memory that was read: a tensor, its count of writes, a checksum."""

    tensor: Tensor
    version: int
    content: Hashable = None
    _seen: tuple[int, torch.Size, Any] | None = None  # where it lay, and the same as bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Memory:
        """What a tensor holds now."""
        return cls(tensor, _version(tensor), checksum(tensor))

    def is_changed(self) -> bool:
        """Whether it was written, counted or not."""
        tensor = self.tensor
        if _version(tensor) != self.version:
            return True
        seen = self._seen
        if seen is not None and seen[0] == tensor.data_ptr() and seen[1] == tensor.shape:
            return zlib.crc32(seen[2]) != self.content  # as `checksum` has found it before
        if checksum(tensor) != self.content:
            return True
        if _is_whole(tensor):
            self._seen = tensor.data_ptr(), tensor.shape, tensor.detach().numpy()
        return False

    def is_seen_to_change(self) -> bool:
        """The same, where it costs next to nothing: in the midst of runs."""
        # A batch normalisation writes its statistics uncounted.
        small = self.tensor.numel() * self.tensor.element_size() <= _SMALL
        return self.is_changed() if small else _version(self.tensor) != self.version


@dataclass(eq=False)
class Dependences(StaysHere):
    """What one reading of a model depends on; see the module's text.

    Attributes:
        memory: What was read.
        look: Gives what the model's names stand for.
        names: What they stood for.
        trail: Where they were found.
        names_held: Whether a block of runs is under way before and after which they are compared.
    """

    memory: list[Memory] = field(default_factory=list)
    look: Callable[[], dict[str, Any]] = dict
    names: dict[str, Any] = field(default_factory=dict)
    trail: Trail = field(default_factory=lambda: Trail())
    names_held: bool = False

    def is_written(self) -> bool:
        """Whether the content of anything that was read is another by now."""
        return any(m.is_changed() for m in self.memory)

    def is_changed(self) -> bool:
        """Whether anything was written, or a name stands for something else."""
        return self.is_written() or bool(self._renamed())

    def _renamed(self) -> list[str]:
        if self.trail.is_unchanged():
            return []
        now = self.look()
        return [n for n, v in self.names.items() if n not in now or not _is_same(v, now[n])]

    @contextmanager
    def own_run(self) -> Iterator[None]:
        """A block in which the model is run here: what the model changes in it is its own."""
        with self.own_names():
            written = {id(m) for m in self.memory if m.is_seen_to_change()}
            try:
                yield
            finally:
                kept = [m for m in self.memory if id(m) in written or not m.is_seen_to_change()]
                if len(kept) < len(self.memory):
                    self.memory = kept

    @contextmanager
    def own_names(self) -> Iterator[None]:
        """A block of runs between which only this library does anything: names are compared once."""
        if self.names_held:
            yield
            return
        renamed = set(self._renamed())
        self.names_held = True
        try:
            yield
        finally:
            self.names_held = False
            for name in set(self._renamed()) - renamed:
                del self.names[name]


class Reading:
    """Notes what a run reads that was there before it; an `OperationLog` tells it.

    Args:
        model: What is run.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        names: What its names stand for now, where that has just been looked up.
    """

    def __init__(
        self,
        model: Any,
        args: tuple,
        kwargs: Mapping[str, Any],
        names: Mapping[str, Any] | None = None,
    ) -> None:
        self.read: dict[int, list[Memory]] = {}
        self._seen: set[Hashable] = set()
        self._look = functools.partial(names_of, model, args, kwargs)
        self._names = self._look() if names is None else names
        for tensor in tensors_within([args, kwargs, *self._names.values()]):
            self.note(tensor)

    def note(self, tensor: Tensor) -> None:
        """A tensor was read."""
        if not _is_plain(tensor):
            return
        where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if where in self._seen:
            return
        self._seen.add(where)
        at = tensor.untyped_storage().data_ptr()
        known = self.read.setdefault(at, [])
        if any(_covers(m.tensor, tensor) for m in known):
            return
        if len(known) >= _MANY_VIEWS and tensor._base is not None and tensor._base.numel():
            tensor = tensor._base  # which covers all the views of it that are still to come
        known.append(Memory.of(tensor))

    def finished(self, parameters: Iterable[Tensor]) -> Dependences:
        """What the run depends on, its parameters excepted."""
        own = {p.untyped_storage().data_ptr() for p in parameters if _is_plain(p)}
        memory = [m for at, held in self.read.items() if at not in own for m in held]
        memory = [m for m in memory if not m.is_seen_to_change()]
        trail = Trail()
        now = self._look(trail=trail)
        names = {n: v for n, v in self._names.items() if n in now and _is_same(v, now[n])}
        return Dependences(memory, self._look, names, trail)


def changed_since(what: str) -> str:
    """Why something that belongs to the data of a fit cannot be computed any more."""
    return message(
        what,
        "the data, or something else that the model reads (a mask, weights, exposures), were "
        "changed in place after the fit.",
        "it is computed when it is first read, and would be that of other data",
        [
            f"read {what} before changing them",
            "fit a copy: em.fit(x.clone())",
            "fit again, or call em.posterior(data) for the data as they are now",
        ],
    )


def checksum(tensor: Tensor) -> Hashable:
    """A checksum of a tensor's content; of one that is very large, of blocks spread over it.

    Example:
        >>> x = torch.arange(4.0)
        >>> before = checksum(x)
        >>> x.numpy()[2] = 7.0
        >>> checksum(x) == before
        False
        >>> checksum(torch.tensor(2.0).expand(3)) == checksum(torch.tensor([2.0]))
        True
    """
    if not _is_plain(tensor):
        return None
    t = tensor.detach()
    if _is_whole(t):
        return zlib.crc32(t.numpy())
    for dim in range(t.dim()):
        if t.stride(dim) == 0 and t.shape[dim] > 1:
            t = t.narrow(dim, 0, 1)
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    if t.device.type != "cpu":
        return _sums(t)
    content = memoryview(flat_bytes(t.resolve_neg()).numpy())
    if len(content) <= _WHOLE:
        return zlib.crc32(content)
    found = 0
    blocks = _WHOLE // _BLOCK
    for i in range(blocks):
        begin = i * (len(content) - _BLOCK) // (blocks - 1)
        found = zlib.crc32(content[begin : begin + _BLOCK], found)
    return found


def _is_whole(t: Tensor) -> bool:
    """Whether all of a tensor is in its checksum, and lies there as it is."""
    is_common = t.dtype in _COMMON and t.device.type == "cpu" and not t.is_neg()
    return is_common and t.is_contiguous() and t.numel() * t.element_size() <= _WHOLE


def flat_bytes(t: Tensor) -> Tensor:
    """The memory of a tensor, or of its contiguous copy, byte by byte.

    Example:
        >>> flat_bytes(torch.ones(1, 2, dtype=torch.float64)[:, 0]).shape
        torch.Size([8])
    """
    # One element counts as contiguous whatever its stride says, and is then no view as bytes.
    return t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8)


def _sums(t: Tensor) -> Hashable:
    """A checksum that is computed where the tensor is: sums along its longest dimension."""
    flat = flat_bytes(t)
    weights = torch.arange(1, 252, 2, device=t.device)
    full = flat[: flat.numel() // 126 * 126].reshape(-1, 126)
    rows, columns = full.sum(1), full.sum(0)
    order = torch.arange(1, 2 * rows.numel() + 1, 2, device=t.device)
    rest = flat[full.numel() :].to(torch.int64)
    return tuple(torch.stack([(rows * order).sum(), (columns * weights).sum()]).tolist()), tuple(
        rest.tolist()
    )


def contents_of(value: Any) -> tuple[Hashable, ...]:
    """Shapes and checksums of the data in a value and in the containers in it; numbers are none."""
    return tuple((tuple(t.shape), checksum(t)) for t in tensors_within([value]) if t.dim())


def _is_plain(t: Tensor) -> bool:
    return t.layout is torch.strided and not t.is_meta and not t.is_quantized and t.numel() > 0


def _version(t: Tensor) -> int:
    # Tensors made in inference mode have no count.
    return 0 if t.is_inference() else t._version


def _covers(a: Tensor, b: Tensor) -> bool:
    """Whether the memory of one tensor holds that of another of the same storage."""
    if a is b:
        return True
    (first, last), (begin, end) = _span(a), _span(b)
    is_dense = last - first == a.numel() * a.element_size()
    return is_dense and first <= begin and end <= last


def _span(t: Tensor) -> tuple[int, int]:
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    begin = t.data_ptr()
    return begin, begin + (reach + 1) * t.element_size()


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, (NUMBERS, np.generic)):
        return type(a) is type(b) and (a == b or (a != a and b != b))
    return a is b
