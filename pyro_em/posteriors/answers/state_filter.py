"""What a chain's own filter knows: states given the data up to their level, or before it.

Where the data of a series come level by level, one pass has what would else take an E-step for each
step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyro_em.posteriors.answers.data_steps import DataSteps
from pyro_em.posteriors.answers.gaussian_faces import GaussianFaces
from pyro_em.posteriors.answers.site_runs import members_of
from pyro_em.posteriors.filters.kalman import filtered
from pyro_em.posteriors.filters.state_space import Filtered, StateSpace
from pyro_em.posteriors.gaussians.integrated import Integrated
from pyro_em.posteriors.states.state_layout import StateLayout
from pyro_em.posteriors.states.state_solution import StateSolution


def filtered_solutions(
    faces: GaussianFaces, data: DataSteps, names: Sequence[str]
) -> dict[int, Integrated] | None:
    """Solutions in which some latents have their moments given the data up to their own step.

    Args:
        faces: The Gaussian latents.
        data: When data come, along the series of the latents.
        names: The latents, of that series.

    Returns:
        None where a filter does not have them: where discrete values change the moments, or data come
        otherwise than level by level.
    """
    groups = {faces.places[n][0] for n in names if n in faces.places}
    if len(groups) != 1 or any(n not in faces.places for n in names):
        return None
    (g,) = groups
    solution = faces.solved[g]
    if not isinstance(solution, StateSolution) or solution.cells > 1:
        return None
    members, stacks = members_of(faces), solution.layout.stacks
    own = torch.stack([stacks[members[n][1]].levels[members[n][2]] for n in names]).cpu()
    step_of = {n: t for t, n in enumerate(data.chain)}
    steps = torch.tensor([step_of[n] for n in names])
    lags = _lags(solution.layout, _of_group(data, g), own, steps, len(data.chain))
    if lags is None:
        return None
    found = filtered(solution.numbers.space)
    mean, covariance = found.mean, found.covariance
    for lag in sorted({int(k) for k in lags if k > 0}):
        at = own[lags == lag]
        later, their = lagged_filter(solution.numbers.space, found, lag)
        lead = max(len(covariance), len(their))
        mean = mean.index_copy(1, at.to(mean.device), later[:, at])
        covariance = covariance.expand(lead, *covariance.shape[1:])
        their = their.expand(lead, *their.shape[1:])
        covariance = covariance.index_copy(1, at.to(mean.device), their[:, at])
    smoothed = solution.smoothed.with_states(mean, covariance)
    return {**faces.solved, g: replace(solution, smoothed=smoothed)}


def lagged_filter(space: StateSpace, found: Filtered, lag: int) -> tuple[Tensor, Tensor]:
    """The states given the data up to some levels after their own; fewer where a chain ends.

    The state of a level stands beside the newest one, which moves on,

        (x_t, x_{t+j}) → (x_t, A x_{t+j} + a + G ε),   then the data of level t + j + 1,

    for all levels t at once.

    Args:
        space: The chains.
        found: The states given the data up to their own level.
        lag: How many levels more.

    Returns:
        # (chains, T, n), (chains|1, T, n, n)
    """
    n, T = space.size, space.steps
    mean = torch.cat([found.mean, found.mean], -1)
    P = found.covariance
    S = torch.cat([torch.cat([P, P], -1), torch.cat([P, P], -1)], -2)
    for j in range(1, lag + 1):
        there = torch.arange(T - j, device=mean.device)
        after = there + j
        kind = space.dynamics[after]
        A, G = space.transition[:, kind], space.noise[:, kind]
        before, cross, old = S[:, there, n:, n:], S[:, there, :n, n:] @ A.mT, S[:, there, :n, :n]
        new = A @ before @ A.mT + G @ G.mT
        moved = (A @ mean[:, there, n:].unsqueeze(-1)).squeeze(-1) + space.drift[:, after]
        cross, old = (t.expand(len(new), *t.shape[1:]) for t in (cross, old))
        joint = torch.cat([torch.cat([old, cross], -1), torch.cat([cross.mT, new], -1)], -2)
        both = torch.cat([mean[:, there, :n], moved], -1)
        both, joint = _given(space, after, both, joint)
        lead = max(len(S), len(joint))
        S = S.expand(lead, *S.shape[1:]).index_copy(1, there, joint.expand(lead, *joint.shape[1:]))
        mean = mean.index_copy(1, there, both)
    return mean[..., :n], S[..., :n, :n]


def _given(space: StateSpace, at: Tensor, mean: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of states, the second of them of some levels, given the data of these levels.

    One number after the other, as in the filter: noises may be as small as they like.
    """
    kind, n = space.measurement[at], space.size
    loadings, deviation = space.loading[:, kind], space.deviation[:, kind]
    for d in range(loadings.shape[2]):
        h = loadings[:, :, d]
        if space.seen is not None:
            h = h * space.seen[:, at, d].unsqueeze(-1)
        error = space.value[:, at, d] - (h * mean[..., n:]).sum(-1)
        cross = (S[..., n:] @ h.unsqueeze(-1)).squeeze(-1)
        variance = (h * cross[..., n:]).sum(-1) + deviation[:, :, d].square()
        gain = cross / variance.unsqueeze(-1)  # zero where nothing is seen
        mean = mean + gain * torch.where(gain.abs().amax(-1) > 0, error, 0.0).unsqueeze(-1)
        S = S - gain.unsqueeze(-1) * cross.unsqueeze(-2)
    return mean, (S + S.mT) / 2


def predicted_solution(solution: Integrated, data: Mapping[int, Tensor]) -> StateSolution | None:
    """A solution in which each level has its moments given the data of all steps before.

    Args:
        solution: Given all data.
        data: The step of each row of the observed sites. # (rows,) each

    Returns:
        None where a filter does not have it: where discrete values change the moments, or steps are no
        levels.
    """
    if not isinstance(solution, StateSolution) or solution.cells > 1 or not data:
        return None
    steps = torch.cat([data[i] for i in sorted(data)])
    levels = torch.cat([solution.layout.level_of_row[i].cpu() for i in sorted(data)])
    pairs = torch.stack([steps, levels]).unique(dim=1)  # in order of the steps
    if bool((pairs.diff(dim=1) <= 0).any()) or int(pairs[0, 0]) < 0:
        return None
    found = filtered(solution.numbers.space)
    own = solution.smoothed.with_states(found.predicted_mean, found.predicted_covariance)
    return replace(solution, smoothed=own)


def _of_group(data: DataSteps, g: int) -> dict[int, Tensor]:
    return {i: at for (h, i), at in data.of_rows.items() if h == g and i is not None}


def _lags(
    layout: StateLayout, data: Mapping[int, Tensor], own: Tensor, steps: Tensor, T: int
) -> Tensor | None:
    """How many levels after its own a latent's step has data; None where steps are no levels.

    Args:
        layout: The chain.
        data: The step of each row of the observed sites. # (rows,) each
        own: The level of each latent. # (latents,)
        steps: The step of each. # (latents,)
        T: The number of steps.
    """
    come = torch.cat(list(data.values()))
    levels = torch.cat([layout.level_of_row[i].cpu() for i in data])
    far = layout.form.steps
    highest = torch.full((T + 1,), -1).scatter_reduce(0, come + 1, levels, "amax").cummax(0).values
    lowest = torch.full((T + 2,), far).scatter_reduce(0, come + 1, levels, "amin")
    lowest = lowest.flip(0).cummin(0).values.flip(0)
    last, then = highest[steps + 1], lowest[steps + 2]  # of the data by a step, and after it
    if bool((last >= then).any()) or bool((own >= then).any()):
        return None
    return (last - own).clamp(min=0)
