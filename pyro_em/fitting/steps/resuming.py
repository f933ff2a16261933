"""Where a run of exact EM stands, as plain values that a file can hold, and the run again.

What determines the next step to the last bit is kept as it is: the kernel's own form of the parameters
and the sums of its E-step, not the values in the param store, which a transform has rounded. An E-step
through tables is too large to keep; it is made again from what it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.fitting.results.history import EMStatus
from pyro_em.fitting.steps.em_on_sums import SumsPoint, on_sums
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.fitting.steps.point import LeftPoint, PartsPoint, Point, TracedPoint
from pyro_em.fitting.steps.run import Cycle, EMRun, Seen
from pyro_em.plan.part import Made
from pyro_em.tracing.encoding import NotPlain, decoded, encoded
from pyro_em.tracing.parameters import restore, snapshot
from pyro_em.tracing.randomness import random_state, set_random_state
from pyro_em.updates.gradients.optimizers import of_update, state_of, with_state
from pyro_em.updates.m_step import MStepState
from pyro_em.updates.update import Gradient


@dataclass(frozen=True, eq=False)
class Between:
    """What lasts from step to step and changes in the midst of one.

    Attributes:
        random: The random states.
        optimizers: The optimisers of M-steps by gradient, as plain values of their own.
    """

    random: Any
    optimizers: Mapping[str, Any]

    @classmethod
    def of(cls, em: Guarded) -> Between:
        """As it is now."""
        return cls(random_state(), optimizers_state(em.state))


def standing_state(
    em: Guarded, run: EMRun, is_watched: bool, between: Between | None = None
) -> dict[str, Any]:
    """Where a run stands, as plain values that later steps do not change.

    Args:
        em: The map.
        run: The run, after a complete step.
        is_watched: Whether somebody may have written parameters since that step.
        between: What a step that was broken off may have changed; taken now where None.
    """
    # Steps on sums write nothing, and what was written before is what was recorded last.
    is_recorded = isinstance(run.last, SumsPoint) and not is_watched
    store = run.parameters if is_recorded else snapshot(em.program.graph.parameters)
    between = Between.of(em) if between is None else between
    return {
        **_path(run),
        "last": _of_point(run.last),
        "judges": run.judges,
        "stretch": run.stretch,
        "is_recorded": run.recorded is run.last,
        "is_stopped": run.status is EMStatus.STOPPED,
        "cycle": _of_cycle(run.cycle),
        "fork": run.fork,
        "store": encoded(store),
        "handovers": em.handovers,
        "is_sound": em.quick is None,
        "random": encoded(between.random),
        "optimizers": between.optimizers,
    }


def _path(run: EMRun) -> dict[str, Any]:
    return {
        "name": run.name,
        "parameters": encoded(run.parameters),
        "initial_values": encoded(run.initial_values),
        "verified": encoded(run.verified),
        "entering": torch.tensor(run.entering, dtype=torch.float64),
        "after": torch.tensor(run.after, dtype=torch.float64),
        "plain_from": run.plain_from,
        "verify_at": run.verify_at,
        "began_symmetric": run.began_symmetric,
    }


def ended_state(run: EMRun) -> dict[str, Any]:
    """A run whose last E-step has been let go, or which never had one, as plain values."""
    last = run.last if run.last is None else LeftPoint.of(run.last)
    # What was interrupted goes on.
    status = EMStatus.MAX_STEPS if run.status is EMStatus.INTERRUPTED else run.status
    return {
        **_path(run),
        "last": _of_point(last),
        "status": status.name,
        "message": run.message,
    }


def is_ended(state: Mapping[str, Any]) -> bool:
    """Whether `ended_state` made a state."""
    return "status" in state


def ended_run(state: Mapping[str, Any]) -> EMRun:
    """The run that `ended_state` made a state of."""
    run = _bare(state)
    run.status, run.message = EMStatus[state["status"]], state["message"]
    if state["last"] is not None:
        run.last = run.recorded = _left(state["last"])
    return run


def resumed(em: Guarded, state: Mapping[str, Any]) -> EMRun:
    """The run that `standing_state` made a state of; the param store holds what it held then.

    Args:
        em: The map, whose program has been read as it was.
        state: The state.
    """
    em.start_over()
    run = _bare(state)
    run.is_resumed = True
    run.judges, run.stretch, run.fork = state["judges"], state["stretch"], state["fork"]
    run.status = EMStatus.STOPPED if state["is_stopped"] else EMStatus.MAX_STEPS
    run.last = _point_of(em, state["last"])
    run.recorded = run.last if state["is_recorded"] else None
    run.cycle = _cycle_of(em, state["cycle"])
    run.seen = Seen(em.program, run.parameters)
    restore(em.program.graph.parameters, decoded(state["store"]))
    em.handovers = state["handovers"]
    if state["is_sound"]:
        em.stay_sound()
    restore_optimizers(em, state["optimizers"])
    set_random_state(decoded(state["random"]))
    return run


def _bare(state: Mapping[str, Any]) -> EMRun:
    """The parts of a run that need no model."""
    run = EMRun(decoded(state["parameters"]), name=state["name"])
    run.initial_values, run.verified = decoded(state["initial_values"]), decoded(state["verified"])
    run.entering, run.after = state["entering"].tolist(), state["after"].tolist()
    run.plain_from, run.verify_at = state["plain_from"], state["verify_at"]
    run.verified_at = run.verify_at + 1  # where runs are kept, it is verified at once
    run.began_symmetric = state["began_symmetric"]
    return run


# ---------------------------------------------------------------- optimisers of M-steps


def optimizers_state(state: MStepState) -> dict[str, Any]:
    """The optimisers of M-steps by their parameters' names, as plain values of their own."""
    return {key: own_copy(state_of(one)) for key, one in state.optimizers.items()}


def own_copy(value: Any) -> Any:
    """The same containers with tensors of their own, which no later step changes."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: own_copy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(own_copy(v) for v in value)
    return value


def restore_optimizers(em: Guarded, saved: Mapping[str, Any]) -> None:
    """Build the optimisers of a state, at the parameters as they are now."""
    em.state.optimizers.clear()
    parameters, updates = em.program.graph.parameters, em.program.updates
    for key, state in saved.items():
        names = [n for n in parameters if n in key.split(",")]
        update = updates[names[0]].update
        assert isinstance(update, Gradient) and update.optimizer is not None
        places = [parameters[n].unconstrained for n in names]
        em.state.optimizers[key] = with_state(of_update(update.optimizer, places), state)


# ---------------------------------------------------------------- points


def _of_point(point: Point | None) -> dict[str, Any] | None:
    """A point as plain values."""
    if point is None:
        return None
    massless = {n: tuple(events) for n, events in point.massless.items()}
    if isinstance(point, SumsPoint):
        return {
            "kind": "sums",
            "massless": massless,
            "at": encoded(point.at),
            "expectation": _of_sums(point),
            "log_prior": encoded(point.log_prior),
            "values": encoded(point.__dict__.get("values")),
        }
    if isinstance(point, (TracedPoint, PartsPoint)) and point.made is not None:
        return {
            "kind": "made",
            "massless": massless,
            "unconstrained": encoded(point.made.unconstrained),
            "index": point.made.index,
            "random": encoded(point.made.random),
        }
    if isinstance(point, TracedPoint):
        return {"kind": "judged", "massless": massless, "values": encoded(point.values)}
    return {
        "kind": "left",
        "massless": massless,
        "objective": encoded(point.objective),
        "log_evidence": encoded(point.log_evidence),
    }


def _of_sums(point: SumsPoint) -> Any:
    """The E-step of a point; None where it holds more than sums, and is made again."""
    try:
        return encoded(point.expectation)
    except NotPlain:
        return None


def _point_of(em: Guarded, state: Mapping[str, Any] | None) -> Point | None:
    """The point of a state; an E-step through tables writes the param store and draws as it did."""
    if state is None:
        return None
    point: Point
    if state["kind"] == "sums":
        point = _sums_of(em, state)
    elif state["kind"] == "made":
        point = _made_of(em, state)
    elif state["kind"] == "judged":
        values = decoded(state["values"])
        evaluation = em.program.evaluate(values)
        point = TracedPoint(values, evaluation, em.program.posterior(evaluation))
    else:
        return _left(state)
    point.massless = dict(state["massless"])
    return point


def _sums_of(em: Guarded, state: Mapping[str, Any]) -> SumsPoint:
    steps = on_sums(em.program, em.data)
    assert steps is not None  # the fingerprint of the fit names what iterates
    at = decoded(state["at"])
    try:
        expectation = decoded(state["expectation"])
    except NotPlain:  # an earlier version's, which held other numbers
        expectation = None
    if expectation is None:
        with torch.inference_mode():
            expectation = steps.expectation(at)
    log_prior, values = decoded(state["log_prior"]), decoded(state["values"])
    return steps.point(at, expectation, log_prior, values)


def _made_of(em: Guarded, state: Mapping[str, Any]) -> Point:
    made = Made(decoded(state["unconstrained"]), state["index"], decoded(state["random"]))
    restore(em.program.graph.parameters, made.unconstrained)
    before = random_state()
    try:
        if made.random is not None:
            set_random_state(made.random)
        return em.sound.e_step(index=made.index)
    finally:
        set_random_state(before)


def _left(state: Mapping[str, Any]) -> LeftPoint:
    objective, log_evidence = decoded(state["objective"]), decoded(state["log_evidence"])
    return LeftPoint(dict(state["massless"]), objective, log_evidence)


_OF_CYCLE = ("longest", "num_steps", "gain", "rounding", "is_over")


def _of_cycle(cycle: Cycle | None) -> dict[str, Any] | None:
    if cycle is None:
        return None
    return {
        "start": _of_point(cycle.start),
        "best": _of_point(cycle.best),
        "first": _of_point(cycle.first),
        "secants": encoded(cycle.secants),
        **{name: getattr(cycle, name) for name in _OF_CYCLE},
    }


def _cycle_of(em: Guarded, state: Mapping[str, Any] | None) -> Cycle | None:
    if state is None:
        return None
    start, best = _point_of(em, state["start"]), _point_of(em, state["best"])
    assert start is not None and best is not None
    first = _point_of(em, state["first"])
    numbers = {name: state[name] for name in _OF_CYCLE}
    return Cycle(start=start, best=best, first=first, secants=decoded(state["secants"]), **numbers)
