"""Figures of fits: functions that take and return matplotlib ``Axes``.

matplotlib is an extra: ``pip install pyro-em[plot]``. Nothing here shows a window or changes a
global style. Without axes to draw on, a function makes new ones with ``pyplot``, so that a notebook
shows them.

* `evidence`: the objective per step;
* `responsibilities` and `ellipses`: a Gaussian mixture in the plane;
* `state_sequence` and `state_probs`: a chain of states over time;
* `caterpillar` and `loadings`: random effects with their intervals, the weights of factors;
* `path`, `forecast` and `prediction_errors`: a series of Gaussian latents with its band, the fan of a
  forecast, and standardised one-step errors;
* `selection`: a criterion of the candidates of `pyro_em.select`;
* `comparison`: how fast the contenders of `pyro_em.compare` close the gap;
* `graph`: the model as a directed graph.

May import: `pyro_em.em` and what is below it, and what is compared or selected as types alone. To add a
figure, copy a function of `fits` and export it here.
"""

from pyro_em.plotting.axes import PALETTE
from pyro_em.plotting.choice import selection
from pyro_em.plotting.contenders import comparison
from pyro_em.plotting.effects import caterpillar, loadings
from pyro_em.plotting.fits import evidence
from pyro_em.plotting.gaussians import ellipses, responsibilities
from pyro_em.plotting.graphs import graph
from pyro_em.plotting.sequences import state_probs, state_sequence
from pyro_em.plotting.series import forecast, path, prediction_errors

__all__ = [
    "PALETTE",
    "caterpillar",
    "comparison",
    "ellipses",
    "evidence",
    "forecast",
    "graph",
    "loadings",
    "path",
    "prediction_errors",
    "responsibilities",
    "selection",
    "state_probs",
    "state_sequence",
]
