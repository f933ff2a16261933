"""Reading how Gaussian latents enter means, from runs of the model.

The model runs with its latents at random values. Their Jacobian C is read off autograd with few
vectors. If each row reads an element of its own through the same C, then J (e_j in row j) has C_j in
row j. Otherwise C_j = J (1 ⊗ e_j) for each coordinate j of a latent's event, and
J (arange ⊗ a) / J (1 ⊗ a) is the element of the latent's plates that a row reads. A random vector
verifies either. C and b are differentiable in the parameters, and are bound to them where no plate
changes them, at parameters moved at random, so that nothing vanishes by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import unwrap
from pyro_em.errors import Finding, ModelError
from pyro_em.families.registry import family_of, given_arguments
from pyro_em.graph.autograd import known_below
from pyro_em.graph.compact import compact
from pyro_em.graph.enumerated import run_enumerated
from pyro_em.graph.layout import FactorLayout
from pyro_em.graph.linearity import Breaks, why_not_linear
from pyro_em.graph.lines import Line, NotLinear, Read, is_gaussian, is_matrix_of_rows, means_at
from pyro_em.graph.signatures import Recurring
from pyro_em.graph.sparse_lines import (
    Forward,
    bind_line,
    forward_of,
    is_close,
    is_rounding,
    numbers_read,
    random_like,
)
from pyro_em.graph.structure import Structure
from pyro_em.tracing.given import GivenGaussians
from pyro_em.tracing.parameters import at_moved, values_of
from pyro_em.tracing.runs import Run
from pyro_em.tracing.sites import Role, mask_tensor, tensors_of

_CELLS = 2**22  # numbers that are compared at once
_FEW = 64  # elements of a latent of which one row may read several


def random_values(model: GivenGaussians, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Random values of all latents of a model; those of one seed differ by their scale alone."""
    return {
        name: scale * random_like(like, seed + i)
        for i, (name, like) in enumerate(model.values.items())
    }


def read_lines(
    model: GivenGaussians,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    *,
    bound: bool = True,
) -> dict[str, Line]:
    """The mean of every site that is a Gaussian latent, or reads one.

    Bindings are found at parameters that are moved at random, and put back.

    Args:
        model: The model with its Gaussian latents given.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found of it.
        bound: Whether bindings are of use, because an M-step follows.

    Raises:
        NotLinear: If a latent has a child that is not linear in it and Gaussian.
    """
    values = {n: v.requires_grad_() for n, v in random_values(model, 31).items()}
    with at_moved(structure.parameters, seed=31):
        try:
            with Breaks(values) as breaks:
                run = run_enumerated(model.at(values), args, kwargs, structure, limit=None)
        except ModelError as error:
            what = "it does not run at other values of its latents."
            raise NotLinear(refusal(tuple(values), "model", what)) from error
        for latent, how in breaks.found.items():
            what = f"it changes with '{latent}' outside autograd ({how})."
            raise NotLinear(refusal((latent,), "model", what))
        at_zero = run_enumerated(model, args, kwargs, structure, limit=None)
        # Modules read their own tensors, which must not be written before all has been read.
        return _lines_of(run, at_zero, values, structure, bound)


def _lines_of(
    run: Run, at_zero: Run, values: Mapping[str, Tensor], structure: Structure, bound: bool
) -> dict[str, Line]:
    """The lines that two runs show.

    Args:
        run: With the latents at random values.
        at_zero: With the latents at zero.
        values: The random values.
        structure: What `examine` found of the model.
        bound: Whether bindings are of use.
    """
    leaves = {n: p.leaf for n, p in run.parameters.items()}
    leaves_at_zero = {n: p.leaf for n, p in at_zero.parameters.items()}
    layout = FactorLayout(run.sites, structure.as_run, Recurring(leaves))
    out = {}
    for name, info in structure.as_run.sites.items():
        site = run.sites[name]
        read = latents_read(name, site, values)
        if info.role is not Role.GAUSSIAN and not read:
            continue
        place = Place.of(name, layout)
        loc = place.loc(site)
        problem = why_not_linear(loc, values)
        if problem:
            raise NotLinear(refusal(read, f"site '{name}'", f"its loc: {problem}."))
        reads = [
            Read(
                latent,
                c.elements,
                bind_line(c.values, leaves, len(place.sizes), bound=bound),
                c.only,
            )
            for latent in read
            for c in coefficients_of(place, loc, values[latent], latent, run.sites[latent])
        ]
        offset = place.compact(place.loc(at_zero.sites[name]))
        own = bind_line(offset, leaves_at_zero, len(place.sizes), bound=bound)
        out[name] = Line(name, place.sizes, place.scope, place.event, own, tuple(reads))
    unseen = hidden(out, (run, at_zero), values, values_of(run.parameters), layout)
    if unseen is not None:
        raise NotLinear(unseen)
    return out


def hidden(
    lines: Mapping[str, Line],
    runs: tuple[Run, Run],
    values: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    layout: FactorLayout,
) -> Finding | None:
    """What changes with the latents although autograd does not show it; None if nothing does.

    Args:
        lines: What autograd shows.
        runs: One with the latents at random values, and one with the latents at zero.
        values: The random values.
        parameters: Constrained values in both runs.
        layout: Of the first run.
    """
    for name in layout.structure.sites:
        here, there = (run.sites[name] for run in runs)
        line = lines.get(name)
        own = (line is not None, name not in values)
        fixed = _numbers_of(here, *own), _numbers_of(there, *own)
        alike = len(fixed[0]) == len(fixed[1]) and all(map(_is_equal, *fixed))
        if alike and line is not None:
            alike = _is_as_predicted(line.as_read(), layout, parameters, values)
        if not alike:
            what = "it changes with Gaussian latents in a way that autograd does not show."
            return refusal(tuple(values), f"site '{name}'", what)
    return None


def _numbers_of(site: Mapping[str, Any], has_line: bool, with_value: bool) -> list[Tensor]:
    """The numbers in the density of a site; without its loc where that reads latents."""
    fn = site["fn"]
    family = family_of(fn)
    if has_line and family is not None:
        arguments = given_arguments(unwrap(fn)[0], family)
        out = [t for a, t in arguments.items() if a != "loc"]
    else:
        out = tensors_of(fn)
    value = site["value"] if site["is_observed"] and with_value else None
    rest = (value, site["scale"], mask_tensor(site))
    return [t for t in (*out, *rest) if isinstance(t, Tensor)]


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def parts_at(
    lines: Mapping[str, Line],
    model: GivenGaussians,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    parameters: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """What means are made of where no binding gives it, read from runs of the model.

    Args:
        lines: How the latents enter each site.
        model: The model with its Gaussian latents given.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found of it.
        parameters: Constrained values at which to run, possibly attached; the current ones if None.

    Returns:
        Per site the parts that are not static, by their names in `Line.parts`.
    """
    if all(line.is_static for line in lines.values()):
        return {}
    values = {n: v.requires_grad_() for n, v in random_values(model, 31).items()}
    how: dict[str, Any] = {"limit": None, "values": parameters}
    run = run_enumerated(model.at(values), args, kwargs, structure, **how)
    at_zero = run_enumerated(model, args, kwargs, structure, **how)
    layout = FactorLayout(run.sites, structure.as_run, Recurring({}))
    out: dict[str, dict[str, Tensor]] = {}
    for name, line in lines.items():
        place = Place.of(name, layout)
        loc = place.loc(run.sites[name])
        for read, (part, binding) in zip((None, *line.reads), line.parts.items(), strict=True):
            if binding.is_static:
                continue
            if read is None:
                found = place.compact(place.loc(at_zero.sites[name]))
            else:
                along = Jacobian.of(place, loc, values[read.latent], run.sites[read.latent])
                found = along.coefficient(read.only)
            shape = binding.constant.shape[1:]
            for d, size in enumerate(shape[: len(place.sizes)]):
                found = found.narrow(d, 0, 1) if size == 1 else found
            out.setdefault(name, {})[part] = found.unsqueeze(0)
    return out


def differing_lines(
    lines: Mapping[str, Line],
    model: GivenGaussians,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    parameters: Mapping[str, Tensor],
    at: Mapping[str, Tensor] | None = None,
    *,
    once: bool = False,
) -> list[str]:
    """Sites whose mean, in runs at other values of the latents, is not what the lines predict.

    Args:
        lines: How the latents enter each site.
        model: The model with its Gaussian latents given.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found of it.
        parameters: Constrained values at which to predict.
        at: What to hand to the runs; the current parameters where None.
        once: Whether one run is enough, because the program did the same when others were made.
    """
    off: dict[str, None] = {}
    # Thresholds are passed by signs, and by values beyond most of them.
    some, others = random_values(model, 31, -1.0), {} if once else random_values(model, 41, 1e4)
    opposite = {name: -value for name, value in others.items()}
    for values in (some,) if once else (some, others, opposite):
        with torch.no_grad():
            run = run_enumerated(model.at(values), args, kwargs, structure, limit=None, values=at)
            layout = FactorLayout(run.sites, structure.as_run, Recurring({}))
            for name, line in lines.items():
                if line.is_static and not _is_as_predicted(line, layout, parameters, values):
                    off[name] = None
    return list(off)


def _is_as_predicted(
    line: Line,
    layout: FactorLayout,
    parameters: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> bool:
    """Whether a run has the mean of a site that its line gives at parameters and latents' values."""
    place = Place.of(line.site, layout)
    actual = place.compact(place.loc(layout.sites[line.site])).detach().unsqueeze(0)
    if not actual.numel():
        return True
    for part, expected in means_at(line, parameters, values, _CELLS):
        there = actual[:, part] if line.sizes and actual.shape[1] > 1 else actual
        if not is_rounding(there - expected.to(actual.dtype), actual):
            return False
    return True


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
