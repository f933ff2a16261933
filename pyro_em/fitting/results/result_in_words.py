"""A result in words: the lines that are printed, and what stands above a table of parameters."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pyro
import torch

from pyro_em.fitting.results.ends import ends_in_words
from pyro_em.fitting.results.information_criteria import WHY

if TYPE_CHECKING:
    from pyro_em.fitting.results.result import EMResult


def above_the_table(result: EMResult) -> list[tuple[str, Any]]:
    """What a summary says above its table, by name."""
    rows: list[tuple[str, Any]] = [
        ("log evidence (nats)", result.log_evidence),
        (f"{result.bound_name} (nats)", result.elbo),
        ("log prior (nats)", result.log_prior),
        ("status", result.status.value),
        ("converged", result.converged),
        ("steps", result.num_steps),
        ("rate of convergence", result.rate),
        ("seconds", round(result.seconds, 3)),
        ("free parameters p", result.num_free_parameters),
        *(
            [("point estimates not counted in p", result.num_local_estimates)]
            if result.num_local_estimates
            else []
        ),
        ("rows N", result.num_rows),
        ("BIC (lower is better)", result.bic),
        ("AIC (lower is better)", result.aic),
        ("ICL (lower is better)", result.icl),
        ("start", result.start),
        *([("starts", ends_in_words(result.ends))] if len(result.ends) > 1 else []),
        ("seed", result.seed),
        ("dtype", str(result.dtype).removeprefix("torch.")),
        ("pyro_em", version("pyro-em")),
        ("pyro", pyro.__version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
    ]
    return rows


def in_words(result: EMResult) -> str:
    """A result as it is printed: its objective, why it ended, and its criteria."""
    rate = "" if result.rate is None else f", rate of convergence {result.rate:.3f}"
    if result.log_evidence is None:
        return (
            f"{result.bound_name} {result.elbo:.6f} after {result.num_steps} steps"
            f" ({result.seconds:.2f} s)\n{result.message}"
        )
    icl = "" if result.icl is None else f"  ICL {result.icl:.3f}"
    prior = "" if result.log_prior == 0 else f" + log prior {result.log_prior:.6f}"
    return (
        f"log evidence {result.log_evidence:.6f}{prior} after {result.num_steps} steps"
        f" ({result.seconds:.2f} s{rate})\n{result.message}\n"
        f"BIC {result.bic:.3f}  AIC {result.aic:.3f}{icl}"
        f"  (p = {result.num_free_parameters}, N = {result.num_rows:g}; lower is better)"
        + _uncounted(result)
        + (f"\n{WHY[result.counted]}" if result.counted in WHY else "")
        + (f"\n{ends_in_words(result.ends)}" if len(result.ends) > 1 else "")
    )


def _uncounted(result: EMResult) -> str:
    """What p leaves out, in words."""
    if not result.num_local_estimates:
        return ""
    return (
        f"\np does not count {result.num_local_estimates} point estimates of latents in the data's "
        "plates; the evidence takes them as known, so that BIC and AIC compare only models with "
        "the same ones"
    )
