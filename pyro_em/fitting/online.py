"""Online EM: an M-step after each chunk, on sums of the chunk and of what came before it.

Stepwise EM averages, with a step size that falls, sums that are scaled to all rows:

    S ← (1 − γ_t) S + γ_t (N / n) S_chunk,    θ ← M(S),    γ_t = (t + 2)^−κ,  γ_0 = 1

(Cappé and Moulines 2009). Incremental EM replaces the sums of a chunk by new ones when it comes again:
S ← S − S_chunk(before) + S_chunk (Neal and Hinton 1998).

Moments of a normal may be taken about the means of an E-step; before they are added they are moved to
those of the present one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_em.arguments import number, shown
from pyro_em.densities.gaussian import Gaussian
from pyro_em.densities.theta import At
from pyro_em.errors import DegenerateError, Handover, UsageError, message, warn
from pyro_em.fitting.em_map import write
from pyro_em.fitting.guarded import Guarded
from pyro_em.fitting.parted import Parted
from pyro_em.fitting.result import EMStatus, EMStep
from pyro_em.fitting.run import Run
from pyro_em.plan.fit_wishes import FitWishes
from pyro_em.plan.part import Part
from pyro_em.plan.program import Program
from pyro_em.portable import Given
from pyro_em.posteriors.quick import QuickSteps
from pyro_em.tracing.parameters import snapshot, values_of
from pyro_em.tracing.sites import Role
from pyro_em.updates.m_step import apply_floors
from pyro_em.updates.statistics import Expectation


@dataclass(frozen=True)
class StepSize:
    """The step sizes of stepwise EM, γ_t = (t + 2)^−κ after a first one of one.

    Args:
        exponent: κ, above one half and at most one: above, so that noise averages out; at most, so that
            the beginning is forgotten.

    Raises:
        UsageError: If it is another number.

    Example:
        >>> sizes = StepSize(0.6)
        >>> [round(sizes.at(t), 3) for t in range(4)]
        [1.0, 0.517, 0.435, 0.381]

    Source: Cappé and Moulines (2009).
    """

    exponent: float = 0.6

    def __post_init__(self) -> None:
        exponent = number("StepSize", "exponent", self.exponent)
        if not 0.5 < exponent <= 1:
            raise UsageError(
                message(
                    "StepSize",
                    f"exponent={exponent:g} is not above 0.5 and at most 1.",
                    "steps have to become small, and not too fast: Σ γ is infinite, Σ γ² is not",
                    ["pass StepSize(0.6)"],
                )
            )

    def at(self, t: int) -> float:
        """The size of a step, from zero."""
        return 1.0 if t == 0 else (t + 2) ** -float(self.exponent)


class Sums(Protocol):
    """Sums that stand for all rows."""

    def with_chunk(self, own: Expectation, at: At, number: int, rows: int) -> Expectation:
        """The sums once a chunk has come.

        Args:
            own: Its sums.
            at: The parameters of its E-step.
            number: Which chunk of a pass it is.
            rows: How many it has.
        """
        ...


class Averaged:
    """The sums of stepwise EM.

    Args:
        block: The latents, for the points about which moments are taken.
        sizes: The sizes of steps.
        total: The number of all rows.
    """

    def __init__(self, block: QuickSteps, sizes: StepSize, total: int) -> None:
        self.block, self.sizes, self.total = block, sizes, total
        self._sums: tuple[Expectation, At] | None = None
        self._steps = 0

    def with_chunk(self, own: Expectation, at: At, number: int, rows: int) -> Expectation:
        """See `Sums.with_chunk`."""
        new = (self.total / rows) * own
        if self._sums is not None:
            size = self.sizes.at(self._steps)
            new = (1 - size) * moved(self.block, *self._sums, at) + size * new
        self._sums, self._steps = (new, at), self._steps + 1
        return new


class Replaced:
    """The sums of incremental EM.

    Args:
        block: The latents, for the points about which moments are taken.
        total: The number of all rows.
    """

    def __init__(self, block: QuickSteps, total: int) -> None:
        self.block, self.total = block, total
        self._chunks: list[tuple[Expectation, At]] = []
        self._sums: tuple[Expectation, At] | None = None
        self._seen = 0

    def with_chunk(self, own: Expectation, at: At, number: int, rows: int) -> Expectation:
        """See `Sums.with_chunk`."""
        new = own
        if self._sums is not None:
            new = moved(self.block, *self._sums, at) + own
        if number < len(self._chunks):
            new = new + (-1.0) * moved(self.block, *self._chunks[number], at)
            self._chunks[number] = own, at
        else:
            self._chunks.append((own, at))
            self._seen += rows
        self._sums = new, at
        return new if self._seen == self.total else (self.total / self._seen) * new


def moved(block: Any, sums: Expectation, before: At, now: At) -> Expectation:
    """Sums with moments about the points of another E-step.

    Args:
        block: The latents.
        sums: The sums.
        before: The parameters of their E-step.
        now: Those of the other one.
    """
    out = dict(sums.sums)
    for g, rule in block.normals.items():
        old, new = before.prepared[g].mean, now.prepared[g].mean
        if old is None and new is None:
            continue
        zero = torch.zeros_like(new if old is None else old)
        step = ((zero if new is None else new) - (zero if old is None else old)).to(torch.float64)
        own = out[g]
        out[g] = {**own, "moments": _about(rule, own["moments"], own["mass"], step)}
    return replace(sums, sums=out)


def _about(rule: Gaussian, moments: Tensor, mass: Tensor, step: Tensor) -> Tensor:
    """Moments about points that are moved. # (K, P), (K,), (K, D) -> (K, P)"""
    D = step.shape[1]
    first, second, each = moments[:, :D], moments[:, D:], mass.unsqueeze(-1)
    i, j = (range(D), range(D)) if rule.diagonal else rule.upper
    cross = step[:, i] * first[:, j] + first[:, i] * step[:, j]
    return torch.cat([first - each * step, second - cross + each * step[:, i] * step[:, j]], 1)


def online_run(
    em: Guarded,
    data: Parted,
    online: StepSize | str,
    num_epochs: int,
    callbacks: Sequence[Callable[[EMStep], Any]],
    held_out: Callable[[], float] | None,
    begin: float,
) -> tuple[Run, list[tuple[int, float]]]:
    """Online EM from the parameters in the param store; the best that were found are there at the end.

    Args:
        em: The map.
        data: The data in chunks.
        online: The step sizes, or ``"incremental"``.
        num_epochs: Passes over the data.
        callbacks: Called with each step; one that returns True stops the fit.
        held_out: The log evidence of other data at the parameters in the store, in nats.
        begin: When the fit began.

    Returns:
        The run, and the held-out evidence after each pass with the number of steps before it.

    Raises:
        UsageError: If steps are not on sums that can be averaged.
        DegenerateError: If the first step has no solution.
    """
    block = _block_of(em, data)
    theta, program = block.theta, em.program
    parameters = program.graph.parameters
    total = data.all_data.rows
    run = Run(snapshot(parameters), name="values in the model")
    run.initial_values = values_of(parameters)
    apply_floors(program.graph, program.updates)
    sums: Sums = Replaced(block, total)
    if isinstance(online, StepSize):
        sums = Averaged(block, online, total)
    place = _Place(theta.enter(values_of(parameters)))

    def visit(part: Part) -> float:
        if run.status is not EMStatus.MAX_STEPS:
            return 0.0
        values = theta.values(place.at)
        at = theta.enter(values)  # as the part does
        try:
            own = part.expectation(values)
            with torch.inference_mode():
                entering = own.log_evidence * total / part.rows + theta.log_prior(at)
                stands_for_all = sums.with_chunk(own, at, place.number, part.rows)
                place.at, gain = theta.m_step(at, stands_for_all)
        except (Handover, torch.linalg.LinAlgError):
            run.status, run.message = EMStatus.DEGENERATE, NO_STEP
            return 0.0
        run.entering.append(entering)
        run.after.append(entering + gain)
        place.number += 1
        if callbacks and _stops(callbacks, run, theta.values(place.at), begin):
            run.status = EMStatus.STOPPED
        return own.log_evidence

    validation: list[tuple[int, float]] = []
    best: tuple[float, Any] = (-math.inf, None)
    try:
        for _ in range(num_epochs):
            place.number = 0
            data.over.sum(visit)
            if held_out is not None:
                write(program, theta.values(place.at))
                validation.append((run.num_steps, held_out()))
                best = max(best, (validation[-1][1], place.at), key=lambda one: one[0])
            if run.status is not EMStatus.MAX_STEPS:
                break
    except KeyboardInterrupt:
        run.status = EMStatus.INTERRUPTED
    if not run.entering and run.status is EMStatus.DEGENERATE:
        raise DegenerateError(NO_STEP)
    if run.status is EMStatus.DEGENERATE:
        warn(NO_STEP)
    write(program, theta.values(place.at if best[1] is None else best[1]))
    run.record(program, em.e_step())
    return run, validation


@dataclass(eq=False)
class _Place:
    """Where a run stands: its parameters, and the number of the next chunk of the pass."""

    at: At
    number: int = 0


def _stops(
    callbacks: Sequence[Callable[[EMStep], Any]], run: Run, values: Any, begin: float
) -> bool:
    index = run.num_steps - 1
    step = EMStep(index, run.entering[-1], None, None, dict, time.perf_counter() - begin)
    step = replace(step, made_params=Given(values))
    return any(callback(step) is True for callback in callbacks)


def _block_of(em: Guarded, data: Parted) -> Any:
    """The kernel whose sums are averaged."""
    block = em.quick.block if em.quick is not None and data.is_quick else None
    refuse_what_is_no_average(em.program, block)
    return block


def refuse_what_is_no_average(program: Program, block: Any, has_others: bool = False) -> None:
    """Refuse a kernel whose sums mean nothing at the parameters of another E-step.

    Args:
        program: The model.
        block: The kernel; None where there is none.
        has_others: Whether the sums hold what counts once.

    Raises:
        UsageError: With the reason.
    """
    why = ""
    normals = getattr(block, "normals", None)
    if has_others or normals is None:
        reasons = program.kernel.reasons or "not all chunks are of one kind"
        if has_others or block is not None:
            reasons = "they hold more than rows"
        why = f"the sums of this model are made by tables: {reasons}"
    elif any(type(rule) is not Gaussian for rule in normals.values()):
        why = "what is missing is completed at the parameters of one E-step"
    else:
        for g, group in enumerate(block.theta.graph.groups):
            family = group.family
            is_own = g in normals or group.role is Role.POINT
            if not is_own and family is not None and family.has_reference and group.observed:
                why = f"the sums of site '{group.members[0]}' are taken about its arguments"
    if why:
        raise UsageError(
            message(
                "online",
                "steps after each chunk are not there for this model.",
                why,
                ["use steps on all data: em.fit(data)"],
            )
        )


def checked_online(online: Any) -> StepSize | str:
    """What a user passed as ``online``.

    Raises:
        UsageError: If it is neither a `StepSize` nor ``"incremental"``.
    """
    if isinstance(online, StepSize) or (isinstance(online, str) and online == "incremental"):
        return online
    raise UsageError(
        message(
            "fit",
            f"online={shown(online)} is not understood.",
            "it says how sums of chunks are put together",
            ["online=StepSize(0.6): stepwise EM", "online='incremental'"],
        )
    )


def refuse_with_online(wishes: FitWishes, has_chunks: bool) -> None:
    """Refuse what steps after each chunk cannot do.

    Args:
        wishes: The keywords of ``fit``.
        has_chunks: Whether the data are chunks.

    Raises:
        UsageError: With the keyword.
    """
    checked_online(wishes.online)
    others = {
        "acceleration": wishes.acceleration is not None,
        "num_restarts": wishes.num_restarts != 1,
        "init": wishes.init is not None,
        "checkpoint": wishes.checkpoint is not None,
        "process_group": wishes.process_group is not None,
    }
    found = [name for name, is_given in others.items() if is_given]
    if has_chunks and not found:
        return
    what = f"{found[0]} was given together with online." if found else "the data are no Chunks."
    raise UsageError(
        message(
            "online",
            what,
            "an M-step follows each chunk of the data, from where the model begins, in one process",
            [f"leave {found[0]} out"] if found else ["em.fit(Chunks(x, rows=1000), online=...)"],
        )
    )


NO_STEP = message(
    "online",
    "a step on the sums so far has no solution; the parameters before it were kept.",
    "a component has lost its mass, or its spread has collapsed",
    ["pass larger chunks: Chunks(x, rows=...)", "start elsewhere, or from em.fit(some_rows)"],
)
