"""The means of sites as runs with Gaussian latents at random values show them: C and b, attached.

With J = ∂loc/∂h, C_j = J (1 ⊗ e_j) for each coordinate j of a latent's event, and J (arange ⊗ a) /
J (1 ⊗ a) is the element of the latent's plates that a row reads; a random vector verifies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import unwrap
from pyro_em.errors import Finding
from pyro_em.families.registry import family_of, given_arguments
from pyro_em.graph.autograd import known_below
from pyro_em.graph.compact import compact
from pyro_em.graph.layout import FactorLayout
from pyro_em.graph.linearity import why_not_linear
from pyro_em.graph.lines import NotLinear, is_gaussian, is_matrix_of_rows
from pyro_em.graph.sparse_lines import (
    Forward,
    forward_of,
    is_close,
    narrowed,
    numbers_read,
    random_like,
)
from pyro_em.tracing.runs import Run
from pyro_em.tracing.sites import Role, mask_tensor, tensors_of

_FEW = 64  # elements of a latent of which one row may read several


@dataclass(frozen=True, eq=False)
class Place:
    """Where the cells of a site are in its tensors.

    Attributes:
        sizes: Of its plates.
        scope: Discrete latents that it depends on.
        dims: The dimension of each plate and latent, from the right.
        event: Dimensions of its event.
    """

    sizes: tuple[int, ...]
    scope: tuple[str, ...]
    dims: tuple[int | None, ...]
    event: int

    @classmethod
    def of(cls, name: str, layout: FactorLayout) -> Place:
        """That of a site in the layout of its run."""
        scope, dims, sizes = layout.place(name)
        plates = len(sizes) - len(scope)
        event = layout.sites[name]["fn"].event_dim
        return cls(tuple(sizes[:plates]), scope, tuple(dims), event)

    @staticmethod
    def loc(site: Mapping[str, Any]) -> Tensor:
        """The mean as the site holds it."""
        family = family_of(site["fn"])
        assert family is not None
        return given_arguments(unwrap(site["fn"])[0], family)["loc"]

    def compact(self, t: Tensor) -> Tensor:
        """# (*sizes or 1s, *scope, *event)"""
        return compact(t, self.event, self.dims)


def latents_read(
    name: str, site: Mapping[str, Any], values: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """The latents in the mean of a site; whatever else one reaches is refused."""
    latents = reaching(name, site, values)
    for finding in refusals(name, site, values, latents):
        raise NotLinear(finding)
    return latents


def reaching(name: str, site: Mapping[str, Any], values: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The latents on which the density of a site depends, in the order of their values."""
    parts = [t for t in tensors_of(site["fn"]) if t.requires_grad]
    parts += _outside(name, site, values)
    reached = {latent for t in parts for latent in known_below(t, values)}
    return tuple(n for n in values if n in reached)


def _outside(name: str, site: Mapping[str, Any], values: Mapping[str, Tensor]) -> list[Tensor]:
    """What a density depends on beside its distribution."""
    out = [t for t in (site["scale"], mask_tensor(site)) if isinstance(t, Tensor)]
    return [*out, site["value"]] if site["is_observed"] and name not in values else out


def refusals(
    name: str, site: Mapping[str, Any], values: Mapping[str, Tensor], latents: Sequence[str]
) -> Iterator[Finding]:
    """Why a site that latents reach otherwise than through its mean has no exact treatment.

    Args:
        name: Its name.
        site: As a run with the latents at attached values traced it.
        values: These.
        latents: Those that reach it (`reaching`).
    """
    fn, where = site["fn"], f"site '{name}'"
    if not latents:
        return
    kind = type(unwrap(fn)[0]).__name__
    if not is_gaussian(fn):
        what = f"{kind} of Gaussian '{latents[0]}' has no exact posterior."
        yield refusal(latents, where, what)
        return
    if is_matrix_of_rows(fn):
        what = "it is a MultivariateNormal under to_event: put its rows in a plate."
        yield refusal(latents, where, what)
        return
    family = family_of(fn)
    assert family is not None
    for argument, t in given_arguments(unwrap(fn)[0], family).items():
        found = () if argument == "loc" else known_below(t, values)
        if found:
            yield refusal(found, where, f"its {argument} depends on '{found[0]}'.")
    found = tuple(n for t in _outside(name, site, values) for n in known_below(t, values))
    if found:
        yield refusal(found, where, f"its value, mask or scale depends on '{found[0]}'.")


@dataclass(frozen=True, eq=False)
class Jacobian:
    """J = ∂loc/∂h of one site in one latent.

    Attributes:
        place: Where the site's cells are.
        loc: Its mean.
        leaf: The latent's value.
        forward: t ↦ J t.
        count: How many elements the latent has.
        q: How many coordinates an element has.
    """

    place: Place
    loc: Tensor
    leaf: Tensor
    forward: Forward
    count: int
    q: int

    @classmethod
    def of(cls, place: Place, loc: Tensor, leaf: Tensor, site: Mapping[str, Any]) -> Jacobian:
        """That of a site's mean in the value of a latent, whose own site is given."""
        event = leaf.dim() - site["fn"].event_dim
        forward = forward_of(loc, leaf, attached=True)
        count, q = leaf.shape[:event].numel(), leaf.shape[event:].numel()
        return cls(place, loc, leaf, forward, count, q)

    def along(self, elements: Tensor, j: int) -> Tensor:
        """J (elements ⊗ e_j). # (*sizes or 1s, *scope, *event)"""
        t = torch.zeros(self.count, self.q, dtype=self.leaf.dtype, device=self.leaf.device)
        t[:, j] = elements.to(t)
        return self.of_all(t)

    def of_all(self, t: Tensor) -> Tensor:
        """J t for t of all elements. # (elements, q) to (*sizes or 1s, *scope, *event)"""
        image = self.forward(t.reshape(self.leaf.shape))
        return compact(image, self.place.event, self.place.dims, like=self.loc)

    def coefficient_of_own(self, probe: Tensor, there: Tensor) -> Tensor | None:
        """The coefficients where each row reads the element of its own number through equal ones.

        Args:
            probe: Random values of all elements. # (elements, q)
            there: J of them. # (*sizes or 1s, *scope, *event)

        Returns:
            # (*1s, *scope, *event, q); None where it is not so
        """
        sizes, plates = self.place.sizes, len(self.place.sizes)
        own = there.shape[plates:]
        if there.shape[:plates] != sizes or math.prod(sizes) != self.count or self.count < self.q:
            return None
        t = torch.zeros_like(probe)
        t.diagonal().fill_(1)
        image = self.of_all(t).reshape(self.count, *own)[: self.q].movedim(0, -1)
        matrix = image.detach().reshape(-1, self.q)
        predicted = (probe.to(matrix) @ matrix.mT).reshape(there.shape)
        if not bool((matrix != 0).any()) or not is_close(predicted, there):
            return None
        return image.reshape(*(1,) * plates, *own, self.q)

    def coefficient(self, only: int | None = None) -> Tensor:
        """The coefficients of one element, or of that which each row reads. # (…, q)"""
        elements = torch.ones(self.count, device=self.leaf.device)
        if only is not None:
            elements = torch.zeros_like(elements)
            elements[only] = 1
        return torch.stack([self.along(elements, j) for j in range(self.q)], -1)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """How one latent enters a mean, attached to all that the mean depends on.

    Attributes:
        elements: For each row the flat number of the latent's element, −1 for none. # (rows,)
        values: C. # (*sizes or 1s, *scope, *event, q)
        only: The one element that it is about, where rows read several.
    """

    elements: Tensor
    values: Tensor
    only: int | None = None


def coefficients_of(
    place: Place, loc: Tensor, leaf: Tensor, latent: str, site: Mapping[str, Any]
) -> list[Coefficients]:
    """What a mean reads of one latent: one element in each row, or few elements one by one.

    Args:
        place: Where the cells of the site are.
        loc: Its mean.
        leaf: The latent's value.
        latent: Its name.
        site: As the run traced the latent.

    Raises:
        NotLinear: If rows read several elements of many.
    """
    jacobian = Jacobian.of(place, loc, leaf, site)
    count, q = jacobian.count, jacobian.q
    plates = len(place.sizes)
    probe = random_like(leaf).reshape(count, q)
    there = jacobian.of_all(probe).detach()
    coefficient = jacobian.coefficient_of_own(probe, there)
    if coefficient is not None:
        return [Coefficients(torch.arange(count, device=leaf.device), coefficient)]
    coefficient = jacobian.coefficient()
    # All coordinates of an element together, with a weight for each.
    along = random_like(leaf.new_zeros(q))

    def weighed(elements: Tensor) -> Tensor:
        return jacobian.of_all(elements.unsqueeze(-1).to(along) * along).detach()

    slope = weighed(torch.ones(count, device=leaf.device))
    numbers = numbers_read(weighed, slope, torch.Size([count]), count)
    element = numbers.flatten(plates).amax(-1) if numbers.dim() > plates else numbers
    shaped = element.reshape((*element.shape, *(1,) * (numbers.dim() - plates)))
    alike = bool(((numbers == shaped) | (numbers < 0)).all())
    rows = probe[element.clamp(min=0)].reshape(*element.shape, *(1,) * (numbers.dim() - plates), q)
    if alike and is_close((coefficient.detach() * rows).sum(-1), there):
        return [Coefficients(element.expand(place.sizes).reshape(-1).clone(), coefficient)]
    if count > _FEW:
        what = f"a row reads several elements of '{latent}', which has {count:,}."
        raise NotLinear(refusal((latent,), "model", what))
    out = []
    for i in range(count):
        part = jacobian.coefficient(i)
        used = (part.detach() != 0).flatten(plates).any(-1)
        if bool(used.any()):
            element = torch.where(used, i, -1).expand(place.sizes).reshape(-1).clone()
            out.append(Coefficients(element, part, i))
    return out


def refusal(latents: Sequence[str], where: str, what: str) -> Finding:
    """Why latents have no exact posterior as Gaussians."""
    return Finding(
        where,
        what,
        "a Gaussian latent is integrated exactly where all that reads it is a Normal or "
        "MultivariateNormal whose loc is linear in it",
        (
            "give a guide: ExactPosteriorEM(model, AutoNormal)",
            "take a point estimate under its prior: ExactPosteriorEM(model, guide='map')",
        ),
        latents=tuple(latents),
    )


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean of a site, and what it is made of, attached.

    Attributes:
        site: The site.
        place: Where its cells are.
        loc: Its mean in a run with the latents at random values.
        offset: The same with the latents at zero. # (*sizes or 1s, *scope, *event)
        reads: What it reads of latents.
    """

    site: str
    place: Place
    loc: Tensor
    offset: Tensor
    reads: tuple[tuple[str, Coefficients], ...]

    def narrowed(self) -> Mean:
        """The same with one slice of each plate along which numbers are equal."""
        plates = len(self.place.sizes)
        reads = tuple(
            (latent, replace(c, values=narrowed(c.values, plates))) for latent, c in self.reads
        )
        return replace(self, offset=narrowed(self.offset, plates), reads=reads)

    def at(self, values: Mapping[str, Tensor]) -> Tensor:
        """The mean at values of the latents, from its parts. # (*sizes or 1s, *scope, *event)"""
        sizes, out = self.place.sizes, self.offset
        for latent, c in self.reads:
            q = c.values.shape[-1]
            rows = values[latent].reshape(-1, q)[c.elements.clamp(min=0)]
            rows = rows * (c.elements >= 0).unsqueeze(-1)
            inner = c.values.dim() - 1 - len(sizes)
            out = out + (c.values * rows.reshape(*sizes, *(1,) * inner, q)).sum(-1)
        return out


def means_of(
    runs: tuple[Run, Run], values: Mapping[str, Tensor], layout: FactorLayout
) -> list[Mean]:
    """The means of all Gaussian latents, and of the sites that read some.

    Args:
        runs: With the latents at random values, and at zero.
        values: The random values.
        layout: Of the first run.

    Raises:
        NotLinear: If a mean is not linear, or something else of a site reads a latent.
    """
    run, at_zero = runs
    out = []
    for name, info in layout.structure.sites.items():
        site = run.sites[name]
        read = latents_read(name, site, values)
        if info.role is not Role.GAUSSIAN and not read:
            continue
        place = Place.of(name, layout)
        loc = place.loc(site)
        problem = why_not_linear(loc, values)
        if problem:
            raise NotLinear(refusal(read, f"site '{name}'", f"its loc: {problem}."))
        reads = tuple(
            (latent, c)
            for latent in read
            for c in coefficients_of(place, loc, values[latent], latent, run.sites[latent])
        )
        offset = place.compact(place.loc(at_zero.sites[name]))
        out.append(Mean(name, place, loc, offset, reads))
    return out
