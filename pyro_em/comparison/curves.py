"""Curves: the path of one run, step by step, and the recorder that writes it.

The recorder's clock stands still while the evidence is evaluated, so that this costs no method
anything; it is evaluated at steps in equal ratios, twelve per decade.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_PER_DECADE = 12

_WINDOW = 20


@dataclass(frozen=True, eq=False)
class Curve:
    """One run of one contender; entry i belongs to the parameters after ``steps[i]`` steps.

    Attributes:
        seeds: The seeds that it stands for: several where no random number matters.
        learning_rate: None where the method has none, or keeps its own.
        steps: 0 at the start.
        seconds: Wall clock when these parameters were reached, without evaluations of the evidence.
        bound: What the method raises, in nats; of a drawn bound one draw.
        evidence: The exact log evidence; nan where it was not evaluated or cannot be computed.
        failure: Why the run broke off, or an empty string.
    """

    seeds: tuple[int, ...]
    learning_rate: float | None
    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    bound: tuple[float, ...]
    evidence: tuple[float, ...]
    failure: str = ""

    def measure(self, by_evidence: bool) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values of what contenders are measured by.

        Args:
            by_evidence: The exact evidence where it was evaluated; else the bound, as the mean of
                its last 20 values.
        """
        if by_evidence:
            values = np.asarray(self.evidence)
        else:
            sums = np.cumsum(np.concatenate([[0.0], self.bound]))
            after = np.arange(1, len(sums))
            before = np.maximum(after - _WINDOW, 0)
            values = (sums[after] - sums[before]) / (after - before)
        steps = np.flatnonzero(np.isfinite(values))
        return steps, values[steps]

    def top(self, by_evidence: bool) -> float:
        """The highest value of the measure; −inf where there is none."""
        return float(self.measure(by_evidence)[1].max(initial=-math.inf))

    def final(self, by_evidence: bool) -> float:
        """The last value of the measure; −inf for a run that broke off."""
        values = self.measure(by_evidence)[1]
        return -math.inf if self.failure or not len(values) else float(values[-1])

    def reaches(self, target: float, by_evidence: bool) -> tuple[int, float] | None:
        """Steps and seconds when the measure first is at ``target``; None if never."""
        steps, values = self.measure(by_evidence)
        there = steps[values >= target]
        return (self.steps[there[0]], self.seconds[there[0]]) if len(there) else None


class RunBroken(Exception):
    """A run that cannot go on, with its message."""


class Recorder:
    """What one run writes its steps to.

    Args:
        evidence: The exact log evidence at the present parameters; None where it has none.
        seconds: Wall-clock limit of the run.
    """

    def __init__(self, evidence: Callable[[], float] | None, seconds: float | None) -> None:
        self.look, self.limit = evidence, seconds
        self.seconds, self.bound = [0.0], [math.nan]
        self.evidence = [math.nan if evidence is None else evidence()]
        self.start()

    def start(self) -> None:
        """Set the clock to zero."""
        self.paused, self.begin = 0.0, time.perf_counter()

    def step(self, entering: float, evidence: float | None = None, *, free: bool = False) -> bool:
        """Record one step; returns whether the time is over.

        Args:
            entering: The bound at the parameters that entered the step.
            evidence: The evidence there, where the method computes it anyway.
            free: Whether it will do so at the next step too.

        Raises:
            RunBroken: If the bound is not finite.
        """
        now = time.perf_counter() - self.begin - self.paused
        self.bound[-1] = entering
        if evidence is not None and self.look is not None:
            self.evidence[-1] = evidence
        if not math.isfinite(entering):
            raise RunBroken(f"the bound was {entering} at step {len(self.bound) - 1}")
        self.seconds.append(now)
        self.bound.append(math.nan)
        self.evidence.append(math.nan)
        if not free and _is_evaluated(len(self.bound) - 1):
            self._evaluate_now()
        return self.limit is not None and now >= self.limit

    def _evaluate_now(self) -> None:
        """The evidence at the present parameters, off the clock."""
        if self.look is None:
            return
        begin = time.perf_counter()
        self.evidence[-1] = self.look()
        self.paused += time.perf_counter() - begin

    def finish(self, bound: float) -> None:
        """Record the bound and the evidence at the parameters where the run ended."""
        self.bound[-1] = bound
        self._evaluate_now()

    def curve(self, rate: float | None, seed: int, failure: str = "") -> Curve:
        """The path as a value; a broken run ends with its last whole step."""
        n = len(self.bound)
        while failure and n > 1 and not math.isfinite(self.bound[n - 1]):
            n -= 1
        return Curve(
            (seed,),
            rate,
            tuple(range(n)),
            tuple(self.seconds[:n]),
            tuple(self.bound[:n]),
            tuple(self.evidence[:n]),
            failure,
        )


def _is_evaluated(step: int) -> bool:
    """Whether a step is one of twelve per decade, in equal ratios."""
    k = math.ceil(_PER_DECADE * math.log10(step) - 1e-9)
    return any(round(10 ** (j / _PER_DECADE)) == step for j in (k - 1, k, k + 1))
