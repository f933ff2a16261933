"""The loop: E-step, M-step, E-step, …, with its promises, its stopping rule and its starts."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_em._errors import DataError, DegenerateError, PyroEMWarning, UsageError, message
from pyro_em._pyro import restore, snapshot
from pyro_em.advice import sites_in_words
from pyro_em.e_step import dot, expected_log_joint
from pyro_em.m_step import apply_floors
from pyro_em.posterior import Posterior
from pyro_em.program import Evaluation, Program, distrust
from pyro_em.result import EMStatus, EMStep
from pyro_em.starts import given_counts, random_counts


@dataclass(eq=False)
class Iterate:
    """Where the loop stands: parameters are in the store, the E-step at them is here.

    Attributes:
        evaluation: The factors at the parameters.
        q: The E-step there.
        massless: Per parameter the components that had no mass in the M-step before.
    """

    evaluation: Evaluation
    q: Posterior
    massless: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def objective(self) -> float:
        """What EM raises: ELBO(q, θ), the evidence plus the log prior where q is exact."""
        assert self.q.bound is not None
        return self.q.bound


@dataclass(frozen=True, eq=False)
class Settings:
    """What all starts of one fit share.

    Attributes:
        max_steps: Steps at most.
        tol: Estimated remaining gain at which to stop, in nats.
        callbacks: Called with each step; one that returns True stops the run.
        bar: The progress bar.
        begin: When the fit began, for the steps' seconds.
    """

    max_steps: int
    tol: float
    callbacks: Sequence[Callable[[EMStep], Any]]
    bar: Bar
    begin: float


@dataclass(eq=False)
class Run:
    """One start: its path and where it stands."""

    parameters: dict[str, Tensor]
    status: EMStatus = EMStatus.MAX_STEPS
    message: str = ""
    last: Iterate | None = None
    entering: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    initial_values: dict[str, Tensor] = field(default_factory=dict)
    verified: dict[str, Tensor] | None = None

    @property
    def num_steps(self) -> int:
        """Complete steps."""
        return len(self.entering)

    @property
    def objective(self) -> float:
        """The bound at the last complete step; nan if there is none."""
        return math.nan if self.last is None else self.last.objective

    def record(self, program: Program, at: Iterate) -> None:
        """Remember parameters and E-step of the last complete step."""
        self.parameters, self.last = snapshot(program.graph.parameters), at

    def go_back(self, program: Program) -> None:
        """Return to the parameters after the first step, the last that were verified."""
        assert self.verified is not None
        restore(program.graph.parameters, self.verified)
        del self.entering[1:], self.after[1:]
        self.message = ""


def e_step(program: Program, index: int = 0) -> Iterate:
    """The E-step of step ``index`` at the parameters in the store."""
    evaluation = program.evaluate()
    return Iterate(evaluation, program.e_step(evaluation, index))


def advance(program: Program, at: Iterate, *, index: int, verify: bool) -> Iterate:
    """The M-step of step ``index`` from the E-step ``at``, and the E-step at the new parameters."""
    origin = snapshot(program.graph.parameters)
    report = program.m_step(at.q.counts, at.evaluation)
    if verify and program.compiled:
        off = program.disagreements()
        if off:
            _warn_disagreement(off[0], "it is not")
            restore(program.graph.parameters, origin)
            distrust(program, off)
            at = e_step(program, index)
            report = program.m_step(at.q.counts, at.evaluation)
    try:
        reached = e_step(program, index + 1)
        reached.massless = report.massless
        return reached
    except BaseException:
        restore(program.graph.parameters, origin)
        raise


def as_step(program: Program, index: int, before: Iterate, after: Iterate, begin: float) -> EMStep:
    """A step as users see it: the bound entering it and the bound after its M-step."""
    bound = expected_log_joint(before.q.counts, after.evaluation.tables) + before.q.entropy()
    return EMStep(
        index,
        before.objective,
        before.q.log_evidence,
        bound,
        before.q,
        {n: p.value() for n, p in program.graph.parameters.items()},
        time.perf_counter() - begin,
    )


def run_start(
    program: Program, settings: Settings, init: Any, generator: torch.Generator, r: int
) -> Run:
    """Run EM from one start until something stops it.

    Args:
        program: The model with its data.
        settings: What all starts share.
        init: The start: None, ``"random"``, ``"random hard"`` or {site: assignments}.
        generator: Source of random starts.
        r: The start's number; only the first one may raise.

    Returns:
        The run; the parameters in the store are those of its last complete step.
    """
    run = Run(snapshot(program.graph.parameters))
    run.initial_values = {n: p.value() for n, p in program.graph.parameters.items()}
    try:
        _apply_init(program, init, generator)
        apply_floors(program.graph, program.updates)
        at = e_step(program)
    except (DegenerateError, DataError) as error:
        if r == 0:
            restore(program.graph.parameters, run.parameters)
            raise
        run.status, run.message = EMStatus.DEGENERATE, str(error)
        return run
    except KeyboardInterrupt:
        restore(program.graph.parameters, run.parameters)
        if r == 0:
            raise
        run.status = EMStatus.INTERRUPTED
        return run
    run.record(program, at)
    symmetric = is_symmetric(at.q)
    if symmetric and settings.bar.starts == 1:
        _warn_symmetric(at.q)
    _iterate(program, settings, run, at, r)
    if program.compiled and run.num_steps > 1 and run.verified is not None:
        off = program.disagreements()
        if off:
            _warn_disagreement(off[0], "at the end of the fit it was not")
            distrust(program, off)
            run.go_back(program)
            _iterate(program, settings, run, e_step(program, run.num_steps), r)
    stopped = run.status in (EMStatus.CONVERGED, EMStatus.ROUNDING)
    if symmetric and stopped and run.last is not None and is_symmetric(run.last.q):
        run.status = EMStatus.SYMMETRIC
    return run


def _iterate(program: Program, settings: Settings, run: Run, at: Iterate, r: int) -> None:
    """Steps from ``at`` until one of the rules stops the run."""
    eps = program.graph.eps
    run.status = EMStatus.MAX_STEPS
    run.record(program, at)
    try:
        for _ in range(settings.max_steps - run.num_steps):
            before, first = at, run.num_steps == 0
            at = advance(program, before, index=run.num_steps, verify=first)
            if fell(program, before, at):
                restore(program.graph.parameters, run.parameters)
                run.status = EMStatus.FELL
                break
            step = as_step(program, run.num_steps, before, at, settings.begin)
            run.entering.append(step.elbo)
            assert step.after_m_step is not None
            run.after.append(step.after_m_step)
            run.record(program, at)
            if first:
                run.verified = run.parameters
            settings.bar.update(r, at.objective)
            if any(callback(step) is True for callback in settings.callbacks):
                run.status = EMStatus.STOPPED
                break
            status = should_stop([*run.entering, at.objective], settings.tol, eps)
            if status is not None and program.may_stop(run.num_steps):
                run.status = status
                break
    except (DegenerateError, DataError) as error:
        run.status, run.message = EMStatus.DEGENERATE, str(error)
    except KeyboardInterrupt:
        run.status = EMStatus.INTERRUPTED
        restore(program.graph.parameters, run.parameters)


def _warn_disagreement(place: tuple[str, str], when: str) -> None:
    site, argument = place
    warnings.warn(
        message(
            f"site '{site}', argument '{argument}'",
            f"{when} what the compiled plan predicts; the fit continues on the generic path from "
            "the last verified parameters.",
            "the model changes in a way that its autograd graph does not show",
            ["avoid detach, .item() and branches on parameters in the model"],
        ),
        PyroEMWarning,
        stacklevel=5,
    )


def _apply_init(program: Program, init: Any, generator: torch.Generator) -> None:
    if init is None:
        return
    evaluation = program.evaluate()
    if isinstance(init, str) and init in ("random", "random hard"):
        if not program.graph.latents:
            return
        counts = random_counts(
            evaluation.graph,
            program.contraction,
            evaluation.tables,
            generator=generator,
            hard=init == "random hard",
        )
    elif isinstance(init, Mapping):
        counts = given_counts(evaluation.graph, program.contraction, evaluation.tables, init)
    else:
        raise UsageError(
            message(
                "init",
                f"{init!r} is not understood.",
                fixes=["use None, 'random', or {site: labels or probabilities}"],
            )
        )
    program.m_step(counts, evaluation)


def fell(program: Program, before: Iterate, after: Iterate) -> bool:
    """Promise: the objective never falls; a fall is reported with the site that did it."""
    old, new = before.objective, after.objective
    eps = program.graph.eps
    allowed = (1e-9 if eps < 1e-12 else 1e-5) * max(1.0, abs(old))
    if new >= old - allowed or not program.is_monotone:
        return False
    losses = {}
    for g in range(len(program.graph.groups)):
        change = float(dot(before.q.counts[g], after.evaluation.tables[g])) - float(
            dot(before.q.counts[g], before.evaluation.tables[g])
        )
        losses[g] = change
    worst = min(losses, key=losses.__getitem__)
    group = program.graph.groups[worst]
    names = ", ".join(f"'{n}'" for n in group.params) or "none"
    warnings.warn(
        message(
            f"site '{group.members[0]}', parameters {names}",
            f"the {program.objective_name} fell from {old:.9g} to {new:.9g}; the expected log joint "
            f"of this site changed by {losses[worst]:.3g}. The parameters before the fall were kept.",
            "an exact EM step cannot do that: rounding, or a model that hides a dependence",
            ["use float64", "avoid detach and branches on parameters in the model"],
        ),
        PyroEMWarning,
        stacklevel=4,
    )
    return True


def best_of(runs: Sequence[Run]) -> Run:
    """The best evidence among sound starts; a degenerate one only where there is no other."""
    usable = [r for r in runs if r.last is not None]
    sound = [r for r in usable if r.status is not EMStatus.DEGENERATE]
    return max(sound or usable, key=lambda r: r.objective)


def should_stop(path: Sequence[float], tol: float, eps: float) -> EMStatus | None:
    """The stopping rule: estimated remaining gain g a / (1 − a), or rounding."""
    if tol == 0:
        return None
    gains = [b - a for a, b in pairwise(path)]
    if len(gains) < 6:
        return None
    rounding = 8 * eps * max(1.0, abs(path[-1]))
    if all(abs(g) <= rounding for g in gains[-2:]):
        return EMStatus.ROUNDING
    last = gains[-6:]
    if min(last) <= 0:
        return None
    ratio = max(b / a for a, b in pairwise(last))
    if ratio >= 1:
        return None
    remaining = last[-1] * ratio / (1 - ratio)
    return EMStatus.CONVERGED if last[-1] < tol and remaining < tol else None


def rate_of_convergence(path: Sequence[float]) -> float | None:
    """The last ratio of successive gains that is clear of rounding; None where there is none."""
    gains = [b - a for a, b in pairwise(path)]
    rounding = 1e-13 * max(1.0, abs(path[-1]))
    clear = [g for g in gains if g > rounding]
    if len(clear) < 3:
        return None
    rate = clear[-1] / clear[-2]
    return rate if rate < 1 else None


def is_symmetric(q: Posterior) -> bool:
    """Whether the data say nothing of any latent: each of its values explains them equally well."""
    if not q.graph.latents:
        return False
    for name, mask in q.graph.structure.masked_pairs.items():
        if f"{name}_unobserved" in q.graph.latents and bool(mask.any()):
            return False  # rows where it is observed tell its values apart
    informative = False
    for group, table in zip(q.graph.groups, q.tables, strict=True):
        if not group.observed or (group.mask is not None and not bool(group.mask.any())):
            continue
        for i, dims in enumerate(group.dims):
            axes = [k for k, d in enumerate(dims) if d in q.graph.latents and table[i].shape[k] > 1]
            if not axes:
                continue
            informative = True
            low, high = table[i].amin(axes), table[i].amax(axes)
            near = high - low <= 1e-9 * high.abs().clamp(min=1.0)
            if not bool((near | (low == high)).all()):
                return False
    return informative


def _warn_symmetric(q: Posterior) -> None:
    warnings.warn(
        message(
            sites_in_words(list(q.graph.latents)),
            "the start is symmetric: every value explains the data equally well.",
            "EM cannot leave such a saddle; all components stay equal",
            [
                "fit(..., init='random', seed=0)",
                "give the components different initial values",
            ],
        ),
        PyroEMWarning,
        stacklevel=4,
    )


class Bar:
    """The progress bar: evidence per step, over all starts."""

    def __init__(
        self, progress: bool | None, max_steps: int, starts: int, objective_name: str
    ) -> None:
        disable = None if progress is None else not progress
        self.bar = tqdm(total=max_steps * starts, disable=disable, desc="EM", unit="step")
        self.max_steps, self.starts, self.current = max_steps, starts, 0
        self.objective_name = objective_name

    def update(self, start: int, objective: float) -> None:
        """One more step of a start."""
        if start != self.current:
            self.bar.n = start * self.max_steps
            self.current = start
        label = f"EM start {start + 1}/{self.starts}" if self.starts > 1 else "EM"
        self.bar.set_description(label, refresh=False)
        self.bar.set_postfix_str(f"{self.objective_name} {objective:.6f}", refresh=False)
        self.bar.update()

    def close(self) -> None:
        """End the bar."""
        self.bar.close()
