"""Sites of equal form: what numbers do not decide is decided once for all steps of a chain.

The form of a site is all of it but numbers and names: the classes of its distribution and of what wraps
it, shapes, strides and dtypes of the tensors that it holds, its plates. Sites with a mask, a scale or
anything that is not known here have none, and are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution

from pyro_em.tracing.sites import ROLE

FEW = 4  # sites of one form from which on they are looked at together


_AT_ONCE = 2**17  # cells


_MOST = 2**16  # cells of one tensor; larger ones are worth a look of their own


_PLAIN: tuple[type, ...] = (int, float, bool, str, type(None))


def form_of(site: Mapping[str, Any], layouts: dict[int, Hashable] | None = None) -> Hashable | None:
    """What determines all of a traced site but numbers and names; None for an unusual one.

    Args:
        site: The site.
        layouts: What is known of distributions that are alive, by their identity; it is filled.
    """
    value, scale = site["value"], site["scale"]
    if site["mask"] is not None or isinstance(scale, Tensor) or scale != 1.0:
        return None
    value = _untagged(value)
    if value is None or value.requires_grad:
        return None
    layouts, fn = {} if layouts is None else layouts, site["fn"]
    if id(fn) not in layouts:
        layouts[id(fn)] = layout_of_distribution(fn)
    own = layouts[id(fn)]
    if own is None:
        return None
    return (
        own,
        _of_tensor(value),
        site["is_observed"],
        site["infer"].get(ROLE),
        tuple((f.name, f.dim, f.size) for f in site["cond_indep_stack"] if f.dim is not None),
    )


def forms_of(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Hashable | None]:
    """The form of each of some sites; where they are few it is of no use."""
    if len(sites) < FEW:
        return dict.fromkeys(sites)
    known: dict[Hashable, Hashable] = {}  # a form is long, and kept once
    layouts: dict[int, Hashable] = {}
    forms = ((name, form_of(site, layouts)) for name, site in sites.items())
    return {name: known.setdefault(form, form) for name, form in forms}


def in_forms(forms: Mapping[str, Hashable | None]) -> list[list[str]]:
    """Names by form in their order; those without one each by itself."""
    found: dict[Hashable, list[str]] = {}
    for name, form in forms.items():
        found.setdefault(("alone", name) if form is None else form, []).append(name)
    return list(found.values())


def in_parts(n: int, cells: int, most: int = _AT_ONCE) -> list[slice]:
    """Slices of ``n`` tensors of some number of cells, so that few cells are stacked at once.

    Args:
        n: How many tensors.
        cells: Of each.
        most: How many tensors at once, whatever their size.
    """
    size = max(1, min(most, _AT_ONCE // max(cells, 1)))
    return [slice(i, i + size) for i in range(0, n, size)]


def unrepeated(tensors: Sequence[Tensor], event_dim: int = 0) -> list[Tensor]:
    """Tensors of one form without the batch dimensions along which they are copies."""
    first = tensors[0]
    batch = range(first.dim() - event_dim)
    copies = [d for d in batch if first.stride(d) == 0 and first.shape[d] > 1]
    out = list(tensors)
    for d in copies:
        out = [t.narrow(d, 0, 1) for t in out]
    return out


def equal_to_first(tensors: Sequence[Tensor]) -> Tensor:
    """Which tensors of one form hold the bits of the first one. # (tensors)"""
    first = tensors[0]
    out = torch.ones(len(tensors), dtype=torch.bool)
    if all(t is first for t in tensors):
        return out
    as_bits = _BITS.get(first.dtype)
    for part in in_parts(len(tensors), first.numel()):
        stack = torch.stack([first, *tensors[part]]).detach()
        bits = stack if as_bits is None else stack.view(as_bits)
        same = (bits == bits[0])[1:]
        out[part] = same.flatten(1).all(1) if same.dim() > 1 else same
    return out


def have_equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits."""
    if a is b:
        return True
    as_bits = _BITS.get(a.dtype)
    return torch.equal(a, b) if as_bits is None else torch.equal(a.view(as_bits), b.view(as_bits))


_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def layout_of_distribution(fn: Any) -> Hashable | None:
    """What determines all of a distribution but the numbers in its tensors; None where unknown."""
    if not isinstance(fn, Distribution) or isinstance(fn, MaskedDistribution):
        return None
    parts: list[Any] = [type(fn)]
    seen: dict[int, int] = {}
    for name, item in vars(fn).items():
        kind = type(item)
        if kind in _PLAIN or kind is torch.Size:
            parts.append((name, item))
        elif isinstance(item, Tensor):
            tensor = _untagged(item)
            if tensor is None:
                return None
            # A distribution may hold one tensor under two names.
            parts.append((name, _of_tensor(tensor), seen.setdefault(id(item), len(seen))))
        elif isinstance(item, Distribution):
            inner = layout_of_distribution(item)
            if inner is None:
                return None
            parts.append((name, inner))
        else:
            return None
    return tuple(parts)


def _untagged(value: Any) -> Tensor | None:
    """A tensor of the common kind, without the tags of a provenance run; None if it is none."""
    value = getattr(value, "_t", value) if isinstance(value, Tensor) else None
    if type(value) is not Tensor and type(value) is not torch.nn.Parameter:
        return None
    common = value.layout is torch.strided and not value.is_meta and value.dtype in _DTYPES
    return value if common and value.numel() <= _MOST else None


_DTYPES = (torch.float64, torch.float32, torch.int64, torch.int32, torch.bool)


def _of_tensor(t: Tensor) -> Hashable:
    return t.shape, t.stride(), t.dtype, t.device, t.requires_grad
