"""Sorting components: the labels of a latent are arbitrary, and a key puts them into an order.

Where the components are exchangeable, permuting a parameter along every dimension that the latent
indexes leaves the evidence as it is. Which dimensions these are is read off the bindings.

Source: Stephens (2000), "Dealing with label switching in mixture models".
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_em.arguments import as_tensor
from pyro_em.errors import UsageError, message
from pyro_em.graph.axes import Over, axes_along
from pyro_em.graph.factors import FactorGraph
from pyro_em.plan.program import Program
from pyro_em.posteriors.answers.names import by_glob, latent_of, own_name
from pyro_em.tracing.parameters import restore, snapshot, write_unconstrained


def component_axes(graph: FactorGraph, site: str) -> dict[str, tuple[int, ...]]:
    """The dimensions of each parameter that run over a latent's values.

    Args:
        graph: A factor graph with bindings.
        site: The latent, or a glob of latents that share their components: the steps of a chain.

    Returns:
        Per parameter its axes, those of all latents that share them (the steps of a chain).

    Raises:
        UsageError: If there is no such latent, or those of a glob have components of their own.
    """
    names = by_glob(graph, site, as_rows=False) or (site,)
    first = latent_of(graph, own_name(graph, names[0])).name
    together, axes = components_of(graph, first)
    apart = next((n for n in names if own_name(graph, n) not in together), None)
    if apart is not None:
        raise UsageError(
            message(
                f"'{site}'",
                f"'{names[0]}' and '{apart}' share no components.",
                "no parameter is indexed by both, so that each has an order of its own",
                ["sort the components of one after the other"],
            )
        )
    return axes


def components_of(graph: FactorGraph, latent: str) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """The latents that share their components with one, and the dimensions of parameters along them.

    Args:
        graph: A factor graph with bindings.
        latent: The latent.
    """
    together, axes = {latent}, dict[str, set[int]]()
    found = [f for f in axes_along(graph) if f.over in (Over.VALUES, Over.OWN)]
    while True:
        before = (len(together), sum(map(len, axes.values())))
        for f in found:
            _note(f.name, f.axis, f.param, together, axes)
        if (len(together), sum(map(len, axes.values()))) == before:
            break
    return together, {p: tuple(sorted(a)) for p, a in axes.items()}


def _note(
    latent: str, axis: int, param: str, together: set[str], axes: dict[str, set[int]]
) -> None:
    """A latent indexes an axis: it joins those that do already, or brings the axis in."""
    if latent in together:
        axes.setdefault(param, set()).add(axis)
    elif axis in axes.get(param, ()):
        together.add(latent)


def a_key(site: str, by: str | Tensor | None) -> str | Tensor:
    """What components are sorted by.

    Raises:
        UsageError: If it is None.
    """
    if by is None:
        raise UsageError(
            message(
                "by",
                "None does not say what to sort by.",
                "the components of a latent are put into the order of something",
                [
                    f"em.sort_components('{site}', 'mu', data): a parameter that it indexes",
                    f"em.sort_components('{site}', keys, data): a number per component",
                ],
            )
        )
    return by


def sort_components(program: Program, site: str, by: str | Tensor, *, descending: bool) -> Tensor:
    """Permute all parameters that run over a latent's values; see `ExactPosteriorEM`.

    Args:
        program: The model with its data.
        site: The latent.
        by: A parameter's name, or a key per component. # (K,)
        descending: Largest first.

    Raises:
        UsageError: If there is no such latent or key, or the components are not exchangeable.
    """
    graph = program.graph
    axes = component_axes(graph, site)
    size = graph.latents[own_name(graph, (by_glob(graph, site, as_rows=False) or (site,))[0])].size
    if isinstance(by, str):
        if by not in axes:
            known = ", ".join(f"'{n}'" for n in axes) or "none"
            raise UsageError(
                message(
                    f"by='{by}'",
                    f"no such parameter is indexed by '{site}'; these are: {known}.",
                    fixes=["name one of them, or pass a key per component"],
                )
            )
        order = order_of(graph.parameters[by].value(), axes[by], size, descending)
    else:
        key = as_tensor("by", by)
        if key.numel() != size:
            raise UsageError(
                message(
                    "by",
                    f"{key.numel()} keys for {size} components of '{site}'.",
                    "a key per component says their order",
                    ["pass the name of a parameter that the latent indexes", "pass a key for each"],
                )
            )
        if key.is_complex() or bool(torch.isnan(key).any()):
            raise UsageError(message("by", "its keys are NaN or complex.", "they have no order"))
        order = key.reshape(-1).argsort(descending=descending, stable=True)
    before = program.posterior().bound
    origin = snapshot(graph.parameters)
    for name, along in axes.items():
        p = graph.parameters[name]
        write_unconstrained(p, permuted(p.value(), along, order))
    after = program.posterior().bound
    assert before is not None and after is not None
    if abs(after - before) > 1e-6 * max(1.0, abs(before)):
        restore(graph.parameters, origin)
        raise UsageError(
            message(
                f"site '{site}'",
                "its components are not exchangeable; nothing was changed.",
                "constants, networks or priors of the model tell them apart",
                ["sort what you print instead"],
            )
        )
    return order


def permuted(value: Tensor, axes: tuple[int, ...], order: Tensor) -> Tensor:
    """A parameter with its components in another order.

    Example:
        >>> import torch
        >>> permuted(torch.tensor([[1, 2], [3, 4]]), (0, 1), torch.tensor([1, 0]))
        tensor([[4, 3],
                [2, 1]])
    """
    for axis in axes:
        value = value.index_select(axis, order.to(value.device))
    return value


def order_of(key: Tensor, axes: tuple[int, ...], size: int, descending: bool) -> Tensor:
    """The order of components by a parameter, by its first entry per component.

    Args:
        key: The parameter.
        axes: Its axes over components; the first one is used.
        size: Number of components.
        descending: Largest first.
    """
    rows = key.movedim(axes[0], 0).reshape(size, -1)
    return rows[:, 0].argsort(descending=descending, stable=True)
