"""A model and its guide as one Pyro program: which latents are summed, estimated or drawn.

    guide, model → look at both → a route per latent, with its reason → `Pair`

A latent with an exact posterior within the budget is summed, its guide site stays unused, unless a
guide site that is used depends on it. Everything else takes its value from the guide: a point
estimate where the guide is a ``Delta`` that nothing random reaches, else a draw.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoDiscreteParallel, AutoGuide
from pyro.poutine.guide import GuideMessenger

from pyro_em import _pyro
from pyro_em._errors import ModelError, Problem, PyroEMError, UsageError, message
from pyro_em._pyro import GiveValues, GuideSites, Role, Run, TracedParameter
from pyro_em.amortized import AutoAmortizedCategorical
from pyro_em.binding import leaves_below
from pyro_em.contraction import ContractionPlan
from pyro_em.plan import Route, budget_problems, contraction_from_structure, routes_of
from pyro_em.structure import SiteInfo, Structure, frames_of

_FOR_DISCRETE = (AutoAmortizedCategorical, AutoDiscreteParallel)
_SMALL = 2**16  # cells of all guide latents enumerated together
_MANY = 20  # dimensions that Pyro's enumeration may take


@dataclass(frozen=True, eq=False)
class Pair:
    """The guide, then the model at the values that the guide gave, as one callable.

    Attributes:
        model: The user's model.
        guide: The guide.
        roles: Per latent of the model that takes its value from the guide, what that value is.
        shown: Guide sites whose log density counts.
        record: Where each run notes the guide's handler with its values, or None.
    """

    model: _pyro.Model
    guide: _pyro.Model
    roles: Mapping[str, Role]
    shown: frozenset[str] = frozenset()
    record: list[GuideSites] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run guide and model on the model's arguments."""
        sites = GuideSites(self.shown)
        with sites:
            self.guide(*args, **kwargs)
        if self.record is not None:
            self.record.append(sites)
        with GiveValues(sites.values, self.roles, sites.subsamples):
            return self.model(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class GuideLook:
    """What two runs of a guide say.

    Attributes:
        run: The plain run.
        scopes: For each site the guide's sites that reach its distribution, directly or not.
        points: Sites that are point estimates.
        leaves: Identities of all leaf tensors that reach a site: its parameters, those of networks
            that only the model registers included.
    """

    run: Run
    scopes: Mapping[str, frozenset[str]]
    points: frozenset[str]
    leaves: frozenset[int] = frozenset()

    def parameters(self, known: Mapping[str, TracedParameter]) -> tuple[str, ...]:
        """Names of the parameters that the guide uses, among its own and those of the model."""
        own = [n for n in known if n in self.run.parameters or id(known[n].leaf) in self.leaves]
        return tuple(dict.fromkeys([*self.run.parameters, *own]))

    @property
    def subsamples(self) -> dict[str, torch.Tensor]:
        """Indices of part of a plate that the guide's plates drew."""
        return {
            n: s["value"]
            for n, s in self.run.sites.items()
            if _pyro.is_subsample(s) and len(s["value"]) != s["fn"].size
        }

    @property
    def sites(self) -> Mapping[str, dict[str, Any]]:
        """The guide's sites by name."""
        return {n: s for n, s in self.run.sites.items() if _pyro.is_factor(s)}

    def upstream(self, names: set[str]) -> set[str]:
        """Sites on which any of the given sites depends, themselves included."""
        found = set(names)
        for name in names:
            found |= self.scopes.get(name, frozenset())
        return found


@dataclass(frozen=True, eq=False)
class Routing:
    """Where each latent of the model goes.

    Attributes:
        exact: Latents that are summed.
        points: Latents at a point estimate.
        drawn: Latents that the guide draws.
        enumerated: Those of ``drawn`` that are summed under the guide.
        reasons: Per latent, why, in words.
        guide: What the guide's runs said, or None.
        unused: Guide sites that are left unused.
    """

    exact: tuple[str, ...]
    points: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()
    enumerated: tuple[str, ...] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    guide: GuideLook | None = None
    unused: tuple[str, ...] = ()

    @property
    def is_stochastic(self) -> bool:
        """Whether anything has to be drawn from the guide."""
        return bool(self.drawn)

    @property
    def shown(self) -> frozenset[str]:
        """Guide sites whose log density counts: the drawn ones and all they depend on."""
        if self.guide is None or not self.drawn:
            return frozenset()
        needed = self.guide.upstream({n for n in self.drawn if n in self.guide.sites})
        return frozenset(n for n in needed if n not in self.guide.points)

    def pair(self, model: _pyro.Model, guide: _pyro.Model | None) -> _pyro.Model:
        """The model with its guide's values, or the model alone where none is used."""
        roles = {
            **dict.fromkeys(self.points, Role.POINT),
            **dict.fromkeys(self.drawn, Role.SAMPLED),
        }
        if guide is None or not roles:
            return model
        return Pair(model, guide, roles, self.shown)


# ---------------------------------------------------------------------- the guide itself


def built_guide(guide: Any, model: _pyro.Model, structure: Structure | None) -> Any:
    """The guide that a user's ``guide`` argument stands for.

    Args:
        guide: A guide, ``"map"``, an autoguide class or a factory from a model to a guide.
        model: The user's model.
        structure: What a look at the model found; needed for classes and factories.

    Returns:
        A guide to be called with the model's arguments.
    """
    if not needs_building(guide):
        return _as_callable(guide)
    factory = AutoDelta if isinstance(guide, str) else guide
    assert structure is not None
    cls = factory.func if isinstance(factory, functools.partial) else factory
    takes_discrete = cls in _FOR_DISCRETE
    hidden = [
        *structure.barren,
        *(n for n in structure.latents if structure.sites[n].is_discrete is not takes_discrete),
    ]
    made = factory(poutine.block(model, hide=hidden))
    if not callable(made):
        raise UsageError(
            message(
                "guide",
                f"the factory returned a {type(made).__name__}, not a guide.",
                fixes=["return a callable with the model's arguments"],
            )
        )
    return _as_callable(made)


def _as_callable(guide: Any) -> Any:
    """A guide whose sites appear in an outer trace as those of a function do."""
    return _FromMessenger(guide) if isinstance(guide, GuideMessenger) else guide


def given_a_name(guide: Any) -> tuple[str, str]:
    """Give an autoguide that was built here a name that the param store does not hold yet.

    Pyro's autoguides are named after their class: a second one would go on with the parameters of
    the first in silence.

    Returns:
        The guide's name and its class's; empty where the guide has no name of its own.
    """
    if not isinstance(guide, AutoGuide):
        return "", ""
    cls = guide._pyro_name
    taken = {name.split(".")[0] for name in pyro.get_param_store()}
    names = (cls if i == 1 else f"{cls}_{i}" for i in itertools.count(1))
    own = next(n for n in names if n not in taken)
    if own != cls:
        _pyro.rename(guide, own)
    return own, cls


class _FromMessenger:
    """A guide messenger runs inside its model; its draws are told again as a guide's sites."""

    def __init__(self, messenger: GuideMessenger) -> None:
        self.messenger = messenger

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with poutine.block(hide_types=["sample", "observe"]):
            self.messenger(*args, **kwargs)  # its parameters stay visible
        _, trace = self.messenger.get_traces()
        for name, site in trace.nodes.items():
            if site["type"] != "sample":
                continue
            with ExitStack() as plates:
                for frame in frames_of(site).values():
                    if frame.full_size not in (None, frame.size):
                        raise ModelError(_subsampled_messenger(frame.name))
                    plates.enter_context(pyro.plate(frame.name, frame.size, dim=frame.dim))
                plates.enter_context(poutine.replay(trace=trace))
                plates.enter_context(poutine.scale(scale=site["scale"]))
                if site["mask"] is not None:
                    plates.enter_context(poutine.mask(mask=site["mask"]))
                pyro.sample(name, site["fn"])


def _subsampled_messenger(plate: str) -> str:
    return message(
        f"plate '{plate}'",
        "a guide messenger draws a subsample of it.",
        "its draws are told again to the model, which would draw another subsample",
        ["use AutoNormal, or leave subsample_size out"],
    )


def needs_building(guide: Any) -> bool:
    """Whether a guide argument is ``"map"``, a class or a factory rather than a guide.

    A function counts as a factory where its only argument without a default is called ``model`` or
    ``m``; a ``functools.partial`` of a class does too.
    """
    if guide is None:
        return False
    if isinstance(guide, (str, type)):
        return True
    if isinstance(guide, functools.partial):
        return isinstance(guide.func, type)
    if isinstance(guide, torch.nn.Module) or not callable(guide):
        return False
    try:
        parameters = inspect.signature(guide).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return needed in (["model"], ["m"])


def look_at_guide(
    guide: _pyro.Model, args: tuple, kwargs: dict[str, Any], *, first_look: bool
) -> GuideLook:
    """Run a guide plainly and with tagged sites.

    Args:
        guide: The guide.
        args: Its positional arguments, those of the model.
        kwargs: Its keyword arguments.
        first_look: Whether the plain run may advance the random state.

    Raises:
        ModelError: If the guide raises.
    """
    if _has_no_forward(guide):  # a bare module: a guide without sites
        return GuideLook(Run({}, {}), {}, frozenset())
    try:
        plain = _pyro.plain_run(guide, args, kwargs, keep_random_state=not first_look)
    except _pyro.RunFailed as failure:
        raise ModelError(_guide_failed(guide, failure.error)) from failure.error
    tagged = _pyro.provenance_run(guide, args, kwargs, plain)
    scopes: dict[str, frozenset[str]] = {}
    random: set[str] = set()
    for name, site in plain.sites.items():
        if not _pyro.is_factor(site):
            continue
        reached = tagged.scopes.get(name, frozenset()) - {name}
        for parent in tuple(reached):
            reached |= scopes.get(parent, frozenset())
        scopes[name] = frozenset(reached)
        if not _is_plain_delta(site) or reached & random:
            random.add(name)
    leaves = leaves_below(t for n in scopes for t in _pyro.tensors_of(plain.sites[n]["fn"]))
    points = frozenset(n for n in scopes if n not in random)
    return GuideLook(plain, scopes, points, frozenset(leaves))


def _has_no_forward(guide: Any) -> bool:
    return isinstance(guide, torch.nn.Module) and type(guide).forward is torch.nn.Module.forward


def _is_plain_delta(site: Mapping[str, Any]) -> bool:
    base = _pyro.unwrap(site["fn"])[0]
    if type(base) is not dist.Delta:
        return False
    return bool((torch.as_tensor(base.log_density) == 0).all())


def _guide_failed(guide: Any, error: Exception) -> str:
    text = str(error).strip().split("\n")[0] or type(error).__name__
    if isinstance(guide, AutoGuide) and "discrete" in text:
        name = type(guide).__name__
        return message(
            f"guide ({name})",
            f"it raised: {text}",
            "Pyro's autoguides refuse discrete sites, and one that is already built on the full "
            "model has seen them",
            [
                f"pass the class: ExactPosteriorEM(model, {name})",
                "build it on the continuous part: "
                f"{name}(poutine.block(model, hide=[names of the discrete sites]))",
            ],
        )
    if isinstance(error, PyroEMError):  # it has said what to do
        return str(error)
    if "invalid shape of pyro.param" in text:
        return message(
            "guide",
            f"it raised {type(error).__name__}: {text}",
            "the param store holds parameters of an earlier guide of this name",
            ["call pyro.clear_param_store() first"],
        )
    fixes = ["call guide(*args) by itself to see where", "give it the model's arguments"]
    if needs_building(guide) or len(inspect_arguments(guide)) == 1:
        fixes.append(
            "if it is a factory, call its argument `model`: lambda model: AutoNormal(model)"
        )
    return message(
        "guide",
        f"it raised {type(error).__name__}: {text}",
        "the guide is called with the model's arguments",
        fixes,
    )


def inspect_arguments(guide: Any) -> list[str]:
    """Names of a guide's arguments; empty where they cannot be known."""
    try:
        return list(inspect.signature(guide).parameters)
    except (TypeError, ValueError):
        return []


# ---------------------------------------------------------------------- routes


def decide_routes(
    structure: Structure,
    guide: GuideLook | None,
    *,
    strategy: Callable[[str], str],
    max_enumeration: int,
) -> tuple[Routing, list[Problem]]:
    """Choose a route for every latent, by looking only.

    Args:
        structure: The bare model's.
        guide: What the guide's runs said, or None.
        strategy: From a latent's name to ``"exact"`` or ``"guide"``.
        max_enumeration: The budget in cells.

    Returns:
        The routes, and what speaks against them.
    """
    if guide is None:
        return Routing(structure.latents), []
    problems = _pair_problems(structure, guide)
    mine = [n for n in guide.sites if n in structure.latents or n in structure.barren]
    reasons: dict[str, str] = {}
    from_guide: set[str] = set()
    for name in structure.latents:
        info = structure.sites[name]
        if name not in guide.sites:
            if strategy(name) == "guide" and info.support_size is not None:
                reasons[name] = "the guide lacks it; finite support, exact sum"
            continue
        if info.support_size is None:
            kind = "infinite support" if info.is_discrete else "continuous"
            from_guide.add(name)
            reasons[name] = kind
        elif strategy(name) == "guide":
            from_guide.add(name)
            reasons[name] = "strategy='guide'"
    from_guide |= _depended_on(guide, from_guide, mine, reasons)
    missing = [
        n
        for n in structure.latents
        if n not in guide.sites and structure.sites[n].support_size is None
    ]
    if missing or problems:
        return Routing(()), [*problems, *(_no_route(structure, n) for n in missing)]
    while True:
        given = reduced(structure, from_guide)
        try:
            cost = contraction_from_structure(given)
        except ModelError as error:
            return Routing(()), list(error.problems)
        if cost.cells <= max_enumeration:
            break
        movable = [n for n in cost.largest if n in guide.sites and n in structure.latents]
        if not movable:
            return Routing(()), budget_problems(given, cost, max_enumeration)
        for name in movable:
            reasons[name] = (
                f"an exact sum would need {_count(cost)} cells, above max_enumeration="
                f"{max_enumeration:,}"
            )
        from_guide |= set(movable)
        from_guide |= _depended_on(guide, from_guide, mine, reasons)
    points = tuple(n for n in mine if n in from_guide and n in guide.points)
    drawn = tuple(n for n in mine if n in from_guide and n not in guide.points)
    exact = tuple(n for n in structure.latents if n not in from_guide)
    enumerated = _enumerated_in_guide(structure, guide, drawn, exact)
    for name in points:
        reasons[name] = "the guide is a Delta: its log prior enters the objective"
    for name in drawn:
        reasons[name] = _how(name, guide, name in enumerated, reasons[name])
    unused = tuple(n for n in mine if n not in from_guide)
    return Routing(exact, points, drawn, enumerated, reasons, guide, unused), []


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


def _how(name: str, guide: GuideLook, is_enumerated: bool, reason: str) -> str:
    fn = guide.sites[name]["fn"]
    if is_enumerated:
        return f"{reason}; enumerated in the guide"
    if getattr(fn, "has_rsample", False):
        return f"{reason}; reparameterised draw"
    return f"{reason}; score function with a baseline"


def _enumerated_in_guide(
    structure: Structure, guide: GuideLook, drawn: tuple[str, ...], exact: tuple[str, ...]
) -> tuple[str, ...]:
    """Drawn latents of finite support that are summed under the guide: small or marked ones."""
    known = [n for n in drawn if n in structure.sites]
    finite = [n for n in known if _pyro.has_finite_support(guide.sites[n]["fn"])]
    if exact or not finite:
        return ()
    marked = [n for n in finite if guide.sites[n]["infer"].get("enumerate")]
    cells = 1
    for name in finite:
        cells *= structure.sites[name].support_size or 1
    rows = max(
        (_cells_of_plates(structure, structure.sites[n]) for n in structure.sites), default=1
    )
    if len(finite) <= _MANY and cells <= _SMALL and cells * rows <= 2**24:
        return tuple(finite)
    return tuple(marked)


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


def _no_route(structure: Structure, name: str) -> Problem:
    info = structure.sites[name]
    kind = "discrete latent of infinite support" if info.is_discrete else "continuous latent"
    return Problem(
        f"site '{name}'",
        f"the guide lacks it, and a {kind} ({info.distribution}) has no exact posterior here.",
        "every latent needs a route: an exact sum, a point estimate or a guide",
        (
            f"add pyro.sample('{name}', ...) to the guide",
            "pass guide='map' for point estimates, or a class for all: AutoNormal",
            *(
                ("let a network do it: ExactPosteriorEM(model, AutoAmortizedNormal)",)
                if set(info.plates) & set(structure.data_plates)
                else ()
            ),
        ),
    )


def _pair_problems(structure: Structure, guide: GuideLook) -> list[Problem]:
    problems = []
    for name, site in guide.sites.items():
        if name in structure.barren or _pyro.is_auxiliary(site):
            continue
        if name not in structure.sites:
            known = ", ".join(f"'{n}'" for n in (*structure.latents, *structure.barren)) or "none"
            problems.append(
                Problem(
                    f"guide site '{name}'",
                    f"the model has no such site; its latents are: {known}.",
                    "a guide is a distribution over the model's latents",
                    (
                        "give it the name of the model's site",
                        "mark it as auxiliary: infer={'is_auxiliary': True}",
                    ),
                )
            )
            continue
        if structure.sites[name].role is Role.DATA:
            problems.append(
                Problem(
                    f"guide site '{name}'",
                    "the model observes this site.",
                    "a guide is a distribution over what is not observed",
                    ("leave it out of the guide when it is observed: `if y is None: ...`",),
                )
            )
            continue
        problems.extend(_plate_problems(structure, name, site))
    return problems


def _plate_problems(structure: Structure, name: str, site: Mapping[str, Any]) -> list[Problem]:
    info = structure.sites[name]
    frames = frames_of(site)
    for plate, frame in frames.items():
        known = structure.plates.get(plate)
        if known is not None and (known.size != frame.size or known.dim != frame.dim):
            return [
                Problem(
                    f"guide site '{name}', plate '{plate}'",
                    f"its size is {frame.size} (dim {frame.dim}) in the guide and {known.size} "
                    f"(dim {known.dim}) in the model.",
                    "the guide's draw could not be the model's latent",
                    (
                        "use the same pyro.plate in both",
                        "build an autoguide with create_plates= where the data change in size",
                    ),
                )
            ]
    fn, prior = site["fn"], structure.unobserved[name]["fn"]
    if _is_plain_delta(site):
        have, want = tuple(site["value"].shape), tuple(prior.shape())
        outside: list[str] = []
    else:
        have, want = tuple(fn.batch_shape), tuple(prior.batch_shape)
        outside = [p for p in info.plates if p not in frames and structure.plates[p].size > 1]
    if _without_leading_ones(have) != _without_leading_ones(want) or outside:
        where = f" outside plate '{outside[0]}'" if outside else ""
        return [
            Problem(
                f"guide site '{name}'",
                f"its shape is {have}{where}, the model's {want} in plates "
                f"({', '.join(info.plates)}).",
                "the guide's draw could not be the model's latent",
                ("sample it inside the same plates as in the model", "use .to_event as the model"),
            )
        ]
    return []


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def routes_with_guide(bare: Structure, routing: Routing) -> tuple[Route, ...]:
    """The route of every unobserved site of a model that has a guide."""
    words = {
        **dict.fromkeys(routing.points, "point estimate"),
        **dict.fromkeys(routing.drawn, "guide"),
    }
    routes = []
    for route in routes_of(bare):
        name = route.site
        if name in words:
            routes.append(replace(route, route=words[name], reason=routing.reasons[name]))
        elif name in routing.reasons:
            routes.append(replace(route, reason=routing.reasons[name]))
        elif name in routing.unused:
            reason = f"{route.reason}; its guide site is not used"
            routes.append(replace(route, reason=reason))
        else:
            routes.append(route)
    return tuple(routes)


@dataclass(frozen=True, eq=False)
class WithSubsamples:
    """A model whose plates take the indices that a guide's plates of the same name drew."""

    model: _pyro.Model
    subsamples: Mapping[str, torch.Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        with GiveValues({}, {}, self.subsamples):
            return self.model(*args, **kwargs)


def unknown_strategies(strategy: Any, latents: Iterable[str]) -> list[str]:
    """Names and globs in a dict of strategies that match no latent."""
    if not isinstance(strategy, Mapping):
        return []
    names = list(latents)
    return [p for p in strategy if not any(n == p or fnmatchcase(n, p) for n in names)]


def matching(strategy: Any, name: str) -> Any:
    """The strategy of one latent where ``strategy`` may be a dict of names and globs."""
    if not isinstance(strategy, Mapping):
        return strategy
    if name in strategy:
        return strategy[name]
    hits = [s for pattern, s in strategy.items() if fnmatchcase(name, pattern)]
    return hits[0] if hits else "exact"
