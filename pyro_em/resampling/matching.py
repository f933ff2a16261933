"""Components of one fit that are those of another: by the rows for which they are responsible.

Labels are arbitrary. Component k of a fit and component j of another are the same as far as they are
responsible for the same rows,

    O_kj = Σ_n q(z_n = k) q'(z_n = j),

and the permutation with the largest sum of O makes them one (Stephens 2000).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_em.analysis.ordering import components_of, permuted
from pyro_em.errors import PyroEMError
from pyro_em.plan.program import Program

_SAME = 1e-6  # relative, of two evidences that differ by rounding


@dataclass(frozen=True, eq=False)
class Components:
    """Components that can be exchanged.

    Attributes:
        latents: The latents that have them: a row's, or the steps of a chain.
        axes: Per parameter its axes along them.
        responsibilities: Those of the fit, per latent. # (rows, K)
    """

    latents: tuple[str, ...]
    axes: Mapping[str, tuple[int, ...]]
    responsibilities: tuple[Tensor, ...]


def components_in(program: Program, params: Mapping[str, Tensor]) -> tuple[Components, ...]:
    """All components of a fitted model that can be exchanged without changing its evidence.

    Args:
        program: The model with the data of the fit.
        params: Its parameters.
    """
    graph = program.graph
    q = program.posterior(program.evaluate(params))
    found, done = [], set[str]()
    for name in graph.latents:
        if name in done:
            continue
        together, axes = components_of(graph, name)
        done |= together
        if not axes:
            continue
        size = graph.latents[name].size
        turned = torch.arange(size).roll(1)
        other = {n: permuted(v, axes.get(n, ()), turned) for n, v in params.items()}
        try:
            after = program.posterior(program.evaluate(other)).bound
        except PyroEMError:
            continue
        assert after is not None and q.bound is not None
        if abs(after - q.bound) > _SAME * max(1.0, abs(q.bound)):
            continue
        latents = tuple(n for n in graph.latents if n in together)
        shares = tuple(q.probs(n).reshape(-1, size) for n in latents)
        found.append(Components(latents, axes, shares))
    return tuple(found)


def matched(
    program: Program, components: tuple[Components, ...], params: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Parameters of another fit with the components in the order of this one.

    Args:
        program: The model with the data of this fit.
        components: Its components.
        params: The other fit's parameters.
    """
    out = dict(params)
    if not components:
        return out
    q = program.posterior(program.evaluate(params))
    for own in components:
        overlap = sum(
            share.T @ q.probs(n).reshape(share.shape)
            for n, share in zip(own.latents, own.responsibilities, strict=True)
        )
        assert isinstance(overlap, Tensor)
        order = torch.as_tensor(assignment(overlap.double().cpu().numpy()))
        for name, axes in own.axes.items():
            out[name] = permuted(out[name], axes, order)
    return out


def assignment(gain: np.ndarray) -> np.ndarray:
    """The permutation of columns with the largest sum of gains: shortest augmenting paths.

    Args:
        gain: # (K, K)

    Returns:
        The column of each row. # (K,)

    Example:
        >>> assignment(np.array([[1.0, 3.0], [2.0, 3.5]])).tolist()
        [1, 0]

    Source: Kuhn (1955), "The Hungarian method for the assignment problem"; Jonker and Volgenant (1987).
    """
    cost, size = -gain, len(gain)
    rows, columns = np.zeros(size + 1), np.zeros(size + 1)  # prices
    row_of = np.full(size + 1, -1)  # of each column; the last is where a path begins
    for row in range(size):
        row_of[size], column = row, size
        least, before = np.full(size, np.inf), np.full(size, size)
        seen = np.zeros(size + 1, dtype=bool)
        while row_of[column] >= 0:
            seen[column] = True
            here = row_of[column]
            reduced = cost[here] - rows[here] - columns[:size]
            better = ~seen[:size] & (reduced < least)
            least[better], before[better] = reduced[better], column
            step = np.where(seen[:size], np.inf, least)
            following = int(step.argmin())
            delta = step[following]
            rows[row_of[seen]] += delta
            columns[seen] -= delta
            least[~seen[:size]] -= delta
            column = following
        while column != size:
            row_of[column] = row_of[before[column]]
            column = before[column]
    out = np.empty(size, dtype=int)
    out[row_of[:size]] = np.arange(size)
    return out
