"""Side by side in one run: interleaved rounds, medians, ratios with their spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

Steps = Callable[[int], None]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: The work.
        peer: Who it is set against.
        target: The ratio to reach, peer over ours.
        make: Builds (ours, theirs), each a function that runs so many EM iterations.
        few: Iterations of the short run; the time of one iteration is a difference, so that what is
            done once (initialising, checking) does not count.
        many: Iterations of the long run of ours.
        their_many: Those of the peer's; as many as ours where None.
        rounds: Interleaved rounds.
        flops: Floating-point operations of one iteration's matrix products, where they dominate.
    """

    name: str
    peer: str
    target: float
    make: Callable[[], tuple[Steps, Steps]]
    few: int = 2
    many: int = 12
    their_many: int | None = None
    rounds: int = 5
    flops: float | None = None


@dataclass(frozen=True)
class Row:
    """A measured case: seconds per iteration, and the ratios of all rounds."""

    case: Case
    ours: float
    theirs: float
    ratios: tuple[float, ...] = field(default=())
    failure: str = ""

    @property
    def ratio(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool:
        """Whether the target was met."""
        return not self.failure and self.ratio >= self.case.target


def seconds(run: Steps, steps: int) -> float:
    """Wall-clock seconds of so many iterations."""
    begin = time.perf_counter()
    run(steps)
    return time.perf_counter() - begin


def per_iteration(run: Steps, few: int, many: int) -> float:
    """Seconds of one iteration: the difference between a long and a short run."""
    short = seconds(run, few)
    return max((seconds(run, many) - short) / (many - few), 1e-9)


def measure(case: Case) -> Row:
    """Run a case; a peer that is not installed is a failure with its reason."""
    try:
        ours, theirs = case.make()
        ours(case.few), theirs(case.few)  # warm
        # What earlier cases left behind is not collected in the middle of a round.
        gc.unfreeze()
        gc.collect()
        gc.freeze()
        mine, yours = [], []
        for _ in range(case.rounds):
            mine.append(per_iteration(ours, case.few, case.many))
            yours.append(per_iteration(theirs, case.few, case.their_many or case.many))
    except Exception as error:  # the table goes on, and says so
        return Row(case, float("nan"), float("nan"), (), f"{type(error).__name__}: {error}")
    ratios = tuple(b / a for a, b in zip(mine, yours, strict=True))
    return Row(case, statistics.median(mine), statistics.median(yours), ratios)
