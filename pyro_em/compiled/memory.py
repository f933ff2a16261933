"""What a step frees is kept for the next one."""

from __future__ import annotations

from functools import cache

import torch


@cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 62 MB of freed memory, once per process.

    glibc gives the end of the heap back to the system where more is free than twice the largest
    block that was mapped and freed so far, and each page that is taken again costs a fault: between
    a sixth and a third of the time where steps make some MB of temporaries. One block just below
    the limit of 32 MiB, freed before it is touched, raises what is kept. Other C libraries take no
    notice.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)
