"""Run the table, print it, write RESULTS.md and the growth figure: ``python -m tests.benchmarks``."""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

import pyro
import torch
from tqdm import tqdm

from tests.benchmarks import calls, chains, chunks, conjugates, growth, network, processes, steps
from tests.benchmarks import memory as peaks
from tests.benchmarks.cases import CASES
from tests.benchmarks.timing import Case, Row, measure

HERE = Path(__file__).parent
VAE = Case("VAE 784-400-50, batch 256: step", "bare torch", 1 / 1.15, network.make, 5, 45, None, 15)


def gemm_limit() -> float:
    """Floating-point operations per second of a large float64 product on this machine."""
    a = torch.randn(1024, 1024, dtype=torch.float64)
    a @ a
    begin = time.perf_counter()
    for _ in range(5):
        a @ a
    return 5 * 2 * 1024**3 / (time.perf_counter() - begin)


def line(row: Row, limit: float) -> str:
    """One row of the table in Markdown."""
    c = row.case
    if row.failure:
        return f"| {c.name} | {c.peer} | {c.target:.3g} | - | - | - | {row.failure} |"
    spread = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}"
    note = "" if row.reached else "below target"
    if c.flops is not None:
        note = f"{note} {c.flops / row.ours / limit:.0%} of the GEMM limit".strip()
    times = f"{1e3 * row.ours:.3g} ms, {1e3 * row.theirs:.3g} ms"
    ratio = f"**{row.ratio:.2f}**"
    return f"| {c.name} | {c.peer} | {c.target:.3g} | {ratio} | {spread} | {times} | {note} |"


def short(ratio: float) -> str:
    """Two digits, without an exponent."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def into_site(rows: list[Row]) -> None:
    """Replace the table of ratios between its marks in ``docs/speed.md``."""
    page = HERE.parent.parent / "docs" / "speed.md"
    text = page.read_text()
    begin, end = "<!-- ratios -->", "<!-- end of ratios -->"
    table = ["| one EM iteration | against | times faster | asked for |", "|---" * 4 + "|"]
    for row in rows:
        shown = row.failure or short(row.ratio)
        table.append(f"| {row.case.name} | {row.case.peer} | {shown} | {short(row.case.target)} |")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    page.write_text("\n".join([head + begin, "", *table, "", end + tail]))


def versions() -> str:
    """What was run."""
    names = (
        "torch",
        "pyro-ppl",
        "numba",
        "scikit-learn",
        "hmmlearn",
        "stepmix",
        "pgmpy",
        "statsmodels",
        "numpy",
    )
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return f"Python {platform.python_version()}, " + ", ".join(found)


def planning() -> list[str]:
    """Seconds to plan a chain, as T grows."""
    out = ["", "Planning a categorical chain (trace, recognise, compile):", ""]
    for T in (1000, 10_000):
        out.append(f"* T = {T:,}: {growth.run('T', T)[2]:.1f} s")
    return out


def memory() -> list[str]:
    """What a whole fit of many rows takes above its data."""
    out = ["", "Peak memory of a whole fit above its data (planning, three steps, result):", ""]
    for N, D, K in growth.LARGE:
        data, above = 8 * N * D, growth.whole_fit(N, D, K)
        out.append(
            f"* N = {N:,}, D = {D}, K = {K}: {above / 2**20:.0f} MiB, {above / data:.1f} times"
        )
    return out


def whole_calls(only: str, rounds: int | None) -> list[str]:
    """The table of whole calls."""
    out = [
        "",
        "Whole calls, reading the model included; ratios are ours over the peer's, so that",
        "",
    ]
    out[1] += " less is better for us; processor time of the quickest rounds:"
    out += [calls.HEAD, "|---" * 7 + "|"]
    for call in tqdm([c for c in calls.CALLS if only in c.name]):
        out.append(calls.line(calls.measure(call, rounds)))
        tqdm.write(out[-1])
    out += ["", "The first fit of a fresh process, and the second (processor time):", ""]
    return out + list(calls.first_calls())


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description="EM iterations beside their peers.")
    parser.add_argument("--only", default="", help="cases whose name holds this word")
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument("--no-iterations", action="store_true", help="whole calls only")
    parser.add_argument("--rounds", type=int, help="of each whole call")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    limit = gemm_limit()
    head = "| work | against | at least | ratio | spread | ours, theirs | note |"
    lines = [head, "|---" * 7 + "|"]
    begin = time.perf_counter()
    chosen = [c for c in (*CASES, VAE) if options.only in c.name and not options.no_iterations]
    rows = []
    for case in tqdm(chosen):
        rows.append(measure(case))
        lines.append(line(rows[-1], limit))
        tqdm.write(lines[-1])
    lines += whole_calls(options.only, options.rounds)
    if not options.no_growth:
        growths = [growth.sweep(what) for what in growth.SWEEPS]
        growth.draw(growths, HERE / "growth.png")
        lines += ["", *growth.table(growths)]
        lines += planning()
        lines += memory()
        lines += peaks.table()
        lines += chains.table()
        lines += conjugates.table()
        lines += chunks.table()
        lines += processes.table()
        lines += steps.table()
        lines += ["", "![Time and memory as the work grows](growth.png)"]
    text = "\n".join(
        [
            "# One EM iteration beside its peers",
            "",
            "Written by `make bench`. Ratios are peer over ours, so that more is better for us; "
            "medians of interleaved rounds in one process, one thread, planning excluded. Absolute "
            "times do not carry over to another machine.",
            "",
            f"{versions()}; {limit / 1e9:.1f} GFLOP/s in a float64 product; "
            f"{time.perf_counter() - begin:.0f} s in all.",
            "",
            *lines,
            "",
        ]
    )
    print(text)
    if options.write:
        (HERE / "RESULTS.md").write_text(text)
        into_site(rows)


if __name__ == "__main__":
    main()
