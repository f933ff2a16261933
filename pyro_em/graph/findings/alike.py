"""Sites of a plain run of which nothing has to be said where nothing was said of one of their form.

A finding about a site follows from its form and from its numbers. Numbers are looked at for all sites
of a form at once; where any of them is odd every site is looked at by itself, and named.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import depends_on_tensors, unwrap
from pyro_em.graph.forms import FEW, forms_of, in_forms, in_parts
from pyro_em.tracing.sites import Role, role_of


def sound_forms(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Hashable]:
    """The forms of those sites whose numbers are no reason to look at each of them.

    Where nothing has to be said of a site, nothing has to be said of the others of its form.

    Args:
        sites: All sites with a density, of a plain run.
    """
    out: dict[str, Hashable] = {}
    if len(sites) < FEW:
        return out
    forms = {n: f for n, f in forms_of(sites).items() if f is not None}
    for names in in_forms(forms):
        if len(names) >= FEW and _are_sound([sites[n] for n in names]):
            out |= {n: forms[n] for n in names}
    return out


def _are_sound(sites: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the numbers of sites of one form give no reason to look at each of them."""
    fn, value = sites[0]["fn"], sites[0]["value"]
    if hasattr(unwrap(fn)[0], "total_count"):
        return False  # a number that decides on the support
    if role_of(sites[0]) is not Role.DATA:
        return True
    try:
        support = fn.support
        if depends_on_tensors(support) or value.is_meta:
            return False
        for part in in_parts(len(sites), value.numel()):
            values = torch.stack([s["value"] for s in sites[part]])
            if not bool(support.check(values).all()) or not _are_finite(values):
                return False
    except (NotImplementedError, AttributeError, RuntimeError):
        return False
    return True


def _are_finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values).all())
