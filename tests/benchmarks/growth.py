"""Time and memory as the work grows: one iteration against N, D, K and T, over two decades."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SWEEPS: Mapping[str, tuple[int, ...]] = {
    "N": (10_000, 100_000, 1_000_000),
    "D": (2, 8, 32, 128),
    "K": (2, 16, 64, 200),
    "T": (100, 1_000, 10_000),
}
FIXED = {"N": 20_000, "D": 4, "K": 4}
LARGE = ((1_000_000, 8, 16), (10_000_000, 4, 8))  # N, D, K of whole fits


@dataclass(frozen=True)
class Growth:
    """One sweep: sizes, seconds per iteration, bytes above the data."""

    what: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    memory: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """The slope of log seconds against log size, at the upper half."""
        half = max(2, len(self.sizes) // 2 + 1)
        return float(np.polyfit(np.log(self.sizes[-half:]), np.log(self.seconds[-half:]), 1)[0])


def sweep(what: str) -> Growth:
    """Measure one sweep, each size in a process of its own."""
    found = [run(what, size) for size in SWEEPS[what]]
    seconds, memory = tuple(s for s, _, _ in found), tuple(float(m) for _, m, _ in found)
    return Growth(what, SWEEPS[what], seconds, memory)


def run(what: str, size: int) -> tuple[float, float, float]:
    """Seconds per iteration, peak bytes above the data, seconds of planning."""
    command = [sys.executable, "-m", "tests.benchmarks.growth", what, str(size)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory, planning = json.loads(out.stdout.splitlines()[-1])
    return seconds, memory, planning


def whole_fit(N: int, D: int, K: int) -> float:
    """In a process of its own: peak bytes above the data of ``fit``, planning and result included."""
    command = [sys.executable, "-m", "tests.benchmarks.growth", "fit", str(N), str(D), str(K)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(out.stdout.splitlines()[-1])


def fit(N: int, D: int, K: int) -> float:
    """In this process: a fit of three steps."""
    import pyro

    from pyro_em import ExactPosteriorEM
    from tests.benchmarks import cases, models

    torch.set_num_threads(1)
    models.iterations(models.mixture, cases.blobs(1000, 2, 2), 2)(1)  # load what loads late
    pyro.clear_param_store()
    x = cases.blobs(N, D, K)
    # What was used to draw the data does not count: the peak begins anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    ExactPosteriorEM(models.mixture).fit(x, K, max_steps=3, tol=0, progress=False)
    return peak() - before


def peak() -> float:
    """Peak resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024.0 * int(line.split()[1])
    return float("nan")


def measure(what: str, size: int) -> tuple[float, float, float]:
    """In this process: an iteration of a mixture, or of a chain where T grows."""
    from tests.benchmarks import cases, models

    torch.set_num_threads(1)
    begin = time.perf_counter()
    if what == "T":
        x = torch.randint(0, 16, (size,), generator=torch.Generator().manual_seed(0))
        before = peak()
        steps = models.iterations(models.symbols_chain, x, 4, 16, cases.chain_start(4, 16))
    else:
        N, D, K = ({**FIXED, what: size}[n] for n in "NDK")
        models.iterations(models.mixture, cases.blobs(1000, 2, 2), 2)(1)  # load what loads late
        x = cases.blobs(N, D, K)
        before, begin = peak(), time.perf_counter()
        steps = models.iterations(models.mixture, x, K)
    planning = time.perf_counter() - begin
    steps(1)
    many = 3 if size * (FIXED["D"] if what == "N" else 1) > 10**6 else 10
    begin = time.perf_counter()
    steps(many)
    return (time.perf_counter() - begin) / (many + 1), peak() - before, planning


def table(growths: list[Growth]) -> list[str]:
    """The sweeps in Markdown."""
    head = "| grows | sizes | ms per iteration | exponent | MiB above the data, planning included |"
    out = [head, "|---" * 5 + "|"]
    for g in growths:
        sizes = ", ".join(f"{s:,}" for s in g.sizes)
        times = ", ".join(f"{1e3 * s:.3g}" for s in g.seconds)
        memory = ", ".join(f"{m / 2**20:.0f}" for m in g.memory)
        out.append(f"| {g.what} | {sizes} | {times} | {g.exponent:.2f} | {memory} |")
    return out


def draw(growths: list[Growth], path: Path) -> None:
    """Time and memory on log axes, one panel each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for g in growths:
        sizes = np.array(g.sizes) / g.sizes[0]
        left.plot(
            sizes, g.seconds, "o-", label=f"{g.what} from {g.sizes[0]:,}: exponent {g.exponent:.2f}"
        )
        right.plot(sizes, np.maximum(np.array(g.memory), 1e4) / 2**20, "o-", label=g.what)
    left.set_ylabel("seconds per EM iteration")
    right.set_ylabel("peak memory above the data (MiB)")
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("size relative to the smallest")
        ax.grid(True, which="major", linewidth=0.4, alpha=0.5)
    left.legend(fontsize="small", loc="upper left")  # the colours of both panels
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if sys.argv[1] == "fit":
        print(fit(*map(int, sys.argv[2:])))
    else:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
