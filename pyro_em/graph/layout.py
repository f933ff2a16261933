"""The compact layout of factors: only the plates and latents that a tensor really has."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import bases_of, element_mask, split_mask, unexpanded, unwrap
from pyro_em.errors import Finding, raise_findings
from pyro_em.families.family import Family
from pyro_em.families.registry import (
    REGISTRY,
    Given,
    given_arguments_of_all,
    given_by_all,
    spread_arguments,
)
from pyro_em.graph.bindings.autograd import bind, known_below, parameters_below
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.signatures import Recurring, outlines
from pyro_em.graph.bindings.useful import useful_for
from pyro_em.graph.compact import (
    Stray,
    compact,
    compact_all,
    compacted,
    laid_out,
    once_along_rows,
    recipe_for,
    stray_finding,
)
from pyro_em.graph.factors import Latent
from pyro_em.graph.forms import FEW, equal_to_first, in_forms
from pyro_em.graph.stacking import Batch, Factor, repeated
from pyro_em.graph.structure import SiteInfo, Structure
from pyro_em.graph.unrecorded import log_density_of_site
from pyro_em.tracing.feasible import without_masked_nonsense
from pyro_em.tracing.sites import Role, mask_tensor

_POSSIBLE = ("Unit", "Clamped")  # of which no value is nonsense where it is masked
_LARGE = 1 << 16  # numbers of an argument from which on it is read without its copies
_KINDS = 8  # of bindings among sites of one form that are told apart together


class FactorLayout:
    """Brings traced tensors into the compact layout.

    Args:
        sites: As a run traced them.
        structure: The skeleton.
        bindings: Reads how parameters reach arguments; None where nobody asks.
        detached: Whether only the numbers of arguments and densities are of interest.
    """

    def __init__(
        self,
        sites: Mapping[str, dict[str, Any]],
        structure: Structure,
        bindings: Recurring | None = None,
        detached: bool = False,
    ) -> None:
        self.sites, self.detached = sites, detached
        self.bindings = bindings
        self.structure = structure
        self.problems: list[Finding] = []
        self.order = {n: i for i, n in enumerate(structure.latents)}
        self.dim_of: dict[str, int] = {}
        self.size_of: dict[str, int] = {}
        self._places: dict[str, tuple[tuple[str, ...], list[int | None], list[int]]] = {}
        self.id_of: dict[str, int] = {}
        self.name_of: dict[int, str] = {}
        for name in structure.latents:
            infer = sites[name]["infer"]
            self.dim_of[name] = infer["_enumerate_dim"]
            self.id_of[name] = infer["_dim_to_id"][infer["_enumerate_dim"]]
            self.name_of[self.id_of[name]] = name
            site = sites[name]
            self.size_of[name] = site["value"].shape[self.dim_of[name] - site["fn"].event_dim]

    def pieces_and_latents(
        self,
        names: Sequence[str],
        forms: Mapping[str, Hashable | None],
        leaves: Mapping[str, Tensor] | None,
        few: float,
    ) -> tuple[list[Factor | Batch], dict[str, Latent]]:
        """The factors of some sites, and all latents; see `pieces`."""
        return self.pieces(names, forms, leaves, few), self.latents(forms)

    def latents(self, forms: Mapping[str, Hashable | None]) -> dict[str, Latent]:
        """All latents; those of one form that have equal values share one support."""
        known: dict[Hashable, tuple[Tensor, Latent]] = {}
        out: dict[str, Latent] = {}
        for name in self.structure.latents:
            form = forms[name]
            key = (form, self.dim_of[name], self.structure.sites[name].batch_dim)
            value = self.sites[name]["value"]
            if form is not None and key in known and torch.equal(known[key][0], value):
                out[name] = replace(known[key][1], name=name)
                continue
            out[name] = self.latent(name)
            known[key] = value, out[name]
        return out

    def latent(self, name: str) -> Latent:
        """A latent that is summed: its values and its plates."""
        site = self.sites[name]
        fn, value = site["fn"], site["value"]
        event_dim = fn.event_dim
        batch = value.dim() - event_dim
        at = batch + self.dim_of[name]
        support = value
        for dim in reversed(range(batch)):
            if dim != at:
                support = support.select(dim, 0)
        info = self.structure.sites[name]
        by_dim = {self.structure.plates[p].dim: p for p in info.plates}
        dims = tuple(by_dim.get(d) for d in range(-info.batch_dim, 0))
        return Latent(name, info.plates, support.detach(), dims)

    def place(self, name: str) -> tuple[tuple[str, ...], list[int | None], list[int]]:
        """The latents in a site's scope, and the dimensions and sizes of its plates and of these."""
        if name in self._places:
            return self._places[name]
        site, info = self.sites[name], self.structure.sites[name]
        scope = self._scope(info, site["infer"].get("_dim_to_id", {}), site["fn"], site["value"])
        plates = [self.structure.plates[p] for p in info.plates]
        # A latent of one value has no dimension of its own: Pyro may give it to another.
        own = [self.dim_of[z] if self.size_of[z] > 1 else None for z in scope]
        sizes = [p.size for p in plates] + [self.size_of[z] for z in scope]
        self._places[name] = scope, [*(p.dim for p in plates), *own], sizes
        return self._places[name]

    def _kinds(self, forms: Mapping[str, Hashable]) -> dict[str, Hashable]:
        """What sites must share to be laid out together: their form, and their dimensions."""
        places = ((name, form, self.place(name)) for name, form in forms.items())
        return {name: (form, tuple(p[1]), tuple(p[2])) for name, form, p in places}

    @property
    def is_masked(self) -> bool:
        """Whether a latent is masked: what is counted there depends on each site below it."""
        return any(self.sites[name]["mask"] is not None for name in self.structure.latents)

    def pieces(
        self,
        names: Sequence[str],
        forms: Mapping[str, Hashable | None],
        leaves: Mapping[str, Tensor] | None,
        few: float,
    ) -> list[Factor | Batch]:
        """The factors of all sites, those of equal form together where that is plain.

        Args:
            names: The sites.
            forms: Theirs.
            leaves: The leaf tensor of each parameter; None where bindings are not read.
            few: How many sites of one form are laid out together at least.

        Raises:
            ModelError: If a tensor has a dimension that belongs to no plate and no latent.
        """
        out: list[Factor | Batch] = []
        alone = set(names)
        if len(names) >= few and not self.is_masked:
            alike = [n for n in names if forms[n] is not None and n not in self.structure.lines]
            for own in in_forms(self._kinds({n: forms[n] for n in alike})):
                if len(own) < few:
                    continue
                try:
                    found, rest = self.batches(own, leaves)
                except Stray:
                    continue  # named below
                out += found
                alone -= set(own) - set(rest)
        left = [name for name in names if name in alone]
        for name, given in zip(
            left, given_by_all([self.sites[n]["fn"] for n in left]), strict=True
        ):
            try:
                out.append(self._factor(name, leaves, given))
            except Stray as stray:
                self.problems.append(stray_finding(name, self.structure, *stray.args))
        if self.problems:
            raise_findings(self.problems)
        return out

    def batches(
        self, names: Sequence[str], leaves: Mapping[str, Tensor] | None
    ) -> tuple[list[Batch], list[str]]:
        """The factors of sites of one form and one place, laid out together.

        Args:
            names: The sites.
            leaves: The leaf tensor of each parameter; None where bindings are not read.

        Returns:
            Factors of equal bindings, and the sites that have to be laid out by themselves.
        """
        fns = bases_of([self.sites[n]["fn"] for n in names])
        family = REGISTRY.get(type(fns[0]))
        if family is None or self.structure.sites[names[0]].role is Role.POINT:
            return [], list(names)
        held = given_arguments_of_all(fns, family)
        moving = [a for a, t in held[0].items() if leaves is not None and t.requires_grad]
        expanded = any(0 in held[0][a].stride() for a in moving)
        graphs: dict[Hashable, list[int]] = {}
        saved: list[list[Tensor]] = []
        reached = iter(outlines([arguments[a] for arguments in held for a in moving]))
        for i, arguments in enumerate(held):
            found = [next(reached) for _ in moving]
            shown = [f for f in found if f is not None]
            key = tuple(f[0] for f in shown) if len(shown) == len(found) else None
            saved.append(
                [t for f in shown for t in f[1]]
                + [unexpanded(arguments[a]) if expanded else arguments[a] for a in moving]
            )
            graphs.setdefault(key, []).append(i)
        out, rest = [], graphs.pop(None, [])
        for left in graphs.values():
            for _ in range(_KINDS):
                if len(left) < FEW:
                    break
                alike = torch.ones(len(left), dtype=torch.bool)
                for tensors in zip(*(saved[i] for i in left), strict=True):
                    alike &= equal_to_first(tensors)
                kept = [i for i, same in zip(left, alike.tolist(), strict=True) if same]
                left = [i for i, same in zip(left, alike.tolist(), strict=True) if not same]
                if len(kept) < FEW:
                    rest += kept
                    continue
                members = [(names[i], held[i]) for i in kept]
                out.append(self._batch(members, moving, self.factor(names[kept[0]], leaves)))
            rest += left
        return out, [names[i] for i in rest]

    def _batch(
        self,
        members: Sequence[tuple[str, Mapping[str, Tensor]]],
        moving: Sequence[str],
        first: Factor,
    ) -> Batch:
        """The factors of sites with their arguments; those in ``moving`` are equal."""
        assert first.family is not None
        name, held = members[0]
        fn, dims = self.sites[name]["fn"], self.place(name)[1]
        reinterpreted, n = unwrap(fn)[1], len(members)
        arguments, bindings = {}, {}
        for argument, one in first.arguments.items():
            if argument in moving:
                arguments[argument] = one.unsqueeze(0).expand(n, *one.shape)
                bindings[argument] = repeated(first.bindings[argument], n)
                continue
            event = reinterpreted + first.family.argument_dims.get(argument, 0)
            recipe = recipe_for(held[argument], event, dims, reinterpreted)
            stack = compact_all([own[argument] for _, own in members], recipe).to(one.dtype)
            arguments[argument] = stack
            bindings[argument] = replace(first.bindings[argument], constant=stack.detach())
        values = [self.sites[member]["value"] for member, _ in members]
        value = compact_all(values, recipe_for(values[0], fn.event_dim, dims))
        return Batch(
            first,
            tuple(member for member, _ in members),
            tuple(first.info.plates + self.place(member)[0] for member, _ in members),
            arguments,
            bindings,
            value.to(first.value.dtype),
        )

    def factor(self, name: str, leaves: Mapping[str, Tensor] | None) -> Factor:
        """A site's factor; ``leaves`` are the parameters to which its arguments are bound."""
        return self._factor(name, leaves, given_by_all([self.sites[name]["fn"]])[0])

    def _factor(self, name: str, leaves: Mapping[str, Tensor] | None, given: Given) -> Factor:
        site, info = self.sites[name], self.structure.sites[name]
        fn, value = site["fn"], site["value"]
        scope, dims, sizes = self.place(name)
        base, reinterpreted, wrapping, family, traced = given
        is_masked = site["mask"] is not None or bool(wrapping)
        mask, elements = self._masks(site, dims) if is_masked else (None, None)
        if mask is not None and not info.observed and mask.shape[len(info.plates) :].numel() != 1:
            self.problems.append(
                Finding(
                    f"site '{name}'",
                    "its mask depends on a latent.",
                    "a latent is either there or not; only observations may be masked by latents",
                    ("mask the observed sites below it instead",),
                )
            )
        scale = site["scale"]
        if isinstance(scale, Tensor):
            scale = compact(scale, 0, dims) if scale.dim() else float(scale)
        if is_masked and site["is_observed"] and type(base).__name__ not in _POSSIBLE:
            value = without_masked_nonsense(fn, value, element_mask(fn, site["mask"]))
        if name.removesuffix("_observed") in self.structure.masked_pairs:
            value = value.clone()  # a posterior shows it when it is asked
        event_of = {} if family is None else family.argument_dims
        asked = [
            (self._read(t, event_of.get(a, 0)), reinterpreted + event_of.get(a, 0), reinterpreted)
            for a, t in traced.items()
        ]
        (compact_value, _), *placed = laid_out([(value, fn.event_dim, 0), *asked], dims)
        arguments: dict[str, Tensor] = {}
        bindings: dict[str, Binding] = {}
        raw: Tensor | None = None
        raw_params: tuple[str, ...] | None = ()
        value_binding: Binding | None = None
        if leaves is not None:
            if compact_value.requires_grad:
                raw_params = parameters_below(compact_value, leaves)
            if raw_params and info.observed and (family is not None or info.role is Role.POINT):
                layout = partial(compact, event_dim=fn.event_dim, dims=dims, like=value)
                value_binding = bind(value, leaves, layout=layout)
        if family is None:
            log_p = log_density_of_site(name, fn, value, info.role)
            mask_now = mask_tensor(site)
            if isinstance(mask_now, Tensor) and info.observed:
                log_p = torch.where(mask_now, log_p, 0.0)
            elif mask_now is False and info.observed:
                log_p = torch.zeros_like(log_p)
            raw = compact(log_p.detach() if self.detached else log_p, 0, dims)
            if leaves is not None:
                raw_params = parameters_below(raw, leaves)
        else:
            may_meet = info.role is Role.DATA and name not in self.structure.lines
            compact_value = _typed(compact_value, traced, family)
            for arg, (tensor, event, _), (laid, recipe) in zip(traced, asked, placed, strict=True):
                kept = laid
                if kept.dtype != compact_value.dtype and compact_value.is_floating_point():
                    kept = kept.to(compact_value.dtype)
                if arg == "loc" and name in self.structure.lines:
                    kept = kept.detach()
                    arguments[arg], bindings[arg] = kept, Binding("opaque", (), kept)
                    continue
                arguments[arg] = kept
                if leaves is None or self.bindings is None:
                    bindings[arg] = Binding("opaque", (), kept.detach())
                    continue
                bindings[arg] = self.bindings.bind(
                    tensor,
                    partial(compacted, recipe=recipe),
                    (event, tuple(dims), reinterpreted),
                    useful_for(family, arg, may_meet=may_meet),
                    plates=len(info.plates),
                    laid=laid,
                )
        return Factor(
            info if scope == info.scope else replace(info, scope=scope),
            info.plates + scope,
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

    def _read(self, tensor: Tensor, event_dim: int) -> Tensor:
        """A traced argument as it is read: without its graph or its copies, where nobody asks."""
        tensor = tensor.detach() if self.detached else tensor
        if tensor.numel() <= _LARGE:
            return tensor
        return once_along_rows(tensor, event_dim)

    @staticmethod
    def _edges(base: Any, leaves: Mapping[str, Tensor]) -> tuple[str, ...]:
        try:
            support = base.support
        except (NotImplementedError, AttributeError):
            return ()
        bounds = (getattr(support, end, None) for end in ("lower_bound", "upper_bound"))
        tensors = [b for b in bounds if isinstance(b, Tensor)]
        return tuple(dict.fromkeys(n for b in tensors for n in known_below(b, leaves)))

    @staticmethod
    def _hyperparameters(base: Any, leaves: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
        return tuple(
            (argument, name)
            for argument, tensor in spread_arguments(base).items()
            for name in known_below(tensor, leaves)
        )

    def _scope(
        self, info: SiteInfo, visible: Mapping[int, int], fn: Any, value: Tensor
    ) -> tuple[str, ...]:
        # Dimensions that the tags did not show (a value that left torch and came back).
        more = []
        for dim, ident in visible.items():
            latent = self.name_of.get(ident)
            if latent is None or latent in info.scope:
                continue
            own = dim - fn.event_dim
            in_value = value.dim() >= -own and value.shape[own] > 1
            if in_value or (len(fn.batch_shape) >= -dim and fn.batch_shape[dim] > 1):
                more.append(latent)
        if not more:
            return info.scope
        return tuple(sorted({*info.scope, *more}, key=self.order.__getitem__))

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
            elements = compact(elements, unwrap(site["fn"])[1], dims)
        return mask, elements


def _typed(value: Tensor, arguments: Mapping[str, Tensor], family: Family) -> Tensor:
    """Observed counts as numbers of the arguments' dtype; categories stay integers."""
    if family.name in ("Categorical", "Clamped"):
        return value
    dtypes = [t.dtype for t in arguments.values() if t.is_floating_point()]
    if not dtypes:
        return value
    dtype = max(dtypes, key=lambda d: torch.finfo(d).bits)
    if value.is_floating_point():
        dtype = torch.promote_types(dtype, value.dtype)
    return value if value.dtype == dtype else value.to(dtype)
