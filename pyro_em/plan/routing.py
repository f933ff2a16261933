"""A model and its guide as one Pyro program: which latents are summed, estimated or drawn.

    guide, model → look at both → a route per latent, with its reason → `Pair`

A latent with an exact posterior within the budget is summed, its guide site stays unused, unless a
guide site that is used depends on it. Gaussian latents that leave the guide are found by
`pyro_em.plan.leaving`. Everything else takes its value from the guide: a point
estimate where the guide is a ``Delta`` that nothing random reaches, else a draw. A ``Delta`` of a
discrete latent is no estimate of a parameter but a distribution of one value, with a gap of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from pyro_em.distributions import has_finite_support
from pyro_em.errors import Finding, ModelError
from pyro_em.graph.structure import SiteInfo, Structure
from pyro_em.plan.cost import budget_problems, contraction_from_structure
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.tracing.sites import frames_of
from pyro_em.variational.checks import no_route, pair_problems
from pyro_em.variational.guide import GuideLook
from pyro_em.variational.pair import Routing, support_size

_SMALL = 2**16  # cells of all guide latents enumerated together

_MANY = 20  # dimensions that Pyro's enumeration may take

_FEW_RUNS = 32  # runs of guide and model, one per value of what is enumerated above exact sums

_MANY_RUNS = 1024  # the same, where the user marked it


def decide_routes(
    structure: Structure,
    guide: GuideLook | None,
    *,
    strategy: Callable[[str], str],
    max_enumeration: int,
    gaussian: frozenset[str] = frozenset(),
    kept: Mapping[str, Finding] | None = None,
) -> tuple[Routing, list[Finding]]:
    """Choose a route for every latent, by looking only.

    Args:
        structure: The bare model's.
        guide: What the guide's runs said, or None.
        strategy: From a latent's name to ``"exact"`` or ``"guide"``.
        max_enumeration: The budget in cells.
        gaussian: Gaussian latents that are to be integrated where no used guide site reads them.
        kept: Per Gaussian latent that is not to be, why.

    Returns:
        The routes, and what speaks against them.
    """
    kept = kept or {}
    if guide is None:
        return Routing(tuple(structure.latents)), []
    own = [n for n in guide.sites if n in structure.latents or n in structure.barren]
    choice = _Choice(structure, guide, gaussian, own)
    choice.begin(strategy, kept)
    problems = [*pair_problems(structure, guide), *choice.without_route(kept)]
    problems = problems or choice.keep_within(max_enumeration)
    if problems:
        return Routing(()), problems
    taken, reasons = choice.taken, choice.reasons
    estimated = {n for n in guide.points if not _is_discrete(structure, n)}
    points = tuple(n for n in own if n in taken and n in estimated)
    drawn = tuple(n for n in own if n in taken and n not in estimated)
    integrated = tuple(n for n in structure.latents if n in gaussian - taken)
    exact = tuple(n for n in structure.latents if n not in taken | gaussian)
    solved = (*exact, *integrated)
    enumerated = _enumerated_in_guide(structure, guide, drawn, solved, max_enumeration)
    found = {n: f for n, f in kept.items() if n in taken}
    for name in gaussian & taken:
        found[name] = Finding("guide", f"{reasons[name]}.", latents=(name,))
    for name in points:
        reasons[name] = "the guide is a Delta: its log prior enters the objective"
    for name in drawn:
        reasons[name] = _how(name, guide, name in enumerated, reasons[name], solved)
    unused = tuple(n for n in own if n not in taken)
    return (
        Routing(exact, points, drawn, enumerated, reasons, guide, unused, integrated, found),
        [],
    )


@dataclass
class _Choice:
    """Which latents go to the guide, as reasons for it are found.

    Attributes:
        structure: The bare model's.
        guide: What the guide's runs said.
        gaussian: Latents that are to be integrated.
        own: The latents that the guide has.
        taken: Those that go to it.
        reasons: Per latent, why.
    """

    structure: Structure
    guide: GuideLook
    gaussian: frozenset[str]
    own: list[str]
    taken: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)

    def begin(self, strategy: Callable[[str], str], kept: Mapping[str, Finding]) -> None:
        """Take what has no sum, and what the user wants to be drawn."""
        taken = {}
        for name in self.structure.latents:
            info, coupled = self.structure.sites[name], self.structure.coupled.get(name)
            if name in self.gaussian:
                continue
            if name not in self.guide.sites:
                if strategy(name) == "guide" and info.support_size is not None:
                    self.reasons[name] = "the guide lacks it; finite support, exact sum"
            elif info.support_size is None:
                kind = "infinite support" if info.is_discrete else "continuous"
                taken[name] = f"{kind}; {_in_words(kept[name])}" if name in kept else kind
            elif coupled is not None:
                taken[name] = coupled.reason
            elif strategy(name) == "guide":
                taken[name] = "strategy='guide'"
        self.take(taken)

    def take(self, reasons: Mapping[str, str]) -> None:
        """Take latents, and those on which their sites in the guide depend."""
        self.reasons |= reasons
        self.taken |= reasons.keys()
        self.taken |= _depended_on(self.guide, self.taken, self.own, self.reasons)

    def without_route(self, kept: Mapping[str, Finding]) -> list[Finding]:
        """Latents that have no sum, and that the guide lacks."""
        structure = self.structure
        free = [
            n for n in structure.latents if n not in self.guide.sites and n not in self.gaussian
        ]
        missing = [n for n in free if structure.sites[n].support_size is None]
        coupled = [
            c.problem()
            for n, c in structure.coupled.items()
            if n not in self.guide.sites and n not in missing and n not in self.gaussian
        ]
        return [*(no_route(structure, n, kept.get(n)) for n in missing), *coupled]

    def keep_within(self, max_enumeration: int) -> list[Finding]:
        """Take latents until the others have a sum within the budget; findings where they never do."""
        guide, latents = self.guide, self.structure.latents
        while True:
            # What is integrated has no cells of its own.
            given = reduced(self.structure, self.taken | self.gaussian)
            try:
                cost = contraction_from_structure(given)
            except ModelError as error:  # latents of crossed plates
                outer = [n for p in error.problems for n in p.latents]
                free = [n for n in outer if n in guide.sites and n in latents]
                if not free:
                    return list(error.problems)
                others = ", ".join(f"'{n}'" for n in outer if n != free[0])
                self.take({free[0]: f"coupled with {others} across plates: no exact sum"})
                continue
            if cost.cells <= max_enumeration:
                return []
            movable = [n for n in cost.largest if n in guide.sites and n in latents]
            if not movable:
                return budget_problems(given, cost, max_enumeration)
            reason = (
                f"an exact sum would need {_count(cost)} cells, above max_enumeration="
                f"{max_enumeration:,}"
            )
            self.take(dict.fromkeys(movable, reason))


def _in_words(finding: Finding) -> str:
    """Why a Gaussian latent is not integrated, within a sentence."""
    what = finding.what.rstrip(".")
    return f"{finding.where}: {what}" if finding.where else what


def _is_discrete(structure: Structure, name: str) -> bool:
    return name in structure.sites and structure.sites[name].is_discrete


def _count(cost: ContractionPlan) -> str:
    return f"{cost.cells:,}" if cost.cells < 10**15 else f"{cost.cells:.3g}"


def _depended_on(
    guide: GuideLook, used: set[str], mine: list[str], reasons: dict[str, str]
) -> set[str]:
    """Latents that a used guide site depends on: both stay with the guide."""
    added: set[str] = set()
    for name in mine:
        if name in used or name in guide.points:
            continue
        children = [u for u in used if name in guide.scopes.get(u, frozenset())]
        if children:
            added.add(name)
            reasons[name] = f"the guide's site '{children[0]}' depends on it"
    return added


def _how(
    name: str, guide: GuideLook, is_enumerated: bool, reason: str, exact: tuple[str, ...]
) -> str:
    fn = guide.sites[name]["fn"]
    if name in guide.points:
        return f"{reason}; the guide is a Delta: one value, nothing is drawn"
    if is_enumerated:
        return f"{reason}; enumerated in the guide"
    if getattr(fn, "has_rsample", False):
        return f"{reason}; reparameterised draw"
    words = f"{reason}; score function with a baseline"
    if exact and has_finite_support(fn):
        words += (
            f" (not enumerated: '{exact[0]}' is solved exactly under each of its values, which are "
            "too many, or what depends on it is outside its plates)"
        )
    return words


def _enumerated_in_guide(
    structure: Structure,
    guide: GuideLook,
    drawn: tuple[str, ...],
    exact: tuple[str, ...],
    max_enumeration: int,
) -> tuple[str, ...]:
    """Drawn latents of finite support that are summed under the guide: small or marked ones."""
    known = [n for n in drawn if n in structure.sites]
    finite = [n for n in known if has_finite_support(guide.sites[n]["fn"])]
    # What is enumerated has one element for its whole plate: it must not be read by others.
    # Nor may anything that is drawn under it: that has one value per value of the latent.
    coupled = structure.coupled.keys() | guide.coupled
    under = {n: {n, *(u for u, s in guide.scopes.items() if n in s)} for n in finite}
    finite = [n for n in finite if not under[n] & coupled]
    finite = [n for n in finite if _stays_inside(n, structure, guide, drawn, exact)]
    marked = [n for n in finite if guide.sites[n]["infer"].get("enumerate")]
    if exact:
        if _runs(finite, guide) <= _FEW_RUNS:
            return tuple(finite)
        return tuple(marked) if _runs(marked, guide) <= _MANY_RUNS else ()
    if not finite:
        return ()
    cells = 1
    for name in finite:
        cells *= structure.sites[name].support_size or 1
    rows = max(
        (_cells_of_plates(structure, structure.sites[n]) for n in structure.sites), default=1
    )
    if len(finite) <= _MANY and cells <= _SMALL and cells * rows <= min(2**24, max_enumeration):
        return tuple(finite)
    return tuple(marked)


def _runs(names: list[str], guide: GuideLook) -> int:
    return math.prod(support_size(guide, n) for n in names)


def _stays_inside(
    name: str,
    structure: Structure,
    guide: GuideLook,
    drawn: tuple[str, ...],
    exact: tuple[str, ...],
) -> bool:
    """Whether all that depends on a guide site is inside its plates, exact sums included.

    Then each element of the plates is summed by itself: K runs are enough, not K to the power of
    the plates' sizes.
    """
    own = set(structure.sites[name].plates)
    plates = {f"guide:{n}": set(frames_of(s)) for n, s in guide.sites.items()}
    plates |= {n: set(frames_of(structure.unobserved[n])) for n in structure.barren}
    plates |= {n: set(info.plates) for n, info in structure.sites.items()}
    if plates[f"guide:{name}"] != own:
        return False
    moved = {name, *(u for u in guide.sites if name in guide.scopes.get(u, frozenset()))}
    reached = {f"guide:{u}" for u in moved if u in drawn}
    reached |= {n for n in structure.barren if n in drawn}  # their parents are not known
    scopes = {n: set(info.scope) for n, info in structure.sites.items()}
    reached |= {n for n, scope in scopes.items() if n in moved or scope & moved}
    while True:
        summed = {z for n in reached if n in scopes for z in scopes[n] if z in exact}
        more = {n for n, scope in scopes.items() if scope & summed} - reached
        if not more:
            break
        reached |= more
    return all(own <= plates[n] for n in reached)


def _cells_of_plates(structure: Structure, info: SiteInfo) -> int:
    out = 1
    for plate in info.plates:
        out *= structure.plates[plate].size
    return out


def reduced(structure: Structure, given: set[str]) -> Structure:
    """The structure in which some latents have values."""
    sites = {
        n: replace(
            info,
            observed=info.observed or n in given,
            scope=tuple(s for s in info.scope if s not in given),
        )
        for n, info in structure.sites.items()
    }
    return replace(
        structure, sites=sites, latents=tuple(n for n in structure.latents if n not in given)
    )
