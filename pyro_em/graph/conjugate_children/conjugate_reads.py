"""How conjugate latents enter the sites below them, from runs of the model.

The model runs with its latents at random values. An argument that reads one is its element to some
power times a known positive factor (`pyro_em.graph.conjugate_children.powers`), a probability or one
minus it (`pyro_em.graph.conjugate_children.shares`), or a whole simplex in any order; its Jacobian
tells which element. A run at other values must show what follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import unwrap
from pyro_em.errors import ModelError
from pyro_em.families.conjugate_kernels import KERNELS, PriorKernel
from pyro_em.families.conjugate_pairs import pair_of
from pyro_em.families.registry import family_of, given_arguments
from pyro_em.graph.bindings.autograd import bind, known_below
from pyro_em.graph.bindings.linearity import Breaks
from pyro_em.graph.bindings.named_leaves import NamedLeaves
from pyro_em.graph.bindings.sparse_lines import forward_of, numbers_read
from pyro_em.graph.bindings.useful import Useful
from pyro_em.graph.compact import compact
from pyro_em.graph.conjugate_children.conjugate_checks import require_as_predicted
from pyro_em.graph.conjugate_children.conjugate_model import ConjugateModel
from pyro_em.graph.conjugate_children.conjugate_record import ConjugateRead, NotConjugate, refused
from pyro_em.graph.conjugate_children.powers import power_of
from pyro_em.graph.conjugate_children.shares import share_of, share_of_log_odds
from pyro_em.graph.layout import FactorLayout
from pyro_em.tracing.parameters import at_moved
from pyro_em.tracing.runs import Run
from pyro_em.tracing.sites import mask_tensor, tensors_of


def kernel_of_prior(fn: Any) -> PriorKernel | None:
    """The kernel of a latent's prior, with any number of ``to_event``; None where there is none."""
    return KERNELS.get(type(unwrap(fn)[0]))


def read_conjugates(
    given: ConjugateModel, at: Mapping[str, Tensor] | None = None
) -> dict[str, ConjugateRead]:
    """What every site reads of conjugate latents.

    Args:
        given: The model with its conjugate latents given.
        at: Parameters at which to look, in general position; they are moved where None.

    Raises:
        NotConjugate: If a latent has a child that is not conjugate to it.
    """
    structure, kernels = given.structure, given.kernels
    values = NamedLeaves({n: v.requires_grad_() for n, v in given.inside(31).items()})
    others = given.inside(47)
    with at_moved(structure.parameters, seed=31) if at is None else nullcontext():
        try:
            with Breaks(values) as breaks:
                run = given.run(values, at)
            again = given.run(others, at)
        except ModelError as error:
            what = "it does not run at other values of its latents."
            raise refused(next(iter(values)), "model", what) from error
        for latent, how in breaks.found.items():
            what = f"it changes with '{latent}' outside autograd ({how})."
            raise refused(latent, "model", what)
        layout = FactorLayout(run.sites, structure.as_run)
        out = {}
        for name in structure.as_run.sites:
            found = _read_of(name, run, values, kernels, layout)
            require_as_predicted(name, found, (run, again), (values, others), layout, kernels)
            if found is not None:
                out[name] = found
    return out


def differing_reads(
    reads: Mapping[str, ConjugateRead],
    given: ConjugateModel,
    at: Mapping[str, Tensor] | None = None,
    seen: Run | None = None,
) -> list[tuple[str, str]]:
    """Sites that, at other parameters, do not read latents in the way that was found.

    Args:
        reads: What was found.
        given: The model with its conjugate latents given.
        at: Parameters at which to look; the current ones where None.
        seen: A run there with the latents at the values that the model gives them, which stands for
            one of two runs; None to make both.

    Returns:
        Pairs of a site and an argument.
    """
    structure, kernels, random = given.structure, given.kernels, given.inside(59)
    pairs = (given.inside(53) if seen is None else dict(given.model.values)), random
    with torch.no_grad():
        one = seen or given.run(pairs[0], at)
        two = given.run(random, at)
        layout = FactorLayout(one.sites, structure.as_run)
        off = []
        for name in structure.as_run.sites:
            read = reads.get(name)
            try:
                require_as_predicted(name, read, (one, two), pairs, layout, kernels)
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
    event = reinterpreted + family.argument_dims.get(argument, 0)
    dims = layout.place(name)[1]
    brought = partial(compact, event_dim=event, dims=dims, collapse=reinterpreted, like=tensor)
    power: float | str
    elements, order = torch.empty(0), None
    if kernel.support in ("positive", "matrix"):
        power = power_of(tensor, values[latent])
        elements = _elements(brought(tensor), values[latent])
        if kernel.support == "positive" and family.argument_dims.get(argument, 0):
            elements = _of_matrices(elements, latent, where, f"{kind}.{argument}")
    elif kernel.support == "unit":
        read = share_of_log_odds if argument == "logits" else share_of
        share = read(brought(tensor), values[latent], latent)
        power = share if isinstance(share, str) else 1.0
        if not isinstance(share, str):
            elements = share.elements
            if bool(share.turned.any()):
                order = torch.stack([share.turned.long(), 1 - share.turned.long()], -1)
    else:
        own = {latent: values[latent]}
        binding = bind(tensor, own, Useful(normalised=argument), layout=brought)
        maps = ["log"] if argument == "logits" else []
        plain = binding.how == "selection" and all(
            [m.name for m in s.maps] == maps and s.factor is None for s in binding.selections
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
    if order is None:
        first = len(layout.structure.sites[name].plates)
        elements = _once_where_alike(elements, first, len(dims))
    return ConjugateRead(name, latent, pair, power, elements, order)


def _once_where_alike(elements: Tensor, first: int, last: int) -> Tensor:
    """Which element each cell reads, once for all values of a discrete latent that read the same.

    Args:
        elements: # (*plates or 1s, *scope or 1s, *to_event or 1s)
        first: The first dimension of the scope.
        last: The one behind its last.
    """
    for d in range(first, last):
        one = elements.narrow(d, 0, 1)
        if elements.shape[d] > 1 and bool((elements == one).all()):
            elements = one
    return elements


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
