"""An enumerated run against a plain one: at the plain run's values both must say the same.

Every argument, value, mask and scale of the enumerated run is gathered at the values that the
latents had in the plain run. Where the two differ the model does something else with a value that
has all its alternatives at once, and what would be summed is another model.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import bases_of, unwrap
from pyro_em.errors import Finding
from pyro_em.families.registry import family_of, given_arguments_of_all
from pyro_em.graph.coupling import Sites, counted_cells, differs, parts_of_both
from pyro_em.graph.findings.folded import Folded
from pyro_em.graph.forms import FEW, forms_of, in_forms, in_parts, unrepeated
from pyro_em.tracing.sites import tensors_of

_LOOKED_AT = 256  # elements of a plate that are compared; fewer where plates cross

_AT_ONCE = 128  # sites that are compared together: each is held twice meanwhile


def disagreements(
    enumerated: Sites,
    plain: Sites,
    latents: Sequence[str],
    nesting: int,
    forms: Mapping[str, Hashable | None],
    parts: Mapping[int, tuple[int, Tensor]] | None = None,
) -> list[tuple[str, str]]:
    """Sites, and what of them differs.

    Args:
        enumerated: The sites with a density as the enumerated run traced them.
        plain: The same sites of a plain run from the same random state.
        latents: The sites that are enumerated.
        nesting: Number of dimensions that belong to plates.
        forms: Of the enumerated sites.
        parts: For each dimension of which the plain run has a part: its size, and which elements.
    """
    look = _Look(enumerated, plain, latents, nesting)
    look.parts = parts or {}
    others = plain.forms if isinstance(plain, Folded) else forms_of(_of_both(plain, enumerated))
    kinds = {
        n: None if form is None or others.get(n) is None else (form, others[n])
        for n, form in forms.items()
    }
    is_alike = any(kind is not None for kind in kinds.values())
    agreeing = _Together(look, kinds).agreeing() if is_alike else frozenset[str]()
    found = []
    for name, site in enumerated.items():
        other = None if name in agreeing else plain.get(name)
        if other is None:
            continue
        visible = look.visible(site)
        for what, e, p, event_dim in parts_of_both(site, other):
            if not look.same(e, _untagged(p), event_dim, visible, other):
                found.append((name, what))
                break
    return found


def _of_both(sites: Sites, others: Sites) -> dict[str, Mapping[str, Any]]:
    """The sites that others have, too."""
    return {n: sites[n] for n in others if n in sites}


def differing(a: Sites, b: Sites, names: Sequence[str]) -> list[tuple[str, str]]:
    """Sites, and what of them differs between two plain runs."""
    found = []
    for name in names:
        for what, x, y, event_dim in parts_of_both(a[name], b[name]):
            if x.shape != y.shape or differs(x, y, event_dim) is not None:
                found.append((name, what))
                break
    return found


class _Look:
    """Gathers tensors of an enumerated run at the values of a plain one."""

    def __init__(
        self, enumerated: Sites, plain: Sites, latents: Sequence[str], nesting: int
    ) -> None:
        self.enumerated, self.plain, self.nesting = enumerated, plain, nesting
        self.most = _LOOKED_AT if nesting < 2 else 48
        self.parts: Mapping[int, tuple[int, Tensor]] = {}
        self.names: dict[int, str] = {}
        for name in latents:
            infer = enumerated[name]["infer"]
            self.names[infer["_dim_to_id"][infer["_enumerate_dim"]]] = name
        self._indices: dict[str, Tensor] = {}
        self._chosen: dict[int, Tensor] = {}

    def visible(self, site: Mapping[str, Any]) -> dict[int, str]:
        """Per dimension the latent that has it at a site."""
        known = site["infer"].get("_dim_to_id", {})
        return {dim: self.names[i] for dim, i in known.items() if i in self.names}

    def same(
        self,
        e: Tensor,
        p: Tensor,
        event_dim: int,
        visible: Mapping[int, str],
        site: Mapping[str, Any],
    ) -> bool:
        """Whether a tensor of a site, enumerated and gathered, is the plain one where that counts."""
        if e is p:
            return True  # no mask, no scale
        event_dim = min(event_dim, e.dim(), p.dim())
        index: list[Tensor] = []
        for d in range(event_dim - e.dim(), 0):
            size = e.shape[d - event_dim]
            if size == 1:
                index.append(torch.zeros((), dtype=torch.long, device=e.device))
            elif d >= -self.nesting:
                index.append(self.elements(d, size).to(e.device))
            elif d in visible and size == self.size(visible[d]):
                index.append(self.index(visible[d]).to(e.device))
            else:
                return True  # a dimension that the layout has to judge
        part = e[tuple(index)] if index else e
        cut = self.cut(p, event_dim)
        try:
            part, cut = torch.broadcast_tensors(part.detach(), cut.detach())
        except RuntimeError:
            return False
        off = differs(part, cut.to(part.dtype), event_dim)
        counts = None if off is None else counted_cells(site)
        if off is None or counts is None:
            return off is None
        return not bool((off & self.cut(_untagged(counts), 0).to(off.device)).any())

    def elements(self, dim: int, size: int) -> Tensor:
        """The elements of a plate that are compared, along its dimension."""
        if dim in self.parts:
            full, part = self.parts[dim]
            chosen = part if size == full else torch.arange(size)
            return chosen.reshape(-1, *(1,) * (-dim - 1))
        if size not in self._chosen:
            if size <= self.most:
                chosen = torch.arange(size)
            else:
                ends = torch.arange(8)
                inner = torch.linspace(8, size - 9, self.most - 16).long()
                chosen = torch.cat([ends, inner, size - 8 + ends])
            self._chosen[size] = chosen
        return self._chosen[size].reshape(-1, *(1,) * (-dim - 1))

    def cut(self, p: Tensor, event_dim: int) -> Tensor:
        """A plain tensor at the elements that are compared."""
        batch = p.dim() - event_dim
        if all(n == 1 or n <= self.most for n in p.shape[:batch]):
            return p
        index = [
            self.elements(d, p.shape[d - event_dim]).to(p.device)
            if p.shape[d - event_dim] > 1
            else torch.zeros((), dtype=torch.long, device=p.device)
            for d in range(-batch, 0)
        ]
        return p[tuple(index)]

    def size(self, name: str) -> int:
        """The number of values of a latent."""
        site = self.enumerated[name]
        return site["value"].shape[site["infer"]["_enumerate_dim"] - site["fn"].event_dim]

    def know(self, indices: Mapping[str, Tensor]) -> None:
        """Take note of what `index` would find."""
        self._indices.update(indices)

    def index(self, name: str) -> Tensor:
        """The place of a latent's plain values in its support, at the elements compared."""
        if name not in self._indices:
            site = self.enumerated[name]
            event_dim = site["fn"].event_dim
            support = site["value"]
            batch = support.dim() - event_dim
            for d in reversed(range(batch)):
                if d != batch + site["infer"]["_enumerate_dim"]:
                    support = support.select(d, 0)
            value = self.cut(_untagged(self.plain[name]["value"]), event_dim)
            ones = (1,) * (value.dim() - event_dim)
            support = support.reshape(len(support), *ones, *support.shape[1:])
            hit = (support == value).flatten(1 + len(ones)) if event_dim else support == value
            if event_dim:
                hit = hit.all(-1)
            self._indices[name] = hit.to(torch.uint8).argmax(0)
        return self._indices[name]


class _Together:
    """Sites of equal form that surely agree, found for all of a form at once.

    It is as strict as the look at one site: what is not seen to agree here is looked at again.
    """

    def __init__(self, look: _Look, kinds: Mapping[str, Hashable | None]) -> None:
        self.look, self.kinds = look, kinds
        latents = {n: kinds.get(n) for n in look.names.values()}
        for names in in_forms({n: self._with_dim(n, k) for n, k in latents.items()}):
            if len(names) >= FEW:
                self._find_indices(names)

    def _with_dim(self, name: str, kind: Hashable | None) -> Hashable | None:
        return None if kind is None else (kind, self._site(name)["infer"]["_enumerate_dim"])

    def _site(self, name: str) -> Mapping[str, Any]:
        return self.look.enumerated[name]

    def agreeing(self) -> set[str]:
        """Names of sites that agree."""
        found: set[str] = set()
        for names in in_forms({n: self._with_latents(n, k) for n, k in self.kinds.items()}):
            if len(names) < FEW:
                continue
            site = self._site(names[0])
            held = [site["value"].numel(), *(t.numel() for t in tensors_of(site["fn"]))]
            for part in in_parts(len(names), max(held), _AT_ONCE):
                found.update(self._agreeing(names[part]))
        return found

    def _with_latents(self, name: str, kind: Hashable | None) -> Hashable | None:
        if kind is None:
            return None
        seen = self.look.visible(self._site(name))
        return kind, tuple(sorted((dim, self.look.size(z)) for dim, z in seen.items()))

    def _agreeing(self, names: Sequence[str]) -> list[str]:
        sides = [_some(side, names) for side in (self.look.enumerated, self.look.plain)]
        first = self._site(names[0])["fn"]
        reinterpreted, family = unwrap(first)[1], family_of(first)
        if family is None:
            return []
        fns = [bases_of([site["fn"] for site in side]) for side in sides]
        held = [given_arguments_of_all(of_side, family) for of_side in fns]
        same = torch.ones(len(names), dtype=torch.bool)
        visible = [self.look.visible(self._site(n)) for n in names]
        for name in held[0][0]:
            event_dim = reinterpreted + family.argument_dims.get(name, 0)
            pairs = [(e[name], _untagged(p[name])) for e, p in zip(*held, strict=True)]
            same &= self._same(pairs, event_dim, visible)
        if self._site(names[0])["is_observed"]:
            event_dim = self._site(names[0])["fn"].event_dim
            values = [(e["value"], _untagged(p["value"])) for e, p in zip(*sides, strict=True)]
            same &= self._same(values, event_dim, visible)
        return [n for n, agrees in zip(names, same.tolist(), strict=True) if agrees]

    def _same(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        event_dim: int,
        visible: Sequence[Mapping[int, str]],
    ) -> Tensor:
        """Which enumerated tensors, gathered, are surely the plain ones."""
        enumerated = unrepeated([e for e, _ in pairs])
        plain = unrepeated([p for _, p in pairs])
        nothing = torch.zeros(len(pairs), dtype=torch.bool)
        event_dim = min(event_dim, enumerated[0].dim(), plain[0].dim())
        shape = enumerated[0].shape[: enumerated[0].dim() - event_dim]
        lead = plain[0].dim() - event_dim
        places: list[list[Tensor]] = []
        for d in range(-len(shape), 0):
            size = shape[d]
            if size == 1:
                one = torch.zeros((), dtype=torch.long)
                places.append([one])
            elif d >= -self.look.nesting:
                if size > self.look.most:
                    return nothing
                places.append([self.look.elements(d, size)])
            elif d in visible[0] and size == self.look.size(visible[0][d]):
                places.append([self.look.index(v[d]) for v in visible])
            else:
                return nothing
        if any(n > self.look.most for n in plain[0].shape[:lead]):
            return nothing
        rank = max([lead, *(p[0].dim() for p in places)])
        device = enumerated[0].device
        n = len(pairs)
        index = [torch.arange(n).reshape(n, *(1,) * rank)]
        for place in places:
            one = torch.stack(place)
            index.append(one.reshape(len(one), *(1,) * (rank + 1 - one.dim()), *one.shape[1:]))
        part = torch.stack(enumerated).detach()[tuple(i.to(device) for i in index)]
        other = torch.stack(plain).detach()
        other = other.reshape(n, *(1,) * (rank - lead), *other.shape[1:])
        try:
            part, other = torch.broadcast_tensors(part, other.to(part.dtype))
        except RuntimeError:
            return nothing
        return (
            _close(part, other).flatten(1).all(1).cpu() if part.dim() > 1 else _close(part, other)
        )

    def _find_indices(self, names: Sequence[str]) -> None:
        """The places of plain values in their supports, as `_Look.index` finds them one by one."""
        site = self._site(names[0])
        event_dim, at = site["fn"].event_dim, site["infer"]["_enumerate_dim"]
        plain = [_untagged(value) for value in _values(self.look.plain, names)]
        lead = plain[0].dim() - event_dim
        if any(n > self.look.most for n in plain[0].shape[:lead]):
            return
        support = torch.stack([self._site(n)["value"] for n in names])
        batch = support.dim() - 1 - event_dim
        for dim in reversed(range(batch)):
            if dim != batch + at:
                support = support.select(dim + 1, 0)
        n, k = support.shape[:2]
        support = support.reshape(n, k, *(1,) * lead, *support.shape[2:])
        hit = support == torch.stack(plain).unsqueeze(1)
        if event_dim:
            hit = hit.flatten(2 + lead).all(-1)
        found = hit.to(torch.uint8).argmax(1)
        self.look.know(dict(zip(names, found.unbind(0), strict=True)))


def _close(a: Tensor, b: Tensor) -> Tensor:
    if not a.is_floating_point():
        return a == b
    tolerance = (64 * torch.finfo(a.dtype).eps) ** 0.75
    return torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _some(sites: Sites, names: Sequence[str]) -> list[Mapping[str, Any]]:
    """Some sites, in the order of their names."""
    return sites.some(names) if isinstance(sites, Folded) else [sites[n] for n in names]


def _values(sites: Sites, names: Sequence[str]) -> list[Tensor]:
    """The values of some sites."""
    return (
        sites.values_of(names) if isinstance(sites, Folded) else [sites[n]["value"] for n in names]
    )


def _untagged(value: Any) -> Any:
    return getattr(value, "_t", value)


def other_model(name: str, what: str, scope: Sequence[str]) -> Finding:
    """The finding for a site that differs when its latents are enumerated.

    Args:
        name: The site.
        what: What of it differs.
        scope: The latents that reach it.
    """
    latents = ", ".join(f"'{z}'" for z in scope[:4]) or "a latent"
    return Finding(
        f"site '{name}'",
        f"with {latents} enumerated, its {what} is not what the model computes for the same values.",
        "an enumerated value has extra dimensions on the left and one element for its whole plate: "
        "what reads its shape, or sums, sorts or compares its elements, does something else, and "
        "the evidence would be that of another model",
        (
            f"use {latents} element by element: index with it, or compute with it, and reduce "
            "only dimensions that belong to one observation",
            f"write the plate of {latents} as a loop: for t in pyro.markov(range(N)): ...",
            f"give a guide that draws {latents}: ExactPosteriorEM(model, guide)",
        ),
        latents=tuple(scope),
    )
