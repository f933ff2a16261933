"""The log density of a site whose family has no record, and what is said where there is none."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_em.distributions import is_outside, unwrap
from pyro_em.errors import DataError, DegenerateError, message
from pyro_em.tracing.sites import Role
from pyro_em.tracing.support import density_anywhere


def log_density_of_site(name: str, fn: Any, value: Tensor, role: Role) -> Tensor:
    """The log density of a site without a record of its family."""
    try:
        # With latents enumerated every row meets every value, also those that cannot produce it.
        if role is Role.DATA and is_outside(fn, value):
            return density_anywhere(fn, value)
        return fn.log_prob(value)
    except ValueError as error:  # torch's validation
        text = str(error).split("\n")[0].removesuffix(", but found invalid values:")
        if role is not Role.DATA:
            raise DegenerateError(outside_support(name, fn, text)) from error
        kind = type(unwrap(fn)[0]).__name__
        raise DataError(
            message(
                f"site '{name}'",
                f"the density of its observed values cannot be evaluated: {text}.",
                f"every row is tried with every value of the latents, and {kind} has no density "
                "for some of them",
                [
                    "let all values of a latent choose among distributions of one support",
                    "check the data against each of them by itself: fn.support.check(x)",
                ],
            )
        ) from error


def outside_support(name: str, fn: Any, text: str) -> str:
    """What is said of a site whose density cannot be evaluated."""
    kind = type(unwrap(fn)[0]).__name__
    return message(
        f"site '{name}'",
        f"its density cannot be evaluated: {text}.",
        f"the value, or an argument of {kind}, left its support: a guide that is wider than the "
        "model's distribution, a spread that goes to zero, a step too far",
        [
            "let the guide draw only what the model can: LogNormal or AutoNormal for what is positive",
            "give parameters the constraint of the support: pyro.param(..., constraint=...)",
            "start elsewhere, or give scales a prior that is zero at zero (InverseGamma)",
        ],
    )
