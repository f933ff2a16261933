"""How one latent enters the mean of a site: J = ∂loc/∂h, and the coefficients that it shows.

With J, C_j = J (1 ⊗ e_j) for each coordinate j of a latent's event, and J (arange ⊗ a) / J (1 ⊗ a) is
the element of the latent's plates that a row reads; a random vector verifies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import unwrap
from pyro_em.errors import Finding
from pyro_em.families.registry import family_of, given_arguments
from pyro_em.graph.bindings.sparse_lines import (
    Forward,
    forward_of,
    is_close,
    numbers_read,
    random_like,
)
from pyro_em.graph.compact import compact
from pyro_em.graph.gaussian_lines.lines import NotLinear
from pyro_em.graph.layout import FactorLayout

_FEW = 64  # elements of a latent of which one row may read several


@dataclass(frozen=True, eq=False)
class SitePlace:
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
    def of(cls, name: str, layout: FactorLayout) -> SitePlace:
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


@dataclass(frozen=True, eq=False)
class SiteJacobian:
    """J = ∂loc/∂h of one site in one latent.

    Attributes:
        place: Where the site's cells are.
        loc: Its mean.
        leaf: The latent's value.
        forward: t ↦ J t.
        count: How many elements the latent has.
        q: How many coordinates an element has.
    """

    place: SitePlace
    loc: Tensor
    leaf: Tensor
    forward: Forward
    count: int
    q: int

    @classmethod
    def of(
        cls, place: SitePlace, loc: Tensor, leaf: Tensor, site: Mapping[str, Any]
    ) -> SiteJacobian:
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
    place: SitePlace, loc: Tensor, leaf: Tensor, latent: str, site: Mapping[str, Any]
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
    jacobian = SiteJacobian.of(place, loc, leaf, site)
    found = one_each(jacobian)
    if found is not None:
        return [found]
    count, plates = jacobian.count, len(place.sizes)
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


def one_each(jacobian: SiteJacobian) -> Coefficients | None:
    """What a mean reads of a latent where that is one element in each row; None where it is not."""
    place, leaf = jacobian.place, jacobian.leaf
    count, q = jacobian.count, jacobian.q
    plates = len(place.sizes)
    probe = random_like(leaf).reshape(count, q)
    there = jacobian.of_all(probe).detach()
    coefficient = jacobian.coefficient_of_own(probe, there)
    if coefficient is not None:
        return Coefficients(torch.arange(count, device=leaf.device), coefficient)
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
        return Coefficients(element.expand(place.sizes).reshape(-1).clone(), coefficient)
    return None


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
