"""What two cheap runs of a model say before anything is enumerated: sites, plates, scopes, problems.

Nothing here allocates more than the model itself does. Every finding that would make an exact
treatment wrong or impossible is collected as a `Problem`; latents come first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_em import _pyro
from pyro_em._errors import DataError, ModelError, Problem, UsageError, raise_problems


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
        observed: Whether it has an observed value.
        plates: Names of its plates, left to right.
        scope: Latents on which its density depends, itself included if latent, in model order.
        support_size: Number of values of an enumerable latent, else None.
        batch_dim: Number of its batch dimensions.
    """

    name: str
    distribution: str
    observed: bool
    plates: tuple[str, ...]
    scope: tuple[str, ...]
    support_size: int | None
    batch_dim: int


@dataclass(frozen=True)
class Structure:
    """The skeleton of a model: everything but numbers.

    Attributes:
        plates: All vectorised plates by name.
        sites: All sites with a density, in model order, barren ones excluded.
        latents: Names of the latents to be summed exactly.
        barren: Unobserved sites without observed descendants, which integrate to one.
        max_plate_nesting: Number of dimensions that belong to plates.
        parameters: The parameters that the model read.
        masked_pairs: For each ``obs_mask`` site the user's name -> its mask.
        random_plates: Plates with random subsampling.
    """

    plates: Mapping[str, Plate]
    sites: Mapping[str, SiteInfo]
    latents: tuple[str, ...]
    barren: tuple[str, ...]
    max_plate_nesting: int
    parameters: Mapping[str, _pyro.TracedParameter]
    masked_pairs: Mapping[str, Tensor] = field(default_factory=dict)
    random_plates: tuple[str, ...] = ()

    def plate_size(self, names: tuple[str, ...]) -> int:
        """Number of cells of the product of some plates."""
        return math.prod(self.plates[n].size for n in names)


def frames_of(site: Mapping[str, Any]) -> dict[str, Any]:
    """The vectorised plate frames of a traced site, left to right."""
    frames = [f for f in site["cond_indep_stack"] if f.dim is not None]
    return {f.name: f for f in sorted(frames, key=lambda f: f.dim)}


def mask_tensor(site: Mapping[str, Any]) -> Tensor | bool | None:
    """The conjunction of the masks on a site and on its distribution's wrappers."""
    _, _, masks = _pyro.unwrap(site["fn"])
    mask: Tensor | bool | None = None
    for m in (site["mask"], *masks):
        if m is None or m is True:
            continue
        mask = m if mask is None else mask & m
    return mask


def examine(
    model: _pyro.Model,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    max_plate_nesting: int | None = None,
    first_look: bool = True,
) -> Structure:
    """Run a model plainly and with tagged latents, and say what it is made of.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        max_plate_nesting: The user's own number of plate dimensions, checked against the shapes.
        first_look: Whether this run may advance the random state, as Pyro's first run does.

    Raises:
        PyroEMError: All problems of the model and its data, in one message.
    """
    _refuse_inference_mode(args, kwargs)
    plain = _run_plainly(model, args, kwargs, first_look)
    problems = _parameter_problems(plain)
    factors = {n: s for n, s in plain.sites.items() if _pyro.is_factor(s)}
    plates, random_plates = _plates(plain.sites, factors)
    tagged = _pyro.provenance_run(model, args, kwargs)
    barren = _barren(factors, tagged.scopes)
    masked_pairs = {
        name: _obs_mask(plain.sites[f"{name}_observed"])
        for name, site in plain.sites.items()
        if site["type"] == "sample"
        and f"{name}_observed" in factors
        and f"{name}_unobserved" in factors
    }
    latents = [n for n, s in factors.items() if _pyro.is_latent(s) and n not in barren]
    for name in latents:
        problems.extend(_latent_problems(name, factors[name], tagged.scopes))
    order = {name: i for i, name in enumerate(factors)}
    sites: dict[str, SiteInfo] = {}
    for name, site in factors.items():
        if name in barren:
            continue
        scope = set(tagged.scopes[name]) | ({name} if name in latents else set())
        if name not in latents or not problems:
            problems.extend(_shape_problems(name, site, plates))
        if site["is_observed"]:
            problems.extend(_data_problems(name, site))
        sites[name] = SiteInfo(
            name,
            type(_pyro.unwrap(site["fn"])[0]).__name__,
            site["is_observed"],
            tuple(frames_of(site)),
            tuple(sorted(scope, key=order.__getitem__)),
            _support_size(site["fn"]) if name in latents else None,
            len(site["fn"].batch_shape),
        )
    for info in sites.values():
        problems.extend(_scope_problems(info, sites))
    nesting = max((-p.dim for p in plates.values()), default=0)
    nesting = max([nesting, *(len(s["fn"].batch_shape) for s in factors.values())])
    if max_plate_nesting is not None:
        if max_plate_nesting < nesting:
            problems.append(
                Problem(
                    "max_plate_nesting",
                    f"{max_plate_nesting} was given, but the model uses {nesting} batch dimensions.",
                    "an enumerated dimension would coincide with a plate",
                    (f"pass max_plate_nesting={nesting}, or leave it out",),
                    UsageError,
                )
            )
        nesting = max(nesting, max_plate_nesting)
    if problems:
        raise_problems(problems)
    return Structure(
        plates,
        sites,
        tuple(latents),
        tuple(barren),
        nesting,
        plain.parameters,
        masked_pairs,
        random_plates,
    )


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
                Problem(
                    "inference_mode",
                    what,
                    "the E-step is a gradient, and inference tensors cannot carry one",
                    ("use torch.no_grad() instead", "clone the tensor outside inference mode"),
                )
            )
        )


def _run_plainly(
    model: _pyro.Model, args: tuple, kwargs: dict[str, Any], first_look: bool
) -> _pyro.Run:
    try:
        return _pyro.plain_run(model, args, kwargs, keep_random_state=not first_look)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        text = str(error)
        fixes: tuple[str, ...] = (
            "call the model by itself, outside this library: it fails in the same way",
        )
        if "Shape mismatch inside plate" in text or "must match the size" in text:
            fixes = (
                "make the plate's size that of the data's dimension",
                "check that the data have the shape that the model expects",
                *fixes,
            )
        problem = Problem(
            "model", f"running it plainly fails with {type(error).__name__}: {text}", "", fixes
        )
        raise ModelError(str(problem)) from error


def _parameter_problems(run: _pyro.Run) -> list[Problem]:
    problems = []
    for p in run.parameters.values():
        where = f"parameter '{p.name}'"
        if len(p.declared) > 1:
            problems.append(
                Problem(
                    where,
                    f"it is declared under {len(p.declared)} constraints: "
                    + " and ".join(p.declared)
                    + ".",
                    "Pyro keeps the first and ignores the others in silence",
                    ("give every pyro.param of this name the same constraint", "rename one"),
                )
            )
        shape = p.value().shape
        if p.initial_shape is not None and p.initial_shape != shape:
            problems.append(
                Problem(
                    where,
                    f"the param store holds a value of shape {tuple(shape)}, but the model now asks "
                    f"for shape {tuple(p.initial_shape)}.",
                    "Pyro would return the old value in silence",
                    (
                        "call pyro.clear_param_store() or em.reset() first",
                        "run in a scope of its own: with pyro.get_param_store().scope(): ...",
                    ),
                )
            )
        if not bool(torch.isfinite(p.value()).all()):
            problems.append(
                Problem(
                    where,
                    "its current value is not finite.",
                    "no exact step starts from there",
                    ("call em.reset(), or give a finite initial value",),
                )
            )
    return problems


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
        if not _pyro.is_subsample(site):
            continue
        size, part = getattr(fn, "size", None), getattr(fn, "subsample_size", None)
        if size == 0:
            raise DataError(
                str(
                    Problem(
                        f"plate '{name}'",
                        "it is empty (size 0).",
                        "there is nothing to fit",
                        ("check the data that set the plate's size",),
                    )
                )
            )
        if part is not None and size is not None and part < size:
            random_plates.append(name)
    return plates, tuple(random_plates)


def _barren(factors: Mapping[str, Any], scopes: Mapping[str, frozenset[str]]) -> tuple[str, ...]:
    """Unobserved sites that cannot be enumerated and reach no observation."""
    used: set[str] = set()
    # A site is needed if it is observed or enumerable, or if a needed site depends on it; the
    # model order is topological, so that one backward pass decides.
    needed: list[str] = []
    for name in reversed(list(factors)):
        site = factors[name]
        observed = not _pyro.is_latent(site)
        continuous_parents = [
            p for p in scopes[name] if p in factors and not _enumerable(factors[p]["fn"])
        ]
        if observed or name in used or (_enumerable(site["fn"]) and not continuous_parents):
            needed.append(name)
            used |= scopes[name] - {name}
    return tuple(n for n in factors if n not in needed)


def _enumerable(fn: Any) -> bool:
    return _pyro.has_finite_support(fn)


def _support_size(fn: Any) -> int | None:
    if not _enumerable(fn):
        return None
    base = _pyro.unwrap(fn)[0]
    probs = getattr(base, "probs", None)
    kind = type(base).__name__
    if kind in ("Categorical", "OneHotCategorical") and probs is not None:
        return int(probs.shape[-1])
    if kind == "Bernoulli":
        return 2
    return int(fn.enumerate_support(expand=False).shape[0])


def _latent_problems(
    name: str, site: Mapping[str, Any], scopes: Mapping[str, frozenset[str]]
) -> list[Problem]:
    fn = site["fn"]
    if _enumerable(fn):
        return []
    children = [n for n, scope in scopes.items() if name in scope and n != name]
    because = "other sites depend on it: " + ", ".join(repr(c) for c in children[:5])
    base, joined, _ = _pyro.unwrap(fn)
    kind = type(base).__name__
    if joined and _enumerable(base):
        return [
            Problem(
                f"site '{name}'",
                f"a latent vector of {kind} values (.to_event) cannot be enumerated.",
                "its values would be all combinations of its elements",
                (
                    "put its dimension into a pyro.plate instead of .to_event, if the elements are "
                    "independent given their parents",
                    "use one Categorical over the combinations that matter",
                ),
            )
        ]
    if _pyro.is_discrete(fn):
        return [
            Problem(
                f"site '{name}'",
                f"a latent {kind} has infinite support and cannot be enumerated.",
                because,
                (
                    "truncate it: a Categorical over the values 0 … K−1 that matter",
                    "observe it",
                ),
            )
        ]
    return [
        Problem(
            f"site '{name}'",
            f"a continuous latent ({kind}) has no exact posterior here and no guide was given.",
            because,
            (
                "make it a parameter: pyro.param instead of pyro.sample",
                "put it on a grid: a Categorical over grid points",
                "observe it with obs=, or condition on it",
            ),
        )
    ]


def _shape_problems(
    name: str, site: Mapping[str, Any], plates: Mapping[str, Plate]
) -> list[Problem]:
    """A batch dimension outside every plate would silently meet an enumerated one."""
    fn = site["fn"]
    frames = {f.dim: f for f in frames_of(site).values()}
    batch, event_dim = fn.batch_shape, fn.event_dim
    value_shape = site["value"].shape
    where = f"site '{name}'"
    if site["is_observed"] and event_dim:
        if value_shape[-event_dim:] != fn.event_shape:
            return [
                Problem(
                    where,
                    f"the observed value has shape {tuple(value_shape)}, whose last "
                    f"{event_dim} dimension(s) should be {tuple(fn.event_shape)}.",
                    f"the distribution's event shape is {tuple(fn.event_shape)}",
                    ("pass data with that many features", "change the parameters' last dimension"),
                    DataError,
                )
            ]
        value_shape = value_shape[:-event_dim]
    try:
        shape = torch.broadcast_shapes(batch, value_shape) if site["is_observed"] else batch
    except RuntimeError:
        return [
            Problem(
                where,
                f"the observed value has batch shape {tuple(value_shape)}, the distribution "
                f"{tuple(batch)}; they do not broadcast.",
                "each element of a plate needs its own observation",
                ("make the plate's size that of the data",),
                DataError,
            )
        ]
    problems = []
    for dim in range(-len(shape), 0):
        if shape[dim] == 1:
            continue
        if dim not in frames:
            problems.append(
                Problem(
                    where,
                    f"batch dimension {dim} of size {shape[dim]} is outside every plate.",
                    "it would coincide with the dimension of an enumerated latent, and the evidence "
                    "would be wrong in silence",
                    (
                        f"wrap the site in pyro.plate(..., {shape[dim]}, dim={dim})",
                        ".to_event(n) if the dimension belongs to one observation",
                    ),
                )
            )
        elif frames[dim].size != shape[dim]:
            problems.append(
                Problem(
                    where,
                    f"plate '{frames[dim].name}' has size {frames[dim].size}, the site "
                    f"{shape[dim]} in dimension {dim}.",
                    "",
                    ("make the plate's size that of the data's dimension",),
                    DataError,
                )
            )
    return problems


def _data_problems(name: str, site: Mapping[str, Any]) -> list[Problem]:
    fn, value = site["fn"], site["value"]
    if type(_pyro.unwrap(fn)[0]).__name__ == "Unit" or not isinstance(value, Tensor):
        return []
    event_dim = fn.event_dim
    bad = ~torch.isfinite(value) if value.is_floating_point() else torch.zeros_like(value).bool()
    mask = mask_tensor(site)
    if mask is False:
        return []
    if isinstance(mask, Tensor):
        shown = mask.reshape(mask.shape + (1,) * event_dim)
        try:
            bad = bad & shown
        except RuntimeError:
            return []
    where = f"site '{name}'"
    if bool(bad.any()):
        first = tuple(int(i) for i in bad.nonzero()[0])
        nan = int((bad & torch.isnan(value)).sum())
        count = int(bad.sum())
        kind = "NaN" if nan == count else "infinite" if nan == 0 else "NaN or infinite"
        return [
            Problem(
                where,
                f"{count} of {value.numel()} observed values are {kind}, the first at index {first}.",
                "a missing value is not a number that a density can be evaluated at",
                (
                    "mark missing values: pyro.sample(..., obs=x, obs_mask=~torch.isnan(x)) "
                    "(one mask per event: .all(-1) over features)",
                    "drop the rows that hold them",
                ),
                DataError,
            )
        ]
    try:
        inside = fn.support.check(value)
    except (NotImplementedError, AttributeError, RuntimeError):
        return []
    if isinstance(mask, Tensor):
        inside = inside | ~mask
    if bool(inside.all()):
        return []
    first = tuple(int(i) for i in (~inside).nonzero()[0])
    count = int((~inside).sum())
    base = type(_pyro.unwrap(fn)[0]).__name__
    return [
        Problem(
            where,
            f"{count} of {inside.numel()} observed values are outside the support of {base}, the "
            f"first at index {first}.",
            f"its support is {fn.support}",
            ("check the data", "choose a distribution whose support holds them"),
            DataError,
        )
    ]


def _scope_problems(info: SiteInfo, sites: Mapping[str, SiteInfo]) -> list[Problem]:
    problems = []
    for latent in info.scope:
        if latent == info.name or latent not in sites:
            continue
        outside = [p for p in sites[latent].plates if p not in info.plates]
        if outside:
            problems.append(
                Problem(
                    f"site '{info.name}'",
                    f"it reads latent '{latent}' of plate '{outside[0]}' from outside that plate.",
                    "all elements of the plate would be coupled: an enumeration of "
                    "K to the power of the plate's size",
                    (
                        f"put '{info.name}' inside plate '{outside[0]}'",
                        "replace the plate by a Python loop if it is very small",
                    ),
                )
            )
    return problems


def _obs_mask(site: Mapping[str, Any]) -> Tensor:
    mask = mask_tensor(site)
    return torch.as_tensor(True if mask is None else mask)
