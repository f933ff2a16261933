"""Where the steps of a loop lie in a tensor of all of them: left of plates and of events.

A tensor per step has its steps first. Beside other tensors its steps take the loop's own dimension,
and plates that one step lacks are of size one. Which of one step's dimensions are an event's is told
by the sizes of plates, where the way of reading leaves it open.
"""

from __future__ import annotations

import math

from torch import Tensor

from pyro_em.tracing.loops import EVENTS, Loop, Series


def laid_out(raw: Tensor, series: Series, loop: Loop) -> Tensor:
    """Steps where their dimension is: plates that one step lacks are of size one."""
    right = -1 - loop.dim + own_events(raw, series, loop)
    ones = (1,) * (right - raw.dim() + 1)
    return raw.reshape(raw.shape[0], *ones, *raw.shape[1:]) if ones else raw


def own_events(raw: Tensor, series: Series, loop: Loop) -> int:
    """How many of one step's dimensions belong to an event, as the sizes of plates tell."""
    right, shape = -1 - loop.dim, tuple(raw.shape[1:])
    least = max(0, len(shape) - right)
    if series.way == EVENTS:
        least = max(least, min(loop.events, len(shape)))
    if loop.events and any(n > 1 and n in loop.plates.values() for n in shape):
        series.by_numbers = True  # a plate's, or an event's
    for events in range(least, len(shape) + 1):
        batch = shape[: len(shape) - events]
        sizes = [loop.plates.get(d - len(batch), 1) for d in range(len(batch))]
        if all(n in (1, size) for n, size in zip(batch, sizes, strict=True)):
            break
    return events


def events_beside(shape: tuple[int, ...], series: Series, loop: Loop) -> int:
    """How many of the dimensions of a plain tensor that the body meets belong to an event."""
    sizes = [loop.plates.get(-1 - d, 1) for d in range(-1 - loop.dim)]
    fitting = [e for e in range(len(shape) + 1) if _fits(shape, e, sizes, loop.rest)]
    wanted = [e for e in fitting if e == loop.events] if series.way == EVENTS else []
    if loop.events and len(fitting) > 1 and math.prod(shape) > 1:
        series.by_numbers = True
    return (wanted or fitting)[0]


def _fits(shape: tuple[int, ...], events: int, plates: list[int], steps: int) -> bool:
    """Whether what is left of so many dimensions of an event may be plates, and then steps."""
    batch = shape[: len(shape) - events][::-1]
    return all(n in (1, size) for n, size in zip(batch, [*plates, steps], strict=False))
