"""Gaussian and conjugate latents that are integrated under each draw of a guide.

With u drawn and h Gaussian and linear given u, the bound holds the marginal likelihood of h,

    log p(x, u) = log ∫ p(x, h, u) dh,

whose gradient reaches u through coefficients, offsets and variances; so for latents that are conjugate
to their children at each u. A batch that stands for all data counts its rows several times: the plate's
factor multiplies the logarithm of each row's integral. A latent outside that plate would see the rows
of one batch alone, and is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em.errors import ModelError, UsageError, message
from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.graph.bindings.sparse_lines import random_like
from pyro_em.graph.conjugate_children.conjugate_model import ConjugateModel
from pyro_em.graph.conjugate_children.conjugate_reads import read_conjugates
from pyro_em.graph.conjugate_children.conjugate_record import ConjugateRead, NotConjugate
from pyro_em.graph.enumerated import run_enumerated
from pyro_em.graph.factors import FactorGraph, Group, Nested
from pyro_em.graph.gaussian_lines.drawn_lines import DrawnLines, drawn_lines
from pyro_em.graph.gaussian_lines.lines import NotLinear
from pyro_em.graph.structure import Structure
from pyro_em.posteriors.continuous.conjugate_components import conjugated
from pyro_em.posteriors.continuous.gaussian_components import Alike, NotSeparate, integrated
from pyro_em.posteriors.continuous.gaussian_steps import NESTED_BLOCKS
from pyro_em.posteriors.scales.scaled_components import pairs_alike
from pyro_em.tracing.given import References
from pyro_em.tracing.parameters import moved
from pyro_em.tracing.randomness import same_random_state, set_random_state
from pyro_em.tracing.runs import Model, Run
from pyro_em.tracing.sites import INTEGRATED, Role


@dataclass(frozen=True, eq=False)
class AttachedRun:
    """A run of a model with its latents at values of reference, and what a second one like it needs.

    Attributes:
        at_zero: The run, attached to parameters and draws.
        model: The model without these values, which gives the same run again.
        references: The values.
        structure: The skeleton.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        state: The random state in which ``model`` begins.
        drawn: What the guide drew.
        kernels: The kernel of the prior of each conjugate latent.
    """

    at_zero: Run
    model: Model
    references: References
    structure: Structure
    args: tuple
    kwargs: dict[str, Any]
    state: Any
    drawn: tuple[Tensor, ...] = ()
    kernels: Mapping[str, PriorKernel] = field(default_factory=dict)

    def at(
        self, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | None = None
    ) -> Run:
        """The run at other values of Gaussian latents, detached where parameters are given.

        Raises:
            ModelError: If it fails.
        """
        attached = parameters is None
        how: dict[str, Any] = {"limit": None, "attached": attached, "values": parameters}
        model = self.references.for_lines(self.model).at(values)
        try:
            with same_random_state():
                set_random_state(self.state)
                return run_enumerated(model, self.args, self.kwargs, self.structure, **how)
        except ModelError as error:
            raise ModelError(_fails(tuple(values), str(error))) from error

    @property
    def sources(self) -> list[Tensor]:
        """Tensors of which gradients will be taken; none where gradients are off."""
        if not torch.is_grad_enabled():
            return []
        tensors = [p.unconstrained for p in self.at_zero.parameters.values()]
        return [t for t in (*tensors, *self.drawn) if t.requires_grad and t.is_floating_point()]

    def lines(self) -> DrawnLines:
        """How the latents enter means.

        Raises:
            NotLinear: If the model is not linear in the latents here.
        """
        values = {
            name: random_like(zero, 31 + i).requires_grad_()
            for i, (name, zero) in enumerate(self.references.zeros.items())
        }

        def moved_run() -> Run:
            return self.at(values, self.moved())

        runs = self.at(values), self.at_zero
        return drawn_lines(runs, values, self.structure, self.sources, moved_run)

    @torch.no_grad()
    def moved(self) -> dict[str, Tensor]:
        """Parameters in general position; leaves, of which gradients are taken, stay as they are."""
        places = self.at_zero.parameters
        return {
            n: transform_to(places[n].constraint)(u)
            for n, u in moved(places, seed=31).items()
            if places[n].leaf is not places[n].unconstrained
        }

    def reads(self) -> dict[str, ConjugateRead]:
        """What sites read of conjugate latents.

        Raises:
            NotConjugate: If a latent has a child that is not conjugate to it here.
        """
        structure = self.structure
        # The draw stands for the guide: its own sites are in the run that drew.
        sites = {n: i for n, i in structure.sites.items() if i.role is not Role.GUIDE}
        structure = replace(structure, sites=sites)
        model = self.references.for_reads(self.model)
        with same_random_state():
            set_random_state(self.state)
            run = model, self.args, self.kwargs, structure
            return read_conjugates(ConjugateModel(*run, self.kernels), self.moved())


def integrated_run(
    graph: FactorGraph,
    run: AttachedRun,
    factors: Mapping[str, float] | None = None,
    limit: int | None = None,
) -> FactorGraph:
    """The graph of an attached run, with its Gaussian and conjugate latents integrated.

    Args:
        graph: As traced with these latents at values of reference.
        run: The run that was traced.
        factors: Per plate what multiplies its sites in this run.
        limit: How many numbers the matrices of one E-step may have.

    Raises:
        NotLinear: If the model is not linear in the latents here.
        NotConjugate: If a latent has a child that is not conjugate to it here.
        NotSeparate: If discrete latents connect rows of Gaussian ones, or matrices are too large.
        UsageError: If a batch stands for all data and a latent is outside its plate.
    """
    factors = factors or {}
    found = run.lines() if run.references.zeros else DrawnLines({}, {})
    reads = run.reads() if run.kernels else {}
    out = _unscaled(graph, {*found.lines, *reads, *run.kernels}, factors)
    kept = frozenset(factors)
    alike = Alike(pairs_alike(found.lines, reads), frozenset(found.lines))
    out = integrated(out, found.lines, limit, found.parts, kept, alike)
    if run.kernels:
        out = conjugated(out, reads, run.kernels, limit)
    return replace(out, groups=tuple(_scaled(g, factors) for g in out.groups))


_WHY = "it was integrated exactly, as it could be when the model was first looked at"


def _fails(latents: tuple[str, ...], text: str) -> str:
    shown = ", ".join(f"'{n}'" for n in latents)
    return message(
        "model",
        f"it does not run at other values of {shown}: {text.splitlines()[0]}",
        "it is integrated under each draw of the guide",
        ["give it to the guide: strategy='guide'"],
    )


def _unscaled(
    graph: FactorGraph, names: Collection[str], factors: Mapping[str, float]
) -> FactorGraph:
    """The graph without the factors of a batch in sites that latents connect."""
    if not factors:
        return graph
    groups = []
    for group in graph.groups:
        if not any(n in names for n in group.members):
            groups.append(group)
            continue
        scale = tuple(
            s / _factor(dims, factors) if name in names else s
            for name, dims, s in zip(group.members, group.dims, group.scale, strict=True)
        )
        groups.append(replace(group, scale=scale))
    return replace(graph, groups=tuple(groups))


def _factor(dims: tuple[str, ...], factors: Mapping[str, float]) -> float:
    out = 1.0
    for d in dims:
        out *= factors.get(d, 1.0)
    return out


def _scaled(group: Group, factors: Mapping[str, float]) -> Group:
    """A block whose evidence counts as often as each of its sites."""
    block = group.nested
    if not factors or not isinstance(block, NESTED_BLOCKS):
        return group
    own = set(block.plates) & factors.keys()
    for site in block.groups:
        if set(site.dims[0]) & factors.keys() != own:
            raise UsageError(_outside_the_batch(block, site, factors))
    return replace(group, scale=(_factor(block.plates, factors),))


def _outside_the_batch(block: Nested, site: Group, factors: Mapping[str, float]) -> str:
    names = [n for g in block.groups if g.role in INTEGRATED for n in g.members]
    latents = ", ".join(f"'{n}'" for n in names)
    plates = ", ".join(f"'{p}'" for p in factors)
    return message(
        f"site '{names[0]}'",
        f"{latents} connect rows of plate {plates}, of which a batch holds a part.",
        "they are integrated exactly, and the rows of one batch do not show their posterior",
        [
            "give them to the guide: strategy={"
            + ", ".join(f"'{n}': 'guide'" for n in names)
            + "}",
            "use all data at every step: leave batch_size and num_data out",
        ],
    )


def not_here(error: NotLinear | NotSeparate | NotConjugate, at: str) -> ModelError:
    """What is raised where a run shows that latents cannot be integrated at it.

    Args:
        error: The reason.
        at: Where that is, as the end of a sentence.
    """
    finding = error.finding
    latents = ", ".join(f"'{n}': 'guide'" for n in finding.latents)
    fixes = [f"give it to a guide: strategy={{{latents}}}"]
    return ModelError(message(finding.where, f"{finding.what.rstrip('.')}, {at}.", _WHY, fixes))
