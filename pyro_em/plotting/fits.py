"""The objective of a fit, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyro_em.fitting.results.history import History
from pyro_em.fitting.results.result import EMResult
from pyro_em.plotting.axes import PALETTE, or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def evidence(result: EMResult | History, ax: Axes | None = None, **style: Any) -> Axes:
    """Draw the objective entering each step, and after the last one.

    For exact EM that is the log evidence (plus the log prior of point estimates), for a fit with a
    guide the ELBO, drawn or exact.

    Args:
        result: A fit, or its history alone, which is taken for one of exact EM.
        ax: Axes to draw on; new ones by default.
        **style: Passed to ``Axes.plot``.

    Returns:
        The axes: steps against nats.
    """
    ax = or_new(ax)
    path, name = list(result.history if isinstance(result, EMResult) else result), "log evidence"
    if isinstance(result, EMResult):
        if result.log_evidence is not None:
            path.append(result.elbo)
        else:
            name = "ELBO"
    marker = {"marker": "o", "markersize": 3} if len(path) <= 60 else {}
    ax.plot(range(len(path)), path, **{"color": PALETTE[0], **marker, **style})
    ax.set_xlabel("step")
    ax.set_ylabel(f"{name} (nats)")
    return ax
