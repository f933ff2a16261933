"""The compiled EM step: an E-step that gives sums over the data, and an M-step that needs no more.

    parameter values → `At` → kernel → `Sums` → M-step → `At` → …

The E-step is a mixture over rows (`rows`) or a homogeneous chain (`chain`); what is neither keeps the
full step. Inside a kernel a group of factors is evaluated in one of four ways, the first that fits:

    linear      simplex rows, probabilities and rates of all groups as one vector (`natural`)
    Gaussian    components by products over features of the data (`features`, `gaussians`)
    lines       a Normal whose mean is affine in covariates (`lines`)
    others      the family's own density and statistics, and a solver per parameter (`solve`)

A conjugate prior on a point estimate is a constant that the sums gain (`priors`), a sample weight is
what a row counts (`rows`).

To add a kernel: a function that recognises a collapsed graph by looking, and an ``e_step`` from `At`
to `Sums`. Whatever is out of the ordinary raises `Handover`, and the full step judges it.
"""

from pyro_em.compiled.iteration import Iteration, Point, compile_iteration
from pyro_em.compiled.step import Handover

__all__ = ["Handover", "Iteration", "Point", "compile_iteration"]
