"""A q that the user gives in place of the exact posterior: a posterior, or tables by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from pyro_em.arguments import shown
from pyro_em.errors import UsageError, message
from pyro_em.plan.program import Evaluation
from pyro_em.posteriors.posterior import Posterior, regrouped
from pyro_em.posteriors.product import product_posterior
from pyro_em.variational.drawn import DrawnPosterior


def check_q(q: Any, is_needed: bool = False) -> None:
    """Refuse what can be no posterior.

    Raises:
        UsageError: If it is neither a posterior of summed latents nor a mapping.
    """
    if isinstance(q, (Posterior, Mapping)) or (q is None and not is_needed):
        return
    draws = isinstance(q, DrawnPosterior)
    raise UsageError(
        message(
            "q",
            f"it is {shown(q)}, not a posterior of summed latents.",
            "a guide's draws are no table of probabilities" if draws else "",
            [
                "pass what em.posterior(...) returned on the same data",
                "pass {site: probabilities} for every summed latent: {'z': responsibilities}",
            ],
        )
    )


def as_posterior(q: Posterior | Mapping[str, Tensor], evaluation: Evaluation) -> Posterior:
    """What the user gave, on the factors of an evaluation.

    Raises:
        UsageError: If it does not fit the model or its data.
    """
    if not isinstance(q, Posterior):
        product = product_posterior(evaluation.graph, q, evaluation.tables)
        return replace(product, solved=evaluation.solved)
    laid_out = regrouped(q, evaluation.graph)
    if laid_out is None:
        raise UsageError(
            message(
                "q",
                "the Posterior belongs to other data or another model.",
                "its factors differ in sites or sizes",
                ["compute it with em.posterior on the same arguments"],
            )
        )
    return laid_out
