"""What a mixture of Gaussian components was decided to be, kept for later data of the same form.

Which groups are rows, where numbers lie in vectors, and which parameters are the components' own follow
from selections, updates and shapes, not from data; `pyro_em.graph.told_by_selections` says when a later
graph is known to be the same in all of these. What depends on data is made anew from those at hand:
their centre, their squares, what bounds spreads, and whether rows occur several times.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.densities.components import Owned, OwnedForm
from pyro_em.densities.features import Cells
from pyro_em.densities.gaussian import GaussianForm
from pyro_em.densities.natural import Naturals
from pyro_em.densities.priors import LogPrior
from pyro_em.densities.theta import Theta
from pyro_em.densities.tying import Arguments
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.told_by_selections import Told
from pyro_em.posteriors.block import Component, Values
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.posteriors.mixtures.row_factors import RowFactors
from pyro_em.posteriors.mixtures.rows import RowShape, distinct
from pyro_em.updates.update import ParameterUpdate

_Argument = tuple[str | None, tuple[int, ...], torch.dtype]


@dataclass(frozen=True, eq=False)
class DecidedMixture:
    """A mixture of Gaussian components without its data.

    Attributes:
        latents: Its latent.
        shape: Its groups, by what they read.
        reads: The latents that rows read, by number.
        K: How many values these have.
        cells: Groups that read the latent and no row.
        values: The values of the latent that these were made of.
        naturals: Probabilities of the latent.
        rows: Per group of rows how these are laid out.
        owned: Per group of rows which parameters it has.
        arguments: Per group and argument the parameter that it is, its shape and its dtype.
    """

    latents: tuple[str, ...]
    shape: RowShape
    reads: tuple[int, ...]
    K: int
    cells: Mapping[int, Cells]
    values: Mapping[int, Tensor]
    naturals: Naturals | None
    rows: Mapping[int, GaussianForm]
    owned: Mapping[int, OwnedForm]
    arguments: tuple[Mapping[str, _Argument], ...]

    @classmethod
    def of(cls, block: Mixture) -> DecidedMixture | None:
        """What a mixture was decided to be; None where data may have had a say in it."""
        theta, first = block.theta, block.factors[0]
        owned = {g: s for g, s in theta.owned.items() if isinstance(s, Owned)}
        only_components = len(block.factors) == 1 and owned.keys() == first.normals.keys()
        others = (first.linear, first.others, first.counted, block.tables, block.known, block.free)
        if not only_components or block.repeats is not None or any(others):
            return None
        if theta.solvers or theta.others or theta.prior.counts is not None or theta.prior.rest:
            return None
        return cls(
            block.latents,
            block.shape,
            first.reads,
            first.K,
            block.cells,
            {g: block.graph.groups[g].value.clone() for g in block.cells},
            theta.naturals,
            {g: s.rule.form for g, s in owned.items()},
            {g: s.form for g, s in owned.items()},
            tuple(
                {name: (a.param, a.shape, a.dtype) for name, a in evaluators.items()}
                for evaluators in theta.evaluators
            ),
        )

    def on(
        self, graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values
    ) -> Mixture | None:
        """The mixture on other data; None where what was decided does not hold for these.

        Args:
            graph: A graph of the same form.
            updates: What was decided per parameter.
            values: Parameter values, for their shapes.
        """
        groups = graph.groups
        if not all(torch.equal(groups[g].value, v) for g, v in self.values.items()):
            return None
        if distinct(graph, self.shape, None).counts is not None:  # some rows occur several times
            return None
        rules = {g: form.on(groups[g].value) for g, form in self.rows.items()}
        owned = {g: s.on(rules[g], graph, updates, values) for g, s in self.owned.items()}
        evaluators = [
            {name: Arguments(group.bindings[name], *own) for name, own in arguments.items()}
            for group, arguments in zip(groups, self.arguments, strict=True)
        ]
        prior = LogPrior(None, 0.0, ())
        block = Mixture(
            graph,
            self.shape,
            graph.dim_size(self.shape.plate),
            (RowFactors(self.reads, self.K, None, rules, (), {}),),
            self.cells,
            (),
            {},
            (),
            None,
        )
        block.component = Component(graph, updates, values, self.latents)
        block.theta = Theta(graph, rules, self.naturals, owned, (), evaluators, (), (), prior)
        return block


def known_mixture(
    told: Told, graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values
) -> Mixture | None:
    """The mixture that a graph is known to be; None where it has to be looked at.

    Args:
        told: What tells it apart.
        graph: The graph.
        updates: What was decided per parameter.
        values: Parameter values, for their shapes.
    """
    asked = _asked(graph)
    decided = None if asked is None else told.recall(asked, *updates.values())
    return None if decided is None else decided.on(graph, updates, values)


def keep_mixture(told: Told, graph: FactorGraph, block: Mixture) -> None:
    """Keep what a graph was found to be for graphs that are told to be the same.

    Args:
        told: What tells it apart.
        graph: The graph, as `known_mixture` is asked about it.
        block: What it is.
    """
    asked = _asked(graph)
    decided = None if asked is None else DecidedMixture.of(block)
    if decided is not None:
        told.keep(decided, asked, *block.component.updates.values())


def _asked(graph: FactorGraph) -> Hashable | None:
    """What the decision depends on beside what `Told` holds; None where it is not kept."""
    if graph.all_data is not None:
        return None
    latents = tuple((n, v.plates, v.size) for n, v in graph.latents.items())
    groups = tuple(
        (
            g.observed,
            g.value.shape,
            g.value.dtype,
            g.value.device,
            tuple((n, a.shape, a.dtype) for n, a in g.outlines.items()),
        )
        for g in graph.groups
    )
    return "mixture", latents, groups
