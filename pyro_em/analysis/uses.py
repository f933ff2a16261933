"""What a model does with its arguments: which are observed, which reach densities or masks."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from pyro_em.analysis.rows import Sites, run
from pyro_em.distributions import unwrap
from pyro_em.errors import UsageError, message
from pyro_em.tracing.handlers import KeepValues
from pyro_em.tracing.leaves import Path, leaves_of, name_of, replaced
from pyro_em.tracing.mixing import Mixing
from pyro_em.tracing.provenance import Tagged, looking_at, tags_of
from pyro_em.tracing.runs import Model
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


def refuse_weights(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    sites: Sites,
    fixed: Container[str],
    where: str,
) -> None:
    """Refuse a model of which a part is no distribution: draws would leave that part out.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        sites: A run on them.
        fixed: Latents that are not drawn.
        where: The public method, for messages.

    Raises:
        UsageError: If a ``pyro.factor`` reads a latent, or values of the data.
    """
    found = _weighed_by(model, args, kwargs, sites, fixed)
    if found is None:
        return
    raise UsageError(
        message(
            where,
            f"the factor '{found[0]}' reads {found[1]}.",
            "pyro.factor adds a number to the log joint and is no distribution: what is drawn from the "
            "sites of the model leaves it out",
            ["write it as a site: pyro.sample(name, distribution), with obs= where it is of data"],
        )
    )


def _weighed_by(
    model: Model, args: tuple, kwargs: dict[str, Any], sites: Sites, fixed: Container[str]
) -> tuple[str, str] | None:
    """The first ``pyro.factor`` that weighs what is drawn, and what it reads, in words.

    One that reads parameters alone is a penalty: it has no part in a draw at given parameters. A number
    among the arguments (the weight of a penalty) is no data.
    """
    factors = [n for n, s in sites.items() if is_unit(s)]
    if not factors:
        return None
    latents = {k: s["value"] for k, s in sites.items() if not s["is_observed"]}
    leaves = {
        p: v for p, v in leaves_of(args, kwargs).items() if isinstance(v, Tensor) and v.numel() > 1
    }
    words = {f"the latent '{n}'" for n in latents if n not in fixed}
    given = {n: Tagged(v, frozenset({f"the latent '{n}'"})) for n, v in latents.items()}
    tagged = {p: Tagged(v, frozenset({f"'{name_of(model, p)}'"})) for p, v in leaves.items()}
    words |= {f"'{name_of(model, p)}'" for p in leaves}
    try:
        with looking_at(Mixing({})):
            seen = run(model, *replaced(args, kwargs, tagged), KeepValues(given))
    except Exception:  # some operations take no tagged tensor
        return factors[0], "what cannot be seen"
    for name in factors:
        base = unwrap(seen[name]["fn"])[0] if name in seen else None
        tags = frozenset().union(*map(tags_of, tensors_of(base))) & words
        if tags:
            return name, min(tags, key=lambda t: (not t.startswith("the latent"), t))
    return None


def is_unit(site: Mapping[str, Any]) -> bool:
    """Whether a site is a ``pyro.factor``."""
    return type(unwrap(site["fn"])[0]).__name__ == "Unit"
