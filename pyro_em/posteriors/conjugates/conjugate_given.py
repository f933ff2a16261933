"""A distribution that a user gives in place of a conjugate latent's posterior."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pyro_em.distributions import unwrap
from pyro_em.errors import UsageError, message
from pyro_em.families.family import Arguments
from pyro_em.posteriors.conjugates.conjugate import ConjugateBlock
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution


def conjugate_given(
    block: ConjugateBlock, solution: ConjugateSolution, given: Any, where: str
) -> ConjugateSolution:
    """What stands for a conjugate latent: a distribution of its posterior's class.

    Args:
        block: The block of the latent.
        solution: Its posterior.
        given: What the user gave.
        where: The argument that it is.

    Raises:
        UsageError: If it is no such distribution, or has another shape.
    """
    kernel, group = block.kernel, block.groups[0]
    wanted = kernel.arguments(solution.chi)[0]
    base = unwrap(given)[0] if isinstance(given, torch.distributions.Distribution) else given
    if isinstance(base, torch.distributions.Distribution) and type(base).__name__ == "Delta":
        return _at_values(block, solution, base, where, wanted)
    if type(base) is not wanted:
        raise UsageError(_unfit(block, where, f"it is no {wanted.__name__}", wanted))
    names = kernel.arguments(solution.chi)[1]
    arguments: Arguments = {n: getattr(base, n).to(torch.float64) for n in names}
    chi = kernel.chi(arguments) if wanted is kernel.distribution else _of_gamma(arguments)
    # One draw of all discrete latents stands before none: the given q knows no cells.
    shape = (*group.value.shape[1 : 1 + group.n_plates], *group.value.shape[1 + len(group.sizes) :])
    shape = shape[: len(shape) - kernel.event_dim]
    try:
        rows = chi.squeeze().expand(*shape, chi.shape[-1]) if chi.dim() == 1 else chi
        rows = rows.reshape(block.count, 1, chi.shape[-1])
    except RuntimeError as error:
        what = f"its batch shape is {tuple(given.batch_shape)}"
        raise UsageError(_unfit(block, where, what, wanted)) from error
    return replace(solution, given=rows, place=None, few=None)


def _at_values(
    block: ConjugateBlock, solution: ConjugateSolution, base: Any, where: str, wanted: type
) -> ConjugateSolution:
    """What stands for a latent that has values: their statistics, and no spread."""
    group, value = block.groups[0], base.v.to(torch.float64)
    shape = (*group.value.shape[1 : 1 + group.n_plates], *group.value.shape[1 + len(group.sizes) :])
    try:
        rows = value.expand(shape) if value.numel() < group.value.numel() else value.reshape(shape)
    except RuntimeError as error:
        raise UsageError(
            _unfit(block, where, f"its shape is {tuple(value.shape)}", wanted)
        ) from error
    t = block.kernel.statistics_at(rows)
    if not bool(torch.isfinite(t).all()):
        raise UsageError(_unfit(block, where, "a value is at the end of its support", wanted))
    return replace(solution, values=t.reshape(block.count, 1, -1))


def _of_gamma(a: Arguments) -> torch.Tensor:
    return torch.stack([a["concentration"], a["rate"]], -1)


def _unfit(block: ConjugateBlock, where: str, what: str, wanted: type) -> str:
    return message(
        f"{where}['{block.latent}']",
        f"{what}.",
        "in a conjugate latent's place stands a distribution of its posterior's form",
        [f"give a {wanted.__name__}", "leave it out, for its posterior"],
    )
