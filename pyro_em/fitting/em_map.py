"""One full step: the M-step, the E-step after it, what users see of it, and the promise it keeps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em.errors import DataError, DegenerateError, Handover, message, warn
from pyro_em.fitting.em_on_sums import Iteration, Point, keep_freed_memory
from pyro_em.fitting.result import EMStatus, EMStep
from pyro_em.fitting.run import Deferred, Iterate, Run, Settings
from pyro_em.fitting.stopping import should_stop
from pyro_em.plan.planner import distrust
from pyro_em.plan.program import Program
from pyro_em.tracing.parameters import restore, snapshot, values_of, write_unconstrained
from pyro_em.updates.statistics import dot, expected_log_joint


def e_step(program: Program, index: int = 0) -> Iterate:
    """The E-step of step ``index`` at the parameters in the store."""
    evaluation = program.evaluate()
    return Iterate(evaluation, program.e_step(evaluation, index))


def advance(program: Program, at: Iterate, *, index: int, verify: bool) -> Iterate:
    """The M-step of step ``index`` from the E-step ``at``, and the E-step at the new parameters."""
    origin = snapshot(program.graph.parameters)
    report = program.m_step(at.q.counts, at.evaluation)
    if verify and program.compiled and not confirmed(program, origin):
        at = e_step(program, index)
        report = program.m_step(at.q.counts, at.evaluation)
    try:
        reached = e_step(program, index + 1)
        reached.massless = report.massless
        return reached
    except BaseException:
        restore(program.graph.parameters, origin)
        raise


def after_m_step(before: Iterate, tables: Sequence[Tensor]) -> float:
    """ELBO(q, θ_new) in nats, from the E-step before and the log densities after the M-step."""
    return expected_log_joint(before.q.counts, tables) + before.q.entropy()


def as_step(program: Program, index: int, before: Iterate, bound: float, begin: float) -> EMStep:
    """A step as users see it: the bound entering it and the bound after its M-step."""
    return EMStep(
        index,
        before.objective,
        before.log_evidence,
        bound,
        values_of(program.graph.parameters),
        time.perf_counter() - begin,
        lambda: before.q,
    )


def fell(program: Program, before: Iterate, after: Iterate) -> bool:
    """Promise: the objective never falls; a fall is reported with the site that did it."""
    old, new = before.objective, after.objective
    if new >= old - allowed_fall(old, program.graph.eps) or not program.is_monotone:
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
    warn(
        message(
            f"site '{group.members[0]}', parameters {names}",
            f"the {program.objective_name} fell from {old:.9g} to {new:.9g}; the expected log joint "
            f"of this site changed by {losses[worst]:.3g}. The parameters before the fall were kept.",
            "an exact EM step cannot do that: rounding, or a model that hides a dependence",
            ["use float64", "avoid detach and branches on parameters in the model"],
        ),
    )
    return True


Values = Mapping[str, Tensor]


class EMMap:
    """θ → EM(θ) as a map of values, by compiled or by full steps.

    Args:
        program: The model with its data.
        iteration: Its compiled step, or None.
    """

    def __init__(self, program: Program, iteration: Iteration | None) -> None:
        self.program, self.iteration = program, iteration

    def e_step(self, values: Values) -> Iterate:
        """The E-step at some values.

        Raises:
            Handover: If there is no usable E-step there.
        """
        try:
            if self.iteration is not None:
                iteration = self.iteration
                return Deferred(self.program, iteration.e_step(iteration.enter(values)))
            write(self.program, values)
            return e_step(self.program)
        except (DataError, DegenerateError, torch.linalg.LinAlgError, ValueError) as error:
            raise Handover from error

    def m_step(self, at: Iterate) -> tuple[Values, float]:
        """The values after the M-step, and the bound ELBO(q, θ_new) there.

        Raises:
            Handover: If a compiled M-step is out of the ordinary.
            DegenerateError: If an update is degenerate.
        """
        if isinstance(at, Deferred):
            assert self.iteration is not None
            try:
                after, gain = self.iteration.m_step(at.point)
                return self.iteration.values(after), at.objective + gain
            except torch.linalg.LinAlgError as error:
                raise Handover from error
        self.program.m_step(at.q.counts, at.evaluation)
        bound = after_m_step(at, self.program.evaluate().tables)
        return values_of(self.program.graph.parameters), bound

    def unconstrained(self, values: Values) -> Tensor:
        """All values as one vector of real numbers."""
        parts = []
        for name, value in values.items():
            constraint = self.program.graph.parameters[name].constraint
            inverse = transform_to(constraint).inv(value.to(torch.float64))
            parts.append(inverse.reshape(-1))
        return torch.cat(parts)

    def constrained(self, vector: Tensor, like: Values) -> dict[str, Tensor]:
        """Back from a vector."""
        out, begin = {}, 0
        for name, value in like.items():
            transform = transform_to(self.program.graph.parameters[name].constraint)
            shape = transform.inverse_shape(value.shape)
            end = begin + math.prod(shape)
            out[name] = transform(vector[begin:end].reshape(shape)).to(value.dtype)
            begin = end
        return out


def compiled_iteration(program: Program) -> Iteration | None:
    """The step of a program on sums over the data, or None."""
    block = program.kernel.block
    if block is None:
        return None
    keep_freed_memory()
    return Iteration(block)


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
            status = should_stop(path, settings.tol, eps, point.expectation.noise)
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
