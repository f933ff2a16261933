"""What other libraries call the keywords of `fit`, so that a refusal can name the right one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pyro_em.plan.fit_wishes import FIT_KEYWORDS

#: The keywords of scikit-learn, hmmlearn, statsmodels, pomegranate and of Pyro's own tutorials.
OURS = {
    "epochs": "num_epochs",
    "em_iter": "max_steps",
    "init_params": "init",
    "max_iter": "max_steps",
    "maxiter": "max_steps",
    "n_epochs": "num_epochs",
    "n_init": "num_restarts",
    "n_iter": "max_steps",
    "num_iterations": "max_steps",
    "num_iters": "max_steps",
    "num_steps": "max_steps",
    "random_seed": "seed",
    "random_state": "seed",
    "rng": "seed",
    "steps": "max_steps",
    "tolerance": "tol",
    "verbose": "progress",
}


def likely(name: str, known: Sequence[str]) -> str | None:
    """The keyword that was probably meant, of `fit` or of the model; None if none is near.

    Example:
        >>> likely("n_iter", ["x"]), likely("max_step", ["x"]), likely("colour", ["x"])
        ('max_steps', 'max_steps', None)
    """
    if name in OURS:
        return OURS[name]
    near = difflib.get_close_matches(name, [*FIT_KEYWORDS, *known], n=1)
    return near[0] if near else None
