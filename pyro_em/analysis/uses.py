"""What a model does with its arguments: which are observed, which reach densities or masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from pyro_em.analysis.rows import Sites, run
from pyro_em.distributions import unwrap
from pyro_em.tracing.handlers import KeepValues
from pyro_em.tracing.leaves import Path, leaves_of, replaced
from pyro_em.tracing.mixing import Mixing
from pyro_em.tracing.provenance import Tagged, tags_of
from pyro_em.tracing.runs import Model, looking_at
from pyro_em.tracing.sites import tensors_of


@dataclass(frozen=True, eq=False)
class Uses:
    """What a model does with the leaves of its arguments.

    Attributes:
        observed_by: Per observed site the leaves that reach its value.
        read: Leaves that reach what a site is drawn from, each with the site's name.
        masks: Leaves that reach a mask or a scale, each with the site's name.
        seen: Leaves of which all this is known: tensors.
    """

    observed_by: Mapping[str, frozenset[Path]]
    read: Mapping[Path, str]
    masks: Mapping[Path, str]
    seen: frozenset[Path]

    @cached_property
    def observed(self) -> frozenset[Path]:
        """Leaves that reach an observed value."""
        return frozenset().union(*self.observed_by.values())

    def draws(self, path: Path) -> bool:
        """Whether a leaf, or something in it, is observed."""
        return any(p[: len(path)] == path for p in self.observed)

    def reader(self, path: Path) -> str | None:
        """What reads a leaf, in words; None if nothing does."""
        for found, how in ((self.read, "reads it"), (self.masks, "is masked or scaled by it")):
            for p, site in found.items():
                if p[: len(path)] == path:
                    return f"site '{site}' {how}"
        if not any(p[: len(path)] == path for p in self.seen):
            return "how the model reads it cannot be seen"
        return None


def uses_of(model: Model, args: tuple, kwargs: dict[str, Any], sites: Sites) -> Uses | None:
    """What a model does with its arguments; None where a run with tagged tensors fails.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        sites: A run on them.
    """
    leaves = {p: v for p, v in leaves_of(args, kwargs).items() if isinstance(v, Tensor)}
    tags = {str(i): path for i, path in enumerate(leaves)}
    tagged = {p: Tagged(leaves[p], frozenset({tag})) for tag, p in tags.items()}
    latents = {k: s["value"] for k, s in sites.items() if not s["is_observed"]}
    watch = Mixing({})
    try:
        with looking_at(watch):
            seen = run(model, *replaced(args, kwargs, tagged), KeepValues(latents))
    except Exception:  # some operations take no tagged tensor
        return None
    observed: dict[str, frozenset[Path]] = {}
    read: dict[Path, str] = {}
    masks: dict[Path, str] = {}
    for name, site in seen.items():
        base, _, wrapped = unwrap(site["fn"])
        for tag in frozenset().union(*map(tags_of, tensors_of(base))):
            read.setdefault(tags[tag], name)
        if site["is_observed"]:
            observed[name] = frozenset(tags[tag] for tag in tags_of(site["value"]))
        if name.endswith(("_observed", "_unobserved")):
            continue  # obs_mask says what is kept of the data given; all is drawn anew
        for held in (site["mask"], site["scale"], *(mask for mask, _ in wrapped)):
            for tag in tags_of(held):
                masks.setdefault(tags[tag], name)
    drawn = frozenset().union(*observed.values())
    for tag in watch.read:
        if tags[tag] not in drawn:
            read.setdefault(tags[tag], next(iter(seen)))
    return Uses(observed, read, masks, frozenset(leaves))
