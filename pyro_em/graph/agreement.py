"""An enumerated run against a plain one: at the plain run's values both must say the same.

Every argument, value, mask and scale of the enumerated run is gathered at the values that the
latents had in the plain run. Where the two differ the model does something else with a value that
has all its alternatives at once, and what would be summed is another model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.graph.coupling import Sites, differs, parts_of

_LOOKED_AT = 256  # elements of a plate that are compared; fewer where plates cross


def disagreements(
    enumerated: Sites, plain: Sites, latents: Sequence[str], nesting: int
) -> list[tuple[str, str]]:
    """Sites, and what of them differs.

    Args:
        enumerated: The sites with a density as the enumerated run traced them.
        plain: The same sites of a plain run from the same random state.
        latents: The sites that are enumerated.
        nesting: Number of dimensions that belong to plates.
    """
    look = _Look(enumerated, plain, latents, nesting)
    found = []
    for name, site in enumerated.items():
        other = plain.get(name)
        if other is None:
            continue
        visible = look.visible(site)
        for (what, e, event_dim), (_, p, _) in zip(parts_of(site), parts_of(other), strict=False):
            if not look.same(e, _untagged(p), event_dim, visible):
                found.append((name, what))
                break
    return found


def differing(a: Sites, b: Sites, names: Sequence[str]) -> list[tuple[str, str]]:
    """Sites, and what of them differs between two plain runs."""
    found = []
    for name in names:
        for (what, x, event_dim), (_, y, _) in zip(
            parts_of(a[name]), parts_of(b[name]), strict=False
        ):
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

    def same(self, e: Tensor, p: Tensor, event_dim: int, visible: Mapping[int, str]) -> bool:
        """Whether an enumerated tensor, gathered, is the plain one."""
        event_dim = min(event_dim, e.dim(), p.dim())
        index: list[Tensor] = []
        for d in range(event_dim - e.dim(), 0):
            size = e.shape[d - event_dim]
            if size == 1:
                index.append(torch.zeros((), dtype=torch.long, device=e.device))
            elif d >= -self.nesting:
                index.append(self.elements(d, size).to(e.device))
            elif d in visible and size == self._size(visible[d]):
                index.append(self.index(visible[d]).to(e.device))
            else:
                return True  # a dimension that the layout has to judge
        part = e[tuple(index)] if index else e
        cut = self.cut(p, event_dim)
        try:
            part, cut = torch.broadcast_tensors(part.detach(), cut.detach())
        except RuntimeError:
            return False
        return differs(part, cut.to(part.dtype), event_dim) is None

    def elements(self, dim: int, size: int) -> Tensor:
        """The elements of a plate that are compared, along its dimension."""
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

    def _size(self, name: str) -> int:
        site = self.enumerated[name]
        return site["value"].shape[site["infer"]["_enumerate_dim"] - site["fn"].event_dim]

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
