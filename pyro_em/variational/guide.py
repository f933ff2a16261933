"""The guide: what a user's ``guide`` argument stands for, and what two runs of it say."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoDelta, AutoDiscreteParallel, AutoGuide, AutoGuideList
from pyro.poutine.guide import GuideMessenger

from pyro_em.distributions import has_finite_support, unwrap
from pyro_em.errors import ModelError, PyroEMError, UsageError, message, raise_findings
from pyro_em.graph.bindings.autograd import leaves_below
from pyro_em.graph.findings.held_latents import coupled_latents
from pyro_em.graph.findings.initial import tell_of_starts
from pyro_em.graph.findings.side_effects import Watched, refused_clearing, writing_problems
from pyro_em.graph.structure import Structure
from pyro_em.graph.unregistered import Unregistered, unregistered
from pyro_em.tracing.allocation import NumbersNeeded, is_shadow
from pyro_em.tracing.parameters import TracedParameter, rename
from pyro_em.tracing.prototypes import SparingOnce
from pyro_em.tracing.runs import Model, Run, RunFailed, plain_run, provenance_run
from pyro_em.tracing.sites import factors_in, frames_of, signature_of, subsamples_in, tensors_of
from pyro_em.variational.amortized import AutoAmortizedCategorical

_FOR_DISCRETE = (AutoAmortizedCategorical, AutoDiscreteParallel)


@dataclass(frozen=True, eq=False)
class GuideLook:
    """What two runs of a guide say.

    Attributes:
        run: The plain run.
        scopes: For each site the guide's sites that reach its distribution, directly or not.
        points: Sites that are point estimates.
        leaves: Identities of all leaf tensors that reach a site: its parameters, those of networks
            that only the model registers included.
        coupled: Sites whose elements in a plate are read by other elements of the guide.
        unregistered: Tensors that require gradients, reach a density and are no parameters.
    """

    run: Run
    scopes: Mapping[str, frozenset[str]]
    points: frozenset[str]
    leaves: frozenset[int] = frozenset()
    coupled: frozenset[str] = frozenset()
    unregistered: tuple[Unregistered, ...] = ()

    def parameters(self, known: Mapping[str, TracedParameter]) -> tuple[str, ...]:
        """Names of the parameters that the guide uses, among its own and those of the model."""
        read = [n for n in known if n in self.run.parameters or id(known[n].leaf) in self.leaves]
        return tuple(dict.fromkeys([*self.run.parameters, *read]))

    @property
    def subsamples(self) -> dict[str, torch.Tensor]:
        """Indices of part of a plate that the guide's plates drew."""
        return {
            n: s["value"]
            for n, s in subsamples_in(self.run.sites).items()
            if len(s["value"]) != s["fn"].size
        }

    @property
    def only_points(self) -> bool:
        """Whether nothing is drawn from the guide."""
        return self.points >= self.scopes.keys()

    @cached_property
    def sites(self) -> Mapping[str, dict[str, Any]]:
        """The guide's sites by name."""
        return factors_in(self.run.sites)

    def upstream(self, names: set[str]) -> set[str]:
        """Sites on which any of the given sites depends, themselves included."""
        above = set(names)
        for name in names:
            above |= self.scopes.get(name, frozenset())
        return above


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
    needed = [
        p.name
        for p in signature_of(guide)
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return needed in (["model"], ["m"])


def takes_points(guide: Any) -> bool:
    """Whether what is built of a guide argument has point estimates alone."""
    cls = guide.func if isinstance(guide, functools.partial) else guide
    return isinstance(guide, str) or cls is AutoDelta


def lacks_numbers(structure: Structure) -> bool:
    """Whether a latent that a guide may cover was looked at without numbers."""
    if not structure.unchecked:
        return False
    sites = (s for s in structure.unobserved.values() if not has_finite_support(s["fn"]))
    return any(is_shadow(t) for s in sites for t in (s["value"], *tensors_of(s["fn"])))


def built_guide(
    guide: Any, model: Model, structure: Structure | None, *, sparing: bool = False
) -> Any:
    """The guide that a user's ``guide`` argument stands for.

    Args:
        guide: A guide, ``"map"``, an autoguide class or a factory from a model to a guide.
        model: The user's model.
        structure: The model's structure; needed for classes and factories.
        sparing: Whether its own run of the model is without numbers for large latents.

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
    try:
        seen = SparingOnce(model) if sparing else model
        made = factory(poutine.block(seen, hide=hidden))
    except Exception as error:  # a user's code, or a class that needs more than a model
        raise UsageError(_factory_failed(guide, cls, error)) from error
    if not callable(made):
        raise UsageError(
            message(
                "guide",
                f"the factory returned a {type(made).__name__}, not a guide.",
                fixes=["return a callable with the model's arguments"],
            )
        )
    return _as_callable(made)


def _factory_failed(guide: Any, cls: Any, error: Exception) -> str:
    if isinstance(error, PyroEMError):
        return str(error)
    fixes = ["call it by itself on the model to see where"]
    if isinstance(cls, type):
        name = _public_name(cls)
        fixes.insert(0, f"give what it needs beside the model: lambda model: {name}(model, ...)")
    return message(
        f"guide ({_public_name(cls)})" if isinstance(guide, type) else "guide",
        f"building it raised {type(error).__name__}: {error}",
        "a class or factory is called with the model, whose discrete sites are hidden",
        fixes,
    )


def _public_name(cls: Any) -> str:
    """The name under which a user finds an autoguide's class; ``AutoGaussian`` has backends."""
    public = (c.__name__ for c in getattr(cls, "__mro__", ()) if c.__name__ in autoguide.__all__)
    return str(next(public, getattr(cls, "__name__", "guide")))


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
    free_name = next(n for n in names if n not in taken)
    if free_name != cls:
        rename(guide, free_name)
    return free_name, cls


class _FromMessenger:
    """A guide messenger runs inside its model; its draws are recorded again as sites of a guide."""

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


def look_at_guide(
    guide: Model, args: tuple, kwargs: dict[str, Any], *, first_look: bool
) -> GuideLook:
    """Run a guide plainly and with tagged sites.

    Args:
        guide: The guide.
        args: Its positional arguments, those of the model.
        kwargs: Its keyword arguments.
        first_look: Whether the plain run may advance the random state.

    Raises:
        ModelError: If the guide raises.
        NumbersNeeded: If it was built to run the model sparingly, and cannot.
    """
    if _has_no_forward(guide):  # a bare module: a guide without sites
        return GuideLook(Run({}, {}), {}, frozenset())
    watched = Watched(guide, args, kwargs)
    try:
        plain = plain_run(guide, args, kwargs, keep_random_state=not first_look)
    except RunFailed as failure:
        if isinstance(failure.error, NumbersNeeded):
            raise failure.error from None
        raise ModelError(_guide_failed(guide, failure.error)) from failure.error
    tell_of_starts(plain.parameters)
    if plain.cleared:
        raise refused_clearing("guide")
    watched.after_one_run(plain.sites)
    tagged = provenance_run(guide, args, kwargs, plain, drawn=True)
    if tagged.cleared:
        raise refused_clearing("guide")
    if writing := writing_problems(guide, args, kwargs, watched, plain, tagged.scopes):
        raise_findings(writing)
    scopes: dict[str, frozenset[str]] = {}
    random: set[str] = set()
    for name, site in factors_in(plain.sites).items():
        reached = tagged.scopes.get(name, frozenset()) - {name}
        for parent in tuple(reached):
            reached |= scopes.get(parent, frozenset())
        scopes[name] = frozenset(reached)
        if not is_plain_delta(site) or reached & random:
            random.add(name)
    leaves = leaves_below(t for n in scopes for t in tensors_of(plain.sites[n]["fn"]))
    points = frozenset(n for n in scopes if n not in random)
    suspects = tagged.suspects & scopes.keys()
    direct = {n: tagged.scopes[n] - {n} for n in scopes}
    coupled = coupled_latents(guide, args, kwargs, plain, suspects, direct)
    unknown = unregistered(guide, args, kwargs, plain, scopes)
    return GuideLook(plain, scopes, points, frozenset(leaves), frozenset(coupled), unknown)


def _has_no_forward(guide: Any) -> bool:
    return isinstance(guide, torch.nn.Module) and type(guide).forward is torch.nn.Module.forward


def is_plain_delta(site: Mapping[str, Any]) -> bool:
    """Whether a site is a ``Delta`` without a density of its own."""
    base = unwrap(site["fn"])[0]
    if type(base) is not dist.Delta:
        return False
    return bool((torch.as_tensor(base.log_density) == 0).all())


def _guide_failed(guide: Any, error: Exception) -> str:
    text = str(error).strip().split("\n")[0] or type(error).__name__
    users_guide = guide.messenger if isinstance(guide, _FromMessenger) else guide
    if isinstance(users_guide, (AutoGuide, GuideMessenger)) and "discrete" in text:
        name = _public_name(type(users_guide))
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
    if isinstance(error, PyroEMError):  # its own message says what to do
        return str(error)
    if "invalid shape of pyro.param" in text:
        return message(
            "guide",
            f"it raised {type(error).__name__}: {text}",
            "the param store holds parameters of an earlier guide of this name",
            ["call pyro.clear_param_store() first"],
        )
    fixes = ["call guide(*args) by itself to see where", "give it the model's arguments"]
    if isinstance(guide, AutoGuideList) and isinstance(error, KeyError):
        fixes = [
            "build the list on the whole model, not in a factory, whose model hides its "
            "discrete sites",
            *fixes,
        ]
    if needs_building(guide) or len(signature_of(guide)) == 1:
        fixes.append(
            "if it is a factory, call its argument `model`: lambda model: AutoNormal(model)"
        )
    return message(
        "guide",
        f"it raised {type(error).__name__}: {text}",
        "the guide is called with the model's arguments",
        fixes,
    )
