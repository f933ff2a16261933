"""Weighted least squares for a Normal whose ``loc`` is affine in parameters.

    δ = (Σ_cells w/σ² J Jᵀ)⁺ Σ_cells (w/σ²) J (x̄ − loc),    θ ← θ + δ,

for all parameters of one argument at once; of a multivariate Normal (`vector_lines`) with its precision
matrix in place of 1/σ². The pseudo-inverse leaves directions that the data do
not identify where they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.expectations.scatter import sum_to
from pyro_em.updates.regressions.coefficient_priors import normal_priors
from pyro_em.updates.regressions.designs import designs_of
from pyro_em.updates.regressions.expansion import Expansion
from pyro_em.updates.regressions.gaussian_lines import normal_equations
from pyro_em.updates.regressions.pseudo_inverse import pseudo_solve
from pyro_em.updates.regressions.separate_lines import separate_step
from pyro_em.updates.regressions.vector_lines import is_vector, vector_equations
from pyro_em.updates.update import ParameterUpdate


@dataclass(frozen=True, eq=False)
class Equations:
    """Normal equations of a block of parameters, and of working coefficients after them.

    Attributes:
        gram: Σ w/σ² J Jᵀ. # (p, p)
        moment: Σ (w/σ²) J (x̄ − loc). # (p,)
    """

    gram: Tensor
    moment: Tensor


def least_squares(
    block: Sequence[str],
    graph: FactorGraph,
    statistics: Mapping[int, Statistics],
    arguments: Sequence[Mapping[str, Tensor]] | Mapping[int, Mapping[str, Tensor]],
    values: Mapping[str, Tensor],
    updates: Mapping[str, ParameterUpdate],
    expansions: Sequence[Expansion] = (),
) -> dict[str, Tensor]:
    """New values of all parameters of a block.

    Args:
        block: Parameter names.
        graph: The factor graph.
        statistics: Expected statistics per group.
        arguments: The current arguments per group.
        values: The current parameters.
        updates: What was decided per parameter, for Normal priors: ridge regression.
        expansions: Latents whose working coefficients are found with them; by the latent's name.
    """
    groups = _groups_of(block, graph, expansions)
    if len(groups) == 1 and not expansions and not any(updates[p].priors for p in block):
        (g,) = groups
        separate = separate_step(graph.groups[g], block, arguments[g], values)
        if separate is not None:
            steps = zip(block, separate.split([values[p].numel() for p in block]), strict=True)
            return {p: values[p] + own.reshape(values[p].shape) for p, own in steps}
    equations = equations_of(block, graph, statistics, arguments, values, expansions)
    return solved(equations, block, graph, values, updates, expansions)


def _groups_of(
    block: Sequence[str], graph: FactorGraph, expansions: Sequence[Expansion]
) -> list[int]:
    """The groups whose means a block reaches, or whose latents are expanded."""
    return [
        g
        for g, group in enumerate(graph.groups)
        if set(block).intersection(group.mean_params) or any(e.is_read_by((g,)) for e in expansions)
    ]


def equations_of(
    block: Sequence[str],
    graph: FactorGraph,
    statistics: Mapping[int, Statistics],
    arguments: Sequence[Mapping[str, Tensor]] | Mapping[int, Mapping[str, Tensor]],
    values: Mapping[str, Tensor],
    expansions: Sequence[Expansion] = (),
) -> Equations:
    """The normal equations of a block from its data, without priors; see `least_squares`."""
    total = sum(values[p].numel() for p in block) + sum(e.size for e in expansions)
    gram: Tensor | None = None
    moment: Tensor | None = None
    for g in _groups_of(block, graph, expansions):
        group = graph.groups[g]
        if group.belief is not None:
            own_gram, own_moment = normal_equations(
                g, group, block, arguments[g], values, expansions
            )
            gram = own_gram if gram is None else gram + own_gram
            moment = own_moment if moment is None else moment + own_moment
            continue
        binding = group.bindings["loc"].linear_in(block, values)
        stats = statistics[g]
        if is_vector(group):
            own_gram, own_moment = vector_equations(
                binding, block, stats, arguments[g], values, 1 + group.n_plates
            )
            gram = own_gram if gram is None else gram + own_gram
            moment = own_moment if moment is None else moment + own_moment
            continue
        scale = arguments[g]["scale"].detach()
        loc = arguments[g]["loc"].detach()
        precision = scale**-2
        weight = stats["weight"] * precision
        residual = (
            stats["deviation"] + stats["weight"] * (stats["reference:loc"] - loc)
        ) * precision
        cells = binding.constant.shape
        weight, residual = torch.broadcast_tensors(weight, residual)
        weight, residual = sum_to(weight, cells), sum_to(residual, cells)
        if gram is None or moment is None:
            gram, moment = weight.new_zeros(total, total), weight.new_zeros(total)
        parts = designs_of(binding, block, values, 1 + group.n_plates)
        w, r = weight.reshape(-1, len(parts)), residual.reshape(-1, len(parts))
        for k, (columns, narrow) in enumerate(parts):
            design = narrow.to(w.dtype)  # sums may be finer than what they are of
            weighted = design * w[:, k : k + 1]
            diagonal_block = gram[columns.unsqueeze(-1), columns] + weighted.mT @ design
            gram[columns.unsqueeze(-1), columns] = diagonal_block
            moment[columns] += design.mT @ r[:, k]
    assert gram is not None and moment is not None
    return Equations(gram, moment)


def solved(
    equations: Equations,
    block: Sequence[str],
    graph: FactorGraph,
    values: Mapping[str, Tensor],
    updates: Mapping[str, ParameterUpdate],
    expansions: Sequence[Expansion] = (),
) -> dict[str, Tensor]:
    """The maximisers from the normal equations of all of the data, with priors; see `least_squares`."""
    gram, moment = equations.gram, equations.moment
    precision, pull = normal_priors(block, graph, values, updates, gram)
    if precision is not None:
        more = len(moment) - len(pull)  # working coefficients have no prior
        gram = gram + torch.nn.functional.pad(precision, (0, more, 0, more))
        moment = moment + torch.nn.functional.pad(pull, (0, more))
    step = pseudo_solve(gram, moment)
    new, begin = {}, 0
    for p in block:
        size = values[p].numel()
        new[p] = values[p] + step[begin : begin + size].reshape(values[p].shape)
        begin += size
    for e in expansions:
        new[e.latent] = e.one(step) + step[begin : begin + e.size]
        begin += e.size
    return new


@dataclass(frozen=True, eq=False)
class LineSolver:
    """The least squares of one block of parameters, decided once and solved from sums over the data.

    Attributes:
        block: The parameters.
        graph: The graph whose groups the sums are of.
        updates: What was decided per parameter.
    """

    block: tuple[str, ...]
    graph: FactorGraph
    updates: Mapping[str, ParameterUpdate]

    def solve(
        self,
        statistics: Mapping[int, Statistics],
        arguments: Mapping[int, Mapping[str, Tensor]],
        values: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """The maximisers of the expected log joint in the block.

        Args:
            statistics: Expected statistics per group, with references.
            arguments: The current arguments per group.
            values: The current parameters.
        """
        new = least_squares(self.block, self.graph, statistics, arguments, values, self.updates)
        return {name: value.to(values[name].dtype) for name, value in new.items()}
