"""Several starts of one fit: short runs of many candidates, long runs of the best.

Source: Biernacki, Celeux and Govaert (2003), "Choosing starting values for the EM algorithm for
getting the highest likelihood in multivariate Gaussian mixture models" (em-EM).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.fitting.beginnings import Beginning
from pyro_em.fitting.guarded import Guarded
from pyro_em.fitting.loop import continue_run, lengthen_run, revive, run_start, short_run
from pyro_em.fitting.result import EMStatus
from pyro_em.fitting.run import Run, Settings, best_of
from pyro_em.tracing.parameters import restore, snapshot

# Per start after the first: how many candidates run for how many steps in all.
STAGES = ((6, 5), (2, 40))


DEAR_STAGES = ((3, 5),)  # where every step runs the model


MIX = ("random points", "random k-means", "nearest points", "random hard")


_TWINS = 1e-2  # nats within which two candidates are taken for one


_UNSOUND = (EMStatus.DEGENERATE, EMStatus.UNBOUNDED)


_OVER = (EMStatus.INTERRUPTED, EMStatus.STOPPED)


def run_starts(
    em: Guarded, settings: Settings, init: Any, num_restarts: int, seed: int | None
) -> list[Run]:
    """EM from several starts.

    Args:
        em: The map.
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
    beginning = Beginning(em, generator)
    origin = snapshot(em.program.graph.parameters)
    runs: list[Run] = []
    try:
        runs.append(run_start(em, settings, beginning, init, 0))
        if num_restarts > 1 and runs[0].status not in _OVER:
            _others(em, settings, beginning, num_restarts - 1, origin, runs)
        revive(em, best_of(runs))
    except BaseException:
        if runs:  # nothing already fitted is lost
            restore(em.program.graph.parameters, best_of(runs).parameters)
        raise
    finally:
        settings.bar.close()
    return runs


def _others(
    em: Guarded,
    settings: Settings,
    beginning: Beginning,
    count: int,
    origin: dict[str, Tensor],
    runs: list[Run],
) -> None:
    """The starts after the first, appended to ``runs``."""
    kinds = itertools.cycle(MIX if beginning.rows else MIX[-1:])
    if (
        not em.program.is_monotone
    ):  # objectives of a few steps say little: each start goes to the end
        for r, kind in zip(range(1, count + 1), kinds, strict=False):
            restore(em.program.graph.parameters, origin)
            runs.append(run_start(em, settings, beginning, kind, r))
            if runs[-1].status in _OVER:
                return
        return
    waiting: list[Run] = []
    for stage, (each, steps) in enumerate(STAGES if em.program.compiled else DEAR_STAGES):
        # The first start was compared with the model, and every long run is at its end.
        most = min(steps, settings.max_steps)
        few = replace(settings, max_steps=most, tol=0.0, acceleration=None, verify=False)
        for c in range(each * count):
            settings.bar.label = f"EM, {most} steps: {c + 1}/{each * count}"
            if stage == 0:
                restore(em.program.graph.parameters, origin)
                waiting.append(short_run(em, few, beginning, next(kinds), 1))
            else:
                lengthen_run(em, few, waiting[c], 1)
            run = waiting[c]
            run.leave()
            if run.status in _OVER:
                runs.extend(waiting)
                return
        waiting = _best_first(waiting)
    settings.bar.label = ""
    for r in range(1, count + 1):
        while waiting:
            run = waiting.pop(0)
            continue_run(em, settings, run, r)
            runs.append(run)
            best = best_of(runs)
            for other in runs:
                if other is not best:
                    other.leave()
            if run.status in _OVER:
                return
            if run.status not in _UNSOUND or len(waiting) <= count - r:
                break
            run.is_replaced = True  # it collapsed: another candidate replaces it


def _best_first(pool: list[Run]) -> list[Run]:
    """The best of each kind of start in turn, the kind of the very best first.

    A few steps from random assignments all components are still alike, and yet some of the best
    maxima are reached from there: their objectives compete with their own kind only. Candidates that
    equal a better one come last but for those that broke.
    """
    broken = [r for r in pool if r.last is None or r.status in _UNSOUND]
    sound = sorted((r for r in pool if r not in broken), key=lambda r: r.objective, reverse=True)
    by_kind: dict[str, list[Run]] = {}
    twins = list[Run]()
    for before, run in zip([None, *sound], sound, strict=False):
        twin = before is not None and before.objective - run.objective <= _TWINS
        (twins if twin else by_kind.setdefault(run.name, [])).append(run)
    turns = itertools.zip_longest(*by_kind.values())
    return [run for turn in turns for run in turn if run is not None] + twins + broken
