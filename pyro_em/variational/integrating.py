"""Gaussian latents that are integrated under each draw of a guide.

With u drawn and h Gaussian and linear given u, the bound holds the marginal likelihood of h,

    log p(x, u) = log ∫ p(x, h, u) dh,

whose gradient reaches u through coefficients, offsets and variances. A batch that stands for all data
counts its rows several times: the plate's factor multiplies the logarithm of each row's integral. A
latent outside that plate would see the rows of one batch alone, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em.errors import ModelError, UsageError, message
from pyro_em.graph.drawn_lines import DrawnLines, drawn_lines
from pyro_em.graph.enumerated import run_enumerated
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.lines import NotLinear
from pyro_em.graph.sparse_lines import random_like
from pyro_em.graph.structure import Structure
from pyro_em.posteriors.gaussian import GaussianBlock
from pyro_em.posteriors.gaussian_components import NotSeparate, integrated
from pyro_em.tracing.given import GivenGaussians
from pyro_em.tracing.parameters import moved
from pyro_em.tracing.randomness import same_random_state, set_random_state
from pyro_em.tracing.runs import Run


@dataclass(frozen=True, eq=False)
class AttachedRun:
    """A run of a model with its Gaussian latents at zero, and what a second one like it needs.

    Attributes:
        at_zero: The run, attached to parameters and draws.
        model: Gives the same run again, or at other values of the latents.
        structure: The skeleton.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        state: The random state in which ``model`` begins.
        drawn: What the guide drew.
    """

    at_zero: Run
    model: GivenGaussians
    structure: Structure
    args: tuple
    kwargs: dict[str, Any]
    state: Any
    drawn: tuple[Tensor, ...] = ()

    def at(
        self, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | None = None
    ) -> Run:
        """The run at other values of the latents, detached where parameters are given.

        Raises:
            ModelError: If it fails.
        """
        attached = parameters is None
        how: dict[str, Any] = {"limit": None, "attached": attached, "values": parameters}
        model = self.model.at(values)
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
            for i, (name, zero) in enumerate(self.model.values.items())
        }

        def moved_run() -> Run:
            places = self.at_zero.parameters
            with torch.no_grad():
                at = {
                    n: transform_to(places[n].constraint)(u)
                    for n, u in moved(places, seed=31).items()
                    if places[n].leaf is not places[n].unconstrained
                }
            return self.at(values, at)

        runs = self.at(values), self.at_zero
        return drawn_lines(runs, values, self.structure, self.sources, moved_run)


def integrated_run(
    graph: FactorGraph,
    run: AttachedRun,
    factors: Mapping[str, float] | None = None,
    limit: int | None = None,
) -> FactorGraph:
    """The graph of an attached run, with its Gaussian latents integrated.

    Args:
        graph: As traced with these latents at zero.
        run: The run that was traced.
        factors: Per plate what multiplies its sites in this run.
        limit: How many numbers the matrices of one E-step may have.

    Raises:
        NotLinear: If the model is not linear in the latents here.
        NotSeparate: If discrete latents connect rows of Gaussian ones, or matrices are too large.
        UsageError: If a batch stands for all data and a latent is outside its plate.
    """
    factors, found = factors or {}, run.lines()
    once = _unscaled(graph, found, factors)
    out = integrated(once, found.lines, limit, found.parts, frozenset(factors))
    return replace(out, groups=tuple(_scaled(g, factors) for g in out.groups))


_WHY = "it was integrated exactly, as the model was linear in it when it was first looked at"


def _fails(latents: tuple[str, ...], text: str) -> str:
    shown = ", ".join(f"'{n}'" for n in latents)
    return message(
        "model",
        f"it does not run at other values of {shown}: {text.splitlines()[0]}",
        "a Gaussian latent is integrated under each draw of the guide",
        ["give it to the guide: strategy='guide'"],
    )


def _unscaled(graph: FactorGraph, found: DrawnLines, factors: Mapping[str, float]) -> FactorGraph:
    """The graph without the factors of a batch in sites that latents connect."""
    if not factors:
        return graph
    groups = []
    for group in graph.groups:
        if not any(n in found.lines for n in group.members):
            groups.append(group)
            continue
        scale = tuple(
            s / _factor(dims, factors) if name in found.lines else s
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
    if not factors or not isinstance(block, GaussianBlock):
        return group
    own = set(block.plates) & factors.keys()
    for site in block.groups:
        if set(site.dims[0]) & factors.keys() != own:
            raise UsageError(_outside_the_batch(block, site, factors))
    return replace(group, scale=(_factor(block.plates, factors),))


def _outside_the_batch(block: GaussianBlock, site: Group, factors: Mapping[str, float]) -> str:
    latents = ", ".join(f"'{n}'" for n in block.latents)
    plates = ", ".join(f"'{p}'" for p in factors)
    return message(
        f"site '{next(iter(block.latents))}'",
        f"Gaussian {latents} connect rows of plate {plates}, of which a batch holds a part.",
        "they are integrated exactly, and the rows of one batch do not show their posterior",
        [
            "give them to the guide: strategy={"
            + ", ".join(f"'{n}': 'guide'" for n in block.latents)
            + "}",
            "use all data at every step: leave batch_size and num_data out",
        ],
    )


def not_here(error: NotLinear | NotSeparate, at: str) -> ModelError:
    """What is raised where a run shows that latents cannot be integrated at it.

    Args:
        error: The reason.
        at: Where that is, as the end of a sentence.
    """
    finding = error.finding
    latents = ", ".join(f"'{n}': 'guide'" for n in finding.latents)
    fixes = [f"give it to a guide: strategy={{{latents}}}"]
    return ModelError(message(finding.where, f"{finding.what.rstrip('.')}, {at}.", _WHY, fixes))
