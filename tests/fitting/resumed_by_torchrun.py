"""A fit whose last process dies once; who starts all of them again finds the checkpoint."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as torch_dist

from tests.fitting.group_models import shard_of, table
from tests.fitting.test_groups import fit


def main(folder: Path) -> None:
    """Fit, with a checkpoint in a folder; rank 0 writes there what was found."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch_dist.init_process_group("gloo")
    rank, is_first = torch_dist.get_rank(), not (folder / "run.pt").exists()
    torch_dist.barrier()  # all have looked

    def dies(step: object) -> None:
        if is_first and rank == 1 and getattr(step, "index", 0) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    how = {"checkpoint": folder / "run.pt", "checkpoint_every": 2, "callbacks": dies}
    world = torch_dist.group.WORLD
    out = fit("mixture", shard_of(table(), [9, 15]), max_steps=9, process_group=world, **how)
    if rank == 0:
        torch.save({**out, "is_first": is_first}, folder / "out.pt")
    torch_dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
