"""Sites of a plain run of which nothing has to be said, because nothing was said of one of their form.

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
from pyro_em.graph.structure import SiteInfo
from pyro_em.tracing.sites import Role, role_of


class Alike:
    """What is known of sites by their form.

    Args:
        sites: All sites with a density, of a plain run.
    """

    def __init__(self, sites: Mapping[str, Mapping[str, Any]]) -> None:
        self._forms: dict[str, Hashable] = {}
        self._known: dict[Hashable, SiteInfo] = {}
        if len(sites) < FEW:
            return
        forms = forms_of(sites)
        for names in in_forms({n: f for n, f in forms.items() if f is not None}):
            if len(names) >= FEW and _are_sound([sites[n] for n in names]):
                self._forms.update((n, forms[n]) for n in names)

    def known(self, name: str) -> SiteInfo | None:
        """The record of a site of the same form of which there was nothing to say."""
        return self._known.get(self._forms.get(name))

    def note(self, name: str, info: SiteInfo) -> None:
        """There is nothing to say of a site."""
        form = self._forms.get(name)
        if form is not None:
            self._known[form] = info


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
