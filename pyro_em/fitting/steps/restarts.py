"""Several starts of one fit: short runs of many candidates, long runs of the best.

Source: Biernacki, Celeux and Govaert (2003), "Choosing starting values for the EM algorithm for
getting the highest likelihood in multivariate Gaussian mixture models" (em-EM).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from torch import Tensor

from pyro_em.fitting.results.history import EMStatus
from pyro_em.fitting.steps.beginnings import Beginning
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.loop import iterate
from pyro_em.fitting.steps.resuming import ended_run, is_ended, resumed
from pyro_em.fitting.steps.run import EMRun, Settings, best_of
from pyro_em.fitting.steps.search import Search
from pyro_em.fitting.steps.starts import (
    continue_run,
    lengthen_run,
    resume_run,
    revive,
    run_start,
    short_run,
)
from pyro_em.tracing.parameters import restore, snapshot

# Per start after the first: how many candidates run for how many steps in all.
STAGES = ((6, 5), (2, 40))

DEAR_STAGES = ((3, 5),)  # where every step runs the model

MIX = ("random points", "random k-means", "nearest points", "random hard")

_TWINS = 1e-2  # nats within which two candidates are taken for one

_UNSOUND = (EMStatus.DEGENERATE, EMStatus.UNBOUNDED)

_OVER = (EMStatus.INTERRUPTED, EMStatus.STOPPED)


def run_starts(
    em: Guarded, settings: Settings, init: Any, num_restarts: int, search: Search
) -> list[EMRun]:
    """EM from several starts.

    Args:
        em: The map.
        settings: What all starts share.
        init: Where the first one begins.
        num_restarts: How many run to the end.
        search: Where the fit stands.

    Returns:
        The runs that went to the end, the first start first; after an interrupt also the short runs
        that had been done. The best one has its E-step.
    """
    beginning = Beginning(em, search.generator)
    origin = snapshot(em.program.graph.parameters) if num_restarts > 1 else {}
    runs = search.runs
    over: list[EMRun] = []
    try:
        first = _left(em, settings, search, 0)
        runs.append(first or run_start(em, settings, beginning, init, 0))
        if num_restarts > 1 and runs[0].status not in _OVER:
            over = _others(em, settings, beginning, num_restarts - 1, origin, search)
        if first is not None or num_restarts > 1:  # a single start has left its own in the store
            revive(em, best_of([*runs, *over]))
    except BaseException:
        if runs:  # nothing already fitted is lost
            restore(em.program.graph.parameters, best_of(runs).parameters)
        raise
    finally:
        settings.bar.close()
    return [*runs, *over]


def _left(em: Guarded, settings: Settings, search: Search, r: int) -> EMRun | None:
    """The next run to the end that another process left, at its end; None where there is none."""
    if not search.left:
        return None
    state = search.left.pop(0)
    if is_ended(state):
        return ended_run(state)
    run = resumed(em, state)
    resume_run(em, settings, run, r)
    return run


def _kinds(em: Guarded, beginning: Beginning) -> tuple[str, ...]:
    """The rules of starts that serve the data."""
    if em.data is None:
        has_rows = bool(beginning.rows)
    else:
        has_rows = em.data.over.from_first(lambda: bool(beginning.rows))
    return MIX if has_rows else MIX[-1:]


def _others(
    em: Guarded,
    settings: Settings,
    beginning: Beginning,
    count: int,
    origin: dict[str, Tensor],
    search: Search,
) -> list[EMRun]:
    """The starts after the first; after an interrupt of short runs these, else none."""
    runs = search.runs
    if not em.program.is_monotone:
        # Objectives of a few steps say little: each start goes to the end.
        search.begin_candidates((settings.max_steps,))
        kinds = itertools.cycle(_kinds(em, beginning))
        for r, kind in zip(range(1, count + 1), kinds, strict=False):
            run = _left(em, settings, search, r)
            if run is None:
                search.drawn = search.generator.get_state()
                restore(em.program.graph.parameters, origin)
                run = run_start(em, settings, beginning, kind, r)
            runs.append(run)
            if run.status in _OVER:
                return []
        return []
    over = _candidates(em, settings, beginning, count, origin, search)
    if over:
        return over
    waiting = list(search.waiting)
    for r in range(1, count + 1):
        while waiting:
            run = waiting.pop(0)
            left = _left(em, settings, search, r)
            if left is None:
                continue_run(em, settings, run, r)
            else:
                run = left
            runs.append(run)
            best = best_of(runs)
            for other in runs:
                if other is not best:
                    other.leave()
            if run.status in _OVER:
                return []
            if run.status not in _UNSOUND or len(waiting) <= count - r:
                break
            run.is_replaced = True  # it collapsed: another candidate replaces it
    return []


def _candidates(
    em: Guarded,
    settings: Settings,
    beginning: Beginning,
    count: int,
    origin: dict[str, Tensor],
    search: Search,
) -> list[EMRun]:
    """Short runs, the most promising first in the end; all of them where one was interrupted."""
    kinds = itertools.cycle(_kinds(em, beginning))
    stages = STAGES if em.program.compiled else DEAR_STAGES
    search.begin_candidates(tuple(min(steps, settings.max_steps) for _, steps in stages))
    for _ in range(search.done if search.stage == 0 else 0):
        next(kinds)
    search.is_short = True
    for stage in range(search.stage, len(stages)):
        each, most = stages[stage][0], search.limits[stage]
        # The first start was compared with the model, and every long run is at its end.
        few = replace(settings, max_steps=most, tol=0.0, acceleration=None, verify=False)
        for c in range(search.done, each * count):
            settings.bar.label = f"EM, {most} steps: {c + 1}/{each * count}"
            search.drawn = search.generator.get_state()
            left, search.left_short = search.left_short, None
            kind = next(kinds) if stage == 0 else ""
            if left is not None:
                run = resumed(em, left)
                iterate(em, few, run, 1)
            elif stage == 0:
                restore(em.program.graph.parameters, origin)
                run = short_run(em, few, beginning, kind, 1)
            else:
                run = search.waiting[c]
                lengthen_run(em, few, run, 1)
            search.waiting[c : c + 1] = [run]
            run.leave()
            if run.status in _OVER:
                return search.waiting
            run.rest, search.done = None, c + 1
        search.waiting = _best_first(search.waiting)
        search.stage, search.done = stage + 1, 0
    search.is_short = False
    settings.bar.label = ""
    return []


def _best_first(pool: list[EMRun]) -> list[EMRun]:
    """The best of each kind of start in turn, the kind of the very best first.

    A few steps from random assignments all components are still alike, and yet some of the best
    maxima are reached from there: their objectives compete with their own kind only. Candidates that
    equal a better one come last but for those that broke.
    """
    broken = [r for r in pool if r.last is None or r.status in _UNSOUND]
    sound = sorted((r for r in pool if r not in broken), key=lambda r: r.objective, reverse=True)
    by_kind: dict[str, list[EMRun]] = {}
    twins = list[EMRun]()
    for before, run in zip([None, *sound], sound, strict=False):
        twin = before is not None and before.objective - run.objective <= _TWINS
        (twins if twin else by_kind.setdefault(run.name, [])).append(run)
    turns = itertools.zip_longest(*by_kind.values())
    return [run for turn in turns for run in turn if run is not None] + twins + broken
