"""Processes as users start them: by ``torchrun``, and again where one has died."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as torch_dist

from tests.fitting.group_models import are_equal, shard_of, table
from tests.fitting.test_groups import fit
from tests.ranks import on_ranks

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).parents[2]


def never_killed() -> dict[str, Any]:
    own, world = shard_of(table(), [9, 15]), torch_dist.group.WORLD
    return fit("mixture", own, max_steps=9, process_group=world, callbacks=lambda step: None)


def test_a_killed_fit_is_started_again_by_torchrun(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    script = str(Path(__file__).with_name("resumed_by_torchrun.py"))
    paths = {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *torchrun, script, str(tmp_path)]
    codes = []
    for _ in range(2):
        ended = subprocess.run(
            command, env={**os.environ, **paths}, capture_output=True, timeout=300, check=False
        )
        codes.append(ended.returncode)
    assert codes[0] and not codes[1]
    out = torch.load(tmp_path / "out.pt", weights_only=False)
    assert not out["is_first"] and out["steps"] == 9
    assert are_equal(out, on_ranks(2, never_killed)[0])


def printed(folder: str) -> str:
    """What the script of the how-to page prints, in a group that exists already."""
    out = io.StringIO()
    script = str(_ROOT / "docs/how_to/many_machines.py")
    with (
        mock.patch.dict(os.environ, {"DATA": folder}),
        mock.patch.object(torch_dist, "init_process_group"),
        mock.patch.object(torch_dist, "destroy_process_group"),
        contextlib.redirect_stdout(out),
    ):
        runpy.run_path(script, run_name="__main__")
    return out.getvalue()


def test_the_script_of_the_page_runs_on_four_processes(tmp_path: Path) -> None:
    first, *others = on_ranks(4, printed, str(tmp_path))
    assert float(first.rpartition("differ by ")[2]) < 1e-9 and not any(others)
