"""Errors of one-step predictions, over their standard deviations.

    e_t = (y_t − E[y_t | y_1, …, y_{t−1}]) / sd(y_t | y_1, …, y_{t−1})

Of data that read Gaussian latents a filter has both moments. Of data that read discrete latents alone
they are those of a mixture: `pyro_em.posteriors.answers.one_step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.globs import meant, require_alike, unknown
from pyro_em.graph.factors import Group
from pyro_em.posteriors.answers.data_steps import (
    DataSteps,
    ObservedSite,
    number_of,
    observed_sites,
    stem_of,
)
from pyro_em.posteriors.answers.gaussian_predictions import known_data, predicted, value_rows
from pyro_em.posteriors.answers.names import names_of
from pyro_em.posteriors.answers.normal_mixtures import NormalsByCell
from pyro_em.posteriors.answers.one_step import cells_before, standardised_rows
from pyro_em.posteriors.answers.series_faces import (
    batch_of,
    data_steps,
    gaussian_faces,
    series_of,
    until,
)
from pyro_em.posteriors.answers.state_filter import predicted_solution
from pyro_em.posteriors.continuous.gaussian_steps import gaussians_in
from pyro_em.updates.expectations.gaussian_rows import event_shape

if TYPE_CHECKING:
    from pyro_em.posteriors.answers.posterior import Posterior


@torch.no_grad()
def prediction_errors(q: Posterior, site: str) -> Tensor:
    """See `Posterior.prediction_errors`."""
    every = {s.name: s for s in observed_sites(q.graph)}
    names = meant(site, every)
    if not names:
        raise unknown(site, every, "observed sites")
    rows = _Errors(q, data_steps(q, _clock_of(q, [every[n] for n in names], list(every))), site)
    out = []
    for name in names:
        own = every[name]
        shape = (*batch_of(q.graph, own.own), *event_shape(own.of))
        value = own.of.value
        dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        out.append(rows.of_site(own).reshape(shape).to(dtype))
    if names == [site]:
        return out[0]
    require_alike("prediction_errors", [(n, e.shape) for n, e in zip(names, out, strict=True)])
    return torch.stack(out)


class _Errors:
    """Standardised errors, those of all sites of a group together."""

    def __init__(self, q: Posterior, data: DataSteps, asked: str) -> None:
        self.q, self.data, self.asked = q, data, f"prediction_errors('{asked}')"
        self._until: dict[int, Posterior] = {}
        self._known: dict[tuple[int, int | None], Tensor] = {}

    def of_site(self, site: ObservedSite) -> Tensor:
        """# (rows, D)"""
        key = site.group, site.number
        if key not in self._known:
            self._known[key] = (
                self._of_discrete(site.group, site.of)
                if site.number is None
                else self._of_group(site.group, site.number, site.of)
            )
        return self._known[key][site.rows]

    def _before(self, step: int) -> Posterior:
        """The posterior given the data before a step."""
        if step not in self._until:
            self._until[step] = until(self.q, self.data, step - 1)
        return self._until[step]

    def _of_discrete(self, g: int, group: Group) -> Tensor:
        steps = self.data.of_rows[g, None]
        weights = cells_before(self.q.graph, self.q.tables, g, steps)
        if weights is None:
            parts = [self._before(t).cells[g][m] for m, t in enumerate(steps.tolist())]
            weights = torch.stack(parts)
        arguments = group.evaluate_arguments(self.q.parameters)
        return standardised_rows(group, arguments, weights, self.asked)

    def _of_group(self, g: int, i: int, group: Group) -> Tensor:
        solved = gaussians_in(self.q.solved)
        if g not in solved:
            raise UsageError(
                message(
                    self.asked,
                    f"'{group.members[0]}' reads a conjugate latent.",
                    "errors are those of predictions from Gaussian or discrete latents",
                    ["compare the data with draws: em.predictive(x)"],
                )
            )
        value, noise = value_rows(group), known_data(solved[g]).noise(i)
        steps = {j: at for (h, j), at in self.data.of_rows.items() if h == g and j is not None}
        own = predicted_solution(solved[g], steps)
        if own is not None:
            faces = replace(gaussian_faces(self.q), solved={**solved, g: own})
            return _standardised(value, predicted(faces, g, i, noise))
        out = value.clone()
        for step in sorted(set(steps[i].tolist())):
            here = (steps[i] == step).to(value.device)
            rows = predicted(gaussian_faces(self._before(step)), g, i, noise)
            out[here] = _standardised(value, rows)[here]
        return out


def _standardised(value: Tensor, rows: NormalsByCell) -> Tensor:
    mean, variance = rows.moments()
    return (value - mean) / variance.sqrt()


def _clock_of(q: Posterior, sites: Sequence[ObservedSite], observed: Sequence[str]) -> list[str]:
    """The longest series of latents, or the data themselves where no latents are one.

    Of data that read no Gaussian latent the discrete latents come first.
    """
    gaussian, discrete = list(gaussian_faces(q).places), names_of(q.graph)
    for names in (discrete, gaussian) if sites[0].number is None else (gaussian,):
        chains = {stem_of(n): n for n in names if number_of(n) is not None}
        longest = max((series_of(n, names) for n in chains.values()), key=len, default=[])
        if len(longest) > 1:
            return longest
    return series_of(sites[0].name, observed)
