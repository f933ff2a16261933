"""The sweep: all runs of one contender, one per learning rate and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import TypeAlias

from tqdm.auto import tqdm

from pyro_em.comparison.contest import Contest, Method
from pyro_em.comparison.curves import Curve

Sweep: TypeAlias = Mapping[float | None, tuple[Curve, ...]]

_EXTENSIONS = 2


def run_sweep(contest: Contest, method: Method, bar: tqdm) -> Sweep:
    """All runs of one contender by learning rate.

    Where the best rate is at an edge the sweep goes on beyond it, a factor of three at a time.
    Where two seeds give the same path to the bit, the first run stands for all seeds.
    """
    # A short run pays what only the first run of all pays.
    contest.once(method, method.rates[0], method.seeds[0], short=True)
    out: dict[float | None, tuple[Curve, ...]] = {}
    repeats: bool | None = None
    waiting, extensions = list(method.rates), 0
    while waiting:
        rate = waiting.pop(0)
        curves: list[Curve] = []
        for seed in method.seeds:
            bar.set_description(method.label if rate is None else f"{method.label}, rate {rate:g}")
            curves.append(contest.once(method, rate, seed))
            bar.update()
            if repeats is None and len(curves) == 2:
                repeats = _same_path(*curves)
            if repeats:
                bar.update(len(method.seeds) - len(curves))
                curves[0] = replace(curves[0], seeds=method.seeds)
                break
        out[rate] = tuple(curves)
        if not waiting and len(out) > 1 and extensions < _EXTENSIONS:
            waiting = _beyond(out, contest.has_evidence)
            extensions += len(waiting)
            bar.total += len(waiting) * len(method.seeds)
    return dict(sorted(out.items(), key=lambda item: item[0] or 0.0))


def best_rate(sweep: Sweep, by_evidence: bool) -> float | None:
    """The learning rate with the best median over seeds; a run that broke off counts as worst."""
    score = {r: median(c.final(by_evidence) for c in cs) for r, cs in sweep.items()}
    return max(score, key=score.__getitem__)


def _beyond(sweep: Sweep, by_evidence: bool) -> list[float | None]:
    """The next learning rate where the best so far is at an edge; empty where it is inside."""
    best, rates = best_rate(sweep, by_evidence), [r for r in sweep if r is not None]
    if best is None or all(c.failure for c in sweep[best]):
        return []
    if best == max(rates):
        return [float(f"{best * 3:.1g}")]
    return [float(f"{best / 3:.1g}")] if best == min(rates) else []


def _same_path(a: Curve, b: Curve) -> bool:
    """Whether two sound runs agree to the bit for as long as both last."""
    n = min(len(a.bound), len(b.bound)) - 1
    return not (a.failure or b.failure) and n > 1 and a.bound[:n] == b.bound[:n]
