"""Random states: kept, restored and seeded around the runs of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from pyro.util import get_rng_state, set_rng_state


def same_random_state(active: bool = True) -> AbstractContextManager[None]:
    """Restore the random state after a block; not where it is not ``active``."""
    return _same_random_state() if active else nullcontext()


@contextmanager
def _same_random_state() -> Iterator[None]:
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)


def seeded(seed: int | None) -> AbstractContextManager[None]:
    """Another random state inside a block; the present one where ``seed`` is None."""
    return nullcontext() if seed is None else _seeded(seed)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with _same_random_state():
        seed_generators(seed)
        yield


def seed_generators(seed: int) -> None:
    """Seed the generators that `same_random_state` restores.

    `torch.manual_seed` would also queue a seed, with a formatted stack, for every device that is
    not initialised yet: a seed that outlives the block, and most of the time of a short one.

    >>> torch.manual_seed(3).initial_seed()
    3
    >>> with same_random_state():
    ...     seed_generators(5)
    ...     first = torch.rand(())
    >>> bool(first == torch.rand((), generator=torch.Generator().manual_seed(5)))
    True
    """
    torch.default_generator.manual_seed(int(seed))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(seed))


def random_state() -> tuple[Any, Any]:
    """The random states that a model may advance."""
    return get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def set_random_state(state: tuple[Any, Any]) -> None:
    """Go back to a `random_state`."""
    set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def seeds_from(seed: int | None) -> Iterator[int | None]:
    """Seeds of several calls, which all follow from one and are independent; None without one.

    Example:
        >>> seeds, again = seeds_from(0), seeds_from(0)
        >>> [next(seeds), next(seeds)] == [next(again), next(again)]
        True
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    while True:
        yield None if generator is None else int(torch.randint(2**62, (), generator=generator))
