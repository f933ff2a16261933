"""Coefficients of linear predictors: their M-step by Newton's method, with Normal priors.

    Q(θ) = Σ_cells f(η) − ½ (θ − μ)ᵀ Λ (θ − μ)

A dispersion is found with them, by its logarithm. What the data hold on both sides has a maximum. Where
some covariate tells outcomes apart without an error the likelihood rises towards infinite coefficients:
they are left where predictions are certain to ten digits, and it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import Tensor

from pyro_em.distributions import is_real
from pyro_em.errors import message
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.closed_forms.collapses import refuse_collapse, refuse_noiseless
from pyro_em.updates.regressions.coefficient_priors import dispersion_priors, normal_priors
from pyro_em.updates.regressions.curved import Curved
from pyro_em.updates.regressions.dispersed import Dispersed, positive
from pyro_em.updates.regressions.idle import Moves
from pyro_em.updates.regressions.newton import climb
from pyro_em.updates.regressions.predictors import Predictor, predictors_of
from pyro_em.updates.update import ParameterUpdate

Ask = Callable[[Mapping[str, Tensor]], Curved]

FAR = 0.5  # of a unit of the predictor, by which it still moves where next to nothing is gained


@dataclass(frozen=True, eq=False)
class Coefficients:
    """What Newton's method found.

    Attributes:
        values: The parameters.
        gain: By how much the expected log joint rises, priors included, in nats. # ()
        last: The last step, all parameters one after the other. # (P,)
        is_settled: Whether it was small.
    """

    values: dict[str, Tensor]
    gain: Tensor
    last: Tensor
    is_settled: bool


def coefficients(
    ask: Ask,
    block: Sequence[str],
    graph: FactorGraph,
    values: Mapping[str, Tensor],
    updates: Mapping[str, ParameterUpdate],
    slope: Ask | None = None,
    moves: Callable[[Tensor], Moves] | None = None,
) -> Coefficients:
    """The maximisers of the expected log joint in a block of parameters.

    Args:
        ask: From values of these parameters to the expected log joint of the predictors they reach.
        block: Parameter names.
        graph: The factor graph.
        values: The current parameters.
        updates: What was decided per parameter, for Normal priors.
        slope: As ``ask``, without second derivatives; None where these cost nothing more.
        moves: What a direction does to all predictors; asked only without priors.

    Raises:
        DegenerateError: If a spread collapses, or data have no noise.
    """
    bounded = {name for name in block if not is_real(graph.parameters[name].constraint)}
    start = torch.cat([_coordinate(values[n].detach(), n in bounded).reshape(-1) for n in block])
    reached = predictors_of(graph, block, mixed=updates[block[0]].is_mixed)
    is_concave = all(isinstance(p, Predictor) and not p.binding.pairs for p in reached)
    spread = [torch.full((values[n].numel(),), n in bounded, device=start.device) for n in block]
    logs = torch.cat(spread)
    precision, pull = normal_priors(block, graph, values, updates, start)

    def split(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([values[name].numel() for name in block])
        return {
            n: (p.exp() if n in bounded else p).reshape(values[n].shape)
            for n, p in zip(block, parts, strict=True)
        }

    def of(place: Tensor, ask: Ask = ask) -> Curved:
        found = ask(split(place))
        if precision is not None:
            away = place - start
            back = precision @ away
            value = torch.dot(pull, away) - 0.5 * torch.dot(back, away)
            found = found + Curved(value, pull - back, precision)
        of_dispersions = dispersion_priors(block, graph, {**values, **split(place)}, updates)
        if of_dispersions is not None:
            found = found + of_dispersions
        return found if is_concave else positive(found, logs)

    gentle = None if slope is None else lambda place: of(place, slope)
    found = climb(of, start, gentle, moves if precision is None else None)
    new = {n: v.to(values[n].dtype) for n, v in split(found.place).items()}
    forms = {p.group: p.form for p in reached if isinstance(p, Dispersed)}
    spreads = {g: form.spread for g, form in forms.items() if form.spread is not None}
    refuse_collapse(graph, spreads, block, {**values, **new})
    shapes = {g: (form.shape, form.largest) for g, form in forms.items() if form.largest < inf}
    refuse_noiseless(graph, shapes, block, {**values, **new})
    return Coefficients(new, found.gain, found.last, found.is_settled)


def _coordinate(value: Tensor, is_positive: bool) -> Tensor:
    """What Newton's method moves: a coefficient, or the logarithm of a positive parameter."""
    wide = value.to(torch.float64)
    return wide.log() if is_positive else wide


def separated(
    block: Sequence[str],
    graph: FactorGraph,
    values: Mapping[str, Tensor],
    step: Tensor,
    far: float,
) -> str:
    """The sentence on coefficients, or a dispersion, that run off; empty where they do not.

    Args:
        block: Parameter names.
        graph: The factor graph.
        values: The current parameters.
        step: The last step of all parameters of the block. # (P,)
        far: By how much it moves the predictor of a cell.
    """
    bounded = [not is_real(graph.parameters[p].constraint) for p in block]
    spread = [values[p].numel() * [b] for p, b in zip(block, bounded, strict=True)]
    is_log = torch.tensor([b for own in spread for b in own], device=step.device)
    is_dispersion = bool((step[is_log].abs() >= FAR).any())
    if far < FAR and not is_dispersion:
        return ""
    flat = int((torch.where(is_log, step, 0.0) if is_dispersion else step).abs().argmax())
    name = block[-1]
    for p in block:
        if flat < values[p].numel():
            name = p
            break
        flat -= values[p].numel()
    shape = values[name].shape
    place = tuple(int(i) for i in np.unravel_index(flat, shape)) if shape else ()
    which = f", element {place[0] if len(place) == 1 else place}" if place else ""
    reached = predictors_of(graph, [name]) or predictors_of(graph, [name], mixed=True)
    sites = dict.fromkeys(graph.groups[p.group].members[0] for p in reached)
    shown = ", ".join(f"'{site}'" for site in sites)
    if is_dispersion:
        limits = [p.form.limit for p in reached if isinstance(p, Dispersed) and p.form.limit]
        return message(
            f"parameter '{name}'{which}",
            f"it runs off: site {shown} goes to {next(iter(limits), 'an end of its range')}.",
            "the data vary no more than they do in that limit, which the likelihood only approaches; "
            "it is kept where less than 1e-10 nats are left",
            [
                "use the distribution of the limit, for this component or for all",
                f"give it a prior: {name} = pyro.sample('{name}', dist.Gamma(2., 0.1)…) and "
                "guide='map'",
                "use fewer components",
            ],
        )
    return message(
        f"parameter '{name}'{which}",
        f"it runs off: the linear predictor of site {shown} separates the data without an error.",
        "the likelihood rises towards infinite coefficients and has no maximum; they are kept where "
        "the predictions are certain to ten digits",
        [
            f"give it a prior: {name} = pyro.sample('{name}', dist.Normal(0., 5.)…) and guide='map'",
            "drop the covariate that tells the outcomes apart, or pool its levels",
            "use fewer components",
        ],
    )
