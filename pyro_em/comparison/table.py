"""`Comparison`: what the contenders reached, as a value that prints and draws."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyro_em import html, plotting
from pyro_em.comparison.curves import Curve
from pyro_em.comparison.sweep import Sweep
from pyro_em.portable import Portable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Row:
    """What a comparison says of one contender; medians over seeds.

    Attributes:
        contender: Its label.
        final_bound: What it raises, at its end; the mean of the last 20 values where it is drawn.
        final_evidence: The exact log evidence at its end; None if it cannot be computed.
        best_evidence: The best that any of its shown runs saw.
        steps: Steps of the shown run.
        seconds: Of the shown run.
        steps_to_best: Steps until within the tolerance of the best of all; None if at least half
            of the seeds never are.
        seconds_to_best: Seconds until then.
        learning_rate: The best of the sweep; None where there is none.
        seeds: Number of seeds.
        total_seconds: Of all its runs: every seed and every learning rate.
        note: What a reader has to know of the run; its failure, if it failed.
    """

    contender: str
    final_bound: float | None
    final_evidence: float | None
    best_evidence: float | None
    steps: int
    seconds: float
    steps_to_best: int | None
    seconds_to_best: float | None
    learning_rate: float | None
    seeds: int
    total_seconds: float
    note: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Portable):
    """What `compare` found; prints as a table.

    Attributes:
        table: A `Row` per contender.
        curves: Per contender the runs that are shown, at its best learning rate.
        sweep: Per contender and learning rate all runs.
        best: The best evidence that any run saw in nats; where no evidence can be computed the best
            bound at the end of runs, as the median over seeds.
        measure: ``"evidence"`` or ``"bound"``.
        num_rows: N, by which gaps are divided.
        tolerance: Nats per datum within which a run has reached the best.
    """

    table: tuple[Row, ...]
    curves: Mapping[str, tuple[Curve, ...]]
    sweep: Mapping[str, Sweep]
    best: float
    measure: str
    num_rows: float
    tolerance: float

    def __getitem__(self, contender: str) -> Row:
        return {row.contender: row for row in self.table}[contender]

    def __repr__(self) -> str:
        return f"Comparison:\n{self}"

    def __str__(self) -> str:
        lines = self._cells()
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        out = []
        for line in lines:
            cells = [line[0].ljust(widths[0])]
            cells += [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
            out.append("  ".join(cells).rstrip())
        return "\n".join([*out, *self._remarks()])

    def _repr_html_(self) -> str:
        header, *rows = self._cells()
        numbers = range(1, len(header))
        return html.whole(
            html.table(header, rows, numbers), *(html.line(r) for r in self._remarks())
        )

    def _cells(self) -> list[tuple[str, ...]]:
        """The names of the columns, and a row for each contender."""
        within = f"{self.tolerance:g}"
        head = (
            "contender",
            "final bound",
            "final evidence",
            "best evidence",
            "steps",
            "seconds",
            f"steps to {within}",
            f"seconds to {within}",
            "rate",
            "seeds",
            "seconds with sweep",
        )
        lines: list[tuple[str, ...]] = [head]
        for r in self.table:
            lines.append(
                (
                    r.contender,
                    _shown(r.final_bound, ".6f"),
                    _shown(r.final_evidence, ".6f"),
                    _shown(r.best_evidence, ".6f"),
                    str(r.steps),
                    f"{r.seconds:.3f}",
                    _shown(r.steps_to_best, "d", "never"),
                    _shown(r.seconds_to_best, ".3f", "never"),
                    _shown(r.learning_rate, "g"),
                    str(r.seeds),
                    f"{r.total_seconds:.3f}",
                )
            )
        return lines

    def _remarks(self) -> list[str]:
        """What the best is, and what a reader has to know of single runs."""
        within = f"{self.tolerance:g}"
        best = (
            f"Best {self.measure} {self.best:.6f} nats, N = {self.num_rows:g};"
            f" 'to {within}': within {within} nats per datum of it. Medians over seeds."
        )
        return [best, *(f"{r.contender}: {r.note}" for r in self.table if r.note)]

    def plot(self, axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes]:
        """Draw the gap to the best per datum against steps and against seconds.

        Lines are medians over seeds, bands reach from the worst to the best seed. Gaps below 1e-9
        (below a tenth of the tolerance where bounds are drawn) are drawn there, and the start, at
        zero steps, has no place on a logarithmic axis.

        Args:
            axes: Two axes to draw on; new ones by default.

        Returns:
            The two axes.
        """
        return plotting.comparison(self, axes)

    def gaps(self, curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, gaps to the best per datum, and median seconds, where all these runs were evaluated.

        Args:
            curves: Runs of one contender.

        Returns:
            Steps, gaps of every run in nats (at least 1e-9; a tenth of the tolerance where bounds
            are drawn), seconds. # (S,), (runs, S), (S,)
        """
        by_evidence = self.measure == "evidence"
        measured = [curve.measure(by_evidence) for curve in curves]
        common = functools.reduce(np.intersect1d, [steps for steps, _ in measured])
        common = common[common > 0]
        gaps = np.stack([v[np.isin(steps, common)] for steps, v in measured])
        least = 1e-9 if by_evidence else self.tolerance / 10
        gaps = np.maximum((self.best - gaps) / self.num_rows, least)
        seconds = np.median([np.asarray(c.seconds)[common] for c in curves], 0)
        return np.asarray(curves[0].steps)[common], gaps, seconds


def _shown(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else format(value, form)
