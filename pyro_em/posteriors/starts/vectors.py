"""The observed vectors of a latent's rows: what can be clustered before anything is known.

The rows of a latent are the elements of its plates; latents that read the same parameters (the
steps of a chain) share their rows. What is observed below a row is its vector:

* numbers are standardised, column by column; symbols (categories, one-hot and binary values) become
  one-hot codes, which are only centred; Binomial and Multinomial counts become proportions first;
* several observed sites, and the elements of plates inside the row along which parameters differ
  (items of a questionnaire), stand side by side; along a plate whose elements share all parameters
  the mean is taken;
* a masked value is put at the mean of its column, and a row with nothing but masked values is no
  part of the clustering;
* covariates are no observations: a mixture of regressions is clustered by what is regressed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.graph.clamps import places_of_labels
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role

_Key = tuple[str, int, int]

_SYMBOLS = ("Categorical", "OneHotCategorical", "Bernoulli")


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of latents of one kind.

    Attributes:
        latents: The latents; their rows follow one another.
        sizes: Sizes of each latent's plates.
        size: Number of values K.
        sites: The observed sites that the vectors come from.
        vectors: Standardised; zero where masked. # (R, D)
        seen: Whether anything is observed of a row. # (R,)
        weights: Sample weights. # (R,)
        labels: Observed labels of an ``obs_mask`` latent, −1 elsewhere. # (R,)
    """

    latents: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    size: int
    sites: frozenset[str]
    vectors: Tensor
    seen: Tensor
    weights: Tensor
    labels: Tensor

    def split(self, per_row: Tensor) -> dict[str, Tensor]:
        """Something per row, by latent. # (*plates, ...)"""
        counts = [_product(s) for s in self.sizes]
        parts = per_row.split(counts)
        return {
            name: part.reshape(*sizes, *per_row.shape[1:])
            for name, sizes, part in zip(self.latents, self.sizes, parts, strict=True)
        }


def rows_of(graph: FactorGraph) -> list[Rows]:
    """The rows of every kind of latent that has at least two rows with something observed.

    Args:
        graph: A factor graph with bindings.

    Returns:
        One entry per kind, in model order.
    """
    readers = _readers(graph)
    found = [_rows(graph, readers, kind) for kind in _kinds(graph, readers)]
    return [r for r in found if r is not None]


def _kinds(graph: FactorGraph, readers: _Readers) -> list[tuple[str, ...]]:
    """Latents whose values mean the same, because they index the same elements of parameters."""
    leader = {name: name for name in graph.latents}

    def root(name: str) -> str:
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for group, forms in zip(graph.groups, readers.forms, strict=True):
        for d in range(group.n_plates, len(group.sizes)):
            alike: dict[int, str] = {}
            for form, dims in zip(forms, group.dims, strict=True):
                other = alike.setdefault(form, dims[d])
                if graph.latents[dims[d]].size == graph.latents[other].size:
                    leader[root(dims[d])] = root(other)
    together: dict[str, list[str]] = {}
    for name in graph.latents:
        together.setdefault(root(name), []).append(name)
    return [tuple(names) for names in together.values()]


def _forms(group: Group) -> list[int]:
    """A number per member; equal where parameters reach the members in the same way."""
    parts = [s.index for b in group.bindings.values() for s in b.selections]
    slopes = [j for b in group.bindings.values() for j in b.slopes]
    parts += [j.dense for j in slopes]
    if not parts:
        return [0 if group.params else i for i in range(len(group.members))]
    if len(group.members) == 1:
        return [0]
    rows = [p.reshape(len(p), -1).contiguous().view(torch.uint8).cpu().numpy() for p in parts]
    met: dict[tuple[bytes, ...], int] = {}
    return [
        met.setdefault(tuple(r[i].tobytes() for r in rows), len(met))
        for i in range(len(group.members))
    ]


@dataclass(frozen=True, eq=False)
class _Readers:
    """Which sites read a latent, in model order: places (group, member) of observed ones.

    Attributes:
        observed: The observed sites that read each latent.
        latent: The latents that read each latent.
        forms: Per group `_forms`.
    """

    observed: Mapping[str, list[tuple[int, int]]]
    latent: Mapping[str, list[str]]
    forms: Sequence[list[int]]

    def below(self, name: str) -> list[tuple[int, int]]:
        """The observed sites below the latents that depend on a latent, directly or not."""
        found, todo = {name}, [name]
        while todo:
            more = [n for n in self.latent.get(todo.pop(), ()) if n not in found]
            found.update(more)
            todo.extend(more)
        return list(dict.fromkeys(p for n in self.latent if n in found for p in self.observed[n]))


def _readers(graph: FactorGraph) -> _Readers:
    places = {
        name: (g, i) for g, group in enumerate(graph.groups) for i, name in enumerate(group.members)
    }
    observed: dict[str, list[tuple[int, int]]] = {n: [] for n in graph.latents}
    latent: dict[str, list[str]] = {n: [] for n in graph.latents}
    labels = {f"{name}_observed" for name in graph.structure.clamped}
    for name in graph.structure.sites:
        if name not in places or name in labels:
            continue
        g, i = places[name]
        group = graph.groups[g]
        for parent in group.dims[i][group.n_plates :]:
            if not group.observed and name != parent:
                latent[parent].append(name)
            elif group.observed and group.role is Role.DATA:
                observed[parent].append((g, i))
    return _Readers(observed, latent, [_forms(g) for g in graph.groups])


def _rows(graph: FactorGraph, readers: _Readers, latents: tuple[str, ...]) -> Rows | None:
    places = {name: readers.observed[name] for name in latents}
    if not any(places.values()):
        places = {name: readers.below(name) for name in latents}
    sizes = [tuple(graph.dim_size(p) for p in graph.latents[n].plates) for n in latents]
    blocks: list[dict[_Key, Tensor]] = []
    symbols: dict[_Key, bool] = {}
    for name in latents:
        own = _blocks(graph, readers, name, places[name])
        blocks.append({key: block for key, (block, _) in own.items()})
        symbols.update({key: symbol for key, (_, symbol) in own.items()})
    if not symbols:
        return None
    columns = []
    for key, is_symbol in symbols.items():
        like = next(b[key] for b in blocks if key in b)
        parts = [
            b[key] if key in b else like.new_full((_product(s), like.shape[-1]), torch.nan)
            for b, s in zip(blocks, sizes, strict=True)
        ]
        columns.append((torch.cat(parts), is_symbol))
    device = columns[0][0].device
    weights = torch.cat(
        [_weights(graph, n, s, device) for n, s in zip(latents, sizes, strict=True)]
    )
    seen = ~torch.cat([torch.isnan(c) for c, _ in columns], -1).all(-1) & (weights > 0)
    if int(seen.sum()) < 2:
        return None
    vectors = torch.cat([_standardised(c, weights * seen, s) for c, s in columns], -1)
    labels = torch.cat([_labels(graph, n, s, device) for n, s in zip(latents, sizes, strict=True)])
    sites = frozenset(graph.groups[g].members[i] for ps in places.values() for g, i in ps)
    size = graph.latents[latents[0]].size
    return Rows(latents, tuple(sizes), size, sites, vectors, seen, weights, labels)


def _blocks(
    graph: FactorGraph, readers: _Readers, latent: str, places: Iterable[tuple[int, int]]
) -> dict[_Key, tuple[Tensor, bool]]:
    """Columns of a latent's rows by the kind of site that they come from."""
    out: dict[_Key, tuple[Tensor, bool]] = {}
    met: Counter[tuple[str, int]] = Counter()
    shared: dict[tuple[int, int], tuple[_Key, list[Tensor]]] = {}
    for g, i in places:
        group = graph.groups[g]
        block = _block(graph, latent, group, i)
        if block is None:
            continue
        stem = (re.sub(r"\d+", "#", group.members[i]), block.shape[-1])
        form = (g, readers.forms[g][i])
        if form in shared and group.params:
            shared[form][1].append(block)
            continue
        key = (*stem, met[stem])
        met[stem] += 1
        shared[form] = (key, [block])
        out[key] = (block, _is_symbol(group))
    for key, same in shared.values():
        if len(same) > 1:  # sites with the same parameters: the steps below a sequence's class
            out[key] = (torch.stack(same).nanmean(0), out[key][1])
    return out


def _block(graph: FactorGraph, latent: str, group: Group, i: int) -> Tensor | None:
    """What one site shows of each row of a latent; NaN where it is masked. # (rows, columns)"""
    plates = group.dims[i][: group.n_plates]
    own = graph.latents[latent].plates
    n_dims = len(group.sizes)
    value = _numbers(group, i)  # (*dims or 1s, columns)
    if any(value.shape[d] != 1 for d in range(group.n_plates, n_dims)):
        return None  # the value itself depends on a latent
    if group.mask is not None:
        mask = group.mask[i]
        mask = mask.reshape(*mask.shape[:n_dims], -1)
        if mask.shape[-1] not in (1, value.shape[-1]):
            mask = mask.all(-1, keepdim=True)
        value = torch.where(mask, value, torch.nan)
    value = value.reshape(*value.shape[: group.n_plates], value.shape[-1])
    value = value.expand(*(graph.dim_size(p) for p in plates), value.shape[-1])
    beyond = [d for d, p in enumerate(plates) if p not in own]
    for d in beyond:
        if _is_shared_along(group, i, d):
            value = value.nanmean(d, keepdim=True)
    for p in own:
        if p not in plates:
            value = value.unsqueeze(0)
            plates = (p, *plates)
    order = [plates.index(p) for p in own] + [d for d, p in enumerate(plates) if p not in own]
    value = value.permute(*order, value.dim() - 1)
    sizes = [graph.dim_size(p) for p in own]
    value = value.expand(*sizes, *value.shape[len(own) :])
    return value.reshape(_product(sizes), -1)


def _numbers(group: Group, i: int) -> Tensor:
    """A site's values as numbers: codes of symbols, proportions, or the values themselves."""
    name = "" if group.family is None else group.family.name
    value = group.value[i].detach()
    n_dims = len(group.sizes)
    if name == "Categorical":
        given = [a for n, a in group.arguments.items() if n in ("probs", "logits")]
        codes = value.long()
        size = given[0].shape[-1] if given else int(codes.max()) + 1
        return torch.nn.functional.one_hot(codes.clamp(0, size - 1), size).to(torch.float64)
    value = value.to(torch.float64).reshape(*value.shape[:n_dims], -1)
    if name == "Binomial" and "total_count" in group.arguments:
        total = group.arguments["total_count"][i].detach().to(value)
        total = total.reshape(*total.shape[:n_dims], -1)
        if all(total.shape[d] == 1 for d in range(group.n_plates, n_dims)):
            value = value / total.clamp(min=1)
    elif name == "Multinomial":
        value = value / value.sum(-1, keepdim=True).clamp(min=1)
    return value


def _is_symbol(group: Group) -> bool:
    return group.family is not None and group.family.name in _SYMBOLS


def _is_shared_along(group: Group, i: int, dim: int) -> bool:
    """Whether the elements of a plate share every parameter, so that their order says nothing."""
    if not group.bindings:
        return False
    parts = []
    for name, binding in group.bindings.items():
        parts += [s.index for s in binding.selections]
        parts += [j.dense for j in binding.slopes]
        parts.append(binding.constant if binding.is_static else group.arguments[name])
    for part in parts:
        own = part[i]
        if own.dim() > dim and own.shape[dim] > 1:
            first = own.narrow(dim, 0, 1)
            if not bool((own == first).all()):
                return False
    return True


def _standardised(columns: Tensor, weights: Tensor, is_symbol: bool) -> Tensor:
    """Columns with mean zero and, of numbers, variance one; zero where NaN."""
    there = ~torch.isnan(columns) & torch.isfinite(columns)
    filled = torch.where(there, columns, 0.0)
    mass = there * weights.unsqueeze(-1)
    total = mass.sum(0).clamp(min=1e-300)
    mean = (mass * filled).sum(0) / total
    centred = torch.where(there, columns - mean, 0.0)
    if is_symbol:
        return centred
    deviation = ((mass * centred.square()).sum(0) / total).sqrt()
    return centred / torch.where(deviation > 1e-12 * mean.abs().clamp(min=1e-300), deviation, 1.0)


def _weights(graph: FactorGraph, latent: str, sizes: Sequence[int], device: torch.device) -> Tensor:
    """What poutine.scale makes each row of a latent count."""
    group, i = graph.group_of(latent)
    scale = torch.as_tensor(group.scale[i]).detach().to(device, torch.float64)
    own, plates = graph.latents[latent].plates, group.dims[i][: group.n_plates]
    if scale.dim():
        scale = scale.reshape(scale.shape[: group.n_plates])
        scale = scale.permute([plates.index(p) for p in own])
    return scale.expand(tuple(sizes)).reshape(-1)


def _labels(graph: FactorGraph, latent: str, sizes: Sequence[int], device: torch.device) -> Tensor:
    """Labels of the rows of an ``obs_mask`` site that were observed; −1 elsewhere."""
    name = latent.removesuffix("_unobserved")
    label = None if name == latent else places_of_labels(graph, name)
    if label is None:
        return torch.full((_product(sizes),), -1, device=device)
    group, i = graph.group_of(f"{name}_observed")
    own, plates = graph.latents[latent].plates, group.dims[i][: group.n_plates]
    label = label.permute([plates.index(p) for p in own]).expand(tuple(sizes)).reshape(-1)
    label, mask = label.to(device), graph.structure.masked_pairs[name]
    known = mask.to(device).expand(tuple(sizes)).reshape(-1)
    return torch.where(known, label, -1)


def _product(sizes: Sequence[int]) -> int:
    out = 1
    for s in sizes:
        out *= s
    return out
