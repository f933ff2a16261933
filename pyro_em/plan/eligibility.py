"""Which block iterates a model: one ordered list, and why each that does not match does not.

The blocks are asked one after the other, for each component of latents; the first that matches is
taken. What the others said is the plan's reason. Where none matches, or an M-step needs more than
sums, the contraction of the factor graph iterates, which serves every model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.densities.priors import is_plain_prior
from pyro_em.densities.tying import collapsed
from pyro_em.errors import Finding
from pyro_em.families.family import has_sums
from pyro_em.graph.bindings.useful import may_be_affine
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.stretches import LaterTuple
from pyro_em.graph.told_by_selections import told_by_selections
from pyro_em.posteriors.arrangement import Arrangement, arranged
from pyro_em.posteriors.block import Component, components_of
from pyro_em.posteriors.chain_sums.state_steps import chain_sums
from pyro_em.posteriors.chains.chain import Chain
from pyro_em.posteriors.chains.step_chain import StepChain
from pyro_em.posteriors.continuous.collapsed import collapsed_rows
from pyro_em.posteriors.continuous.conjugate_rows import conjugate_rows
from pyro_em.posteriors.continuous.factor_rows import factor_rows
from pyro_em.posteriors.continuous.table_rows import table_rows
from pyro_em.posteriors.independent import Independent
from pyro_em.posteriors.mixtures.grouped_rows import GroupedRows
from pyro_em.posteriors.mixtures.kept_mixtures import keep_mixture, known_mixture
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.posteriors.mixtures.product_rows import ProductRows
from pyro_em.posteriors.quick import QuickBlock, QuickSteps, SumsBlock
from pyro_em.tracing.sites import Role
from pyro_em.updates.decisions.appearances import is_joint
from pyro_em.updates.regressions.dispersed import dispersed_at
from pyro_em.updates.regressions.predictors import predictor_binding
from pyro_em.updates.sums.climb_on_sums import climbs
from pyro_em.updates.update import EXACT, Fixed, NewtonOnProfile, ParameterUpdate

# To add a block, add its class here, the quicker ones first.
BLOCKS: tuple[type[QuickBlock], ...] = (Mixture, GroupedRows, Chain, StepChain, ProductRows)

CONTRACTION = "contraction"


@dataclass(frozen=True, eq=False)
class Kernel:
    """What iterates a model.

    Attributes:
        name: "mixture", "chain", …; "contraction" where no block on sums serves, "independent" where
            components of latents have blocks of their own.
        reason: Why no quicker one serves, in words; None where one does.
        block: The block on sums, if there is one.
        latents: The components of latents, each in model order.
        own: Where there are several, what iterates each.
        words: What the plan says of an iteration, where it is more than name and reason.
    """

    name: str
    reason: str | None = None
    block: QuickSteps | None = None
    latents: tuple[Sequence[str], ...] = ()
    own: tuple[Kernel, ...] = ()
    words: str = ""

    @property
    def adding(self) -> QuickSteps | None:
        """The block, where the sums of parts of the data add up."""
        if isinstance(self.block, SumsBlock) and not self.block.adds:
            return None
        return self.block

    @property
    def names(self) -> str | dict[tuple[str, ...], str]:
        """The name; with several components of latents one for each."""
        if len(self.latents) < 2:
            return self.name
        return {tuple(k.latents[0]): k.name for k in self.each}

    @property
    def reasons(self) -> str | dict[tuple[str, ...], str | None] | None:
        """The reason, of the same shape as the name."""
        if len(self.latents) < 2:
            return self.reason
        return {tuple(k.latents[0]): k.reason for k in self.each}

    @property
    def each(self) -> tuple[Kernel, ...]:
        """What iterates each component of latents."""
        alike = (replace(self, latents=(names,)) for names in self.latents)
        return self.own or tuple(alike)

    def stepped(self) -> str:
        """What makes the steps, in words: ``mixture kernel``, ``mixture kernel and contraction``."""
        names = dict.fromkeys(k.name for k in self.each or (self,))
        return " and ".join(n if n == CONTRACTION else f"{n} kernel" for n in names)

    def in_plan(self, users: Mapping[str, str]) -> dict[str, Any]:
        """What a plan says of it.

        Args:
            users: The user's names of latents that have others here.
        """
        return {
            "kernel": self.names,
            "kernel_reason": self.reasons,
            "iterations": self.in_words(users),
        }

    def in_words(self, users: Mapping[str, str] | None = None) -> str:
        """What the plan says of an iteration: components that step alike together.

        Args:
            users: The user's names of latents that have others here.
        """
        users = users or {}
        said: dict[str, list[Kernel]] = {}
        for kernel in self.each or (self,):
            said.setdefault(kernel.words or kernel.name, []).append(kernel)
        parts = []
        for words, kernels in said.items():
            reasons = list(dict.fromkeys(k.reason for k in kernels if k.reason is not None))
            shown = "; ".join(reasons[:2]) + ("; …" if len(reasons) > 2 else "")
            parts.append(words + (f" ({shown})" if shown else ""))
            # One component is not named: a chain has a latent for each step.
            if self.block is not None and sum(map(bool, self.latents)) > 1:
                latents = [
                    tuple(users.get(n, n) for n in names)
                    for k in kernels
                    for names in k.latents
                    if names
                ]
                parts[-1] += f", for {_components_in_words(latents)}"
        return "; ".join(parts)


def _components_in_words(components: Sequence[tuple[str, ...]]) -> str:
    """``z``, ``z and a, b``, ``z_0 … z_9``, ``z_0 … z_9 (10 components)``."""
    if len(components) > 4:
        return f"{components[0][0]} … {components[-1][-1]} ({len(components)} components)"
    return " and ".join(
        ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]}" for names in components
    )


def gaussian_kernel(
    graph: FactorGraph, reason: str | None = None, block: QuickSteps | None = None
) -> Kernel:
    """What iterates a model with Gaussian latents.

    Args:
        graph: Its graph.
        reason: Why no sums over rows serve, where something stands in their way.
        block: What takes steps on sums over rows.
    """
    sites = [s for g in graph.groups if g.nested is not None for s in g.nested.groups]
    latents = [s.members for s in sites if s.role is Role.GAUSSIAN]
    names: Sequence[str] = LaterTuple(lambda: tuple(n for own in latents for n in own))
    others = components_of(graph)
    parts = (*others, tuple(names)) if others else (names,)
    own = dict.fromkeys(g.nested.words for g in graph.groups if g.nested is not None)
    words = ", ".join(own) if block is None else block.words
    name = "Gaussian" if block is None else block.name
    return Kernel(name, reason, block, parts, words=words)


@torch.no_grad()
def kernel_of(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Mapping[str, Tensor]
) -> Kernel:
    """The kernel of a graph whose bindings are all static.

    Args:
        graph: The factor graph.
        updates: As decided.
        values: Parameter values, for their shapes.
    """
    if any(g.nested for g in graph.groups):
        chains = chain_sums(graph, updates, values)
        if isinstance(chains, Finding):
            return gaussian_kernel(graph, chains.what)
        rows: QuickSteps | None = chains or factor_rows(graph, updates, values)
        rows = rows or collapsed_rows(graph, updates) or conjugate_rows(graph, updates, values)
        if rows is None:
            words = ", ".join(dict.fromkeys(g.nested.words for g in graph.groups if g.nested))
            rows = table_rows(graph, updates, values, "Gaussian", f"{words}, in chunks of rows")
        return gaussian_kernel(graph, block=rows)
    told = told_by_selections(graph)
    known = None if told is None else known_mixture(told, graph, updates, values)
    if known is not None:
        return Kernel(known.name, None, known, (known.component.latents,), words=known.words)
    parts = components_of(graph)
    finding = needs_more_than_sums(graph, updates)
    if finding is not None:
        return Kernel(CONTRACTION, finding.what, None, parts)
    names = parts[0] if len(parts) == 1 else tuple(graph.latents)
    whole = Component(collapsed(graph), updates, values, names)
    if len(parts) > 1:
        return _kernel_of_several(whole, parts)
    said: list[Finding] = []
    for kind in BLOCKS:
        found = kind.match(whole)
        if not isinstance(found, Finding):
            if (
                told is not None
                and isinstance(found, Mixture)
                and not isinstance(found, GroupedRows)
            ):
                keep_mixture(told, graph, found)
            return Kernel(found.name, None, found, parts, words=found.words)
        said.append(found)
    words = f"{CONTRACTION}, in chunks of rows"
    rows = table_rows(graph, updates, values, CONTRACTION, words)
    reason = _reason(graph, whole.latents, said)
    return Kernel(CONTRACTION, reason, rows, parts, words="" if rows is None else words)


def _kernel_of_several(whole: Component, parts: tuple[tuple[str, ...], ...]) -> Kernel:
    """Where components of latents share no factor, each has its own."""
    found = arranged(whole, BLOCKS)
    own = tuple(_kernel_beside(found, names) for names in parts)
    if not found.kernels:
        return Kernel(CONTRACTION, own[0].reason, None, parts, own)
    block = Independent.of(found)
    if isinstance(block, Finding):
        return Kernel(CONTRACTION, block.what, None, parts)
    return Kernel(block.name, None, block, parts, own)


def _kernel_beside(found: Arrangement, latents: tuple[str, ...]) -> Kernel:
    """What iterates one of several components."""
    block = found.serves[latents]
    if block is not None:
        return Kernel(block.name, None, block, (latents,), words=block.words)
    reason = _reason(found.component.graph, latents, found.said[latents])
    return Kernel(CONTRACTION, reason, None, (latents,))


def _reason(graph: FactorGraph, latents: Sequence[str], said: Sequence[Finding]) -> str:
    """Of what the blocks said the finding that tells most."""
    # A chain says more of many latents than a mixture does, and less of one or two.
    if (
        len(said) == len(BLOCKS)
        and len(latents) > 2
        and len(latents) > _most_per_row(graph, latents)
    ):
        return said[BLOCKS.index(StepChain)].what
    # Of several latents of a row their product says more than a mixture does.
    return (said[-1] if len(latents) > 1 else said[0]).what


def _most_per_row(graph: FactorGraph, latents: Sequence[str]) -> int:
    """How many of some latents share a row with the same data, where all read them."""
    degrees = [
        sum(d in latents for d in dims) for g in graph.groups if g.observed for dims in g.dims
    ]
    return max(degrees, default=0)


def needs_more_than_sums(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate]
) -> Finding | None:
    """Why the M-step of a graph is not one of closed forms on sums; None where it is."""
    exact = {n: u for n, u in updates.items() if isinstance(u.update, EXACT)}
    climbed = {n for n, u in updates.items() if climbs(graph, u)}
    for name, u in updates.items():
        if name not in exact and name not in climbed and not isinstance(u.update, Fixed):
            return Finding(f"parameter '{name}'", f"the update of '{name}' is a gradient")
        if isinstance(u.update, NewtonOnProfile):
            return Finding(f"parameter '{name}'", f"'{name}' is solved for with scale matrices")
        if u.kind is not None and u.needs_data and u.is_end:
            return Finding(f"parameter '{name}'", f"'{name}' is a {u.kind.value}, which is no sum")
    if not exact and not climbed:
        return Finding("model", "no parameter is updated")
    medians = {use.group for u in exact.values() if u.needs_data for use in u.uses}
    for g, group in enumerate(graph.groups):
        if g in medians:  # their rows keep the responsibilities, or the block says why not
            continue
        found = _no_sums(graph, updates, exact, climbed, g, group)
        if found is not None:
            return Finding(f"site '{group.members[0]}'", found)
    return None


def _no_sums(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    exact: Mapping[str, ParameterUpdate],
    climbed: Collection[str],
    g: int,
    group: Group,
) -> str | None:
    """Why a group has no sums that serve its updates."""
    site, kind = group.members[0], group.distribution
    if group.role is Role.POINT:
        if not group.is_unscaled or not is_plain_prior(group, updates, g):
            return f"the prior of '{site}' is no constant that sums gain"
        return None
    if group.value_binding is not None:
        return f"the value of '{site}' depends on a parameter"
    if group.family is None:
        return f"'{site}' ({kind}) has no sums"
    is_predicted = group.family.predicted is not None
    dispersed = dispersed_at(g, group, graph.parameters) if is_predicted else None
    for argument, binding in group.bindings.items():
        if binding.how in ("constant", "selection", "computed"):
            continue
        if not set(binding.params).isdisjoint(climbed):  # any function of parameters serves
            continue
        is_line = binding.how in ("affine", "bilinear") and argument == "loc"
        is_line = is_line or (dispersed is not None and argument in dispersed.bindings)
        is_line = is_line or predictor_binding(group, argument, graph.parameters) is not None
        if not is_line and not is_joint(group):
            if binding.how == "composite":
                return f"{argument} of '{site}' ({kind}) is made of several parameters"
            how = "a sum" if binding.how == "sum" else binding.how
            return f"{argument} of '{site}' ({kind}) is {how} in its parameters"
    touched = set(exact).intersection(group.params)
    if touched and not has_sums(group.family, group.arguments):
        return f"'{site}' ({kind}) has no single form of sums"
    return None


def changing_argument(graph: FactorGraph) -> Finding:
    """Which factor cannot be recomputed from the parameters without the model."""
    groups = [n for g in graph.groups for n in (g.nested.groups if g.nested else (g,))]
    for group in groups:
        if group.is_static:
            continue
        site = group.members[0]
        where = f"site '{site}'"
        for argument, binding in group.bindings.items():
            if not binding.is_static and argument in group.lines:
                return Finding(where, f"the mean of '{site}' is not linear in parameters")
            if not binding.is_static:
                either = group.family is not None and may_be_affine(group.family, argument)
                what = "neither a selection nor affine in" if either else "no selection of"
                return Finding(where, f"{argument} of '{site}' is {what} parameters")
        if group.family is None:
            return Finding(where, f"'{site}' ({group.distribution}) has no closed forms")
        return Finding(where, f"the value, mask or scale of '{site}' depends on parameters")
    return Finding("model", "the model changes in a way that its autograd graph does not show")
