"""What two cheap runs of a model say before anything is enumerated: sites, plates, scopes, problems.

Nothing here allocates more than the model itself does. Every finding that would make an exact
treatment wrong or impossible is collected as a `Finding`; latents come first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import _enumerable, is_discrete, support_size_of, unwrap
from pyro_em.errors import DataError, Finding, UsageError, message, raise_findings
from pyro_em.graph.blame import given_arguments, given_tensors, same_tensor
from pyro_em.graph.checks import (
    data_problems,
    given_problems,
    latent_problems,
    parameter_problems,
    scope_problems,
    shape_problems,
    weight_problems,
)
from pyro_em.graph.coupling import Coupling, couplings
from pyro_em.graph.failures import changing_sites, is_about_numbers, on_failure
from pyro_em.graph.initial import forget_bad_starts, start_problem, tell_of_starts
from pyro_em.graph.marginals import marginals_of
from pyro_em.graph.side_effects import Watched, refuse_clearing, writing_problems
from pyro_em.graph.unregistered import Unregistered, unregistered
from pyro_em.portable import Portable
from pyro_em.tracing.allocation import NumbersNeeded, is_shadow, judging_shadows
from pyro_em.tracing.feasible import feasible_event
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.randomness import random_state, set_random_state
from pyro_em.tracing.runs import (
    Model,
    Run,
    RunFailed,
    held_run,
    is_smooth,
    plain_run,
    provenance_run,
)
from pyro_em.tracing.sites import (
    Role,
    frames_of,
    is_factor,
    is_latent,
    is_subsample,
    mask_tensor,
    role_of,
    support_reads_latents,
)

logger = logging.getLogger("pyro_em")


@dataclass(frozen=True)
class Plate:
    """A vectorised plate: its name, its dimension from the right, its size."""

    name: str
    dim: int
    size: int
    full_size: int


@dataclass(frozen=True)
class SiteInfo:
    """One sample site that contributes a density.

    Attributes:
        name: The site's name.
        distribution: The name of its distribution.
        observed: Whether it has a value: observed, estimated or drawn by a guide.
        plates: Names of its plates, left to right.
        scope: Latents on which its density depends, itself included if latent, in model order.
        support_size: Number of values of an enumerable latent, else None.
        batch_dim: Number of its batch dimensions.
        role: What it stands for.
        is_discrete: Whether its support is discrete.
        nested: Names of all its plates, sequential ones too, outermost first.
        turns: For each of its plates that are loops the turn in which it was.
    """

    name: str
    distribution: str
    observed: bool
    plates: tuple[str, ...]
    scope: tuple[str, ...]
    support_size: int | None
    batch_dim: int
    role: Role = Role.DATA
    is_discrete: bool = False
    nested: tuple[str, ...] = ()
    turns: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Structure(Portable):
    """The skeleton of a model: everything but numbers.

    Attributes:
        plates: All vectorised plates by name.
        sites: All sites with a density, in model order, barren ones excluded.
        latents: Names of the latents to be summed exactly.
        barren: Unobserved sites without observed descendants, which integrate to one, and their
            distributions.
        max_plate_nesting: Number of dimensions that belong to plates.
        parameters: The parameters that the model read.
        masked_pairs: For each ``obs_mask`` site the user's name -> its mask.
        random_plates: Plates with random subsampling.
        kept_values: Values of the barren sites, which nothing that counts depends on.
        sequential: Sizes of the plates that are loops.
        notes: Warnings in words.
        unobserved: The unobserved sites as the plain run traced them.
        edges: Pairs (parent, child): the child's distribution uses the value of the parent.
        unchecked: Whether the run had no numbers, so that no distribution checked its arguments.
        coupled: Per latent whose elements in a plate are read by other elements, where.
        unregistered: Tensors that require gradients, reach a density and are no parameters.
        looked: The sites of the provenance run, which an enumerated run has to agree with; None
            where it has no numbers, or once they have been compared.
    """

    plates: Mapping[str, Plate]
    sites: Mapping[str, SiteInfo]
    latents: tuple[str, ...]
    barren: Mapping[str, str]
    max_plate_nesting: int
    parameters: Mapping[str, TracedParameter]
    masked_pairs: Mapping[str, Tensor] = field(default_factory=dict)
    random_plates: tuple[str, ...] = ()
    kept_values: Mapping[str, Tensor] = field(default_factory=dict)
    unobserved: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sequential: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    edges: tuple[tuple[str, str], ...] = ()
    unchecked: bool = False
    coupled: Mapping[str, Coupling] = field(default_factory=dict)
    unregistered: tuple[Unregistered, ...] = ()
    looked: Mapping[str, Mapping[str, Any]] | None = None

    def _travelling(self) -> dict[str, Any]:
        # What only runs of the model need: traced sites, values of barren latents.
        return {**vars(self), "unobserved": {}, "kept_values": {}}

    def _staying(self) -> dict[str, Any]:
        return self._travelling()

    @property
    def data_plates(self) -> tuple[str, ...]:
        """The plates that all observations share, outermost first; loops included."""
        data = [i for i in self.sites.values() if i.role is Role.DATA]
        if not data:
            return ()
        shared = set.intersection(*(set(i.nested) for i in data))
        return tuple(p for p in data[0].nested if p in shared)

    @property
    def data_plate(self) -> str | None:
        """The outermost of ``data_plates``; None where it is a loop, or there is none."""
        outermost = next(iter(self.data_plates), None)
        return outermost if outermost in self.plates else None

    def are_local(self, latents: Iterable[str]) -> bool:
        """Whether every latent is drawn anew for each element of the data plate."""
        plate = self.data_plate
        names = [n for n in latents if n in self.sites]
        return plate is not None and all(
            plate in self.sites[n].plates and n not in self.coupled for n in names
        )


def form_of(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What calls of one structure share: shapes, dtypes and devices; other values by identity."""
    out: list[Any] = []
    for a in (*args, *(kwargs[k] for k in sorted(kwargs))):
        if isinstance(a, Tensor):
            out.append((a.dtype, a.device, tuple(a.shape)))
        else:
            out.append(a if isinstance(a, (int, float, str, bool, type(None))) else id(a))
    return (tuple(out), tuple(sorted(kwargs)))


def examine(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    max_plate_nesting: int | None = None,
    first_look: bool = True,
    guide_given: bool = False,
    sparing: bool = False,
    max_enumeration: int = 2**27,
) -> tuple[Structure, list[Finding]]:
    """Run a model plainly and with tagged latents, and say what it is made of.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        max_plate_nesting: The user's own number of plate dimensions, checked against the shapes.
        first_look: Whether this run may advance the random state, as Pyro's first run does.
        guide_given: Whether latents without an exact posterior may go to a guide.
        sparing: Whether large latents may be looked at without numbers, where the model allows it;
            the skeleton's ``unchecked`` says whether arguments have still to be validated.
        max_enumeration: An unobserved site on which nothing depends integrates to one: it is not
            summed where its table would have more cells.

    Returns:
        The skeleton, and all findings: latents first, then parameters, then the other sites.

    Raises:
        PyroEMError: If the model cannot be run at all.
    """
    _refuse_inference_mode(args, kwargs)
    refuse_without_numbers(given_arguments(model, args, kwargs))
    watched = Watched(model, args, kwargs)
    how = (max_plate_nesting, guide_given, watched, max_enumeration)
    if sparing:
        begin = random_state()
        try:
            plain = _run_plainly(model, args, kwargs, first_look, sparing=True)
            with judging_shadows() if plain.shadows else nullcontext():
                return _findings(model, args, kwargs, plain, *how)
        except NumbersNeeded:
            set_random_state(begin)
            logger.debug("the model reads numbers off its latents: it is run with draws")
    return _findings(model, args, kwargs, _run_plainly(model, args, kwargs, first_look), *how)


def _findings(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    plain: Run,
    max_plate_nesting: int | None,
    guide_given: bool,
    watched: Watched,
    max_enumeration: int,
) -> tuple[Structure, list[Finding]]:
    """The skeleton and all findings, from a plain run."""
    refuse_clearing(plain, "model")
    watched.after_one_run(plain.sites)
    factors = {n: s for n, s in plain.sites.items() if is_factor(s)}
    if not factors:
        raise UsageError(
            message(
                "model", "it has no sites.", fixes=["call pyro.sample in it, and pass its data"]
            )
        )
    plates, random_plates = _plates(plain.sites, factors)
    _refuse_sparse_values(factors)
    tagged = provenance_run(model, args, kwargs, plain, drawn=guide_given)
    refuse_clearing(tagged, "model")
    if set(tagged.scopes) != set(factors):
        raise_findings([changing_sites(sorted(set(tagged.scopes) ^ set(factors)), random_plates)])
    writing = writing_problems(model, args, kwargs, watched, plain, factors)
    if writing:
        raise_findings(writing)
    # Under an obs_mask that is True everywhere nothing of the unobserved part is used.
    unused = {n for n, s in factors.items() if is_latent(s) and _masked_out(s)}
    unused = {n for n in unused if not _enumerable(factors[n]["fn"])}
    place = {name: i for i, name in enumerate(plain.sites)}
    edges = tuple(
        (parent, child)
        for child, scope in tagged.scopes.items()
        for parent in sorted(scope & place.keys(), key=place.__getitem__)
        if parent != child
    )
    hidden = {n for n, s in factors.items() if is_latent(s)} - unused
    scopes = {n: scope & hidden for n, scope in tagged.scopes.items()}
    barren = _barren(factors, scopes, max_enumeration)
    masked_pairs = {
        name: _obs_mask(plain.sites[f"{name}_observed"])
        for name, site in plain.sites.items()
        if site["type"] == "sample"
        and f"{name}_observed" in factors
        and f"{name}_unobserved" in factors
    }
    dropped = set(barren)
    latents = {n: None for n, s in factors.items() if is_latent(s) and n not in dropped}
    counted = {n: scope for n, scope in scopes.items() if n not in dropped}
    coupled = coupled_latents(model, args, kwargs, plain, tagged.suspects & latents.keys(), counted)
    order = {name: i for i, name in enumerate(factors)}
    site_plates = {n: tuple(frames_of(s)) for n, s in factors.items()}
    marginals = marginals_of(model, args, kwargs, plain, scopes, not guide_given)
    of_latents: list[Finding] = []
    of_others: list[Finding] = []
    told_of: list[Tensor] = []
    sites: dict[str, SiteInfo] = {}
    for name, site in factors.items():
        if name in dropped:
            continue
        unobserved = name in latents
        scope = set(scopes[name]) | ({name} if unobserved else set())
        found = of_latents if unobserved else of_others
        no_route: list[Finding] = []
        if unobserved:
            no_route = latent_problems(name, site, scopes, marginals)
            if not guide_given:
                among = [c.problem() for c in coupled.get(name, ()) if c.part]
                found.extend(no_route or among)
        elif role_of(site) is Role.DATA:
            anew = support_reads_latents(tagged.sites[name]["fn"])
            of_data = data_problems(name, site, check_support=not anew)
            found.extend(of_data)
            if of_data and isinstance(site["value"], Tensor):
                told_of.append(site["value"])
        found.extend(shape_problems(name, site))
        found.extend(weight_problems(name, site))
        if not guide_given:
            # A continuous latent is no sum: what is said of it above is enough.
            summed = [s for s in sorted(scope) if _enumerable(factors[s]["fn"])]
            found.extend(scope_problems(name, summed, site_plates))
        for latent in sorted(scope - {name}):
            outside = [p for p in site_plates[latent] if p not in site_plates[name]]
            if outside and not is_smooth(factors[latent]["fn"]):
                coupled.setdefault(latent, [Coupling(latent, outside[0], name, "")])
        sites[name] = SiteInfo(
            name,
            _name_of(site),
            not unobserved,
            site_plates[name],
            tuple(sorted(scope, key=order.__getitem__)),
            support_size_of(site["fn"]) if unobserved and not no_route else None,
            len(site["fn"].batch_shape),
            role_of(site),
            is_discrete(site["fn"]),
            tuple(f.name for f in site["cond_indep_stack"]),
            {f.name: f.counter for f in site["cond_indep_stack"] if f.dim is None},
        )
    nesting = max((-p.dim for p in plates.values()), default=0)
    nesting = max([nesting, *(len(s["fn"].batch_shape) for s in factors.values())])
    if max_plate_nesting is not None:
        if max_plate_nesting < nesting:
            of_others.append(
                Finding(
                    "max_plate_nesting",
                    f"{max_plate_nesting} was given, but the model uses {nesting} batch dimensions.",
                    "an enumerated dimension would coincide with a plate",
                    (f"pass max_plate_nesting={nesting}, or leave it out",),
                    UsageError,
                )
            )
        nesting = max(nesting, max_plate_nesting)
    structure = Structure(
        plates,
        sites,
        tuple(latents),
        {n: _name_of(factors[n]) for n in barren},
        nesting,
        plain.parameters,
        masked_pairs,
        random_plates,
        _kept_values(factors, barren),
        {n: factors[n] for n in (*latents, *barren)},
        {f.name: f.size for s in factors.values() for f in s["cond_indep_stack"] if f.dim is None},
        (*(_changed_mask(n) for n in plain.changed_masks), *watched.notes()),
        edges,
        plain.shadows is not None,
        {name: first for name, (first, *_) in coupled.items()},
        unregistered(model, args, kwargs, plain, sites),
        None if plain.shadows is not None else {n: tagged.sites[n] for n in sites},
    )
    of_parameters = parameter_problems(plain)
    if of_parameters and _not_finite(plain):
        given = {
            where: value
            for where, value in given_tensors(model, args, kwargs).items()
            if not any(same_tensor(value, told) for told in told_of)
        }
        of_parameters = [*given_problems(given, _NO_NUMBERS), *of_parameters]
    forget_bad_starts(plain.parameters)
    return structure, [*of_latents, *of_parameters, *of_others]


def coupled_latents(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    plain: Run,
    suspects: frozenset[str],
    scopes: Mapping[str, frozenset[str]],
) -> dict[str, list[Coupling]]:
    """Latents whose elements in a plate are read by other elements.

    Args:
        model: The model or guide.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        plain: A plain run of it.
        suspects: Latents whose elements a provenance run may have mixed.
        scopes: For each site that counts, the latents that reach it.

    Raises:
        NumbersNeeded: If a run without numbers cannot tell.
    """
    if not suspects:
        return {}
    if plain.shadows is not None:
        raise NumbersNeeded
    found = couplings(
        lambda values: held_run(model, args, kwargs, values),
        {n: s for n, s in plain.sites.items() if is_latent(s)},
        suspects,
        scopes,
    )
    out: dict[str, list[Coupling]] = {}
    for one in found:
        out.setdefault(one.latent, []).append(one)
    return out


def _kept_values(factors: Mapping[str, Any], barren: Iterable[str]) -> dict[str, Tensor]:
    """Values for sites that count nowhere: as drawn, or one feasible event where nothing was."""
    kept = {}
    seen = [s["value"] for s in factors.values() if s["is_observed"]]
    device = next((v.device for v in seen if isinstance(v, Tensor) and not v.is_meta), None)
    for name in barren:
        fn, value = factors[name]["fn"], factors[name]["value"].detach()
        if is_shadow(value):
            like = torch.empty(0, dtype=value.dtype, device=device)
            value = feasible_event(fn, like).expand(value.shape)
        kept[name] = value
    return kept


def _changed_mask(name: str) -> str:
    return message(
        f"site '{name}'",
        "its mask is changed in place after the site.",
        "densities are taken after the run, so that the site sees the later mask (as in Pyro)",
        ["make a new tensor: mask = mask | seen instead of mask |= seen"],
    )


def _name_of(site: Mapping[str, Any]) -> str:
    return type(unwrap(site["fn"])[0]).__name__


def refuse_without_numbers(given: Mapping[str, Tensor]) -> None:
    """Refuse data without numbers, or in a form that densities cannot read.

    Raises:
        DataError: With the argument's name.
    """
    problems = []
    for where, value in given.items():
        what = fixes = ""
        if value.is_nested:
            what = "it is a nested tensor, whose rows have several lengths."
            fixes = "pad it: torch.nested.to_padded_tensor(x, nan), and mask what is padded"
        elif value.is_meta:
            what = "it is on the device 'meta', and has a shape but no numbers."
            fixes = "pass a tensor that holds the data, on the CPU or a GPU"
        elif value.is_quantized:
            what = "it is a quantised tensor."
            fixes = "pass x.dequantize()"
        if what:
            why = "a density is computed from numbers"
            problems.append(Finding(where, what, why, (fixes,), DataError))
    if problems:
        raise_findings(problems)


def _refuse_sparse_values(factors: Mapping[str, Any]) -> None:
    """Refuse sparse observed values; sparse covariates are the model's own matter."""
    problems = [
        Finding(
            f"site '{name}'",
            f"its observed value is a sparse tensor ({value.layout}).",
            "Pyro's densities read dense tensors",
            ("pass x.to_dense()",),
            DataError,
        )
        for name, site in factors.items()
        if isinstance(value := site["value"], Tensor) and value.layout != torch.strided
    ]
    if problems:
        raise_findings(problems)


def _refuse_inference_mode(args: tuple, kwargs: dict[str, Any]) -> None:
    inside = torch.is_inference_mode_enabled()
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if inside or any(t.is_inference() for t in tensors):
        what = (
            "the call is inside torch.inference_mode()."
            if inside
            else "a tensor made inside torch.inference_mode() was passed."
        )
        raise UsageError(
            str(
                Finding(
                    "inference_mode",
                    what,
                    "the E-step is a gradient, and inference tensors cannot carry one",
                    ("use torch.no_grad() instead", "clone the tensor outside inference mode"),
                )
            )
        )


def _run_plainly(
    model: Model, args: tuple, kwargs: dict[str, Any], first_look: bool, sparing: bool = False
) -> Run:
    try:
        run = plain_run(model, args, kwargs, keep_random_state=not first_look, sparing=sparing)
        tell_of_starts(run.parameters)
        return run
    except RunFailed as failure:
        problems = [
            Finding(
                f"plate '{name}'",
                "it is empty (size 0).",
                "there is nothing to fit",
                ("check the data that set the plate's size",),
                DataError,
            )
            for name in failure.empty_plates
        ]
        problems = problems or _why_it_failed(model, args, kwargs, failure)
        try:
            raise_findings(problems)
        except Exception as error:
            raise error from failure.error


def _why_it_failed(
    model: Model, args: tuple, kwargs: dict[str, Any], failure: RunFailed
) -> list[Finding]:
    """What made a model raise: the likelier cause first."""
    error, run = failure.error, failure.run
    given = given_tensors(model, args, kwargs)
    # A stale or non-finite parameter is the likelier cause of a failure that follows it.
    problems = parameter_problems(run)
    forget_bad_starts(run.parameters)
    start = None if run.unfinished is None else start_problem(run.unfinished)
    if start is not None:
        problems.append(start)
    if not problems:
        latents = {n: _name_of(s) for n, s in run.sites.items() if is_latent(s)}
        values = {**given, **_values_by_site(run)}
        problems = [on_failure(error, latents, enumerated=False, values=values)]
    if start is None and not is_about_numbers(error) and not _not_finite(run):
        return problems
    return [*given_problems(given, _NO_NUMBERS), *problems]


_NO_NUMBERS = (
    "a mean, a covariance, an initial value or an argument that is computed from it is no number "
    "either"
)


def _not_finite(run: Run) -> bool:
    """Whether a parameter's value is not finite."""
    real = (p for p in run.parameters.values() if not p.unconstrained.is_meta)
    return any(not bool(torch.isfinite(p.value()).all()) for p in real)


def _values_by_site(run: Run) -> dict[str, Tensor]:
    """The values of a run's sites, under their names in words."""
    return {
        f"site '{n}'": s["value"]
        for n, s in run.sites.items()
        if is_factor(s) and isinstance(s["value"], Tensor)
    }


def _plates(
    all_sites: Mapping[str, Any], factors: Mapping[str, Any]
) -> tuple[dict[str, Plate], tuple[str, ...]]:
    plates: dict[str, Plate] = {}
    for site in factors.values():
        for name, f in frames_of(site).items():
            plates[name] = Plate(name, f.dim, f.size, f.full_size or f.size)
    random_plates = []
    for name, site in all_sites.items():
        fn = site.get("fn")
        if not is_subsample(site):
            continue
        size, part = getattr(fn, "size", None), getattr(fn, "subsample_size", None)
        if part is not None and size is not None and part < size:
            random_plates.append(name)
    return plates, tuple(random_plates)


def _barren(
    factors: Mapping[str, Any], scopes: Mapping[str, frozenset[str]], max_enumeration: int
) -> tuple[str, ...]:
    """Unobserved sites that reach no observation and cannot be enumerated with their parents."""
    needed: set[str] = set()
    for name in reversed(list(factors)):  # the model's order is topological
        if name in needed or not is_latent(factors[name]):
            needed |= {name} | scopes[name]

    def is_cheap(name: str) -> bool:
        supports = [support_size_of(factors[z]["fn"]) or 1 for z in {name} | scopes[name]]
        plates = [f.size for f in frames_of(factors[name]).values()]
        return math.prod((*supports, *plates)) <= max_enumeration

    for name, site in factors.items():
        if name in needed or not _enumerable(site["fn"]) or not scopes[name] - {name} <= needed:
            continue
        if is_cheap(name):
            needed.add(name)
    return tuple(n for n in factors if n not in needed)


def _masked_out(site: Mapping[str, Any]) -> bool:
    mask = mask_tensor(site)
    return mask is False or (isinstance(mask, Tensor) and not bool(mask.any()))


def _obs_mask(site: Mapping[str, Any]) -> Tensor:
    """A copy: a posterior reads it when it is asked, whatever became of the user's mask by then."""
    mask = mask_tensor(site)
    return torch.as_tensor(True if mask is None else mask).clone()
