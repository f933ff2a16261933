"""Steps on batches that come one after the other, on one running average of their sums.

    s ← (1 − γ_t) s + γ_t S_batch / n,    θ ← M(N s),    N the rows so far

It is stepwise EM (Cappé and Moulines 2009) without an end; see `pyro_em.fitting.online`. What is kept
between two calls is a dict of tensors and numbers, so that a file can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, Handover, UsageError, message
from pyro_em.fitting.em_map import write
from pyro_em.fitting.online import NO_STEP, StepSize, moved, refuse_what_is_no_average
from pyro_em.fitting.preconditions import refuse_a_guide
from pyro_em.fitting.session import Session
from pyro_em.graph.all_data import AllData, Centre
from pyro_em.plan.over_all import all_data_of, require_partable
from pyro_em.plan.part import Part
from pyro_em.reduction.reduction import Whole
from pyro_em.tracing.parameters import values_of
from pyro_em.updates.m_step import apply_floors
from pyro_em.updates.statistics import Expectation, Key


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
        UsageError: If the sums of this model cannot be averaged.
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
    block: Any = part.program.kernel.block
    refuse_what_is_no_average(part.program, block, has_others=part.has_data_outside)
    parameters, theta = program.graph.parameters, block.theta
    if not kept:
        apply_floors(program.graph, program.updates)
    values = values_of(parameters)
    at = theta.enter(values)
    try:
        own = part.expectation(values)
        with torch.inference_mode():
            sums = (1.0 / part.rows) * own
            if kept:
                size = online.at(kept["steps"])
                before = moved(block, _expectation(kept["sums"]), theta.enter(kept["values"]), at)
                _refuse_others(before, sums)
                sums = (1 - size) * before + size * sums
            after, _ = theta.m_step(at, float(all_data.rows) * sums)
    except (Handover, torch.linalg.LinAlgError) as error:
        raise DegenerateError(NO_STEP) from error
    write(program, theta.values(after))
    session.running = {
        "steps": kept.get("steps", 0) + 1,
        "sums": _plain(sums),
        "values": {n: v.detach().clone() for n, v in values.items()},
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
    return own.log_evidence


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


def _plain(sums: Expectation) -> dict[str, dict[str, Tensor]]:
    """Sums as a file can hold them."""
    return {
        f"{type(key).__name__} {key}": {n: t.clone() for n, t in named.items()}
        for key, named in sums.sums.items()
    }


def _expectation(plain: Mapping[str, Mapping[str, Tensor]]) -> Expectation:
    sums: dict[Key, dict[str, Tensor]] = {}
    for key, named in plain.items():
        kind, _, name = key.partition(" ")
        sums[int(name) if kind == "int" else name] = dict(named)
    return Expectation(0.0, sums)


def _refuse_others(before: Expectation, now: Expectation) -> None:
    """Refuse a batch whose sums are those of another model."""
    forms = [
        {(k, n): t.shape for k, named in e.sums.items() for n, t in named.items()}
        for e in (before, now)
    ]
    if forms[0] != forms[1]:
        raise UsageError(
            message(
                "partial_fit",
                "the sums of this batch are not those of the ones before.",
                "every batch has to read as the same model",
                ["pass larger batches", "forget what came before: em.reset()"],
            )
        )
