"""Steps of the compiled iteration: parameters are plain values until somebody can look.

The first step is verified against a fresh trace of the model, as in `pyro_em.loop`; whatever the
compiled iteration hands over is judged there, and it may be taken up again afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyro_em._errors import message, warn
from pyro_em._pyro import restore, snapshot, values_of, write_unconstrained
from pyro_em.compiled import Handover, Iteration, Point, compile_iteration
from pyro_em.program import Program, distrust
from pyro_em.result import EMStatus
from pyro_em.runs import Deferred, Iterate, Run, Settings
from pyro_em.stopping import should_stop


def compiled_iteration(program: Program) -> Iteration | None:
    """The compiled step of a program, or None."""
    if not program.compiled or program.strategy is not None:
        return None
    if program.structure.random_plates or any(g.value.is_inference() for g in program.graph.groups):
        return None
    return compile_iteration(program.graph, program.updates, values_of(program.graph.parameters))


def enter(program: Program, iteration: Iteration) -> Deferred | None:
    """The compiled E-step at the parameters in the store; None where the full one has to look."""
    try:
        point = iteration.e_step(iteration.enter(values_of(program.graph.parameters)))
    except (Handover, torch.linalg.LinAlgError):
        return None
    return Deferred(program, point)


def watched_step(
    program: Program, iteration: Iteration, at: Deferred, *, verify: bool
) -> tuple[Deferred, float] | None:
    """One compiled step whose parameters are in the store when somebody looks.

    Args:
        program: The model with its data.
        iteration: Its compiled step.
        at: The E-step at the parameters in the store.
        verify: Whether to compare the compiled plan with a fresh trace.

    Returns:
        The E-step at the new parameters and the bound after the M-step; None where a full step is
        due, and then nothing was changed.
    """
    try:
        after, gain = iteration.m_step(at.point)
        reached = iteration.e_step(after)
    except (Handover, torch.linalg.LinAlgError):
        return None
    if reached.objective < at.objective - allowed_fall(at.objective, program.graph.eps):
        return None
    if verify and not _verified(program, reached.values):
        return None
    write(program, reached.values)
    return Deferred(program, reached), at.objective + gain


def advance_compiled(
    program: Program, iteration: Iteration, settings: Settings, run: Run, r: int
) -> bool:
    """Compiled steps from the run's last iterate until a rule stops the run.

    Args:
        program: The model with its data.
        iteration: Its compiled step.
        settings: What all starts share.
        run: Its last iterate is `Deferred`; it is left at the last complete step.
        r: The start's number.

    Returns:
        Whether the run is over; if not, a full step is due.
    """
    assert isinstance(run.last, Deferred)
    point = run.last.point
    eps = program.graph.eps
    over = True
    try:
        while run.num_steps < settings.max_steps:
            after, gain = iteration.m_step(point)
            reached = iteration.e_step(after)
            if reached.objective < point.objective - allowed_fall(point.objective, eps):
                raise Handover
            if run.num_steps == run.verify_at:
                if not settings.verify:
                    write(program, reached.values)
                elif not _verified(program, reached.values):
                    over = False
                    break
                run.verified = snapshot(program.graph.parameters)
            run.entering.append(point.objective)
            run.after.append(point.objective + gain)
            point = reached
            settings.bar.update(r, point.objective)
            path = [*run.plain_path(), point.objective]
            status = should_stop(path, settings.tol, eps, point.sums.noise)
            if status is not None:
                run.status = status
                break
    except (Handover, torch.linalg.LinAlgError):
        over = False
    except KeyboardInterrupt:
        run.status = EMStatus.INTERRUPTED
    return settle(program, run, point.values, lambda: _settled(program, iteration, point)) or over


def settle(
    program: Program, run: Run, values: Mapping[str, Tensor], at: Callable[[], Iterate]
) -> bool:
    """Put values into the store and the run, whole, even if an interrupt comes in between.

    Args:
        program: The model with its data.
        run: What records them.
        values: Parameter values.
        at: Makes the iterate at them, when they are in the store.

    Returns:
        Whether there was an interrupt; the run's status says so then.
    """
    interrupted = False
    for last in (False, True):
        try:
            write(program, values)
            run.record(program, at())
            return interrupted
        except KeyboardInterrupt:
            run.status, interrupted = EMStatus.INTERRUPTED, True
            if last:
                raise
    return interrupted


def _settled(program: Program, iteration: Iteration, point: Point) -> Deferred:
    """The iterate at what the store holds now: a transform may round."""
    return enter(program, iteration) or Deferred(program, point)


def _verified(program: Program, values: Mapping[str, Tensor]) -> bool:
    """Write the values and verify the compiled plan there; if not, all is as before."""
    origin = snapshot(program.graph.parameters)
    try:
        write(program, values)
        return confirmed(program, origin)
    except BaseException:
        restore(program.graph.parameters, origin)
        raise


def confirmed(program: Program, origin: Mapping[str, Tensor]) -> bool:
    """Whether a fresh trace agrees with the compiled plan after the first M-step.

    On a disagreement it is said, the parameters go back to ``origin``, and the plan is dropped.
    """
    off = program.disagreements()
    if not off:
        return True
    warn_disagreement(off[0], "it is not")
    restore(program.graph.parameters, origin)
    distrust(program, off)
    return False


def write(program: Program, values: Mapping[str, Tensor]) -> None:
    """Write constrained values into the store."""
    with torch.no_grad():
        for name, value in values.items():
            p = program.graph.parameters[name]
            if not torch.equal(p.value(), value):
                write_unconstrained(p, value)


def allowed_fall(objective: float, eps: float) -> float:
    """By how much rounding may lower an objective."""
    return (1e-9 if eps < 1e-12 else 1e-5) * max(1.0, abs(objective))


def warn_disagreement(place: tuple[str, str], when: str) -> None:
    """Say that the compiled plan and the model disagree, and that the generic path goes on."""
    site, argument = place
    warn(
        message(
            f"site '{site}', argument '{argument}'",
            f"{when} what the compiled plan predicts; the fit continues on the generic path from "
            "the last verified parameters.",
            "the model changes in a way that its autograd graph does not show",
            ["avoid detach, .item() and branches on parameters in the model"],
        ),
    )
