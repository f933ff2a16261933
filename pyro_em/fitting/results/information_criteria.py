"""Information criteria of a fit at a stated N: BIC, AIC, ICL, with the entropy of the latents."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Criteria:
    """Information criteria; of all of them lower is better, in units of twice a nat.

        BIC = −2 log p(x; θ) + p log N                                      (Schwarz 1978)
        AIC = −2 log p(x; θ) + 2 p                                          (Akaike 1974)
        ICL = BIC + 2 H(q) = −2 (log p(x; θ) − H(q)) + p log N              (McLachlan and Peel 2000)

    H(q) is the entropy of the posterior of the discrete latents (of responsibilities), in nats: ICL
    asks for components that are told apart, BIC only for density. The ICL of mclust and of Biernacki,
    Celeux and Govaert (2000) has −Σ log max_k q(z_n = k) in place of H(q), which is never larger, and
    that of mclust has the other sign: larger is better.

    Attributes:
        log_evidence: log p(x; θ) in nats.
        num_free_parameters: p.
        n: N.
        counted: What N counts, in words.
        entropy: H(q) in nats; None where the data came in parts.

    Example:
        >>> found = Criteria(-100.0, 3, 50, "elements of plate 'rows'", entropy=2.0)
        >>> print(found)
        BIC 211.736  AIC 206.000  ICL 215.736  (lower is better)
        p = 3, N = 50 (elements of plate 'rows'), log evidence -100.000000, entropy 2.000000 nats
    """

    log_evidence: float
    num_free_parameters: int
    n: float
    counted: str
    entropy: float | None = None

    @property
    def bic(self) -> float:
        """−2 log evidence + p log N."""
        penalty = self.num_free_parameters * math.log(max(self.n, 1))
        return -2 * self.log_evidence + penalty

    @property
    def aic(self) -> float:
        """−2 log evidence + 2 p."""
        return -2 * self.log_evidence + 2 * self.num_free_parameters

    @property
    def icl(self) -> float | None:
        """BIC + 2 H(q); None without an entropy."""
        return None if self.entropy is None else self.bic + 2 * self.entropy

    def __str__(self) -> str:
        icl = "" if self.icl is None else f"  ICL {self.icl:.3f}"
        entropy = "" if self.entropy is None else f", entropy {self.entropy:.6f} nats"
        return (
            f"BIC {self.bic:.3f}  AIC {self.aic:.3f}{icl}  (lower is better)\n"
            f"p = {self.num_free_parameters}, N = {self.n:g} ({self.counted}), "
            f"log evidence {self.log_evidence:.6f}{entropy}"
            + (f"\n{WHY[self.counted]}" if self.counted in WHY else "")
        )


STEPS = "steps of one series"

ONE = "one observation"

# Of what is counted, what there is to say.
WHY = {
    STEPS: "N counts the steps of one series: they are no independent rows, but each of them tells of "
    "the parameters, and the evidence grows with their number.",
    ONE: "All data are one observation, and BIC's penalty is zero.",
}
