"""Many independent tasks, one after the other or in processes, with the same results to the bit.

Each task uses one thread of torch: sums in several threads add up in another order, and many fits side
by side use a machine better than many threads of one. Processes are forked, so that models that were
written in a notebook or a script are there as they are.
"""

from __future__ import annotations

import multiprocessing
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from pyro_em.arguments import whole
from pyro_em.errors import UsageError, message

T = TypeVar("T")

_task: Callable[[int], Any] | None = None  # what forked processes find


def run_all(
    task: Callable[[int], T],
    count: int,
    processes: int | None,
    progress: bool | None,
    what: str,
    where: str,
) -> list[T]:
    """The values of a task for 0, …, count − 1, in order.

    Args:
        task: It handles its own errors; its value pickles.
        count: How many.
        processes: How many processes; None for this one alone.
        progress: Whether to show a bar; by default where the output is a terminal.
        what: What a task is, in one word, for the bar.
        where: The public function, for messages.

    Raises:
        UsageError: If processes cannot be forked here.
    """
    disable = None if progress is None else not progress
    with tqdm(total=count, disable=disable, desc=where, unit=what) as bar, one_thread():
        if processes is None:
            done = []
            for i in range(count):
                done.append(_portable(task(i)))
                bar.update()
            return done
        return _forked(task, count, whole(where, "processes", processes), bar, where)


def _forked(task: Callable[[int], T], count: int, processes: int, bar: tqdm, where: str) -> list[T]:
    global _task
    _refuse_fork(where)
    found: dict[int, T] = {}
    before, _task = _task, task
    pool = ProcessPoolExecutor(
        min(processes, max(count, 1)), mp_context=multiprocessing.get_context("fork")
    )
    try:
        with warnings.catch_warnings():
            # Python warns of forks beside threads: those of torch, which the tasks do not use.
            warnings.simplefilter("ignore", DeprecationWarning)
            places = {pool.submit(_called, i): i for i in range(count)}
        for done in as_completed(places):
            found[places[done]] = pickle.loads(done.result())
            bar.update()
    finally:
        _task = before
        pool.shutdown(cancel_futures=True)
    return [found[i] for i in range(count)]


def _called(i: int) -> bytes:
    """The value of a task in a forked process; as bytes, which need no shared memory."""
    assert _task is not None
    torch.set_num_threads(1)
    return pickle.dumps(_task(i), protocol=pickle.HIGHEST_PROTOCOL)


def _portable(value: T) -> T:
    """The value as it would come from another process: without links to the model's run."""
    content = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    return pickle.loads(content)  # type: ignore[no-any-return]


def _refuse_fork(where: str) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        why = "processes are forked, so that models need not be pickled; this system has no fork"
    elif torch.cuda.is_initialized():
        why = "processes are forked, and an accelerator that is in use does not survive that"
    else:
        return
    raise UsageError(message(where, "it cannot use processes here.", why, ["leave out processes="]))


@contextmanager
def one_thread() -> Iterator[None]:
    """A block in which torch uses one thread."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
