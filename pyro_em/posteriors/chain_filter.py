"""What a chain's own filter knows: states given the data up to their level, or before it.

Where the data of a series come level by level, one pass has what would else take an E-step for each
step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.posteriors.chain_layout import ChainLayout
from pyro_em.posteriors.chain_solution import ChainSolution
from pyro_em.posteriors.data_steps import DataSteps
from pyro_em.posteriors.gaussian_faces import GaussianFaces
from pyro_em.posteriors.gaussian_steps import Solved
from pyro_em.posteriors.linear_gaussian import Integrated


def filtered_solutions(
    faces: GaussianFaces, data: DataSteps, names: Sequence[str]
) -> Solved | None:
    """Solutions in which a latent has its moments given the data up to its own step.

    Args:
        faces: The Gaussian latents.
        data: When data come, along the series of the latents.
        names: The latents.

    Returns:
        None where a filter does not have them: where discrete values change the moments, or data come
        otherwise than level by level.
    """
    groups = {faces.places[n][0] for n in (*names, *data.chain) if n in faces.places}
    if len(groups) != 1 or any(n not in faces.places for n in names):
        return None
    (g,) = groups
    solution = faces.solved[g]
    if not isinstance(solution, ChainSolution) or solution.cells > 1:
        return None
    if any(n not in faces.places for n in data.chain):
        return None
    levels = torch.tensor([_level(faces, solution.layout, n) for n in data.chain])
    if not _come_by_level(solution.layout, _of_group(data, g), levels):
        return None
    found = solution.smoothed.filtered
    own = replace(solution.smoothed, mean=found.mean, covariance=found.covariance)
    return {**faces.solved, g: replace(solution, smoothed=own)}


def predicted_solution(solution: Integrated, data: Mapping[int, Tensor]) -> ChainSolution | None:
    """A solution in which each level has its moments given the data of all steps before.

    Args:
        solution: Given all data.
        data: The step of each row of the observed sites. # (rows,) each

    Returns:
        None where a filter does not have it: where discrete values change the moments, or steps are no
        levels.
    """
    if not isinstance(solution, ChainSolution) or solution.cells > 1 or not data:
        return None
    steps = torch.cat([data[i] for i in sorted(data)])
    levels = torch.cat([solution.layout.level_of_row[i] for i in sorted(data)])
    pairs = torch.stack([steps, levels]).unique(dim=1)  # in order of the steps
    if bool((pairs.diff(dim=1) <= 0).any()) or int(pairs[0, 0]) < 0:
        return None
    found = solution.smoothed.filtered
    own = replace(
        solution.smoothed, mean=found.predicted_mean, covariance=found.predicted_covariance
    )
    return replace(solution, smoothed=own)


def _level(faces: GaussianFaces, layout: ChainLayout, name: str) -> int:
    site = faces.site("filtered", name)
    return int(layout.level_of_row[site.number][site.first])


def _of_group(data: DataSteps, g: int) -> dict[int, Tensor]:
    return {i: at for (h, i), at in data.of_rows.items() if h == g and i is not None}


def _come_by_level(layout: ChainLayout, data: Mapping[int, Tensor], levels: Tensor) -> bool:
    """Whether the data up to each step are those up to its level.

    Args:
        layout: The chain.
        data: The step of each row of the observed sites. # (rows,) each
        levels: The level of each step. # (T,)
    """
    if bool((levels.diff() < 0).any()):
        return False
    for i, steps in data.items():
        own = layout.level_of_row[i].cpu()
        known = own <= levels[steps.clamp(min=0)]
        new = (steps <= 0) | (own > levels[(steps - 1).clamp(min=0)])
        if not bool((known & new).all()):
            return False
    return True
