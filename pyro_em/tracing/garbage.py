"""Python's collector of garbage while a model is read: nearly all that is made is kept."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fewer_collections() -> Iterator[None]:
    """Let Python look for garbage more rarely: reading a long chain keeps nearly all it makes."""
    before = gc.get_threshold()
    if before[0]:
        gc.set_threshold(max(before[0], 150_000), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
