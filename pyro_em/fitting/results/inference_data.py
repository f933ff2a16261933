"""A fit as ArviZ's InferenceData: draws of latents, log evidence per row, data, parameters.

What ArviZ calls a posterior are here draws of the latents given the fitted parameters; these are point
estimates, and constant, or drawn from the normal distribution that they have when data are many. The
log likelihood of a row is its log evidence: its own latents are summed and integrated out, not drawn,
which is what leave-one-out needs.

Source: Kumar, Carroll, Hartikainen and Martin (2019) for ArviZ; Vehtari, Gelman and Gabry (2017) for
leave-one-out with latents integrated.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.arguments import seed_of, shown, whole
from pyro_em.errors import UsageError, message
from pyro_em.fitting.results.asymptotic import asymptotic_draws
from pyro_em.fitting.results.labels import Labels, ParameterForm, labels_of
from pyro_em.globs import natural
from pyro_em.graph.clamps import places_of_labels
from pyro_em.graph.factors import FactorGraph, Group, seen_entries
from pyro_em.graph.structure import Structure
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.tracing.sites import Role

if TYPE_CHECKING:
    from pyro_em.fitting.results.result import EMResult

LOG_LIKELIHOOD = (
    "log evidence of each row in nats: its latents are summed and integrated out, not drawn"
)


@dataclass
class InferenceGroups:
    """The groups of an InferenceData, and the names of their dimensions.

    Attributes:
        groups: By group and variable. # draws: (chains, draws, *shape)
        dims: By variable, without chains and draws.
        coords: By dimension.
        attrs: What describes the whole.
    """

    groups: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    dims: dict[str, list[str]] = field(default_factory=dict)
    coords: dict[str, list[Any]] = field(default_factory=dict)
    attrs: dict[str, str] = field(default_factory=dict)

    def add(
        self, group: str, name: str, value: np.ndarray, dims: Sequence[tuple[str, Any]]
    ) -> None:
        """Add a variable.

        Args:
            group: Where it belongs.
            name: Its name.
            value: Its numbers.
            dims: A name and labels for each of its dimensions but for chains and draws. A name that
                stands for something else already gets the variable's name in front.
        """
        named = []
        for axis, labels in dims:
            known = self.coords.get(axis)
            own = axis if known is None or known == list(labels) else f"{name}_{axis}"
            self.coords[own] = list(labels)
            named.append(own)
        self.groups.setdefault(group, {})[name] = value
        self.dims[name] = named

    def renamed(self) -> InferenceGroups:
        """The same, with no dimension that has the name of a variable, which xarray refuses."""
        variables = {name for group in self.groups.values() for name in group}
        new = {d: f"{d}_dim" if d in variables else d for d in self.coords}
        return InferenceGroups(
            self.groups,
            {name: [new[d] for d in own] for name, own in self.dims.items()},
            {new[d]: labels for d, labels in self.coords.items()},
            self.attrs,
        )


def add_parameters(
    out: InferenceGroups,
    group: str,
    values: Mapping[str, Tensor],
    forms: Mapping[str, ParameterForm],
    labels: Labels,
) -> None:
    """Add parameters, estimates or draws, under the names of their axes."""
    for name, value in values.items():
        dims = list(zip(forms[name].axes, labels[name], strict=True))
        out.add(group, name, _array(value[None] if group == "posterior" else value), dims)


def add_latents(out: InferenceGroups, draws: Mapping[str, Tensor], structure: Structure) -> None:
    """Add draws of latents # (draws, *plates, *event); steps of a chain become one variable."""
    for name, members in together(draws):
        value = torch.stack([draws[m] for m in members], 1)
        plates = _batch_of(structure, members[0], value.shape[2:], name)
        _add_steps(out, "posterior", name, members, value[None], plates, 3)


def add_observed(out: InferenceGroups, graph: FactorGraph) -> None:
    """Add observed data # (*plates, *event), NaN where nothing was observed."""
    found = observed_in(graph)
    for name, members in together({n: value for n, (value, _) in found.items()}):
        value = torch.stack([found[m][0] for m in members])
        plates = [(p, range(graph.dim_size(p))) for p in found[members[0]][1]]
        _add_steps(out, "observed_data", name, members, value, plates, 1)


def _add_steps(
    out: InferenceGroups,
    group: str,
    name: str,
    members: Sequence[str],
    value: Tensor,
    plates: Sequence[tuple[str, Any]],
    lead: int,
) -> None:
    """Add what has a dimension of steps before plates; of a single member it is left out."""
    dims = [(p, out.coords.get(p, places)) for p, places in plates]
    axis = "feature" if group == "observed_data" else "factor"
    for i, size in enumerate(value.shape[lead + len(plates) :]):
        known = out.coords.get(axis, []) if i == 0 else []
        dims.append((axis, known) if len(known) == size else (f"{name}_event_{i}", range(size)))
    if len(members) > 1:
        dims.insert(0, (f"{name}_step", [int(re.findall(r"\d+$", m)[0]) for m in members]))
    out.add(group, name, _array(value if len(members) > 1 else value.squeeze(lead - 1)), dims)


def observed_in(graph: FactorGraph) -> dict[str, tuple[Tensor, list[str]]]:
    """What each site observed, and its plates. # (*plates, *event)"""
    out: dict[str, tuple[Tensor, list[str]]] = {}
    for outer in graph.groups:
        for group in outer.nested.groups if outer.nested is not None else (outer,):
            if group.role is Role.DATA and group.observed and group.distribution != "Unit":
                seen = seen_entries(group)
                for i, name in enumerate(group.members):
                    user = name.removesuffix("_observed")
                    out[user] = _labels(graph, user) or _observed(graph, group, i, seen)
    return out


def _labels(graph: FactorGraph, name: str) -> tuple[Tensor, list[str]] | None:
    """The labels of a latent that is seen in part, and its plates. # (*plates, *event)"""
    places = places_of_labels(graph, name)
    if places is None:
        return None
    group, i = graph.group_of(f"{name}_observed")
    plates = list(group.dims[i][: group.n_plates])
    support = graph.latents[f"{name}_unobserved"].support
    places = places.expand([graph.dim_size(p) for p in plates])
    value = support.double()[places.clamp(0, len(support) - 1)]
    if group.mask is not None:
        seen = group.mask[min(i, len(group.mask) - 1)].flatten(group.n_plates).any(-1)
        seen = seen.reshape(seen.shape + (1,) * (support.dim() - 1))
        value = torch.where(seen, value, torch.nan)
    return value, plates


def _observed(
    graph: FactorGraph, group: Group, member: int, seen: Tensor | None
) -> tuple[Tensor, list[str]]:
    dims = group.dims[member]
    value = group.value[min(member, len(group.value) - 1)]
    if seen is not None:
        value = torch.where(seen[min(member, len(seen) - 1)], value.double(), torch.nan)
    event = value.shape[len(dims) :]
    plates = [d for d in dims if d in graph.structure.plates]
    sizes = [graph.dim_size(d) if d in plates else 1 for d in dims]
    value = value[tuple(slice(None) if d in plates else slice(0, 1) for d in dims)]
    value = value.expand([*sizes, *event])
    return value.reshape([*(graph.dim_size(p) for p in plates), *event]), plates


def together(names: Mapping[str, Tensor]) -> Iterator[tuple[str, list[str]]]:
    """Names that differ in a number at the end, of one shape, as one; others by themselves.

    Example:
        >>> x = torch.zeros(2)
        >>> list(together({"z_10": x, "z_2": x, "w": x}))
        [('z', ['z_2', 'z_10']), ('w', ['w'])]
    """
    stems: dict[str, list[str]] = {}
    for name in names:
        found = re.fullmatch(r"(.*?)_?\d+", name)
        stems.setdefault(found[1] if found and found[1] else name, []).append(name)
    for stem, members in stems.items():
        shapes = {names[m].shape for m in members}
        if len(members) > 1 and len(shapes) == 1 and stem not in names:
            yield stem, sorted(members, key=natural)
        else:
            yield from ((m, [m]) for m in members)


def _batch_of(
    structure: Structure, site: str, shape: Sequence[int], variable: str
) -> list[tuple[str, Any]]:
    """A name and labels for each batch dimension of a latent, the leftmost first."""
    info = structure.sites.get(site) or structure.sites.get(f"{site}_unobserved")
    if info is None:
        return []
    plates = {structure.plates[p].dim: p for p in info.plates if p in structure.plates}
    names = [plates.get(d, f"{variable}_batch_{-d}") for d in range(-info.batch_dim, 0)]
    return [(name, range(size)) for name, size in zip(names, shape, strict=False)]


def _array(value: Tensor) -> np.ndarray:
    return np.array(value.detach().cpu().numpy())


def inference_groups(
    result: EMResult,
    num_samples: int,
    parameters: str,
    seed: int | None,
    labels: Mapping[str, Any] | None,
) -> InferenceGroups:
    """What `EMResult.to_inference_data` hands to ArviZ."""
    where = "to_inference_data"
    n, seed = whole(where, "num_samples", num_samples), seed_of(where, seed)
    if parameters not in ("estimates", "draws"):
        what = f"parameters={shown(parameters)} is neither 'estimates' nor 'draws'."
        raise UsageError(message(where, what, "", ["pass parameters='draws' to have them drawn"]))
    if result.is_parted:
        fixes = ["fit arrays that fit into memory", "take draws of a chunk: em.posterior(chunk)"]
        raise UsageError(
            message(where, "the data came in parts.", "there is no posterior of all rows", fixes)
        )
    q, forms = result.posterior, result.forms
    structure = q.graph.structure if isinstance(q, Posterior) else q.variational.bare
    plates = {p: s.size for p, s in structure.plates.items()}
    shapes = {m: v.shape for m, v in result.params.items()}
    named = labels_of(labels, forms, shapes, result.columns.values(), plates)
    out = InferenceGroups(attrs={"log_likelihood": LOG_LIKELIHOOD})
    out.coords |= {p: list(labels[p]) for p in plates if labels and p in labels}
    if parameters == "draws":
        drawn = asymptotic_draws(result.params, forms, result.standard_errors(), n, seed)
        add_parameters(out, "posterior", drawn, forms, named)
        rows, draws = _given_draws(result, drawn, n, seed)
    else:
        add_parameters(out, "constant_data", result.params, forms, named)
        draws = dict(q.sample(n, seed=seed))
        rows = q.pointwise if isinstance(q, Posterior) else None
        rows = None if rows is None else rows.expand(n, *rows.shape)
    add_latents(out, draws, structure)
    if isinstance(q, Posterior):
        add_observed(out, q.graph)
    if rows is not None and structure.data_plate is not None:
        plate = structure.data_plate
        dims = [(plate, out.coords.get(plate, range(rows.shape[-1])))]
        out.add("log_likelihood", "log_evidence", _array(rows[None]), dims)
    return out


def _given_draws(
    result: EMResult, drawn: Mapping[str, Tensor], n: int, seed: int | None
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The evidence of each row, and a draw of the latents, at each draw of the parameters."""
    rows: list[Tensor | None] = []
    draws: list[Mapping[str, Tensor]] = []
    for i in range(n):
        q = result.posterior_at({m: v[i] for m, v in drawn.items()})
        rows.append(q.pointwise)
        draws.append(q.sample(1, seed=None if seed is None else seed + i))
    known = [r for r in rows if r is not None]
    latents = {m: torch.cat([d[m] for d in draws]) for m in draws[0]}
    return (torch.stack(known) if len(known) == n else None), latents


def as_inference_data(groups: InferenceGroups, convert: Callable[..., Any] | None = None) -> Any:
    """ArviZ's object: an InferenceData of version 0.x, a DataTree from version 1 on.

    Args:
        groups: What it holds.
        convert: ArviZ's ``from_dict``; imported where None.

    Raises:
        UsageError: If ArviZ is not installed.
    """
    convert = convert or _from_dict()
    groups = groups.renamed()
    rest = {"coords": groups.coords, "dims": groups.dims}
    if "data" in inspect.signature(convert).parameters:  # from version 1 on
        return convert(groups.groups, attrs={"/": groups.attrs}, **rest)
    return convert(**groups.groups, attrs=groups.attrs, **rest)


def _from_dict() -> Callable[..., Any]:
    for name in ("arviz", "arviz_base"):
        try:
            found: Callable[..., Any] = __import__(name).from_dict
            return found
        except ImportError:
            continue
    raise UsageError(
        message(
            "to_inference_data",
            "ArviZ is not installed.",
            "the object that it returns is ArviZ's",
            ["pip install arviz"],
        )
    )
