"""Which latent an estimator answers for, and its answers per row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.plan.plan import Plan


@dataclass(frozen=True)
class Latents:
    """The latents of the rows.

    Attributes:
        discrete: Names of discrete ones, or globs for chains.
        continuous: The same of the others.
        wanted: The one that the user named, or None.
    """

    discrete: tuple[str, ...]
    continuous: tuple[str, ...]
    wanted: str | None

    @classmethod
    def of(cls, plan: Plan, wanted: str | None) -> Latents:
        """The latents that a plan has routes for; point estimates are parameters.

        Args:
            plan: The plan of a fit.
            wanted: The user's choice.
        """
        routes = [r for r in plan.routes if r.route != "point estimate"]
        stems = Counter(r.site.rstrip("0123456789") for r in routes)
        found: dict[str, bool] = {}
        for route in routes:
            stem = route.site.rstrip("0123456789")
            is_chain = stem != route.site and stems[stem] > 1
            if is_chain or route.plates:
                found[f"{stem}*" if is_chain else route.site] = route.size is not None
        return cls(
            tuple(n for n, is_discrete in found.items() if is_discrete),
            tuple(n for n, is_discrete in found.items() if not is_discrete),
            wanted,
        )

    def probs(self, q: Any) -> Tensor:
        """Posterior probabilities of the discrete one. # (N, *plates, K)

        Raises:
            UsageError: If there is none, or several and none was chosen.
        """
        return q.probs(self.wanted or _only(self.discrete, "discrete latent")).detach().cpu()

    def features(self, q: Any) -> Tensor:
        """Posterior probabilities of the discrete one, or posterior means of the others. # (N, H)

        Raises:
            UsageError: If there is none, or several and none was chosen.
        """
        name = self.wanted or _only(self.discrete or self.continuous, "latent")
        if name in self.discrete:
            return _per_row(q.probs(name))
        means = q.mean(name)
        return _per_row(means if means.dim() > 1 else means.unsqueeze(-1))

    def drawn(self, values: Mapping[str, Tensor]) -> np.ndarray | None:
        """The latent among draws of new data. # (n, *event); None without a single one"""
        names = [self.wanted] if self.wanted else self.discrete or self.continuous
        return values[names[0]].detach().cpu().numpy() if len(names) == 1 else None


def _per_row(answers: Tensor) -> Tensor:
    return answers.detach().reshape(len(answers), -1).cpu()


def _only(names: tuple[str, ...], what: str) -> str:
    if len(names) == 1:
        return names[0]
    found = f"no single {what}, but several: {', '.join(names)}" if names else f"no {what}"
    raise UsageError(
        message(
            "latent",
            f"the rows of the model have {found}.",
            "predict, predict_proba and transform answer for one",
            [f"pass latent='{names[0]}'"] if names else ["call score(X) or score_samples(X)"],
        )
    )
