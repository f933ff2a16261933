"""How conjugate latents enter the sites below them, from runs of the model.

The model runs with its latents at random values. An argument that reads one is its element to some
power times a known positive factor (`pyro_em.graph.powers`), a probability or one minus it
(`pyro_em.graph.shares`), or a whole simplex in any order; its Jacobian tells which element. A run at
other values must show what follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import unwrap
from pyro_em.errors import Finding, ModelError
from pyro_em.families.conjugate_kernels import KERNELS, PriorKernel
from pyro_em.families.conjugate_pairs import Pair, children_of, pair_of
from pyro_em.families.registry import family_of, given_arguments
from pyro_em.graph.autograd import bind, known_below
from pyro_em.graph.compact import compact
from pyro_em.graph.enumerated import run_enumerated
from pyro_em.graph.layout import FactorLayout
from pyro_em.graph.linearity import Breaks
from pyro_em.graph.powers import power_of
from pyro_em.graph.shares import share_of
from pyro_em.graph.signatures import Recurring
from pyro_em.graph.sparse_lines import forward_of, numbers_read, random_like
from pyro_em.graph.structure import Structure
from pyro_em.tracing.given import GivenConjugates
from pyro_em.tracing.parameters import at_moved
from pyro_em.tracing.runs import Run
from pyro_em.tracing.sites import mask_tensor, tensors_of

_MANY = 1 << 16  # numbers that are compared at a time


@dataclass(frozen=True, eq=False)
class ConjugateRead:
    """One argument of a site that reads a conjugate latent.

    Attributes:
        site: The site.
        latent: The latent.
        pair: What the site adds to the latent's kernel.
        power: Of the latent in the argument.
        elements: For each cell of the argument the flat number of the latent's element, −1 where the
            cell does not read it. # (*plates or 1s, *scope or 1s, *to_event or 1s)
        order: Of probabilities and simplexes, which statistic of the latent's prior stands where each
            of a value's is; None where all are in their places. # the same, and (P,)
    """

    site: str
    latent: str
    pair: Pair
    power: float
    elements: Tensor
    order: Tensor | None = None


class NotConjugate(Exception):
    """A latent whose posterior is not of its prior's form; holds the finding."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


def kernel_of_prior(fn: Any) -> PriorKernel | None:
    """The kernel of a latent's prior, with any number of ``to_event``; None where there is none."""
    return KERNELS.get(type(unwrap(fn)[0]))


def refused(latent: str, where: str, what: str, kernel: PriorKernel | None = None) -> NotConjugate:
    """Why a latent has no posterior of its prior's form."""
    serve = "" if kernel is None else f": {children_of(kernel)}"
    return NotConjugate(
        Finding(
            where,
            what,
            f"'{latent}' is integrated where all that reads it is conjugate to its prior{serve}",
            (
                "give a guide: ExactPosteriorEM(model, AutoNormal)",
                "take a point estimate under its prior: ExactPosteriorEM(model, guide='map')",
            ),
            latents=(latent,),
        )
    )


def values_inside(
    model: GivenConjugates, kernels: Mapping[str, PriorKernel], seed: int
) -> dict[str, Tensor]:
    """Random values in the supports of all latents."""
    return {
        name: kernels[name].inside(random_like(like, seed + i))
        for i, (name, like) in enumerate(model.values.items())
    }


def read_conjugates(
    model: GivenConjugates,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    kernels: Mapping[str, PriorKernel],
    at: Mapping[str, Tensor] | None = None,
) -> dict[str, ConjugateRead]:
    """What every site reads of conjugate latents.

    Args:
        model: The model with its conjugate latents given.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found of it.
        kernels: The kernel of each latent's prior.
        at: Parameters at which to look, in general position; they are moved where None.

    Raises:
        NotConjugate: If a latent has a child that is not conjugate to it.
    """
    values = {n: v.requires_grad_() for n, v in values_inside(model, kernels, 31).items()}
    others = values_inside(model, kernels, 47)
    how: dict[str, Any] = {"limit": None, "values": at}
    with at_moved(structure.parameters, seed=31) if at is None else nullcontext():
        try:
            with Breaks(values) as breaks:
                run = run_enumerated(model.at(values), args, kwargs, structure, **how)
            again = run_enumerated(model.at(others), args, kwargs, structure, **how)
        except ModelError as error:
            what = "it does not run at other values of its latents."
            raise refused(next(iter(values)), "model", what) from error
        for latent, how in breaks.found.items():
            what = f"it changes with '{latent}' outside autograd ({how})."
            raise refused(latent, "model", what)
        layout = FactorLayout(run.sites, structure.as_run, Recurring({}))
        out = {}
        for name in structure.as_run.sites:
            found = _read_of(name, run, values, kernels, layout)
            _require_as_predicted(name, found, (run, again), (values, others), layout, kernels)
            if found is not None:
                out[name] = found
    return out


def differing_reads(
    reads: Mapping[str, ConjugateRead],
    model: GivenConjugates,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    kernels: Mapping[str, PriorKernel],
    at: Mapping[str, Tensor] | None = None,
    seen: Run | None = None,
) -> list[tuple[str, str]]:
    """Sites that, at other parameters, do not read latents in the way that was found.

    Args:
        reads: What was found.
        model: The model with its conjugate latents given.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found of it.
        kernels: The kernel of each latent's prior.
        at: Parameters at which to look; the current ones where None.
        seen: A run there with the latents at the values that the model gives them, which stands for
            one of two runs; None to make both.

    Returns:
        Pairs of a site and an argument.
    """
    random = values_inside(model, kernels, 59)
    pairs = (values_inside(model, kernels, 53) if seen is None else dict(model.values)), random
    how: dict[str, Any] = {"limit": None, "values": at}
    with torch.no_grad():
        one = seen or run_enumerated(model.at(pairs[0]), args, kwargs, structure, **how)
        two = run_enumerated(model.at(random), args, kwargs, structure, **how)
        layout = FactorLayout(one.sites, structure.as_run, Recurring({}))
        off = []
        for name in structure.as_run.sites:
            read = reads.get(name)
            try:
                _require_as_predicted(name, read, (one, two), pairs, layout, kernels)
            except NotConjugate:
                off.append((name, "" if read is None else read.pair.argument))
    return off


def _read_of(
    name: str,
    run: Run,
    values: Mapping[str, Tensor],
    kernels: Mapping[str, PriorKernel],
    layout: FactorLayout,
) -> ConjugateRead | None:
    """What a site reads; None where it reads nothing."""
    site = run.sites[name]
    fn, where = site["fn"], f"site '{name}'"
    reached = {n for t in tensors_of(fn) if t.requires_grad for n in known_below(t, values)}
    outside = [t for t in (site["scale"], mask_tensor(site)) if isinstance(t, Tensor)]
    if site["is_observed"] and name not in values:
        outside.append(site["value"])
    for latent in (n for t in outside for n in known_below(t, values)):
        raise refused(latent, where, f"its value, mask or scale depends on '{latent}'.")
    if not reached:
        return None
    latent = next(n for n in values if n in reached)
    kernel = kernels[latent]
    if name in values:
        what = f"the prior of '{name}' depends on '{latent}', which is integrated too."
        raise refused(latent, where, what)
    if len(reached) > 1:
        both = " and ".join(f"'{n}'" for n in values if n in reached)
        raise refused(latent, where, f"it reads {both}, which are not conjugate together.")
    base, reinterpreted, _ = unwrap(fn)
    kind, family = type(base).__name__, family_of(fn)
    given = {} if family is None else given_arguments(base, family)
    reading = [a for a, t in given.items() if t.requires_grad and known_below(t, values)]
    if family is None or len(reading) != 1:
        what = f"{kind} of '{latent}' has no posterior of its prior's form."
        raise refused(latent, where, what, kernel)
    (argument,) = reading
    tensor = given[argument]
    event = reinterpreted + family.argument_event_dim(argument)
    dims = layout.place(name)[1]
    brought = partial(compact, event_dim=event, dims=dims, collapse=reinterpreted, like=tensor)
    power: float | str
    elements, order = torch.empty(0), None
    if kernel.support in ("positive", "matrix"):
        power = power_of(tensor, values[latent])
        elements = _elements(brought(tensor), values[latent])
        if kernel.support == "positive" and family.argument_event_dim(argument):
            elements = _of_matrices(elements, latent, where, f"{kind}.{argument}")
    elif kernel.support == "unit":
        share = share_of(brought(tensor), values[latent], latent)
        power = share if isinstance(share, str) else 1.0
        if not isinstance(share, str):
            elements = share.elements
            if bool(share.turned.any()):
                order = torch.stack([share.turned.long(), 1 - share.turned.long()], -1)
    else:
        own = {latent: values[latent]}
        binding = bind(tensor, own, layout=brought, normalised=argument)
        plain = binding.how == "selection" and all(
            not s.maps and s.factor is None for s in binding.selections
        )
        power = 1.0 if plain else binding.reason or "it is no selection of its elements"
        elements = binding.selections[0].index if plain else torch.empty(0)
    what = f"{kind}.{argument} of '{latent}'"
    if isinstance(power, str):
        raise refused(latent, where, f"{what} is not the latent itself: {power}.", kernel)
    pair = pair_of(kernel, type(base), argument, power)
    if pair is None:
        shown = "" if power == 1 else f", its power {power:g},"
        raise refused(latent, where, f"{what}{shown} has no posterior of its prior's form.", kernel)
    if kernel.event_dim:
        elements, order = _whole(elements, values[latent], latent, where, what, kernel)
        if kernel.support == "matrix" and not _is_multiple(
            brought(tensor), values[latent], elements
        ):
            what = f"{what} is not a multiple of the latent: its elements have different factors."
            raise refused(latent, where, what, kernel)
    return ConjugateRead(name, latent, pair, power, elements, order)


def _elements(tensor: Tensor, leaf: Tensor) -> Tensor:
    """Which element of a latent each cell of an argument reads, −1 where none."""
    if tensor is leaf:
        return torch.arange(leaf.numel(), device=leaf.device).reshape(leaf.shape)
    forward = forward_of(tensor, leaf)
    slope = forward(torch.ones_like(leaf)).detach()
    return numbers_read(forward, slope, leaf.shape, leaf.numel())


def _of_matrices(elements: Tensor, latent: str, where: str, what: str) -> Tensor:
    """Which element each matrix reads, whose entries that are not zero read one alike."""
    most = elements.amax((-2, -1))
    if bool(((elements >= 0) & (elements != most[..., None, None])).any()):
        raise refused(
            latent, where, f"the entries of {what} read different elements of '{latent}'."
        )
    return most


def _is_multiple(tensor: Tensor, leaf: Tensor, elements: Tensor) -> bool:
    """Whether matrices are those that they read of a latent, each times one number."""
    a, size = tensor.detach(), leaf.shape[-1]
    factors = a / leaf.detach().reshape(-1, size, size)[elements].to(a)
    eps = 1e3 * torch.finfo(a.dtype).eps
    return bool(torch.isclose(factors, factors[..., :1, :1], rtol=eps, atol=0.0).all())


def _whole(
    index: Tensor, value: Tensor, latent: str, where: str, what: str, kernel: PriorKernel
) -> tuple[Tensor, Tensor | None]:
    """Which row or matrix each cell reads, where it reads whole ones; of rows in which order."""
    event = value.shape[-kernel.event_dim :]
    size = event.numel()
    alike = index.shape[-kernel.event_dim :] == event
    index = index.flatten(-kernel.event_dim)
    rows = index[..., 0].div(size, rounding_mode="floor")
    within = index - rows.unsqueeze(-1) * size
    places = torch.arange(index.shape[-1], device=index.device)
    if alike and bool((within == places).all()):
        return rows, None
    if alike and kernel.event_dim == 1 and bool((within.sort(-1).values == places).all()):
        return rows, within
    none = bool((index < 0).any())
    why = "a part of it is constant" if none else "its elements are cut, or in another order"
    raise refused(latent, where, f"{what} is not the latent itself: {why}.", kernel)


def _require_as_predicted(
    name: str,
    read: ConjugateRead | None,
    runs: tuple[Run, Run],
    values: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    layout: FactorLayout,
    kernels: Mapping[str, PriorKernel],
) -> None:
    """Hold the numbers of a site in two runs against what it reads.

    Raises:
        NotConjugate: If they differ otherwise.
    """
    here, there = (run.sites[name] for run in runs)
    is_latent = name in values[0]
    fixed = _numbers_of(here, read, is_latent), _numbers_of(there, read, is_latent)
    alike = len(fixed[0]) == len(fixed[1]) and all(map(_is_equal, *fixed))
    if alike and read is not None:
        alike = _is_as_read(name, read, (here, there), values, layout, kernels[read.latent])
    if not alike:
        latent = next(iter(values[0])) if read is None else read.latent
        what = f"it changes with '{latent}' in a way that autograd does not show."
        raise refused(latent, f"site '{name}'", what)


def _is_as_read(
    name: str,
    read: ConjugateRead,
    sites: tuple[Mapping[str, Any], Mapping[str, Any]],
    values: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    layout: FactorLayout,
    kernel: PriorKernel,
) -> bool:
    """Whether an argument in two runs follows from the values of its latent."""
    found = []
    for site, own in zip(sites, values, strict=True):
        base, reinterpreted, _ = unwrap(site["fn"])
        family = family_of(site["fn"])
        assert family is not None
        tensor = given_arguments(base, family)[read.pair.argument]
        event = reinterpreted + family.argument_event_dim(read.pair.argument)
        dims = layout.place(name)[1]
        a = compact(tensor.detach(), event, dims, reinterpreted, tensor)
        value = own[read.latent].detach()
        value = value.reshape(-1, *value.shape[value.dim() - kernel.event_dim :])
        reads = read.elements >= 0
        chosen = value[read.elements.clamp(min=0)].to(a)
        if kernel.support == "matrix":
            factor = a[..., :1, :1] / chosen[..., :1, :1]
            rest = a - factor * chosen
            found.append((torch.stack([rest, factor.expand_as(rest)]), a))
        elif kernel.event_dim:
            if read.order is not None:
                chosen = chosen.gather(-1, read.order.expand(chosen.shape))
            found.append((a - chosen, torch.zeros_like(a)))
        else:
            if read.order is not None:
                chosen = torch.where(read.order[..., 0] > 0, 1 - chosen, chosen)
            deep = a.dim() - reads.dim()  # the entries of a matrix read one element
            if deep:
                reads, chosen = (t.reshape(*t.shape, *(1,) * deep) for t in (reads, chosen))
            chosen = chosen**read.power
            found.append((torch.where(reads, a / chosen, a), a))
        del chosen
    (one, _), (two, _) = found
    if one.shape != two.shape:
        return False
    # What is a covariance times a positive number is one at every number.
    sure = kernel.event_dim > 0 or one.dim() > read.elements.dim()
    positive = sure or bool((one[(read.elements >= 0).expand_as(one)] > 0).all())
    eps = 1e3 * torch.finfo(one.dtype).eps
    how = {"rtol": eps, "atol": eps * kernel.event_dim}
    pairs = zip(one.reshape(-1).split(_MANY), two.reshape(-1).split(_MANY), strict=True)
    return positive and all(bool(torch.isclose(u, v, **how).all()) for u, v in pairs)


def _numbers_of(
    site: Mapping[str, Any], read: ConjugateRead | None, is_latent: bool
) -> list[Tensor]:
    """The numbers in the density of a site, without the argument that reads a latent."""
    fn = site["fn"]
    family = family_of(fn)
    if read is not None and family is not None:
        arguments = given_arguments(unwrap(fn)[0], family)
        out = [t for a, t in arguments.items() if a != read.pair.argument]
    else:
        out = tensors_of(fn)
    value = site["value"] if site["is_observed"] and not is_latent else None
    rest = (value, site["scale"], mask_tensor(site))
    return [t for t in (*out, *rest) if isinstance(t, Tensor)]


def _is_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
