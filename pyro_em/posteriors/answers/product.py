"""The posterior that a dict of probabilities stands for: the product of its marginals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.arguments import as_tensor
from pyro_em.errors import UsageError, message
from pyro_em.globs import listed
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.answers.discrete_faces import marginal
from pyro_em.posteriors.answers.names import names_of, spread
from pyro_em.posteriors.answers.posterior import Posterior


def product_posterior(
    graph: FactorGraph, marginals: Mapping[str, Tensor], log_densities: Sequence[Tensor]
) -> Posterior:
    """The product of marginals that a user gave.

    Args:
        graph: The factor graph.
        marginals: For every summed latent its probabilities # (*plates, K); by glob those of a chain
            # (T, *plates, K)
        log_densities: Per group.

    Raises:
        UsageError: If a latent is missing, or probabilities have a wrong shape or sum.
    """
    tables = {}
    marginals = spread(graph, marginals, "q")
    for name in graph.structure.masked_pairs:
        if name in marginals and f"{name}_unobserved" in graph.latents:
            marginals[f"{name}_unobserved"] = marginals.pop(name)
    missing = [n for n in graph.latents if n not in marginals]
    unknown = [n for n in marginals if n not in graph.latents]
    if missing or unknown:
        names = listed(missing or unknown)
        what = "probabilities are missing for" if missing else "no summed latent is called"
        raise UsageError(
            message(
                "q",
                f"{what} {names}.",
                "q must name every summed latent and nothing else",
                [f"give {{site: probabilities}} for: {listed(names_of(graph))}"],
            )
        )
    for name, latent in graph.latents.items():
        device = log_densities[0].device
        p = as_tensor(f"q['{name}']", marginals[name]).to(dtype=torch.float64, device=device)
        sizes = [graph.dim_size(d) for d in latent.plates]
        shape = [graph.dim_size(d) if d is not None else 1 for d in latent.batch_dims]
        if list(p.shape) not in ([*sizes, latent.size], [*shape, latent.size]):
            raise UsageError(
                message(
                    f"q['{name}']",
                    f"its shape is {tuple(p.shape)}; {(*sizes, latent.size)} was expected.",
                    "plates first, left to right, the support last",
                )
            )
        # Written so that NaN fails too.
        if not bool((p >= 0).all()) or not float((p.sum(-1) - 1).abs().max()) <= 1e-5:
            raise UsageError(
                message(
                    f"q['{name}']",
                    "its rows are not probabilities that sum to one.",
                    fixes=["divide by p.sum(-1, keepdim=True)"],
                )
            )
        tables[name] = p.reshape(*sizes, latent.size)
    cells, counts, entropy = [], [], 0.0
    for group in graph.groups:
        parts = []
        for dims in group.dims:
            table = log_densities[0].new_ones((1,) * len(dims), dtype=torch.float64)
            for d in dims:
                if d in graph.latents:
                    have = (*graph.latents[d].plates, d)
                    p = tables[d].permute([have.index(x) for x in dims if x in have])
                    shape = [graph.dim_size(x) if x in have else 1 for x in dims]
                    table = table * p.reshape(shape)
            parts.append(table.expand(group.sizes))
        cell = torch.stack(parts)
        count = torch.stack([c * s for c, s in zip(cell, group.scale, strict=True)])
        count = count if group.mask is None else count * group.mask
        cells.append(cell)
        counts.append(count)
        if not group.observed:
            for i, name in enumerate(group.members):
                p = marginal(cell[i], group.dims[i], [*graph.latents[name].plates, name])
                w = marginal(count[i], group.dims[i], [*graph.latents[name].plates, name])
                entropy -= float(torch.where(w == 0, 0.0, w * p.clamp(min=1e-300).log()).sum())
    return Posterior(
        graph, cells, counts, None, False, [t.detach() for t in log_densities], entropy
    )
