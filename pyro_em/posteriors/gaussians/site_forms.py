"""What a site of a linear-Gaussian component is, without its numbers.

Sites are in topological order. Each has rows (the cells of its plates) and a width D (its event):

    y_s[r] = offset_s[r] + Σ_t C_{s,t}[r] h_{latent(t)}[element_t[r]] + L_s[r] ε,     ε ~ N(0, I)

where y is observed or a latent itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Term:
    """What a site reads of one latent: at most one element per row.

    Attributes:
        latent: The number of the latent's site among all sites.
        elements: The element that each row reads; −1 where a row reads none. # (rows,)
    """

    latent: int
    elements: Tensor


@dataclass(frozen=True, eq=False)
class SiteForm:
    """A linear-Gaussian site without its numbers.

    Attributes:
        name: Its name in the model.
        rows: Cells of its plates. Of a latent: its elements.
        width: D, the size of its event; 1 for numbers.
        is_latent: Whether it is an unknown rather than observed.
        terms: What its mean reads; a latent may only be read by sites that come after it.
    """

    name: str
    rows: int
    width: int
    is_latent: bool
    terms: tuple[Term, ...] = ()
