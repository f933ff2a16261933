"""Where a stochastic fit stands in its data: the order of an epoch, and how far it has come in it.

An order is known by what it is drawn from: the random states where the epoch began. To go on in the
midst of one, it is drawn again, and what has been used of it is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler

from pyro_em.sources.source import Source
from pyro_em.tracing.encoding import decoded, encoded
from pyro_em.tracing.randomness import random_state, set_random_state
from pyro_em.variational.batches import Batch, Batches, ChunkLoader


@dataclass(eq=False)
class Place:
    """See the module's text.

    Attributes:
        batches: The data.
        remembers: Whether somebody wants to know where it stands.
        done: Batches of the present epoch that have been taken.
        begin: The random states where that epoch began, and the states of the generators of its order;
            None between epochs.
        pass_over: Called with the last batch that another process took of the present epoch.
    """

    batches: Batches
    remembers: bool = False
    done: int = 0
    begin: tuple[Any, list[Tensor]] | None = None
    pass_over: Callable[[Batch], None] | None = None

    def epoch(self) -> Iterator[Batch]:
        """The batches of an epoch, or the rest of the one that another process left."""
        if self.begin is not None:
            rest = self._rest(*self.begin)
        else:
            if self.remembers:
                self.begin = random_state(), [g.get_state() for g in generators(self.batches)]
            rest = self.batches.epoch()
        for batch in rest:
            self.done += 1
            yield batch

    def _rest(self, random: Any, states: list[Tensor]) -> Iterator[Batch]:
        now = random_state()
        set_random_state(random)
        for generator, state in zip(generators(self.batches), states, strict=True):
            generator.set_state(state)
        batches = self.batches.epoch()
        last: Batch | None = None
        for _ in range(self.done):
            last = next(batches)
        set_random_state(now)
        if last is not None and self.pass_over is not None:
            self.pass_over(last)
        return batches

    def end(self) -> None:
        """The epoch is over."""
        self.done, self.begin = 0, None

    def state(self) -> dict[str, Any]:
        """Where it stands, as plain values."""
        now = [g.get_state() for g in generators(self.batches)]
        return {"done": self.done, "begin": encoded(self.begin), "now": now}

    def go_to(self, state: Mapping[str, Any]) -> None:
        """Stand where another process stood."""
        self.done, self.begin = state["done"], decoded(state["begin"])
        for generator, now in zip(generators(self.batches), state["now"], strict=True):
            generator.set_state(now)


def generators(batches: Batches) -> list[torch.Generator]:
    """The generators that the order of batches is drawn from, beside the global random state."""
    loader = batches.loader
    if isinstance(loader, ChunkLoader):
        return generators_of(loader.source)
    return _generators([batches.generator], loader)


def generators_of(source: Source) -> list[torch.Generator]:
    """The same of chunks that a loader gives."""
    return _generators([], getattr(source, "items", None))


@contextmanager
def same_order(source: Source | None) -> Iterator[None]:
    """A block that may read a source whose order is drawn; the passes after it are as without it."""
    if source is None or source.is_ordered:
        yield
        return
    drawn, states = random_state(), [(g, g.get_state()) for g in generators_of(source)]
    try:
        yield
    finally:
        set_random_state(drawn)
        for generator, state in states:
            generator.set_state(state)


def order_is_drawn(source: Source) -> bool:
    """Whether chunks are those of a loader that is known to shuffle."""
    return isinstance(getattr(getattr(source, "items", None), "sampler", None), RandomSampler)


def _generators(held: list[Any], loader: Any) -> list[torch.Generator]:
    if loader is not None:
        order = getattr(loader, "batch_sampler", None)
        owners = (loader, getattr(loader, "sampler", None), order, getattr(order, "sampler", None))
        held = held + [getattr(owner, "generator", None) for owner in owners]
    found: list[torch.Generator] = []
    for one in held:
        if isinstance(one, torch.Generator) and all(one is not other for other in found):
            found.append(one)
    return found
