"""What is said of the sites of a model, one after the other, and the record of each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pyro_em.distributions import has_finite_support, is_discrete, support_size_of
from pyro_em.errors import Finding
from pyro_em.graph.checks import latent_problems, scope_problems, shape_problems
from pyro_em.graph.coupling import Coupling
from pyro_em.graph.findings.alike import sound_forms
from pyro_em.graph.findings.first_run import name_of_distribution
from pyro_em.graph.findings.missing_inputs import input_problems
from pyro_em.graph.findings.value_checks import data_problems, weight_problems
from pyro_em.graph.structure import SiteInfo
from pyro_em.tracing.runs import is_smooth
from pyro_em.tracing.sites import Role, roles_in, support_reads_latents


@dataclass(eq=False)
class SiteFindings:
    """The findings on the sites that have been taken in so far.

    Attributes:
        factors: The sites with a density, of a plain run.
        tagged: The same of a run with tagged latents.
        scopes: Per site the latents that reach it.
        children: Per latent the sites that it reaches, in the order of the model.
        latents: The latents.
        plates: Per site the names of its plates.
        coupled: Latents whose elements read each other, or that a site outside their plates reads.
        marginals: How to do without a latent, in sentences.
        guide_given: Whether latents without an exact posterior may go to a guide.
        missing: Whether NaN in observed values means missing.
        sites: The record of each site.
        of_latents: What is wrong with latents.
        of_others: What is wrong with all others.
        told_of: Observed values of which something is said.
    """

    factors: Mapping[str, Any]
    tagged: Mapping[str, Any]
    scopes: Mapping[str, frozenset[str]]
    children: Mapping[str, Sequence[str]]
    latents: Mapping[str, None]
    plates: Mapping[str, tuple[str, ...]]
    coupled: dict[str, list[Coupling]]
    marginals: Callable[[str], tuple[str, ...]]
    guide_given: bool
    missing: bool
    sites: dict[str, SiteInfo] = field(default_factory=dict)
    of_latents: list[Finding] = field(default_factory=list)
    of_others: list[Finding] = field(default_factory=list)
    told_of: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._order = {name: i for i, name in enumerate(self.factors)}
        self._forms = sound_forms(self.factors)
        self._roles = roles_in(self.factors)
        self._known: dict[Hashable, SiteInfo] = {}  # by form, where there was nothing to say

    def take(self, names: Sequence[str]) -> None:
        """Say what there is to say of some sites, one after the other, and keep their records."""
        for name in names:
            self._take(name)

    def _take(self, name: str) -> None:
        site, unobserved = self.factors[name], name in self.latents
        scope = set(self.scopes[name]) | ({name} if unobserved else set())
        ordered = sorted(scope, key=self._order.__getitem__)
        if not any(self.plates[z] for z in scope) and name not in self.coupled:
            known = self._known.get(self._forms.get(name))
            if known is not None:
                self.sites[name] = _info_like(known, name, site, ordered)
                return
        has_route = True
        told = len(self.of_latents) + len(self.of_others)
        found = self.of_latents if unobserved else self.of_others
        if unobserved:
            no_route = latent_problems(name, site, self.children.get(name, ()), self.marginals)
            has_route = not no_route
            if not self.guide_given:
                among = [c.problem() for c in self.coupled.get(name, ()) if c.part]
                found.extend(no_route or among)
        role = self._roles[name]
        if not unobserved and role is Role.DATA:
            found.extend(self._of_data(name, site))
        if self.missing:
            found.extend(input_problems(site))
        found.extend(shape_problems(name, site))
        found.extend(weight_problems(name, site))
        if not self.guide_given:
            # A continuous latent is no sum: what is said of it above is enough.
            summed = [s for s in sorted(scope) if has_finite_support(self.factors[s]["fn"])]
            found.extend(scope_problems(name, summed, self.plates))
        self._note_readers_outside(name, scope)
        self.sites[name] = SiteInfo(
            name,
            name_of_distribution(site),
            not unobserved,
            self.plates[name],
            tuple(ordered),
            support_size_of(site["fn"]) if unobserved and has_route else None,
            len(site["fn"].batch_shape),
            role,
            is_discrete(site["fn"]),
            tuple(f.name for f in site["cond_indep_stack"]),
            {f.name: f.counter for f in site["cond_indep_stack"] if f.dim is None},
        )
        form = self._forms.get(name)
        is_sound = told == len(self.of_latents) + len(self.of_others)
        if form is not None and is_sound and name not in self.coupled:
            self._known[form] = self.sites[name]

    def _of_data(self, name: str, site: Mapping[str, Any]) -> list[Finding]:
        """What is wrong with what is observed at a site."""
        anew = support_reads_latents(self.tagged[name]["fn"])
        found = data_problems(name, site, check_support=not anew)
        if found and isinstance(site["value"], Tensor):
            self.told_of.append(site["value"])
        return found

    def _note_readers_outside(self, name: str, scope: set[str]) -> None:
        """A site outside the plate of a latent reads all of its elements, or any."""
        for latent in sorted(scope - {name}):
            outside = [p for p in self.plates[latent] if p not in self.plates[name]]
            if outside and not is_smooth(self.factors[latent]["fn"]):
                self.coupled.setdefault(latent, [Coupling(latent, outside[0], name, "")])


def _info_like(
    known: SiteInfo, name: str, site: Mapping[str, Any], scope: Sequence[str]
) -> SiteInfo:
    """The record of a site of the same form as another one."""
    stack = site["cond_indep_stack"]
    return SiteInfo(
        name,
        known.distribution,
        known.observed,
        known.plates,
        tuple(scope),
        known.support_size,
        known.batch_dim,
        known.role,
        known.is_discrete,
        tuple(f.name for f in stack),
        {f.name: f.counter for f in stack if f.dim is None},
    )
