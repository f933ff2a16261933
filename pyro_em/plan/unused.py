"""What was asked for and has no effect on a program: its plan says so."""

from __future__ import annotations

from dataclasses import replace

from pyro_em.plan.program import Program
from pyro_em.updates.update import Gradient


def noting_unused(program: Program, optim: object) -> Program:
    """The program without a strategy that has no meaning; it says what is not used.

    Args:
        program: The program.
        optim: The user's optimiser.
    """
    program = without_unused_strategy(program)
    if optim is None or not program.updates:
        return program
    if any(isinstance(u.update, Gradient) for u in program.updates.values()):
        return program
    return program.noting(
        "optim is not used: no parameter needs a gradient (updates={name: Gradient(optim)} "
        "would move one by it).",
    )


def without_unused_strategy(program: Program) -> Program:
    """The program without an E-step that has no meaning because no latent is summed; it says so."""
    if program.strategy is None or program.graph.latents:
        return program
    note = f"strategy={program.strategy!r} is not used: no latent is summed."
    return replace(program.noting(note), strategy=None)
