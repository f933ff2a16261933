"""Two processes with a million rows each: what a step spends in all-reduces, and sends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as torch_dist
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM

ROWS, D, K = 1_000_000, 8, 16
STEPS = 10


def table() -> list[str]:
    """The lines of the report."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    said = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.benchmarks.processes"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = json.loads(said.strip().splitlines()[-1])
    return [
        "",
        f"Two processes with {ROWS:,} x {D} rows each (float32, mixture of {K}), a thread each:",
        "",
        f"* {found['step']:.1f} ms a step, {found['inside']:.2f} ms of it in all-reduces: "
        f"{found['inside'] / found['step']:.1%} (at most 5%)",
        f"* waiting for the slower process: {found['waiting'] / found['step']:.1%}",
        f"* {found['bytes']:,.0f} bytes in {found['calls']:.1f} all-reduces a step",
    ]


class Counted:
    """An all-reduce that is timed, apart from the wait for the other process."""

    def __init__(self) -> None:
        self.real = torch_dist.all_reduce
        self.inside = self.waiting = 0.0
        self.bytes = self.calls = 0

    def __call__(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        torch_dist.barrier()
        ready = time.perf_counter()
        out = self.real(tensor, *args, **kwargs)
        self.inside += time.perf_counter() - ready
        self.waiting += ready - begin
        self.bytes += tensor.numel() * tensor.element_size()
        self.calls += 1
        return out


def main() -> None:
    """What one of the processes does; the first one prints what was found."""
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo")
    rank = torch_dist.get_rank()
    centres = torch.randn(K, D, generator=torch.Generator().manual_seed(0)) * 3
    own = torch.Generator().manual_seed(10 + rank)
    z = torch.randint(K, (ROWS,), generator=own)
    x = centres[z] + torch.randn(ROWS, D, generator=own)

    def model(x: torch.Tensor) -> None:
        w = pyro.param("w", torch.ones(K) / K, constraint=constraints.simplex)
        mu = pyro.param("mu", centres + 0.3)
        sigma = pyro.param("sigma", torch.ones(K, D), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            k = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[k], sigma[k]).to_event(1), obs=x)

    def run(steps: int) -> tuple[float, Counted]:
        counted = Counted()
        torch_dist.all_reduce = counted
        try:
            pyro.clear_param_store()
            begin = time.perf_counter()
            ExactPosteriorEM(model).fit(
                x,
                process_group=torch_dist.group.WORLD,
                max_steps=steps,
                tol=0.0,
                progress=False,
            )
            return time.perf_counter() - begin, counted
        finally:
            torch_dist.all_reduce = counted.real

    run(2)
    (few, before), (many, after) = run(3), run(3 + STEPS)
    found = {
        "step": 1e3 * (many - few) / STEPS,
        "inside": 1e3 * (after.inside - before.inside) / STEPS,
        "waiting": 1e3 * (after.waiting - before.waiting) / STEPS,
        "bytes": (after.bytes - before.bytes) / STEPS,
        "calls": (after.calls - before.calls) / STEPS,
    }
    if rank == 0:
        print(json.dumps(found))
    torch_dist.destroy_process_group()


if __name__ == "__main__":
    main()
