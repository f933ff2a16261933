"""Where a mixture starts: scikit-learn's own rules, so that the same seed gives the same start."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.cluster import KMeans, kmeans_plusplus

from pyro_em.arguments import shown
from pyro_em.errors import UsageError, message

RULES = ("kmeans", "k-means++", "random", "random_from_data")


def responsibilities(X: np.ndarray, K: int, rule: Any, rng: np.random.RandomState) -> np.ndarray:
    """Responsibilities from which a first M-step makes parameters.

    Args:
        X: Rows. # (N, D)
        K: Number of components.
        rule: One of `RULES`, as scikit-learn's ``init_params``.
        rng: Where random numbers come from, drawn in scikit-learn's order.

    Returns:
        They sum to one. # (N, K)

    Raises:
        UsageError: If there is no such rule.
    """
    if rule == "random":
        r = rng.uniform(size=(len(X), K)).astype(X.dtype)
        return r / r.sum(1, keepdims=True)
    r = np.zeros((len(X), K), dtype=X.dtype)
    if rule == "kmeans":
        r[np.arange(len(X)), KMeans(K, n_init=1, random_state=rng).fit(X).labels_] = 1
    elif rule == "k-means++":
        r[kmeans_plusplus(X, K, random_state=rng)[1], np.arange(K)] = 1
    elif rule == "random_from_data":
        r[rng.choice(len(X), size=K, replace=False), np.arange(K)] = 1
    else:
        raise UsageError(
            message(
                f"init_params={shown(rule)}",
                "there is no such start.",
                "",
                [f"pass {', '.join(map(repr, RULES))}"],
            )
        )
    return r
