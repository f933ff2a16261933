"""Whether bindings are what a model does: a run at other parameters, and what follows where not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributions import transform_to

from pyro_em.errors import message
from pyro_em.plan.agreement import disagreements_of
from pyro_em.plan.evaluation import Disagreement
from pyro_em.plan.program import Program
from pyro_em.tracing.parameters import moved, parameters_at
from pyro_em.updates.update import Fixed, Gradient, ParameterUpdate


def verified(program: Program) -> Program:
    """The program after its bindings were held against a run at other parameters.

    What they do not show gets a gradient.
    """
    off = _disagreements_elsewhere(program)
    if not off:
        return replace(program, compiled=program.graph.is_static)
    program = distrusted(program, off)
    random = disagreements_of(program, random_seed=21)
    program = program.noting(random.note)
    if not random or program.structure.random_plates:
        return program
    site, argument = random.places[0]
    return program.noting(
        message(
            f"site '{site}' ({argument})",
            "the model draws random numbers that reach it.",
            "every step uses one and the same draw; another call would draw others",
            ["draw outside the model and pass the numbers as an argument"],
        ),
    )


def distrusted(program: Program, off: Disagreement) -> Program:
    """The program with every parameter of a site whose bindings are wrong left to a gradient step."""
    sites = {site for site, _ in off.places}
    updates = dict(program.updates)
    for group in program.graph.groups:
        if not sites.intersection(group.members) and "model" not in sites:
            continue
        for name in group.params:
            if isinstance(updates[name].update, (Gradient, Fixed)):
                continue
            where = ", ".join(f"'{s}' ({a})" for s, a in off.places[:3])
            updates[name] = ParameterUpdate(
                name,
                program.gradient or Gradient(),
                f"the model changes {where} in a way that no binding shows "
                "(detach, .item(), a branch on a value, randomness)",
            )
    return replace(program.noting(off.note), compiled=False, updates=updates)


def _disagreements_elsewhere(program: Program) -> Disagreement:
    """Trace once with all free parameters moved inside their constraints and another random state."""
    places = program.graph.parameters
    unconstrained = moved(places, seed=20)
    direct = {n: u for n, u in unconstrained.items() if places[n].leaf is places[n].unconstrained}
    with torch.no_grad():
        values = {n: transform_to(places[n].constraint)(u) for n, u in unconstrained.items()}
    with parameters_at({n: places[n] for n in direct}, direct, unconstrained=True):
        return disagreements_of(program, values, random_seed=20)
