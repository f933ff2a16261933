"""Every test starts with an empty param store, no readings, a seed, float64 and one thread."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Iterator

# One thread for every library, and for the processes that tests start: two workers with two
# threads each on two cores wait for each other. It is read at import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# Reading the tests makes millions of objects, nearly all of which stay: nothing to look for.
gc.disable()

# The libraries are imported where they are used: of the processes of pytest-xdist, the one that
# hands out tests does without, and the others wait for it.


def pytest_configure(config: pytest.Config) -> None:
    """Load Hypothesis and its settings, where tests are run and not only handed out.

    A process that was started in the background ignores interrupts, and tests raise some.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        from hypothesis import settings

        settings.register_profile("suite", deadline=None, derandomize=True, print_blob=True)
        settings.load_profile("suite")


def seed(value: int) -> None:
    """As pyro.set_rng_seed, without a seed that is queued, with its stack, for unused devices."""
    import numpy as np
    import torch

    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    random.seed(value)
    np.random.seed(value)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    import pyro
    import torch

    from pyro_em.plan.kept import forget_readings

    pyro.clear_param_store()
    forget_readings()  # no test begins with what another one has found out
    seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
    pyro.clear_param_store()


def pytest_collection_finish() -> None:
    """Look for garbage more rarely than usual, and never among what was imported."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()
