"""Errors about bounds that are not finite and about draws outside a support, in the user's names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, Finding, PyroEMError, message
from pyro_em.tracing.handlers import GuideSites
from pyro_em.variational.particle import Particle


def require_finite(particle: Particle, loss: Tensor) -> None:
    """Refuse a draw whose loss is not finite, by the site whose term is not.

    Raises:
        DegenerateError: If it is not.
    """
    if math.isfinite(loss.item()):
        return
    for t in particle.terms:
        if not bool(torch.isfinite(t.value).all()):
            where = "the sum over exact latents" if t.role is None else _in_words(t.site)
            raise DegenerateError(not_finite(where, float(t.value.detach().sum())))
    raise DegenerateError(not_finite("model", -float(loss.detach())))


def _in_words(site: str) -> str:
    """A term's site as the user called it."""
    name = site.removeprefix("kl:").removeprefix(GuideSites.prefix)
    return f"guide site '{name}'" if site.startswith(GuideSites.prefix) else f"site '{name}'"


def not_finite(where: str, value: float, line: str = "") -> str:
    """What to say of a bound that is not finite, or of a draw outside a support."""
    return message(
        where,
        line or f"the bound is {value} because of it.",
        "a step from there would destroy every parameter",
        [
            "use a smaller learning rate",
            "let the guide draw only what the model can: AutoNormal, or LogNormal for what is "
            "positive",
            "keep scales away from zero (constraints, or softplus plus a small number)",
            "check the data at this site for NaN and infinite values",
        ],
    )


def in_users_names(problem: Finding) -> Finding:
    """A finding about the pair, with the guide's sites as the user called them."""

    def renamed(text: str) -> str:
        return text.replace(f"site '{GuideSites.prefix}", "guide site '").replace(
            f"'{GuideSites.prefix}", "'"
        )

    return replace(
        problem,
        where=renamed(problem.where),
        what=renamed(problem.what),
        why=renamed(problem.why),
        fixes=tuple(renamed(f) for f in problem.fixes),
    )


@contextmanager
def draw_errors_named() -> Iterator[None]:
    """Turn what torch's validation raises at a draw into the error that ends a fit in order."""
    try:
        yield
    except ValueError as error:
        complaint = re.search(r"^Expected (parameter|value argument).*", str(error), re.MULTILINE)
        if isinstance(error, PyroEMError) or complaint is None:
            raise
        site = re.search(r"at site '([^']*)'", str(error))
        where = _in_words(site[1]) if site else "model or guide"
        line = complaint[0].rstrip(":") + "."
        raise DegenerateError(not_finite(where, math.nan, line)) from error
