"""FactorGraph: what one enumerated run of a model says, in a compact layout.

A factor keeps only the dimensions that it really has: its plates, left to right, then the latents
in its scope. Expanded dimensions are of size one. Factors of equal form (the time steps of a
chain) are stacked into one `Group` with a leading dimension of members, so that each is evaluated
and updated by one call.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from pyro_em import _pyro
from pyro_em._errors import (
    DataError,
    DegenerateError,
    ModelError,
    Problem,
    as_error,
    message,
    raise_problems,
)
from pyro_em._pyro import Role
from pyro_em._shadows import OutputTooLarge, is_shadow
from pyro_em._support import density_anywhere
from pyro_em._wrappers import element_mask, split_mask
from pyro_em.advice import (
    changing_sites,
    needs_more_dimensions,
    on_failure,
    too_many_dimensions,
)
from pyro_em.agreement import differing, disagreements, other_model
from pyro_em.binding import Binding, Selection, bind, parameters_below
from pyro_em.blame import given_tensors
from pyro_em.dependences import Reading
from pyro_em.families import Family, family_of, given_arguments, spread_arguments
from pyro_em.families.pieces import log_density
from pyro_em.findings import is_outside, mask_tensor
from pyro_em.recurring import Recurring
from pyro_em.structure import SiteInfo, Structure, frames_of


@dataclass(frozen=True, eq=False)
class Latent:
    """A latent that is summed: its support and where it lives.

    Attributes:
        name: The site's name.
        plates: Its plates, left to right.
        support: All its values. # (K, *event)
        batch_dims: For each batch dimension of the site, the plate's name or None.
    """

    name: str
    plates: tuple[str, ...]
    support: Tensor
    batch_dims: tuple[str | None, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return self.support.shape[0]


@dataclass(frozen=True, eq=False)
class Factor:
    """One site's log density over its plates and its latents, ready to be stacked."""

    info: SiteInfo
    dims: tuple[str, ...]
    sizes: tuple[int, ...]
    family: Family | None
    event_dims: int
    arguments: dict[str, Tensor]
    bindings: dict[str, Binding]
    value: Tensor
    mask: Tensor | None
    scale: Tensor | float
    raw: Tensor | None
    raw_params: tuple[str, ...] | None
    value_binding: Binding | None
    elements: Tensor | None
    hyperparameters: tuple[tuple[str, str], ...] = ()
    edges: tuple[str, ...] = ()

    @property
    def signature(self) -> tuple[Any, ...]:
        """What two factors must share to be stacked."""
        if self.family is None:
            return ("single", self.info.name)
        return (
            self.family.distribution,
            self.info.role,
            len(self.info.plates),
            self.sizes,
            self.event_dims,
            tuple(self.value.shape),
            self.value.dtype,
            self.raw_params,
            None if self.mask is None else tuple(self.mask.shape),
            None if self.elements is None else tuple(self.elements.shape),
            None if self.value_binding is None else _form(self.value_binding),
            tuple(
                (name, tuple(self.arguments[name].shape), *_form(b))
                for name, b in self.bindings.items()
            ),
        )


def _form(binding: Binding) -> tuple[Any, ...]:
    """What two bindings must share to be stacked."""
    parts = tuple(
        (s.param, tuple(m.name for m in s.maps), s.factor is None) for s in binding.selections
    )
    return (binding.how, binding.normalise, binding.params, parts)


@dataclass(frozen=True, eq=False)
class Group:
    """Factors of equal form, stacked along a leading dimension of members.

    Attributes:
        members: The sites, in model order.
        dims: For each member the names of its dimensions: plates, then latents.
        n_plates: How many of the dimensions are plates.
        sizes: Their sizes.
        family: The record that evaluates and updates them, or None.
        event_dims: Reinterpreted batch dimensions (``to_event``) of each argument.
        arguments: The traced arguments. # (members, *dims or 1s, *event)
        bindings: How parameters reach each argument, with stacked index maps.
        value: Observed or enumerated values. # (members, *dims or 1s, *event)
        mask: Where the factor counts, or None. # (members, *dims or 1s)
        scale: Per member, what multiplies it outside the logarithm.
        raw: The traced log density where no record evaluates it. # (members, *dims)
        raw_params: Parameters that reach ``raw``, or the value of a family's site; None where an
            unknown tensor does.
        observed: Whether the members have a value.
        distribution: Its name.
        role: What the members stand for.
        value_binding: How parameters reach the value, where they do.
        elements: Which elements of an event count (a mask below ``to_event``), or None where all
            do; ``mask`` says where any does. # (members, *dims or 1s, *to_event dims or 1s)
        hyperparameters: Of a point estimate's prior, pairs of an argument that sets how concentrated
            it is and a parameter in it.
        edges: Parameters at which the support of an observed site ends.
    """

    members: tuple[str, ...]
    dims: tuple[tuple[str, ...], ...]
    n_plates: int
    sizes: tuple[int, ...]
    family: Family | None
    event_dims: int
    arguments: Mapping[str, Tensor]
    bindings: Mapping[str, Binding]
    value: Tensor
    mask: Tensor | None
    scale: tuple[Tensor | float, ...]
    raw: Tensor | None
    raw_params: tuple[str, ...] | None
    observed: bool
    distribution: str
    role: Role = Role.DATA
    value_binding: Binding | None = None
    elements: Tensor | None = None
    hyperparameters: tuple[tuple[str, str], ...] = ()
    edges: tuple[str, ...] = ()

    @property
    def is_static(self) -> bool:
        """Whether its density can be recomputed from parameters without the model."""
        if self.family is None:
            assert self.raw is not None
            return not self.raw.requires_grad
        if self.value_binding is None:
            fixed = [self.value]
        else:
            fixed = []
            if not self.value_binding.is_static:
                return False
        fixed += [m for m in (self.mask, self.elements) if m is not None]
        scales = [s for s in self.scale if isinstance(s, Tensor)]
        return all(b.is_static for b in self.bindings.values()) and not any(
            t.requires_grad for t in fixed + scales
        )

    @property
    def is_unscaled(self) -> bool:
        """Whether every member counts once."""
        return all(not isinstance(s, Tensor) and s == 1.0 for s in self.scale)

    @property
    def params(self) -> tuple[str, ...]:
        """All parameters that reach the group."""
        if self.family is None:
            return self.raw_params or ()
        names = [p for b in self.bindings.values() for p in b.params]
        names.extend(self.raw_params or ())
        return tuple(dict.fromkeys(names))

    def evaluate_arguments(self, values: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The arguments at parameter values, or as traced where ``values`` is None."""
        if values is None:
            return dict(self.arguments)
        return {
            # Parameters may be coarser than the data.
            name: b.evaluate(values).to(self.arguments[name].dtype)
            if b.is_static
            else self.arguments[name]
            for name, b in self.bindings.items()
        }

    def weights(self) -> Tensor:
        """What multiplies each member's log density: scale, and zero where it is masked.

        Returns:
            # (members, *sizes or 1s), and *to_event dims or 1s where elements are masked
        """
        ones = (1,) * len(self.sizes)
        parts = [
            s if isinstance(s, Tensor) else self.value.new_full(ones, s, dtype=torch.float64)
            for s in self.scale
        ]
        out = torch.stack(torch.broadcast_tensors(*parts))
        if self.elements is not None:
            return out.reshape(out.shape + (1,) * self.event_dims) * self.elements
        return out if self.mask is None else out * self.mask

    def evaluate_value(self, values: Mapping[str, Tensor] | None) -> Tensor:
        """The members' values at parameter values, or as traced where ``values`` is None."""
        if values is None or self.value_binding is None or not self.value_binding.is_static:
            return self.value
        return self.value_binding.evaluate(values)

    def log_density_at(self, values: Mapping[str, Tensor]) -> Tensor:
        """log p of every cell at parameter values, through the bindings. # (members, *sizes)"""
        return self.log_density(self.evaluate_arguments(values), self.evaluate_value(values))

    def log_density(
        self, arguments: Mapping[str, Tensor] | None = None, value: Tensor | None = None
    ) -> Tensor:
        """log p of every cell, zero where an observation is masked. # (members, *sizes)"""
        full = (len(self.members), *self.sizes)
        if self.family is None:
            assert self.raw is not None
            return self.raw.expand(full)
        log_p = log_density(
            self.family,
            self.value if value is None else value,
            self.arguments if arguments is None else arguments,
            len(full),
            self.event_dims,
            self.elements,
        ).expand(full)
        if self.mask is not None and self.observed:
            log_p = torch.where(self.mask, log_p, 0.0)
        return log_p


@dataclass(frozen=True, eq=False)
class FactorGraph:
    """A traced model: plates, latents, stacked factors with bindings, parameters."""

    structure: Structure
    latents: Mapping[str, Latent]
    groups: tuple[Group, ...]
    parameters: Mapping[str, _pyro.TracedParameter]

    @property
    def is_static(self) -> bool:
        """Whether every density can be recomputed from the parameters without the model."""
        return all(g.is_static for g in self.groups)

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating dtype among the densities."""
        dtypes = [
            t.dtype
            for g in self.groups
            for t in (*g.arguments.values(), g.value, *((g.raw,) if g.raw is not None else ()))
            if t.is_floating_point()
        ]
        return max(dtypes, key=lambda d: torch.finfo(d).bits, default=torch.get_default_dtype())

    @property
    def eps(self) -> float:
        """The rounding of the coarsest floating tensor: densities, data or parameters."""
        parameters = [p.unconstrained for p in self.parameters.values()]
        tensors = [t for g in self.groups for t in (*g.arguments.values(), g.value)]
        floating = [t.dtype for t in (*parameters, *tensors) if t.is_floating_point()]
        return max((torch.finfo(d).eps for d in floating), default=torch.finfo(self.dtype).eps)

    def group_of(self, site: str) -> tuple[Group, int]:
        """The group that holds a site, and the site's place in it."""
        return self._places[site]

    @cached_property
    def _places(self) -> dict[str, tuple[Group, int]]:
        return {name: (g, i) for g in self.groups for i, name in enumerate(g.members)}

    def dim_size(self, dim: str) -> int:
        """The size of a plate or of a latent's support."""
        if dim in self.latents:
            return self.latents[dim].size
        return self.structure.plates[dim].size


@torch.enable_grad()
def trace_graph(
    model: _pyro.Model,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    *,
    limit: int | None = None,
    values: Mapping[str, Tensor] | None = None,
    random_seed: int | None = None,
    with_bindings: bool = True,
    keep_random_state: bool = True,
    attached: bool = False,
    looked: Mapping[str, Mapping[str, Any]] | None = None,
    reading: Reading | None = None,
) -> FactorGraph:
    """Run the model with its latents enumerated and bring every factor into the compact layout.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found.
        limit: Stop when an operation inside the model makes more cells.
        values: Constrained parameter values to trace at; the current ones by default.
        random_seed: Trace from another random state.
        with_bindings: Whether to read off how parameters reach the arguments.
        keep_random_state: Whether the global random state is restored after the run.
        attached: Whether densities stay attached to the unconstrained parameters.
        looked: The sites of a plain run from the same random state, which this one has to agree
            with; None where that is known.
        reading: Notes what the run reads beside the parameters; needs a limit.

    Raises:
        ModelError: If the model cannot run with its latents enumerated, reads a latent outside its
            ``pyro.markov`` scope, or is another model when they are enumerated.
    """
    run = _run_enumerated(
        model,
        args,
        kwargs,
        structure,
        limit=limit,
        values=values,
        random_seed=random_seed,
        keep_random_state=keep_random_state,
        attached=attached,
        reading=reading,
    )
    if reading is not None:
        _note_sites(reading, run)
    sites = {n: s for n, s in run.sites.items() if n in structure.sites}
    if list(sites) != list(structure.sites):
        raise_problems([changing_sites([], structure.random_plates)])
    if any(s["value"].dim() > 64 or len(s["fn"].batch_shape) > 64 for s in sites.values()):
        raise_problems([_more_than_torch_has(structure)])
    _require_sizes(sites, structure)
    leaves = {name: p.leaf for name, p in run.parameters.items()}
    layout = _Layout(sites, structure, Recurring(leaves))
    for name in structure.sites:
        layout.find_out_of_scope(name)
    if layout.problems:
        raise_problems(layout.problems)
    if looked is not None:
        _require_same(model, args, kwargs, sites, structure, looked)
    if values is None:  # not at a trial point
        _require_inside(sites, structure)
    factors = []
    for name in structure.sites:
        try:
            factors.append(layout.factor(name, leaves if with_bindings else None))
        except _Stray as stray:
            shape, size = stray.args
            layout.problems.append(
                Problem(
                    f"site '{name}'",
                    f"with latents enumerated, one of its tensors has shape {shape}; its dimension "
                    f"of size {size} belongs to no plate and no latent of the site.",
                    "an enumerated value has its own dimension on the left of all plates",
                    (
                        "align other tensors with the plates on the right: avoid unsqueeze(-1) and "
                        "reshape on a latent's value",
                        "wrap the site in a pyro.plate, or use .to_event",
                    ),
                    latents=tuple(n for n in structure.sites[name].scope if n in structure.latents),
                )
            )
    if layout.problems:
        raise_problems(layout.problems)
    factors = _count_where_needed(factors, structure)
    latents = {name: layout.latent(name) for name in structure.latents}
    return FactorGraph(structure, latents, tuple(_stack(factors)), run.parameters)


def _note_sites(reading: Reading, run: _pyro.Run) -> None:
    """What sites hold without any operation: values, masks, scales, arguments."""
    for site in run.sites.values():
        if not _pyro.is_factor(site):
            continue
        held = (site["value"], site["mask"], site["scale"], *_pyro.tensors_of(site["fn"]))
        for tensor in held:
            if isinstance(tensor, Tensor):
                reading.note(tensor)


def check_arguments(
    model: _pyro.Model, args: tuple, kwargs: dict[str, Any], structure: Structure, limit: int
) -> None:
    """Let every distribution check its arguments, for all values of the latents.

    This is a run of its own: a check reads arguments that are derived lazily, and a graph follows
    those that the user gave.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found, ``unchecked``.
        limit: Stop when an operation inside the model makes more cells.

    Raises:
        ModelError: If an argument is outside its constraint, or the model cannot be enumerated.
    """
    try:
        run = _run_enumerated(model, args, kwargs, structure, limit=limit, validated=True)
        sites = [run.sites[n] for n in structure.sites if n in run.sites]
        shadowed = any(is_shadow(t) for s in sites for t in _pyro.tensors_of(s["fn"]))
    except ModelError as error:
        shadowed = _pyro.is_of_shadows(error.__cause__)
        if not shadowed:
            raise
    if shadowed:
        raise ModelError(
            message(
                "model",
                "it keeps a tensor that it made of a latent's value from one run to the next.",
                "a latent has other values in every run, and large data are first looked at with "
                "no values at all",
                ["make the tensor anew in every run", "make it outside the model"],
            )
        )


def _run_enumerated(
    model: _pyro.Model,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    *,
    limit: int | None,
    **how: Any,
) -> _pyro.Run:
    try:
        return _pyro.enumerated_run(
            model,
            args,
            kwargs,
            latents=frozenset(structure.latents),
            max_plate_nesting=structure.max_plate_nesting,
            kept=structure.kept_values,
            limit=limit,
            **how,
        )
    except OutputTooLarge as error:
        found = Problem(
            "model",
            f"with its latents enumerated, one operation makes {error.cells:,} cells; the "
            f"budget is max_enumeration={limit:,}.",
            "a value inside the model combines too many latents",
            ("raise max_enumeration", "let each factor depend on fewer latents"),
            latents=structure.latents,
        )
        raise as_error([found]) from None
    except Exception as error:
        if needs_more_dimensions(error):
            raise as_error([_more_than_torch_has(structure)]) from error
        latents = {n: structure.sites[n].distribution for n in structure.latents}
        # An argument outside its constraint is outside without enumeration too.
        checked = bool(how.get("validated")) and _pyro.is_of_validation(error)
        given = given_tensors(model, args, kwargs)
        found = on_failure(error, latents, enumerated=not checked, values=given)
        if not checked:  # it runs with one value of each latent, and not with all of them
            found = replace(found, latents=structure.latents)
        raise as_error([found]) from error


def _more_than_torch_has(structure: Structure) -> Problem:
    """Too many latents; whether they are rows or the steps of a chain decides what to do."""
    latents = set(structure.latents)
    chained = any(len(latents.intersection(structure.sites[n].scope)) > 1 for n in latents)
    loops = [p for n in structure.latents for p in structure.sites[n].nested]
    loop = next((p for p in loops if p in structure.sequential), None)
    plate = None if loop is None else f'pyro.plate("{loop}", {structure.sequential[loop]})'
    return too_many_dimensions(list(structure.latents), plate, chained)


class _Layout:
    """Brings traced tensors into the compact layout."""

    def __init__(
        self, sites: Mapping[str, dict[str, Any]], structure: Structure, bindings: Recurring
    ) -> None:
        self.sites = sites
        self.bindings = bindings
        self.structure = structure
        self.problems: list[Problem] = []
        self.order = {n: i for i, n in enumerate(structure.latents)}
        self.dim_of: dict[str, int] = {}
        self.id_of: dict[str, int] = {}
        self.name_of: dict[int, str] = {}
        for name in structure.latents:
            infer = sites[name]["infer"]
            self.dim_of[name] = infer["_enumerate_dim"]
            self.id_of[name] = infer["_dim_to_id"][infer["_enumerate_dim"]]
            self.name_of[self.id_of[name]] = name

    def latent(self, name: str) -> Latent:
        site = self.sites[name]
        fn, value = site["fn"], site["value"]
        event_dim = fn.event_dim
        batch = value.dim() - event_dim
        at = batch + self.dim_of[name]
        support = value
        for dim in reversed(range(batch)):
            if dim != at:
                support = support.select(dim, 0)
        by_dim = {f.dim: f.name for f in frames_of(site).values()}
        rank = self.structure.sites[name].batch_dim
        dims = tuple(by_dim.get(d) for d in range(-rank, 0))
        return Latent(name, tuple(frames_of(site)), support.detach(), dims)

    def factor(self, name: str, leaves: Mapping[str, Tensor] | None) -> Factor:
        site, info = self.sites[name], self.structure.sites[name]
        fn, value = site["fn"], site["value"]
        visible = site["infer"].get("_dim_to_id", {})
        scope = self._scope(info, visible, fn, value)
        plate_dims = [self.structure.plates[p].dim for p in info.plates]
        dims: list[int | None] = [*plate_dims]
        # A latent of one value has no dimension of its own: Pyro may give it to another.
        dims += [self.dim_of[z] if self._support_size(z) > 1 else None for z in scope]
        sizes = [self.structure.plates[p].size for p in info.plates]
        sizes += [self._support_size(z) for z in scope]
        base, reinterpreted, _ = _pyro.unwrap(fn)
        family = family_of(fn)
        mask, elements = self._masks(site, dims)
        if mask is not None and not info.observed and mask.shape[len(plate_dims) :].numel() != 1:
            self.problems.append(
                Problem(
                    f"site '{name}'",
                    "its mask depends on a latent.",
                    "a latent is either there or not; only observations may be masked by latents",
                    ("mask the observed sites below it instead",),
                )
            )
        scale = site["scale"]
        if isinstance(scale, Tensor):
            scale = compact(scale, 0, dims) if scale.dim() else float(scale)
        if site["is_observed"] and type(base).__name__ != "Unit":
            value = _pyro.without_masked_nonsense(fn, value, element_mask(fn, site["mask"]))
        if name.removesuffix("_observed") in self.structure.masked_pairs:
            value = value.clone()  # a posterior shows it when it is asked
        compact_value = compact(value, fn.event_dim, dims)
        arguments: dict[str, Tensor] = {}
        bindings: dict[str, Binding] = {}
        raw: Tensor | None = None
        raw_params: tuple[str, ...] | None = ()
        value_binding: Binding | None = None
        if leaves is not None:
            raw_params = parameters_below(compact_value, leaves)
            if raw_params and info.observed and (family is not None or info.role is Role.POINT):
                layout = partial(compact, event_dim=fn.event_dim, dims=dims, like=value)
                value_binding = bind(value, leaves, layout=layout)
        if family is None:
            log_p = _log_density(name, fn, value, info.role)
            mask_now = mask_tensor(site)
            if isinstance(mask_now, Tensor) and info.observed:
                log_p = torch.where(mask_now, log_p, 0.0)
            elif mask_now is False and info.observed:
                log_p = torch.zeros_like(log_p)
            raw = compact(log_p, 0, dims)
            if leaves is not None:
                raw_params = parameters_below(raw, leaves)
        else:
            compact_value = _typed(compact_value, given_arguments(base, family), family)
            for arg, tensor in given_arguments(base, family).items():
                event = reinterpreted + family.argument_event_dim(arg)
                layout = partial(
                    compact, event_dim=event, dims=dims, collapse=reinterpreted, like=tensor
                )
                kept = layout(tensor)
                if kept.dtype != compact_value.dtype and compact_value.is_floating_point():
                    kept = kept.to(compact_value.dtype)
                arguments[arg] = kept
                if leaves is None:
                    bindings[arg] = Binding("opaque", (), kept.detach())
                    continue
                bindings[arg] = self.bindings.bind(
                    tensor,
                    layout,
                    (event, tuple(dims), reinterpreted),
                    normalised=arg if family.argument_event_dim(arg) == 1 else "",
                    allow_affine=family.name in ("Normal", "LogNormal") and arg == "loc",
                )
        return Factor(
            replace(info, scope=tuple(scope)),
            info.plates + tuple(scope),
            tuple(sizes),
            family,
            reinterpreted if family is not None else 0,
            arguments,
            bindings,
            compact_value,
            mask,
            scale,
            raw,
            raw_params,
            value_binding,
            None if family is None else elements,
            self._hyperparameters(base, leaves) if info.role is Role.POINT and leaves else (),
            self._edges(base, leaves) if info.role is Role.DATA and leaves else (),
        )

    @staticmethod
    def _edges(base: Any, leaves: Mapping[str, Tensor]) -> tuple[str, ...]:
        try:
            support = base.support
        except (NotImplementedError, AttributeError):
            return ()
        bounds = (getattr(support, end, None) for end in ("lower_bound", "upper_bound"))
        tensors = [b for b in bounds if isinstance(b, Tensor)]
        return tuple(dict.fromkeys(n for b in tensors for n in parameters_below(b, leaves) or ()))

    @staticmethod
    def _hyperparameters(base: Any, leaves: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
        return tuple(
            (argument, name)
            for argument, tensor in spread_arguments(base).items()
            for name in parameters_below(tensor, leaves) or ()
        )

    def _support_size(self, name: str) -> int:
        site = self.sites[name]
        return site["value"].shape[self.dim_of[name] - site["fn"].event_dim]

    def find_out_of_scope(self, name: str) -> None:
        """Note every latent that a site reads outside the latent's markov scope."""
        site = self.sites[name]
        shown = set(site["infer"].get("_dim_to_id", {}).values())
        for latent in self.structure.sites[name].scope:
            if self.id_of[latent] in shown or self._support_size(latent) == 1:
                continue
            if site["infer"].get("_markov_scope") is None:
                fixes: tuple[str, ...] = (
                    f"move site '{name}' into the loop, beside '{latent}'",
                    "replace pyro.markov(range(T), history=...) by range(T) if T is small",
                )
            else:
                fixes = (
                    "raise history= of the pyro.markov that holds them to the number of steps "
                    f"between them: pyro.markov(range(T), history={self._lag(latent, shown)})",
                    f"read '{latent}' only in steps within its history",
                )
            self.problems.append(
                Problem(
                    f"site '{name}'",
                    f"it uses latent '{latent}' outside that latent's pyro.markov scope.",
                    "the latent's dimension is reused by then, and Pyro would compute a wrong "
                    "density in silence",
                    fixes,
                    latents=(latent,),
                )
            )

    def _lag(self, latent: str, shown: set[int]) -> int:
        """Steps between a latent and the latest one of its kind that is visible."""

        def stem(name: str) -> str:
            return re.sub(r"\d+", "#", name)

        kind = [n for n in self.structure.latents if stem(n) == stem(latent)]
        visible = [i for i, n in enumerate(kind) if self.id_of[n] in shown]
        return max(2, max(visible, default=0) - kind.index(latent))

    def _scope(
        self, info: SiteInfo, visible: Mapping[int, int], fn: Any, value: Tensor
    ) -> list[str]:
        scope = list(info.scope)
        # Dimensions that the tags did not show (a value that left torch and came back).
        shape = _pyro.broadcast_shape(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
        for dim, ident in visible.items():
            latent = self.name_of.get(ident, "")
            if latent and latent not in info.scope and len(shape) >= -dim and shape[dim] > 1:
                scope.append(latent)
        return sorted(set(scope), key=self.order.__getitem__)

    def _masks(
        self, site: Mapping[str, Any], dims: Sequence[int | None]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Where the site counts, and which elements of its events do, where they differ."""
        mask, elements = split_mask(site["fn"], site["mask"])
        if mask is None:
            return None, None
        if not isinstance(mask, Tensor) or not mask.dim():
            device = site["value"].device
            mask = torch.as_tensor(mask, device=device).reshape((1,) * len(dims))
        else:
            mask = compact(mask, 0, dims)
        if elements is not None:
            elements = compact(elements, _pyro.unwrap(site["fn"])[1], dims)
        return mask, elements


class _Stray(Exception):
    """A dimension that belongs to no plate and no latent; holds the tensor's shape and its size."""


def compact(
    tensor: Tensor,
    event_dim: int,
    dims: Sequence[int | None],
    collapse: int = 0,
    like: Tensor | None = None,
) -> Tensor:
    """Keep only the batch dimensions ``dims`` (from the right), in that order; expanded ones as 1.

    Args:
        tensor: A traced tensor. # (*batch, *event)
        event_dim: How many of its rightmost dimensions are kept whole.
        dims: Negative positions among the batch dimensions; None inserts one of size one.
        collapse: How many of the leftmost event dimensions may be collapsed too when expanded.
        like: The tensor of the same shape whose strides say what is expanded; by default this one.

    Returns:
        A view. # (*dims, *event)

    Example:
        >>> compact(torch.zeros(2, 1, 5, 3), 1, [-1, -3]).shape
        torch.Size([5, 2, 3])
    """
    like = tensor if like is None else like
    batch = tensor.dim() - event_dim
    expanded = [d for d in range(batch + collapse) if like.shape[d] > 1 and like.stride(d) == 0]
    for d in expanded:
        tensor = tensor.narrow(d, 0, 1)
    if batch < 0:  # an argument that broadcasts over reinterpreted dimensions
        tensor = tensor.reshape((1,) * -batch + tuple(tensor.shape))
        batch = 0
    present = [batch + d for d in dims if d is not None and batch + d >= 0]
    others = [d for d in range(batch) if d not in present]
    for d in others:
        if tensor.shape[d] != 1:
            raise _Stray(tuple(tensor.shape), tensor.shape[d])
    order = [*present, *others, *range(batch, tensor.dim())]
    if order != list(range(tensor.dim())):
        tensor = tensor.permute(order)
    sizes = iter(tensor.shape[: len(present)])
    shape = [next(sizes) if d is not None and batch + d >= 0 else 1 for d in dims]
    target = shape + list(tensor.shape[batch:])
    return tensor if list(tensor.shape) == target else tensor.reshape(target)


class Resized(ModelError):
    """A plate or a support has another size than when the model was looked at."""


def _require_sizes(sites: Mapping[str, dict[str, Any]], structure: Structure) -> None:
    """Refuse a model whose plates or supports are of another size than when it was looked at."""
    for name, site in sites.items():
        for frame in frames_of(site).values():
            known = structure.plates.get(frame.name)
            if known is None or known.size == frame.size:
                continue
            raise_problems(
                [
                    Problem(
                        f"plate '{frame.name}'",
                        f"it has size {frame.size} in this run of the model and had {known.size} "
                        "when it was first looked at.",
                        "its size changes with a parameter or from run to run; evidences of "
                        "different numbers of elements cannot be compared",
                        _FIXED_SIZE,
                        Resized,
                    )
                ]
            )
        known_support = structure.sites[name].support_size
        if name in structure.latents and known_support is not None:
            dim = site["infer"]["_enumerate_dim"] - site["fn"].event_dim
            size = site["value"].shape[dim] if site["value"].dim() >= -dim else 1
            if size != known_support:
                raise_problems(
                    [
                        Problem(
                            f"site '{name}'",
                            f"it has {size} values in this run of the model and had "
                            f"{known_support} when it was first looked at.",
                            "the number of its values changes with a parameter or from run to run",
                            _FIXED_SIZE,
                            Resized,
                        )
                    ]
                )


_FIXED_SIZE = (
    "take the size from the data or from a number: len(x), not int(10 * p.item())",
    "fit the model once for each size that is of interest, and compare with BIC",
)


def _require_same(
    model: _pyro.Model,
    args: tuple,
    kwargs: dict[str, Any],
    sites: Mapping[str, dict[str, Any]],
    structure: Structure,
    looked: Mapping[str, Mapping[str, Any]],
) -> None:
    """Refuse a model that is another one when its latents are enumerated."""
    with torch.no_grad():
        off = disagreements(sites, looked, structure.latents, structure.max_plate_nesting)
        if not off:
            return
        # What the model draws at random, or keeps from run to run, differs by itself.
        drawn = (Role.LATENT, Role.GUIDE)
        held = {n: s["value"] for n, s in looked.items() if _pyro.role_of(s) in drawn}
        held = {n: getattr(v, "_t", v) for n, v in held.items()}
        held = {**structure.kept_values, **held}
        runs = []
        for seed in (23, 24):
            with _pyro.seeded(seed):
                runs.append(_pyro.held_run(model, args, kwargs, held))
        by_itself = {name for name, _ in differing(runs[0], runs[1], [name for name, _ in off])}
    problems = [
        other_model(name, what, [z for z in structure.sites[name].scope if z != name])
        for name, what in off
        if name not in by_itself
    ]
    if problems:
        raise_problems(problems)


def _require_inside(sites: Mapping[str, dict[str, Any]], structure: Structure) -> None:
    """A family's record is no density outside its support: Exponential(1) at -3 is e³."""
    for name, info in structure.sites.items():
        if info.role not in (Role.SAMPLED, Role.POINT):
            continue
        fn, value = sites[name]["fn"], sites[name]["value"]
        if mask_tensor(sites[name]) is not None or bool(torch.isnan(value).any()):
            continue
        if is_outside(fn, value):
            raise DegenerateError(_outside(name, fn, "the guide's value is outside its support"))


def _log_density(name: str, fn: Any, value: Tensor, role: Role) -> Tensor:
    """The log density of a site without a record of its family."""
    try:
        # With latents enumerated every row meets every value, also those that cannot produce it.
        if role is Role.DATA and is_outside(fn, value):
            return density_anywhere(fn, value)
        return fn.log_prob(value)
    except ValueError as error:  # torch's validation
        text = str(error).split("\n")[0].removesuffix(", but found invalid values:")
        if role is not Role.DATA:
            raise DegenerateError(_outside(name, fn, text)) from error
        kind = type(_pyro.unwrap(fn)[0]).__name__
        raise DataError(
            message(
                f"site '{name}'",
                f"the density of its observed values cannot be evaluated: {text}.",
                f"every row is tried with every value of the latents, and {kind} has no density "
                "for some of them",
                [
                    "let all values of a latent choose among distributions of one support",
                    "check the data against each of them by itself: fn.support.check(x)",
                ],
            )
        ) from error


def _outside(name: str, fn: Any, text: str) -> str:
    kind = type(_pyro.unwrap(fn)[0]).__name__
    return message(
        f"site '{name}'",
        f"its density cannot be evaluated: {text}.",
        f"the value, or an argument of {kind}, left its support: a guide that is wider than the "
        "model's distribution, a spread that goes to zero, a step too far",
        [
            "let the guide draw only what the model can: LogNormal or AutoNormal for what is positive",
            "give parameters the constraint of the support: pyro.param(..., constraint=...)",
            "start elsewhere, or give scales a prior that is zero at zero (InverseGamma)",
        ],
    )


def _typed(value: Tensor, arguments: Mapping[str, Tensor], family: Family) -> Tensor:
    """Observed counts as numbers of the arguments' dtype; categories stay integers."""
    if family.name == "Categorical":
        return value
    dtypes = [t.dtype for t in arguments.values() if t.is_floating_point()]
    if not dtypes:
        return value
    dtype = max(dtypes, key=lambda d: torch.finfo(d).bits)
    if value.is_floating_point():
        dtype = torch.promote_types(dtype, value.dtype)
    return value if value.dtype == dtype else value.to(dtype)


def _count_where_needed(factors: Sequence[Factor], structure: Structure) -> list[Factor]:
    """Counts of a masked latent are dropped only where nothing that counts depends on it.

    A padded step of a chain, masked with all below it, sums to one and must not be counted. A
    masked latent above an observation that is not masked takes part in the evidence, and EM has to
    count it. The unobserved part of an ``obs_mask`` site is not read where it is masked.
    """
    unread = {f"{name}_unobserved" for name in structure.masked_pairs}
    if all(f.mask is None or f.info.observed for f in factors):
        return list(factors)
    children: dict[str, list[Factor]] = {}
    for f in factors:
        for latent in f.info.scope:
            if latent != f.info.name:
                children.setdefault(latent, []).append(f)
    counted: dict[str, Factor] = {}
    for f in reversed(factors):
        mask = f.mask
        if mask is not None and not f.info.observed and f.info.name not in unread:
            plates = f.info.plates
            for child in children.get(f.info.name, ()):
                below = counted[child.info.name].mask
                if below is None:
                    mask = torch.ones_like(mask)
                    break
                alive = below.reshape((*below.shape[: len(child.info.plates)], -1)).any(-1)
                beyond = [i for i, p in enumerate(child.info.plates) if p not in plates]
                for i in reversed(beyond):
                    alive = alive.any(i)
                mask = mask | alive.reshape(alive.shape + (1,) * (mask.dim() - alive.dim()))
        counted[f.info.name] = f if mask is f.mask else replace(f, mask=mask)
    return [counted[f.info.name] for f in factors]


def _stack(factors: Sequence[Factor]) -> list[Group]:
    by_signature: dict[tuple[Any, ...], list[Factor]] = {}
    for f in factors:
        by_signature.setdefault(f.signature, []).append(f)
    return [_group(members) for members in by_signature.values()]


def _group(members: Sequence[Factor]) -> Group:
    first = members[0]
    n = len(first.info.plates)
    masks = [f.mask for f in members if f.mask is not None]
    elements = [f.elements for f in members if f.elements is not None]
    return Group(
        tuple(f.info.name for f in members),
        tuple(f.dims for f in members),
        n,
        first.sizes,
        first.family,
        first.event_dims,
        {a: _stack_tensors([f.arguments[a] for f in members]) for a in first.arguments},
        {a: _stack_bindings([f.bindings[a] for f in members]) for a in first.bindings},
        _stack_tensors([f.value for f in members]),
        _stack_tensors(masks) if masks else None,
        tuple(f.scale for f in members),
        None if first.raw is None else first.raw.unsqueeze(0),
        first.raw_params,
        first.info.observed,
        first.info.distribution,
        first.info.role,
        None
        if first.value_binding is None
        else _stack_bindings([f.value_binding for f in members if f.value_binding is not None]),
        _stack_tensors(elements) if elements else None,
        first.hyperparameters,
        first.edges,
    )


def _stack_tensors(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _stack_bindings(bindings: Sequence[Binding]) -> Binding:
    first = bindings[0]
    selections = []
    for i, part in enumerate(first.selections):
        same = [b.selections[i] for b in bindings]
        factor = None
        if part.factor is not None:
            factor = _stack_tensors([s.factor for s in same if s.factor is not None])
        index = _stack_tensors([s.index for s in same])
        selections.append(Selection(part.param, index, part.maps, factor))
    jacobians = None
    if first.jacobians is not None:
        jacobians = {
            name: _stack_tensors([b.jacobians[name] for b in bindings if b.jacobians is not None])
            for name in first.jacobians
        }
    return Binding(
        first.how,
        first.params,
        _stack_tensors([b.constant for b in bindings]),
        tuple(selections),
        jacobians,
        first.reason,
        first.normalise,
    )
