"""Tasks in processes: in order, with the same bits whatever the threads, and errors passed on."""

from __future__ import annotations

import pytest
import torch

from pyro_em import UsageError
from pyro_em.resampling.tasks import run_all

NUMBERS = torch.linspace(0, 99, 400_000)  # so many that two threads would share the sum


def task(i: int) -> float:
    return float((NUMBERS + i).sin().sum())


def test_same_bits_here_and_in_processes() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        task(0)  # two threads have been at work: a process that used them would wait for ever
        here = run_all(task, 3, None, False, "sum", "test")
        beside = run_all(task, 3, 2, False, "sum", "test")
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert here == beside == [task(0), task(1), task(2)]
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(UsageError, match="processes=0 is no number"):
        run_all(task, 3, 0, False, "sum", "test")
