"""Rows of a file in chunks beside the same rows in memory: time per step, and peak memory."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.growth import peak

N, D, K = 10_000_000, 8, 16
ROWS = 500_000
STEPS = 6


@dataclass(frozen=True)
class Run:
    """A fit in a process of its own.

    Attributes:
        seconds: Of one step, the median.
        above: Peak bytes above those before the data were opened.
        evidence: At the end, in nats.
    """

    seconds: float
    above: float
    evidence: float


def table(rows: int = N) -> list[str]:
    """The lines of the report."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        write(path, rows)
        memory, chunks = run("memory", path), run("chunks", path)
    return [
        "",
        f"Chunks of a file ({rows:,} x {D} float32, mixture of {K}, {ROWS:,} rows in a chunk) beside "
        "the same rows in memory:",
        "",
        f"* seconds per step: {chunks.seconds:.2f}, {memory.seconds:.2f} in memory: "
        f"{chunks.seconds / memory.seconds:.2f} times (at most 1.3)",
        f"* peak above the process's base: {chunks.above / 2**20:.0f} MiB (at most 1024), "
        f"{memory.above / 2**20:.0f} MiB in memory",
        f"* log evidence: {chunks.evidence:.2f}, {memory.evidence:.2f} in memory",
    ]


def write(path: Path, rows: int) -> None:
    """A file of K clouds, some rows at a time."""
    random = np.random.default_rng(0)
    centres = random.normal(0, 4, (K, D)).astype(np.float32)
    x = np.lib.format.open_memmap(path, "w+", np.float32, (rows, D))
    for begin in range(0, rows, ROWS):
        some = x[begin : begin + ROWS]
        some[:] = centres[random.integers(0, K, len(some))]
        some += random.standard_normal(some.shape, dtype=np.float32)


def run(how: str, path: Path) -> Run:
    """A fit in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.chunks", how, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return Run(*json.loads(out.stdout.splitlines()[-1]))


def measure(how: str, path: str) -> tuple[float, float, float]:
    """In this process: seconds per step, bytes above the base, log evidence."""
    import pyro

    from pyro_em import Chunks, ExactPosteriorEM
    from tests.benchmarks import cases, models

    torch.set_num_threads(1)
    models.iterations(models.mixture, cases.blobs(1000, 2, 2), 2)(1)  # load what loads late
    pyro.clear_param_store()
    Path("/proc/self/clear_refs").write_text("5")
    base = peak()
    x = np.load(path, mmap_mode="r")
    data: Any = Chunks(x, rows=ROWS) if how == "chunks" else torch.from_numpy(np.array(x))
    ends: list[float] = []
    fitted = ExactPosteriorEM(models.mixture).fit(
        data,
        K,
        max_steps=STEPS,
        tol=0,
        progress=False,
        callbacks=[lambda step: ends.append(time.perf_counter())],
    )
    between = [b - a for a, b in itertools.pairwise(ends)]
    assert fitted.log_evidence is not None
    return statistics.median(between), peak() - base, fitted.log_evidence


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2])))
