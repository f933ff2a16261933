"""Memory of parameters: they are written in place, so nobody else may hold it.

Pyro makes the very tensor that a model passes to ``pyro.param`` its parameter where the constraint
needs no transform; an ``nn.Parameter(x[:2])`` is a view of the data. Both would let a fit overwrite
what the user holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor

# Parameters, by identity, with the address of the memory that was made for them here.
_homes: dict[int, tuple[ReferenceType[Tensor], int]] = {}


def _is_at_home(p: Tensor) -> bool:
    """Whether a parameter is where memory was made for it here."""
    home = _homes.get(id(p))
    if home is None:
        return False
    same = home[0]()  # another tensor may have had this identity
    return same is not None and same is p and home[1] == same.data_ptr()


def _note_home(p: Tensor) -> None:
    own = id(p)
    _homes[own] = ref(p, lambda gone: _forget_home(own, gone)), p.data_ptr()


def _forget_home(own: int, gone: ReferenceType[Tensor]) -> None:
    if own in _homes and _homes[own][0] is gone:
        del _homes[own]


def own_start(initial: Any) -> Any:
    """An initial value, or a function that makes one, whose memory is nobody else's.

    An ``nn.Parameter`` stays itself: a module reads it, and optimisers hold it.

    Example:
        >>> x = torch.zeros(3)
        >>> own_start(x[:2]).add_(1.0), x
        (tensor([1., 1.]), tensor([0., 0., 0.]))
    """
    if isinstance(initial, torch.nn.Parameter):
        return initial
    if isinstance(initial, Tensor):
        return initial.detach().clone()
    return _Lazily(initial) if callable(initial) else initial


class _Lazily:
    """A function that makes an initial value, which then gets memory of its own."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make

    def __call__(self) -> Tensor:
        return own_start(self.make())


def settle(parameters: Iterable[Tensor]) -> None:
    """Give parameters memory of their own; the tensors stay the same objects.

    Each is moved once, and again if somebody gives it other memory. Parameters that share out one
    piece of memory among them (the weights of a recurrent network on a GPU) move together and keep
    their places.

    Example:
        >>> x = torch.zeros(3)
        >>> p = torch.nn.Parameter(x[:2])
        >>> settle([p])
        >>> _ = p.data.add_(1.0)
        >>> x
        tensor([0., 0., 0.])
    """
    by_memory: dict[int, dict[int, Tensor]] = {}
    for p in parameters:
        if not _is_at_home(p) and _is_plain(p):
            by_memory.setdefault(p.untyped_storage().data_ptr(), {})[id(p)] = p
    for held in by_memory.values():
        together = list(held.values())
        if len(together) > 1 and _share_out(together):
            _move_together(together)
        else:
            for p in together:
                p.data = p.detach().clone()
        for p in together:
            _note_home(p)


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor has numbers in memory that can be exchanged for other memory."""
    return t.layout is torch.strided and not t.is_meta and not t.is_inference() and t.numel() > 0


def _share_out(parameters: list[Tensor]) -> bool:
    """Whether contiguous tensors of one dtype fill a storage without gaps and do not overlap."""
    if len({p.dtype for p in parameters}) > 1 or not all(p.is_contiguous() for p in parameters):
        return False
    at = 0
    for p in sorted(parameters, key=lambda p: p.storage_offset()):
        if p.storage_offset() != at:
            return False
        at += p.numel()
    return at * parameters[0].element_size() == parameters[0].untyped_storage().nbytes()


def _move_together(parameters: list[Tensor]) -> None:
    """Move tensors that share out one storage into one other."""
    size = sum(p.numel() for p in parameters)
    whole = parameters[0].detach().as_strided((size,), (1,), 0).clone()
    for p in parameters:
        p.data = whole.as_strided(p.shape, p.stride(), p.storage_offset())
