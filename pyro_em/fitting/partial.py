"""Steps on batches that come one after the other, on one running average of their sums.

    s ← (1 − γ_t) s + γ_t S_batch / n,    θ ← M(N s),    N the rows so far

It is stepwise EM (Cappé and Moulines 2009) without an end; see `pyro_em.fitting.batches.online`. What
is kept between two calls is a dict of tensors and numbers, so that a file can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from pyro_em.errors import DegenerateError, Handover, UsageError, message
from pyro_em.fitting.batches.online import NO_STEP
from pyro_em.fitting.batches.online_steps import Marks, OnTables, steps_of
from pyro_em.fitting.batches.online_sums import StepSize
from pyro_em.fitting.preconditions import refuse_a_guide
from pyro_em.fitting.session import Session
from pyro_em.fitting.steps.resuming import own_copy
from pyro_em.graph.all_data import AllData, Centre
from pyro_em.plan.over_all import all_data_of, require_partable
from pyro_em.plan.part import Part
from pyro_em.posteriors.continuous.gaussian_steps import for_updates
from pyro_em.reduction.flat import form
from pyro_em.reduction.reduction import Whole
from pyro_em.reduction.trees import leaves
from pyro_em.tracing.encoding import decoded, encoded
from pyro_em.tracing.missing import has_missing
from pyro_em.tracing.parameters import restore, snapshot
from pyro_em.updates.m_step import apply_floors


def partial_fit(session: Session, online: Any, args: tuple, kwargs: dict[str, Any]) -> float:
    """One step on a batch; the parameters are written in place.

    Args:
        session: What is known of the model, and the running sums.
        online: The sizes of steps.
        args: The model's positional arguments, for the batch.
        kwargs: Its keyword arguments.

    Returns:
        The log evidence of the batch at the parameters entering the step, in nats.

    Raises:
        UsageError: If no sums of one size hold what the rows say.
        DegenerateError: If the step has no solution; parameters and sums are as before.
    """
    if not isinstance(online, StepSize):
        raise UsageError(
            message(
                "partial_fit",
                "online is no StepSize.",
                "sums of batches are averaged, with steps that become smaller",
                ["pass online=StepSize(0.6)"],
            )
        )
    program = refuse_a_guide(session.ready(args, kwargs), "partial_fit")
    require_partable(program, "in batches")
    kept: Mapping[str, Any] = session.running
    part = Part(program)
    all_data = _joined(kept.get("data"), all_data_of(Whole(part), program))
    part = part.told(all_data)
    parameters = program.graph.parameters
    # A batch in which nothing is missing has sums of the form of those in which something is.
    block = None if has_missing(session.request.model) else part.program.kernel.adding
    known = decoded(kept["marks"]) if kept.get("marks") is not None else None
    steps = steps_of(part, block, session.m_step_state, Whole(part), part.rows, known)
    now = steps.marks if isinstance(steps, OnTables) else None
    if known is not None and now is not None and known.differing != now.differing:
        _refuse_other_rows(known, now, part)
    origin = snapshot(parameters)
    if not kept:
        apply_floors(program.graph, program.updates)
        steps.begin()
    try:
        rows, evidence, own = steps.e_step(Whole(part))
        sums = (1.0 / rows) * own
        if kept:
            size, before = online.at(kept["steps"]), decoded(kept["sums"])
            _refuse_others(before, sums)
            sums = (1 - size) * steps.here(before) + size * sums
        steps.m_step(float(all_data.rows) * sums)
    except BaseException as error:
        restore(parameters, origin)
        if isinstance(error, (Handover, torch.linalg.LinAlgError)):
            raise DegenerateError(NO_STEP) from error
        raise
    steps.publish()
    session.running = {
        "steps": kept.get("steps", 0) + 1,
        "sums": own_copy(encoded(sums)),
        "marks": None if now is None else encoded(now),
        "data": {
            "rows": all_data.rows,
            "centres": {
                n: {"mean": c.mean, "low": c.low, "high": c.high}
                for n, c in all_data.centres.items()
            },
            "magnitudes": dict(all_data.magnitudes),
            "read": dict(all_data.read),
        },
    }
    session.total_steps += 1
    return evidence


def _joined(kept: Mapping[str, Any] | None, new: AllData) -> AllData:
    """What is known of all batches: centres stay where they were, bounds grow."""
    if kept is None:
        return replace(new, vectors=None)
    centres = {}
    for name, centre in new.centres.items():
        known = kept["centres"][name]
        low = torch.minimum(known["low"], centre.low)
        centres[name] = Centre(known["mean"], low, torch.maximum(known["high"], centre.high))
    magnitudes = {n: torch.maximum(m, kept["magnitudes"][n]) for n, m in new.magnitudes.items()}
    read = {n: r | kept["read"][n] for n, r in new.read.items()}
    return AllData(kept["rows"] + new.rows, centres, magnitudes, read)


def _refuse_other_rows(known: Marks, now: Marks, part: Part) -> None:
    """Refuse a batch that shows that rows differ in what those before it had in common."""
    g, names = next((g, d) for g, d in now.differing.items() if d != known.differing[g])
    site = for_updates(part.program.graph).groups[g].members[0]
    name = next(n for n in names if n not in known.differing[g])
    raise UsageError(
        message(
            f"partial_fit, site '{site}'",
            f"{name} differs between rows, which those of earlier batches had in common.",
            "sums that were kept do not hold what it says of them",
            [
                "let the first batch hold rows that differ",
                "forget what came before: em.reset()",
            ],
        )
    )


def _refuse_others(before: Any, now: Any) -> None:
    """Refuse a batch whose sums are those of another model."""
    if type(before) is not type(now) or form(leaves(before)) != form(leaves(now)):
        raise UsageError(
            message(
                "partial_fit",
                "the sums of this batch are not those of the ones before.",
                "every batch has to read as the same model",
                ["pass larger batches", "forget what came before: em.reset()"],
            )
        )
