"""Several starts of one fit: short runs of many candidates, long runs of the best.

Source: Biernacki, Celeux and Govaert (2003), "Choosing starting values for the EM algorithm for
getting the highest likelihood in multivariate Gaussian mixture models" (em-EM).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_em._pyro import restore, snapshot
from pyro_em.beginnings import Beginning
from pyro_em.loop import continue_run, revive, run_start, short_run
from pyro_em.program import Program
from pyro_em.result import EMStatus
from pyro_em.runs import Run, Settings, best_of

CANDIDATES = 4  # short runs for each start after the first
SHORT_STEPS = 10
MIX = (*(3 * ("random points", "random k-means")), "random points", "random hard")
_TWINS = 1e-9  # relative difference of objectives below which two candidates are one
_UNSOUND = (EMStatus.DEGENERATE, EMStatus.UNBOUNDED)
_OVER = (EMStatus.INTERRUPTED, EMStatus.STOPPED)


def run_starts(
    program: Program, settings: Settings, init: Any, num_restarts: int, seed: int | None
) -> list[Run]:
    """EM from several starts.

    Args:
        program: The model with its data.
        settings: What all starts share.
        init: Where the first one begins.
        num_restarts: How many run to the end.
        seed: Of random choices; torch's global state where None.

    Returns:
        The runs that went to the end, the first start first; after an interrupt also the short runs
        that had been done. The best one has its E-step.
    """
    generator = torch.Generator().manual_seed(
        int(torch.randint(2**31, ())) if seed is None else seed
    )
    beginning = Beginning(program, generator)
    origin = snapshot(program.graph.parameters)
    runs: list[Run] = []
    try:
        runs.append(run_start(program, settings, beginning, init, 0))
        if num_restarts > 1 and runs[0].status not in _OVER:
            _others(program, settings, beginning, num_restarts - 1, origin, runs)
        revive(program, best_of(runs))
    except BaseException:
        if runs:  # nothing already fitted is lost
            restore(program.graph.parameters, best_of(runs).parameters)
        raise
    finally:
        settings.bar.close()
    return runs


def _others(
    program: Program,
    settings: Settings,
    beginning: Beginning,
    count: int,
    origin: dict[str, Tensor],
    runs: list[Run],
) -> None:
    """The starts after the first, appended to ``runs``."""
    kinds = itertools.cycle(MIX if beginning.rows else MIX[-1:])
    if not program.is_monotone:  # objectives of a few steps say little: each start goes to the end
        for r, kind in zip(range(1, count + 1), kinds, strict=False):
            restore(program.graph.parameters, origin)
            runs.append(run_start(program, settings, beginning, kind, r))
            if runs[-1].status in _OVER:
                return
        return
    steps = min(SHORT_STEPS, settings.max_steps)
    few = replace(settings, max_steps=steps, tol=0.0, acceleration=None)
    pool: list[Run] = []
    for c, kind in zip(range(CANDIDATES * count), kinds, strict=False):
        settings.bar.label = f"EM short run {c + 1}/{CANDIDATES * count}"
        restore(program.graph.parameters, origin)
        pool.append(short_run(program, few, beginning, kind, 1))
        pool[-1].leave()
        if pool[-1].status in _OVER:
            runs.extend(pool)
            return
    settings.bar.label = ""
    waiting = _best_first(pool)
    for r in range(1, count + 1):
        while waiting:
            run = waiting.pop(0)
            continue_run(program, settings, run, r)
            runs.append(run)
            best = best_of(runs)
            for other in runs:
                if other is not best:
                    other.leave()
            if run.status in _OVER:
                return
            if run.status not in _UNSOUND or len(waiting) <= count - r:
                break
            run.is_replaced = True  # it collapsed: another candidate takes its place


def _best_first(pool: list[Run]) -> list[Run]:
    """Candidates by objective; those that broke, or equal a better one, at the end."""
    ranked = sorted(pool, key=lambda r: -math.inf if r.last is None else r.objective, reverse=True)
    sound, others = list[Run](), list[Run]()
    for run in ranked:
        twin = bool(sound) and sound[-1].objective - run.objective <= _TWINS * abs(run.objective)
        (others if twin or run.last is None or run.status in _UNSOUND else sound).append(run)
    return sound + others
