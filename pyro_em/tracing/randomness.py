"""Random states: kept, restored and seeded around the runs of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.util import get_rng_state, set_rng_state


@contextmanager
def same_random_state(active: bool = True) -> Iterator[None]:
    """Restore the random state after a block."""
    if not active:
        yield
        return
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Another random state inside a block; the present one where ``seed`` is None."""
    if seed is None:
        yield
        return
    with same_random_state():
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
