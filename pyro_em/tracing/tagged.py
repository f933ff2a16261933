"""Distributions of tagged tensors, made of the tensors alone where it is known what becomes of tags.

What a constructor of Pyro does to its arguments depends on their kinds and shapes. The first of a form
is made of tagged tensors, and every operation in it is looked at. Where none of them mixed elements,
read a number or dropped a tag, the others of the form are made of plain tensors: what they hold is then
given all tags.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyro_em.tracing.constructed import begin_constructing, end_constructing, is_left_to
from pyro_em.tracing.mixing import Mixing
from pyro_em.tracing.provenance import Tagged, looking_at

_HELD = (Tensor, torch.Size, bool, int, float, type(None))


class TaggedDistributions:
    """Makes the distributions of a run with tagged values.

    Args:
        mixing: Notes what operations do to tagged tensors.
    """

    def __init__(self, mixing: Mixing) -> None:
        self.mixing = mixing
        self._plain: dict[Hashable, bool] = {}  # per form, whether its tags are known to go through
        self._is_watched = False

    @contextmanager
    def made_here(self) -> Iterator[None]:
        """A block whose distributions are made by it."""
        begin_constructing(self.construct)
        try:
            with looking_at(self.mixing):
                yield
        finally:
            end_constructing(self.construct)

    def construct(self, cls: type, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """A distribution; None where Pyro makes it."""
        given = [*args, *kwargs.values()]
        tags = frozenset().union(*[a._provenance for a in given if type(a) is Tagged])
        # Whether elements of plates are mixed depends on whose they are.
        if not tags or self._is_watched or self.mixing.plates:
            return None
        if not is_left_to(self.construct, cls, args, kwargs):
            return None
        form = cls, tuple(kwargs), *map(_form_of, given)
        if form not in self._plain:
            return self._first(form, cls, args, kwargs, tags)
        if not self._plain[form]:
            return None
        own = {k: _plain(v) for k, v in kwargs.items()}
        made = type.__call__(cls, *map(_plain, args), **own)
        known: dict[int, Tensor] = {}  # a distribution may hold one tensor under two names
        for name, value in vars(made).items():
            if isinstance(value, Tensor):
                if id(value) not in known:
                    known[id(value)] = Tagged(value, tags)
                vars(made)[name] = known[id(value)]
        return made

    def _first(
        self,
        form: Hashable,
        cls: type,
        args: tuple,
        kwargs: Mapping[str, Any],
        tags: frozenset[str],
    ) -> Any:
        """The first distribution of a form, made of what it is given."""
        seen, self._is_watched = Mixing({}), True
        try:
            with looking_at(seen):
                made = type.__call__(cls, *args, **kwargs)
        finally:
            self._is_watched = False
        self.mixing.read |= seen.read
        self.mixing.joined |= seen.joined
        self._plain[form] = not (seen.read or seen.joined) and all(
            isinstance(v, _HELD) and (not isinstance(v, Tensor) or _carries(v, tags))
            for v in vars(made).values()
        )
        return made


def _carries(value: Tensor, tags: frozenset[str]) -> bool:
    return isinstance(value, Tagged) and value._provenance == tags


def _plain(value: Any) -> Any:
    return value._t if type(value) is Tagged else value


def _form_of(value: Any) -> Hashable:
    """What of an argument decides which operations a constructor does with it."""
    if not isinstance(value, Tensor):
        return type(value), value
    own = _plain(value)
    return type(value), own.shape, own.stride(), own.dtype, own.requires_grad
