"""Sites that a mask of the user's observes in part: values and marginals under the name in the model.

Pyro makes two sites of one with ``obs_mask``; an answer takes what was observed from one, and the
posterior of the other elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.globs import Values
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.answers.names import observed_steps


def under_user_names(graph: FactorGraph, values: dict[str, Tensor]) -> Values:
    """Values of ``obs_mask`` sites under the user's names, with what was observed."""
    clamped = set(graph.structure.clamped)
    for name, mask in graph.structure.masked_pairs.items():
        hidden = f"{name}_unobserved"
        if name in clamped and hidden in values:
            values[name] = values.pop(hidden)
        elif hidden in values:
            values[name] = _where_observed(graph, name, mask, values.pop(hidden))
    return Values(values, observed_steps(graph))


def _where_observed(graph: FactorGraph, name: str, mask: Tensor, unobserved: Tensor) -> Tensor:
    event_dim = graph.latents[f"{name}_unobserved"].support.dim() - 1
    own = len(graph.latents[f"{name}_unobserved"].batch_dims) + event_dim
    shape = unobserved.shape[unobserved.dim() - own :]  # without that of draws
    value = _observed_value(graph, name).to(unobserved.dtype).reshape(shape)
    return torch.where(mask.reshape(mask.shape + (1,) * event_dim), value, unobserved)


def _observed_value(graph: FactorGraph, name: str) -> Tensor:
    group, i = graph.group_of(f"{name}_observed")
    value = group.value[i]
    latent = graph.latents[f"{name}_unobserved"]
    plates = value.shape[: group.n_plates]
    event = value.shape[len(group.dims[i]) :]
    value = value.reshape((*plates, *event))
    sizes = [graph.dim_size(p) for p in latent.plates]
    return value.expand((*sizes, *event))


def with_observed(graph: FactorGraph, name: str, probs: Tensor) -> Tensor:
    """Marginals of an ``obs_mask`` site: one-hot where it was observed.

    Args:
        graph: The factor graph.
        name: The site's name in the model.
        probs: The marginals of its unobserved part. # (*plates, K)
    """
    if name in graph.structure.clamped:
        return probs
    latent = graph.latents[f"{name}_unobserved"]
    value = _observed_value(graph, name)
    event_dim = latent.support.dim() - 1
    same = value.unsqueeze(value.dim() - event_dim) == latent.support.to(value.dtype)
    hot = same.flatten(same.dim() - event_dim).all(-1) if event_dim else same
    mask = graph.structure.masked_pairs[name]
    hot = hot.reshape(probs.shape)
    return torch.where(mask.unsqueeze(-1), hot.to(probs.dtype), probs)
