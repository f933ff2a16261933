"""The operations of a run, written down: two runs that did the same compute the same function.

Each operation is noted with its arguments. A tensor is known by where it comes from: the operation
that made it, the parameter or the argument that it is, or its content where nobody knows whence it
comes. Numbers that leave torch (``.item()``, a condition) are noted too, since Python may do anything
with them. Runs with equal notes differ in nothing but the numbers in parameters and arguments, so
that what was found out about one of them (which sites read which, what is coupled, how parameters
reach a density) holds for the other.

The only file that uses torch's dispatch modes: what watches operations is here, whether it notes them
or not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from pyro_em.tracing.dependences import Reading, checksum

Operation = Callable[..., Any]

_FRESH = torch.ops.aten.lift_fresh.default

_STRIDED = torch.strided

_OF_TRANSFORMS = ("_inv", "_cached_x_y")  # what a transform remembers of its use

PART = ("one of several that an operation returned",)  # each has a place of its own

MADE, HELD, PARAMETER = "made of numbers", "held by the model", "value of a parameter"

_OPTIONS = (torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))

_NUMBERS = (bool, int, float, str)

_PLAIN = frozenset({bool, int, float, str, torch.Size, type(None)})  # whose content is all they are

_NOTED = (Tensor, int, float, str, tuple, list, type(None))  # of what a distribution holds

_NEAR = 256  # operations: whence a tensor comes is counted back from here, so that steps are alike


class OutputTooLarge(Exception):
    """An operation inside a model made a tensor above the limit; holds its size in cells."""

    def __init__(self, cells: int) -> None:
        super().__init__(f"{cells} cells")
        self.cells = cells


class _Watching(TorchDispatchMode):
    """Every operation inside goes through ``handle(operation, args, kwargs)``."""

    def __init__(self, handle: Callable[[Operation, tuple, dict[str, Any]], Any]) -> None:
        super().__init__()
        self.handle = handle

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True imports torch._dynamo at the first operation: a second or two, and 70 MB.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.handle(func, args, kwargs or {})


class _WatchingBesideDynamo(_Watching):
    """The same where ``torch.compile`` is in use, which must not compile the watching itself."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.handle(func, args, kwargs or {})


def watching(by: Callable[[Operation, tuple, dict[str, Any]], Any]) -> TorchDispatchMode:
    """A block whose operations are run by ``by``, given each and its arguments."""
    cls = _WatchingBesideDynamo if "torch._dynamo" in sys.modules else _Watching
    return cls(by)


def size_guard(limit: int) -> TorchDispatchMode:
    """A block in which an operation whose output exceeds ``limit`` cells raises `OutputTooLarge`."""
    return watching(lambda func, args, kwargs: within(limit, func(*args, **kwargs)))


def within(limit: int, out: Any) -> Any:
    """The output of an operation.

    Raises:
        OutputTooLarge: If it is a tensor that holds more than ``limit`` cells.
    """
    if isinstance(out, Tensor) and out.numel() > limit:
        # An expanded view has many elements and little memory: count what is stored.
        stored = out.untyped_storage().nbytes() // out.element_size()
        if stored > limit:
            raise OutputTooLarge(stored)
    return out


_views: dict[int, tuple[Any, bool]] = {}  # by identity: an operation's hash is slow


def is_view(operation: Any) -> bool:
    """Whether an operation's outputs share an input's memory, or are that input."""
    known = _views.get(id(operation))
    if known is None or known[0] is not operation:
        known = operation, any(r.alias_info is not None for r in operation._schema.returns)
        _views[id(operation)] = known
    return known[1]


def _storage(tensor: Tensor) -> int:
    """The address at which the memory of a tensor begins; of one without such memory none."""
    if tensor.layout is not _STRIDED:
        return 0
    offset = tensor.storage_offset()
    return tensor.data_ptr() - (offset * tensor.element_size() if offset else 0)


class OperationLog:
    """Notes the operations of one run.

    Args:
        given: Tensors that exist before the run, and their names.
        reading: Notes what the run reads that was there before it.

    Attributes:
        entries: One for each operation, and one for each site.
        sites: The sites.
        forms: Of the sites, where these were laid out; None for those that are unlike all others.
        is_aside: Whether operations are none of the model's for now.
    """

    def __init__(
        self,
        given: Iterable[tuple[str, Tensor]],
        reading: Reading | None = None,
    ) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self.sites: dict[str, Mapping[str, Any]] = {}
        self.forms: Mapping[str, Hashable | None] = {}
        self.reading = reading
        self._origin: dict[int, Any] = {}
        self._begins: dict[int, int] = {}  # where what is given begins in its memory, in bytes
        self._end: int | None = None
        self._distinct: dict[Any, Any] = {}
        self.is_aside = False
        for name, tensor in reversed(list(given)):
            self.give(tensor, name)

    def __call__(self, operation: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Run an operation and note it."""
        if self.is_aside:
            return operation(*args, **kwargs)
        is_fresh = operation is _FRESH  # torch.tensor(numbers): memory that nobody has noted
        noted: list[Any] = [getattr(operation, "_name", operation)]  # the hash of a name is kept
        for a in args:
            noted.append(self.origin(a, is_fresh) if isinstance(a, Tensor) else self._other(a))
        if kwargs:
            noted += [(k, self._other(v)) for k, v in kwargs.items()]
        out = operation(*args, **kwargs)
        entries = self.entries
        if isinstance(out, Tensor):
            if not is_view(operation):
                self._origin[_storage(out)] = len(entries)
        elif isinstance(out, (list, tuple)):
            for part in out:
                if isinstance(part, Tensor) and not is_view(operation):
                    self._origin[_storage(part)] = len(entries)
                    entries.append(PART)
        else:
            noted.append(self._other(out))
        note = tuple(noted)
        entries.append(note if len(entries) < _NEAR else self._shared(note))
        return out

    def noting(self, limit: int) -> AbstractContextManager[Any]:
        """A block whose operations are noted; an output of more cells than the limit is refused.

        Raises:
            OutputTooLarge: From the midst of the block.
        """
        return watching(lambda func, args, kwargs: within(limit, self(func, args, kwargs)))

    def aside(self) -> AbstractContextManager[None]:
        """A block that does nothing of the model's."""
        return Unwatched(self)

    def give(self, tensor: Tensor, name: str) -> None:
        """Note the name of a tensor that no operation of the run makes."""
        if tensor.layout is torch.strided and not tensor.is_meta:
            at = tensor.untyped_storage().data_ptr()
            self._origin[at] = name
            self._begins[at] = tensor.storage_offset() * tensor.element_size()

    def know(self, tensor: Tensor, parameter: str) -> None:
        """Note that a tensor, made aside, is the value of a parameter."""
        self._origin[_storage(tensor)] = (PARAMETER, parameter)

    def make(self, tensor: Tensor, form: Hashable) -> None:
        """Note that a tensor, made aside, holds numbers that its form tells."""
        self._origin[_storage(tensor)] = (MADE, form)

    def _shared(self, note: tuple[Any, ...]) -> tuple[Any, ...]:
        """A note, or the earlier one that it equals: the steps of a long run are alike.

        Of a short run nothing is compared, which would take longer than to write it down.
        """
        return note if len(self.entries) < _NEAR else self._distinct.setdefault(note, note)

    def origin(self, tensor: Tensor, is_fresh: bool = False) -> Hashable:
        """Whence a tensor comes, and how it lies in its memory."""
        if tensor.layout is not _STRIDED or tensor.is_meta or tensor.is_quantized:
            return object()  # equal to nothing
        offset, at = tensor.storage_offset(), tensor.data_ptr()
        if offset:
            at -= offset * tensor.element_size()
        known = self._origin.get(at)
        if isinstance(known, str):
            offset = self._since_begin(tensor, at)
        if isinstance(known, int) and not is_fresh:
            back = (len(self.entries) if self._end is None else self._end) - known
            known = -back if 0 < back < _NEAR else known
        elif is_fresh and not isinstance(known, str):
            # Such memory is soon given back and used again: what was known of it says nothing.
            known = self._origin[at] = (MADE, checksum(tensor))
        else:
            if known is None:
                known = self._origin[at] = (HELD, checksum(tensor))
            if self.reading is not None and known[0] not in (MADE, PARAMETER):
                self.reading.note(tensor)
        shape, stride, dtype = tensor.shape, tensor.stride(), tensor.dtype
        return self._shared((known, offset, shape, stride, dtype, tensor.requires_grad))

    def _since_begin(self, tensor: Tensor, at: int) -> float:
        """How many numbers of a tensor fit between its beginning and that of what was given there.

        Data that are some rows of a larger tensor are like any others, wherever they are in it.
        """
        return tensor.storage_offset() - self._begins.get(at, 0) / tensor.element_size()

    def add_sites(self, sites: Mapping[str, Mapping[str, Any]]) -> None:
        """Note all sites of the run, which is over: their distributions, plates and weights, and
        whence their tensors come.
        """
        end = 0
        for name, site in sites.items():
            before, end = end, self._end_of(site, end)
            self.add_site(name, site, end, end - before)
        self._origin.clear()

    def _end_of(self, site: Mapping[str, Any], least: int) -> int:
        """The number of the operation after all those that made a site's tensors."""
        latest, waiting = least - 1, [site["value"], site["fn"]]
        while waiting:
            part = waiting.pop()
            if isinstance(part, Tensor):
                made = self._origin.get(_storage(part))
                if isinstance(made, int) and made > latest:
                    latest = made
            elif isinstance(part, torch.distributions.Distribution):
                waiting += vars(part).values()
        return latest + 1

    def add_site(
        self, name: str, site: Mapping[str, Any], end: int | None = None, steps: int = 0
    ) -> None:
        """Note one site.

        Args:
            name: Its name.
            site: As it was traced.
            end: The operation from which is counted back; by default the latest.
            steps: How many operations that is after the one for the site before.
        """
        self._end = end
        plates = tuple([(f.name, f.dim, f.size, f.counter) for f in site["cond_indep_stack"]])
        mask, scale = site["mask"], site["scale"]
        mask = None if mask is None else self._other(mask)
        scale = (float, scale) if type(scale) is float else self._other(scale)
        noted = bool(site["is_observed"]), plates, mask, scale, self._distribution(site["fn"])
        noted = self._shared(noted)
        self.entries.append((name, steps, noted, self._other(site["value"])))
        self.sites[name] = site
        self._end = None

    def _distribution(self, fn: Any) -> Any:
        """A distribution, by its class and what it holds."""
        noted: list[Any] = [type(fn)]
        for name, v in vars(fn).items():
            if type(v) in _PLAIN:
                noted.append((name, type(v), v))
            elif isinstance(v, _NOTED):
                noted.append((name, self._other(v)))
            elif isinstance(v, torch.distributions.Distribution):
                noted.append((name, self._distribution(v)))
            else:
                noted.append((name, type(v)))
        return tuple(noted)

    def finished(self) -> tuple[tuple[Any, ...], ...]:
        """The notes, as a value."""
        return tuple(self.entries)

    def _other(self, value: Any) -> Any:
        """A number, a list or an option; types are kept apart, since 1 == 1.0 == True."""
        kind = type(value)
        if kind in _NUMBERS:
            note = (kind, value)
            return note if len(self.entries) < _NEAR else self._shared(note)
        if value is None or kind is torch.Size:  # whose numbers are all whole
            return value
        if isinstance(value, Tensor):
            return self.origin(value)
        if isinstance(value, (list, tuple)):
            return tuple([self._other(v) for v in value])
        if isinstance(value, torch.Generator):
            return torch.Generator
        if isinstance(value, torch.distributions.Distribution):
            return self._distribution(value)
        if isinstance(value, torch.distributions.Transform):
            own = ((n, v) for n, v in vars(value).items() if n not in _OF_TRANSFORMS)
            return (type(value), *((n, self._other(v)) for n, v in own))
        if isinstance(value, (bool, int, float, str)):
            return (value.__class__, value)
        return value if isinstance(value, _OPTIONS) else repr(value)


class Unwatched:
    """A block whose operations are of no interest: what watches them costs more than they do.

    Blocks of others that watch too stay as they are.

    Args:
        log: What would note the operations of those blocks.
    """

    def __init__(self, log: OperationLog | None = None) -> None:
        self.log = log
        self._mode: Any = None

    def __enter__(self) -> None:
        if self.log is not None:
            self.log.is_aside = True
        depth = torch._C._len_torch_dispatch_stack()
        if depth and isinstance(torch._C._get_dispatch_stack_at(depth - 1), _Watching):
            self._mode = _pop_mode()

    def __exit__(self, *exception: Any) -> None:
        if self._mode is not None:
            _push_mode(self._mode)
            self._mode = None
        if self.log is not None:
            self.log.is_aside = False
