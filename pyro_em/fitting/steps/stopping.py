"""When a run stops: the estimated remaining gain, rounding, and the rate of convergence.

EM gains g_t = L_{t+1} − L_t in nats, which fall like a power of its rate a near a maximum. With the
largest ratio of the last successive gains as a, what is left to gain is

    Σ_{s > t} g_s ≈ g_t a / (1 − a)     (Aitken's extrapolation),

and a run stops where this and the last gain are below the tolerance, or where gains are rounding. Six
gains in succession are not: the bound on rounding is that of its worst case, which float32 data reach
long before an objective that is summed in float64 is lost in it.

Source: Böhning, Dietz, Schaub, Schlattmann and Lindsay (1994), "The distribution of the likelihood
ratio for mixtures of densities from the one-parameter exponential family", for Aitken's rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pyro_em.fitting.results.history import EMStatus


def should_stop(
    path: Sequence[float], tol: float, eps: float, noise: float = 0.0
) -> EMStatus | None:
    """The stopping rule: estimated remaining gain g a / (1 − a), or rounding.

    Args:
        path: Objectives of successive steps, the latest last.
        tol: Estimated remaining gain at which to stop, in nats; 0 never stops.
        eps: Relative rounding of the objective.
        noise: Rounding in nats that the objective's arithmetic adds to that.
    """
    if tol == 0:
        return None
    gains = [b - a for a, b in pairwise(path[-7:])]
    if len(gains) < 6:
        return None
    rounding = max(8 * eps * max(1.0, abs(path[-1])), noise)
    if min(gains) <= 0:
        within = all(abs(g) <= rounding for g in gains[-2:])
        return EMStatus.ROUNDING if within else None
    ratio = max(b / a for a, b in pairwise(gains))
    if ratio >= 1:
        return None
    remaining = gains[-1] * ratio / (1 - ratio)
    return EMStatus.CONVERGED if gains[-1] < tol and remaining < tol else None


def crawls(path: Sequence[float], tol: float) -> bool:
    """Whether six steps in succession have gained less than the tolerance each, whatever follows.

    Such a run may still have far to go, or creep on for ever within the rounding of an objective that
    has no maximum: it is then worth a look at where its parameters are.
    """
    gains = [abs(b - a) for a, b in pairwise(path[-7:])]
    return len(gains) == 6 and max(gains) < tol


def rate_of_convergence(path: Sequence[float]) -> float | None:
    """The last ratio of successive gains that is clear of rounding; None where there is none."""
    gains = [b - a for a, b in pairwise(path)]
    rounding = 1e-13 * max(1.0, abs(path[-1]))
    clear = [g for g in gains if g > rounding]
    if len(clear) < 3:
        return None
    rate = clear[-1] / clear[-2]
    return rate if rate < 1 else None


# Plain steps are quick where each keeps less than this of the gain before: ten leave a ten-thousandth.
QUICK = 0.4


def is_quick(path: Sequence[float]) -> bool:
    """Whether plain EM steps are so quick that extrapolating would save little.

    The rate is the geometric mean of the last four ratios of successive gains; where they are not all
    gains, nothing is known of it, and the steps count as quick.

    Args:
        path: Objectives of successive plain steps, the latest last.
    """
    gains = [b - a for a, b in pairwise(path)][-5:]
    if len(gains) < 5 or min(gains) <= 0:
        return True
    return (gains[-1] / gains[0]) ** (1 / 4) < QUICK
