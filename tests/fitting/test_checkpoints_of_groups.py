"""Stochastic fits that processes make together: one is killed, and all go on from one checkpoint."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
import torch.distributed as torch_dist

from pyro_em import ExactPosteriorEM
from pyro_em.errors import GroupError, UsageError
from tests.fitting.group_models import (
    are_equal,
    clicks,
    guide_of_clicks,
    numbers_of,
    shard_of,
)
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow

ROWS = [7, 5]


def ends_at(step: int) -> Any:
    """A callback that kills the last rank, and none where there is no step."""

    def watch(found: Any) -> None:
        if found.index == step and torch_dist.get_rank() == len(ROWS) - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return watch


def options(path: Path | None, death: int) -> dict[str, Any]:
    given: dict[str, Any] = {"checkpoint": path, "checkpoint_every": 2} if path else {}
    group = torch_dist.group.WORLD
    return {"callbacks": ends_at(death), "process_group": group, "progress": False, **given}


def drawn(path: Path | None, death: int = -1, **how: Any) -> dict[str, Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    x = shard_of(torch.linspace(0.5, 3.0, 12, dtype=torch.float64), ROWS)
    em = ExactPosteriorEM(clicks, guide_of_clicks)
    noise = torch.tensor(0.5, dtype=torch.float64)
    return numbers_of(
        em.fit(x, noise, batch_size=2, **{"max_steps": 12, **how}, **options(path, death))
    )


def resumed(path: Path) -> list[Any]:
    found: list[Any] = [drawn(path)]
    try:
        drawn(path, seed=2)
    except UsageError as error:
        found.append(str(error))
    return found


def test_a_killed_process_of_a_stochastic_fit_is_no_loss(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    whole = on_ranks(2, drawn, None)
    with pytest.raises(GroupError):
        on_ranks(2, drawn, path, 7)
    for one, other in zip(whole, on_ranks(2, resumed, path), strict=True):
        assert are_equal(one, other[0])
        assert "seed is None there and 2 here" in other[1]
