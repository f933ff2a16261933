"""The joint posterior of latents in plates that cross: each element of one with each of the other.

No sum over all pairs at once exists, and none is needed. The gradient of the log evidence in a
table that a latent reads is its marginal, and the curvature is the covariance of indicators,

    ∂² log p(x) / ∂ℓ_a(n, i) ∂ℓ_b(m, j) = p(a_n = i, b_m = j | x) − p(a_n = i | x) p(b_m = j | x).

Source: Wainwright and Jordan (2008), proposition 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.graph.factors import FactorGraph, Latent
from pyro_em.posteriors.contraction import log_sum_exp
from pyro_em.posteriors.enumeration import contraction_of, forward


def are_connected(graph: FactorGraph, a: str, b: str) -> bool:
    """Whether a path of factors leads from one latent to another; if not, they are independent."""
    reached, before = {a}, 0
    factors = [[d for d in dims if d in graph.latents] for g in graph.groups for dims in g.dims]
    while len(reached) > before:
        before = len(reached)
        for read in factors:
            if not reached.isdisjoint(read):
                reached.update(read)
    return b in reached


def across_plates(
    graph: FactorGraph,
    tables: Sequence[Tensor],
    first: Latent,
    second: Latent,
    plates: Sequence[str],
) -> Tensor:
    """The joint posterior of two latents whose plates cross.

    Args:
        graph: The factors.
        tables: Their log densities per group. # (members, *sizes)
        first: One latent.
        second: The other.
        plates: The plates of both, in the order of the result.

    Returns:
        Probabilities. # (*plates, K_a, K_b)

    Raises:
        UsageError: If sites are scaled: the evidence is no logarithm of a sum then.
    """
    if any(not group.is_unscaled for group in graph.groups):
        raise UsageError(
            message(
                "joint",
                f"'{first.name}' and '{second.name}' are in plates that cross, in a model with "
                "weights.",
                "their joint posterior is known without poutine.scale",
                ["ask for probs(site) of each", "fit with weights, and ask without them"],
            )
        )
    names = [(*latent.plates, latent.name) for latent in (first, second)]
    sizes = [[graph.dim_size(d) for d in dims] for dims in names]
    device = tables[0].device
    zeros = [torch.zeros(size, dtype=torch.float64, device=device) for size in sizes]
    swap = zeros[0].numel() > zeros[1].numel()  # one pass per cell of the smaller one
    if swap:
        names, sizes, zeros = names[::-1], sizes[::-1], zeros[::-1]
    with torch.enable_grad():
        plan = contraction_of(graph, names)
        leaves, _, total = forward(graph, plan, tables, log_sum_exp, zeros)
        few, many = torch.autograd.grad(total, leaves[-2:], create_graph=True)
        rows = [
            torch.autograd.grad(cell, leaves[-1], retain_graph=True)[0] for cell in few.reshape(-1)
        ]
    covariance = torch.stack(rows).reshape(*sizes[0], *sizes[1])
    letter = {d: chr(ord("a") + i) for i, d in enumerate(dict.fromkeys(names[0] + names[1]))}
    one, other = ("".join(letter[d] for d in dims) for dims in names)
    out = "".join(letter[d] for d in (*plates, first.name, second.name))
    product = torch.einsum(f"{one},{other}->{out}", few.detach(), many.detach())
    # A plate of both is met with itself only.
    return (product + torch.einsum(f"{one}{other}->{out}", covariance)).clamp(min=0.0)
