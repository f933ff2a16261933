"""Reading ahead: the next item is made in a background thread while the present one is used."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_END: Any = object()


def one_ahead(make: Callable[[], Iterator[T]]) -> Iterator[T]:
    """The items of an iterator that lives in one background thread, which is one item ahead.

    Nothing runs beside the caller before it has the first item, so that random numbers which are
    drawn where a pass begins are drawn in one order. What the iterator raises is raised where its
    item is asked for. The thread ends with the pass, also where that is given up early.

    Args:
        make: Makes the iterator, in the thread.

    Example:
        >>> list(one_ahead(lambda: iter([1, 2, 3])))
        [1, 2, 3]
    """
    # An executor's threads end with the process, whatever they wait for.
    pool = ThreadPoolExecutor(1, thread_name_prefix="pyro_em-chunks")
    items: Iterator[T] | None = None
    try:
        _alone_in_its_thread(pool)
        items = pool.submit(make).result()
        coming: Future[T] = pool.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, items, _END)
            yield item
            del item  # the thread has begun another: two are in memory
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            with contextlib.suppress(RuntimeError):  # the process is about to end
                pool.submit(close)
        is_own = threading.current_thread().name.startswith("pyro_em-chunks")
        pool.shutdown(wait=not is_own)  # garbage may be collected in the thread itself


def _alone_in_its_thread(pool: ThreadPoolExecutor) -> None:
    """Let what runs in a pool's thread start no threads of its own, which would wait for processors."""
    threads = torch.get_num_threads()
    if threads > 1:
        pool.submit(torch.get_num_threads).result()  # which sets it when a thread first asks
        pool.submit(torch.set_num_threads, 1).result()
        torch.set_num_threads(threads)  # of this thread, and of all that begin later
