"""Coefficients of linear predictors: their M-step by Newton's method, with Normal priors.

    Q(θ) = Σ_cells f(η) − ½ Σ_j (θ_j − μ_j)² / σ_j²

What the data hold on both sides has a maximum. Where some covariate tells outcomes apart without an
error the likelihood rises towards infinite coefficients: they are left where predictions are certain to
ten digits, and it is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_em.errors import message
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.least_squares import normal_priors
from pyro_em.updates.newton import climb
from pyro_em.updates.predictors import Curved, predictors_of
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
) -> Coefficients:
    """The maximisers of the expected log joint in a block of parameters.

    Args:
        ask: From values of these parameters to the expected log joint of the predictors they reach.
        block: Parameter names.
        graph: The factor graph.
        values: The current parameters.
        updates: What was decided per parameter, for Normal priors.
    """
    start = torch.cat([values[name].detach().reshape(-1).to(torch.float64) for name in block])
    precision, pull = normal_priors(block, graph, values, updates, start)

    def split(flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([values[name].numel() for name in block])
        return {n: p.reshape(values[n].shape) for n, p in zip(block, parts, strict=True)}

    def of(place: Tensor) -> Curved:
        found = ask(split(place))
        if precision is None:
            return found
        away = place - start
        value = torch.dot(pull, away) - 0.5 * torch.dot(precision, away * away)
        return found + Curved(value, pull - precision * away, torch.diag(precision))

    found = climb(of, start)
    new = {n: v.to(values[n].dtype) for n, v in split(found.place).items()}
    return Coefficients(new, found.gain, found.last, found.is_settled)


def separated(
    block: Sequence[str],
    graph: FactorGraph,
    values: Mapping[str, Tensor],
    step: Tensor,
    far: float,
) -> str:
    """The sentence on coefficients that run off; empty where they do not.

    Args:
        block: Parameter names.
        graph: The factor graph.
        values: The current parameters.
        step: The last step of all parameters of the block. # (P,)
        far: By how much it moves the predictor of a cell.
    """
    if far < FAR:
        return ""
    flat = int(step.abs().argmax())
    name = block[-1]
    for p in block:
        if flat < values[p].numel():
            name = p
            break
        flat -= values[p].numel()
    shape = values[name].shape
    place = tuple(int(i) for i in np.unravel_index(flat, shape)) if shape else ()
    which = f", element {place[0] if len(place) == 1 else place}" if place else ""
    reached = predictors_of(graph, [name])
    sites = dict.fromkeys(graph.groups[p.group].members[0] for p in reached)
    shown = ", ".join(f"'{site}'" for site in sites)
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
