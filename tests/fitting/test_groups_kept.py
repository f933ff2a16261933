"""Checkpoints of fits on several processes: rank 0 writes one file, and all go on from it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as torch_dist

from pyro_em import Chunks
from tests.fitting.group_models import are_equal, shard_of, table
from tests.fitting.test_groups import caught, fit
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow

_CASES: dict[str, dict[str, Any]] = {
    "mixture": {"acceleration": "quasi-newton", "max_steps": 14, "tol": 1e-9},  # on sums
    "slopes": {"max_steps": 6},  # through tables
    "lines": {"max_steps": 6, "init": "random", "seed": 1},
}
_SIZES = [9, 15]


def run(folder: str | None, kills: tuple[str, int] = ("", 0)) -> dict[str, Any]:
    """All fits; with a checkpoint in a folder; the last rank is killed after a step of one."""
    own, rank = shard_of(table(), _SIZES), torch_dist.get_rank()
    out = {}
    for name, how in _CASES.items():
        if kills[0] not in ("", name):
            continue
        steps = [0]

        def dies(step: Any, name: str = name, steps: list[int] = steps) -> None:
            steps[0] += 1
            if (name, steps[0]) == kills and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        # Whoever watches steps sees them all, so that the path is that of a fit that is watched.
        options: dict[str, Any] = {"callbacks": dies, **how}
        data: Any = own if name != "lines" else Chunks(own, rows=5)
        if folder is not None:
            path = f"{folder}/{name}.pt" if rank == 0 else "elsewhere.pt"  # rank 0 alone has it
            options |= {"checkpoint": path, "checkpoint_every": 2}
        out[name] = fit(name, data, process_group=torch_dist.group.WORLD, **options)
    return out


def killed(folder: str, kills: tuple[str, int]) -> str:
    try:
        run(folder, kills)
    except Exception as error:
        return str(error)
    return ""


def test_a_killed_process_and_the_same_digits(tmp_path: Path) -> None:
    whole = on_ranks(2, run, None)
    for name, steps in (("mixture", 5), ("slopes", 3), ("lines", 4)):
        text, gone = on_ranks(2, killed, str(tmp_path), (name, steps), timeout=10.0)
        assert gone is None and "another process of the group did not answer" in text
        assert (tmp_path / f"{name}.pt").exists()
    for out, wanted in zip(on_ranks(2, run, str(tmp_path)), whole, strict=True):
        for name in _CASES:
            assert are_equal(out[name], wanted[name]), name
            assert out[name]["steps"] == wanted[name]["steps"]
    assert not Path("elsewhere.pt").exists()


def others(path: str) -> list[str]:
    own, rank = shard_of(table(), _SIZES), torch_dist.get_rank()
    together = {"process_group": torch_dist.group.WORLD, "checkpoint": path}
    out = [caught("mixture", own, **together)]
    other = own + (0.01 if rank == 1 else 0.0)
    out.append(caught("mixture", other, **together))
    out.append(caught("mixture", own, **together | {"checkpoint": None if rank else path}))
    none = {"on_checkpoint_error": "raise", "resume": False, "checkpoint": "/proc/none/run.pt"}
    out.append(caught("mixture", own, **together | none))
    return out


def test_a_checkpoint_of_other_data_or_ranks_is_refused_on_all(tmp_path: Path) -> None:
    path = str(tmp_path / "run.pt")
    for rank, (fine, data, unnamed, unwritten) in enumerate(on_ranks(2, others, path)):
        assert not fine
        assert "belongs to another fit: values of argument 0 on rank 1 are others here" in data
        assert "fit(..., checkpoint=) differs" in unnamed
        assert unwritten.startswith("MissingFile") and ("rank 0 of 2" in unwritten) == (rank == 1)
    (text,) = on_ranks(1, alone, path)
    assert "belongs to another fit" in text


def alone(path: str) -> str:
    return caught("mixture", table(), process_group=torch_dist.group.WORLD, checkpoint=path)
