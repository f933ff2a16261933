"""One full step: the M-step, the E-step after it, what users see of it, and the promise it keeps."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from pyro_em._errors import message, warn
from pyro_em._pyro import restore, snapshot, values_of
from pyro_em.compiled_loop import allowed_fall, confirmed
from pyro_em.e_step import dot, expected_log_joint
from pyro_em.program import Program
from pyro_em.result import EMStep
from pyro_em.runs import Iterate


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
