"""What a site reads of a conjugate latent, and why a latent has no posterior of its prior's form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.families.conjugate_pairs import Pair, children_of


@dataclass(frozen=True, eq=False)
class ConjugateRead:
    """One argument of a site that reads a conjugate latent.

    Attributes:
        site: The site.
        latent: The latent.
        pair: What the site adds to the latent's kernel.
        power: Of the latent in the argument.
        elements: For each cell of the argument the flat number of the latent's element, −1 where the
            cell does not read it. # (*plates or 1s, *scope or 1s, *to_event or 1s)
        order: Of probabilities and simplexes, which statistic of the latent's prior stands where each
            of a value's is; None where all are in their places. # the same, and (P,)
    """

    site: str
    latent: str
    pair: Pair
    power: float
    elements: Tensor
    order: Tensor | None = None


class NotConjugate(Exception):
    """A latent whose posterior is not of its prior's form; holds the finding."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


def refused(latent: str, where: str, what: str, kernel: PriorKernel | None = None) -> NotConjugate:
    """Why a latent has no posterior of its prior's form."""
    serve = "" if kernel is None else f": {children_of(kernel)}"
    return NotConjugate(
        Finding(
            where,
            what,
            f"'{latent}' is integrated where all that reads it is conjugate to its prior{serve}",
            (
                "give a guide: ExactPosteriorEM(model, AutoNormal)",
                "take a point estimate under its prior: ExactPosteriorEM(model, guide='map')",
            ),
            latents=(latent,),
        )
    )
