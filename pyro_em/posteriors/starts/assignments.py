"""Where a fit begins: assignments of the latents, from which an M-step makes parameters.

"Things are easy when we know z": a q(z) that comes from labels, from probabilities or from chance
is handed to the M-step. Exact zeros of the model are respected, so that structural zeros survive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_em.arguments import as_tensor
from pyro_em.errors import UsageError, message
from pyro_em.globs import listed
from pyro_em.graph.factors import FactorGraph, Latent
from pyro_em.posteriors.answers.names import names_of, own_name, spread
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.enumeration import largest_cells, run_contraction
from pyro_em.posteriors.starts.vectors import Rows

Cluster = Callable[[Tensor, Tensor, int, torch.Generator, Tensor | None], Tensor]

Start = None | Literal["random", "kmeans", "random points"] | Mapping[str, Any]


def random_counts(
    graph: FactorGraph,
    plan: ContractionPlan,
    tables: Sequence[Tensor],
    *,
    generator: torch.Generator,
    hard: bool,
) -> list[Tensor]:
    """Expected counts of random assignments.

    Args:
        graph: The factor graph.
        plan: Its elimination order.
        tables: Its log densities; only their exact zeros are used.
        generator: Source of randomness.
        hard: One value per latent rather than random probabilities.
    """
    unary = {}
    for name, latent in graph.latents.items():
        sizes = [graph.dim_size(d) for d in latent.plates] + [latent.size]
        uniform = torch.rand(sizes, generator=generator, dtype=torch.float64, device="cpu")
        # −log(−log u) is Gumbel: its argmax is a uniform label. log(−log u) + const. are the logs
        # of a point drawn uniformly from the simplex.
        exponential = -(uniform.clamp(min=1e-300)).log()
        noise = -exponential.log() if hard else exponential.clamp(min=1e-300).log()
        unary[name] = noise.to(tables[0].device)
    flat = [_support_only(t) for t in tables]
    return _counts_with(graph, plan, flat, unary, hard=hard)


def given_counts(
    graph: FactorGraph,
    plan: ContractionPlan,
    tables: Sequence[Tensor],
    assignments: Mapping[str, Any],
) -> list[Tensor]:
    """Expected counts of given labels or probabilities.

    Args:
        graph: The factor graph.
        plan: Its elimination order.
        tables: Its log densities.
        assignments: For each latent integer labels (*plates,) or probabilities (*plates, K), by glob
            those of a chain (T, ...). Latents that are not named take their posterior given the named
            ones.

    Raises:
        UsageError: If a name is unknown or a shape is wrong.
    """
    unary = {}
    for name, given in spread(graph, assignments, "init").items():
        own = own_name(graph, name)
        if own not in graph.latents:
            raise UsageError(
                message(
                    f"init['{name}']",
                    f"it is no summed latent of this model; those are: {listed(names_of(graph))}.",
                    fixes=["name one of them"],
                )
            )
        unary[own] = _log_unary(
            graph,
            graph.latents[own],
            name,
            as_tensor(f"init['{name}']", given).to(tables[0].device),
        )
    complete = all(n in unary for n in graph.latents)
    used = [_support_only(t) for t in tables] if complete else list(tables)
    return _counts_with(graph, plan, used, unary, hard=False)


def clustered_counts(
    graph: FactorGraph,
    plan: ContractionPlan,
    tables: Sequence[Tensor],
    rows: Sequence[Rows],
    cluster: Cluster,
    *,
    generator: torch.Generator,
    shared: float = 0.0,
) -> list[Tensor]:
    """Expected counts of clusters of what is observed below the latents.

    Kinds of latents that see the same sites are clustered one after the other, each by what the
    clusters before it leave over. Latents without rows take their posterior given the others.

    Args:
        graph: The factor graph.
        plan: Its elimination order.
        tables: Its log densities.
        rows: The observed vectors of the latents.
        cluster: Makes responsibilities.
        generator: Source of randomness.
        shared: Part of each row that goes to all clusters evenly, so that none is too small.
    """
    unary: dict[str, Tensor] = {}
    left: dict[frozenset[str], Tensor] = {}
    for kind in rows:
        x, weights = left.get(kind.sites, kind.vectors), kind.weights[kind.seen]
        if len(x) != len(kind.vectors):
            x = kind.vectors
        labels = kind.labels[kind.seen] if bool((kind.labels >= 0).any()) else None
        r = torch.full((len(x), kind.size), 1 / kind.size, dtype=x.dtype, device=x.device)
        own = cluster(x[kind.seen], weights, kind.size, generator, labels)
        r[kind.seen] = own
        centres = (own * weights.unsqueeze(-1)).T @ x[kind.seen]
        centres = centres / (weights @ own).clamp(min=1e-300).unsqueeze(-1)
        left[kind.sites] = torch.where(kind.seen.unsqueeze(-1), x - r @ centres, 0.0)
        r = (1 - shared) * r + shared / kind.size
        logs = torch.where(r > 0, r.clamp(min=1e-300).log(), -torch.inf)
        unary.update(kind.split(logs.to(tables[0].device)))
    support = [_support_only(t) for t in tables]
    if all(n in unary for n in graph.latents):
        return _counts_with(graph, plan, support, unary, hard=False)
    try:
        return _counts_with(graph, plan, list(tables), unary, hard=False)
    except UsageError:  # impossible at the parameters of now
        return _counts_with(graph, plan, support, unary, hard=False)


def _log_unary(graph: FactorGraph, latent: Latent, name: str, given: Tensor) -> Tensor:
    sizes = [graph.dim_size(d) for d in latent.plates]
    own = [graph.dim_size(d) if d is not None else 1 for d in latent.batch_dims]
    if given.is_floating_point() and list(given.shape) in (
        [*sizes, latent.size],
        [*own, latent.size],
    ):
        p = given.to(torch.float64).reshape(*sizes, latent.size)
        if not bool((p >= 0).all()) or not bool((p.sum(-1) > 0).all()):  # NaN fails too
            raise UsageError(
                message(
                    f"init['{name}']",
                    "its rows are not probabilities.",
                    "a value is negative or NaN, or a row is all zero",
                )
            )
        return torch.where(p > 0, p.clamp(min=1e-300).log(), -torch.inf)
    if list(given.shape) not in (sizes, own):
        raise UsageError(
            message(
                f"init['{name}']",
                f"its shape is {tuple(given.shape)}.",
                f"labels have shape {tuple(sizes)}, probabilities {(*sizes, latent.size)}",
            )
        )
    if given.is_floating_point() and not bool((given == given.round()).all()):
        raise UsageError(
            message(
                f"init['{name}']",
                "labels must be whole numbers.",
                "one label per element of the latent's plates",
                ["pass integer labels", f"pass probabilities of shape {(*sizes, latent.size)}"],
            )
        )
    labels = given.long().reshape(sizes)
    if bool(((labels < 0) | (labels >= latent.size)).any()):
        raise UsageError(
            message(
                f"init['{name}']",
                f"labels run from {int(labels.min())} to {int(labels.max())}.",
                f"the latent has {latent.size} values, 0 … {latent.size - 1}",
            )
        )
    hot = torch.nn.functional.one_hot(labels, latent.size)
    return torch.where(hot > 0, 0.0, -torch.inf).to(torch.float64)


def _support_only(table: Tensor) -> Tensor:
    return torch.where(table == -torch.inf, -torch.inf, 0.0)


def _counts_with(
    graph: FactorGraph,
    plan: ContractionPlan,
    tables: Sequence[Tensor],
    unary: Mapping[str, Tensor],
    *,
    hard: bool,
) -> list[Tensor]:
    """Posterior counts of tables with one more unary term per latent."""
    with_unary = []
    for group, table in zip(graph.groups, tables, strict=True):
        table = table.to(torch.float64)
        if group.observed:
            with_unary.append(table)
            continue
        parts = []
        for i, name in enumerate(group.members):
            part = table[i]
            if name in unary:
                latent = graph.latents[name]
                have = (*latent.plates, name)
                u = unary[name].permute([have.index(d) for d in group.dims[i] if d in have])
                shape = [graph.dim_size(d) if d in have else 1 for d in group.dims[i]]
                part = part + u.reshape(shape)
            parts.append(part)
        with_unary.append(torch.stack(parts))
    result = (largest_cells if hard else run_contraction)(graph, plan, with_unary)
    if not bool(torch.isfinite(result.log_evidence)):
        raise UsageError(
            message(
                "init",
                "the given labels are impossible under the model's exact zeros.",
                "some label has probability zero, or the data have",
                ["give probabilities instead of labels", "check structural zeros"],
            )
        )
    return [
        cells if g.mask is None else cells * g.mask
        for g, cells in zip(graph.groups, result.cells, strict=True)
    ]
