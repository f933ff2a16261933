"""The means of sites as runs with Gaussian latents at random values show them: C and b, attached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pyro_em.distributions import unwrap
from pyro_em.errors import Finding
from pyro_em.families.registry import family_of, given_arguments
from pyro_em.graph.bindings.autograd import known_below
from pyro_em.graph.bindings.linearity import why_not_linear
from pyro_em.graph.bindings.named_leaves import NamedLeaves
from pyro_em.graph.bindings.sparse_lines import narrowed
from pyro_em.graph.gaussian_lines.collected import collected
from pyro_em.graph.gaussian_lines.jacobians import Coefficients, SitePlace, coefficients_of, refusal
from pyro_em.graph.gaussian_lines.lines import NotLinear, is_gaussian, is_matrix_of_rows
from pyro_em.graph.layout import FactorLayout
from pyro_em.tracing.runs import Run
from pyro_em.tracing.sites import Role, mask_tensor, tensors_of


def latents_read(
    name: str, site: Mapping[str, Any], values: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """The latents in the mean of a site; whatever else one reaches is refused."""
    latents = reaching(name, site, values)
    for finding in refusals(name, site, values, latents):
        raise NotLinear(finding)
    return latents


_LOGARITHM = (
    "observe the logarithm: dist.Normal(loc, scale) with obs=y.log(); the log evidence of y is that "
    "of its logarithms, less their sum"
)


def reaching(name: str, site: Mapping[str, Any], values: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The latents on which the density of a site depends, in the order of their values."""
    parts = [t for t in tensors_of(site["fn"]) if t.requires_grad]
    parts += _outside(name, site, values)
    found = NamedLeaves.of(values)
    return found.in_order(latent for t in parts for latent in known_below(t, found))


def _outside(name: str, site: Mapping[str, Any], values: Mapping[str, Tensor]) -> list[Tensor]:
    """What a density depends on beside its distribution."""
    out = [t for t in (site["scale"], mask_tensor(site)) if isinstance(t, Tensor)]
    return [*out, site["value"]] if site["is_observed"] and name not in values else out


def refusals(
    name: str, site: Mapping[str, Any], values: Mapping[str, Tensor], latents: Sequence[str]
) -> Iterator[Finding]:
    """Why a site that latents reach otherwise than through its mean has no exact treatment.

    Args:
        name: Its name.
        site: As a run with the latents at attached values traced it.
        values: These.
        latents: Those that reach it (`reaching`).
    """
    fn, where = site["fn"], f"site '{name}'"
    if not latents:
        return
    kind = type(unwrap(fn)[0]).__name__
    if not is_gaussian(fn):
        if kind == "LogNormal" and site["is_observed"]:
            what = f"LogNormal of Gaussian '{latents[0]}': only its logarithm is Normal."
            told = refusal(latents, where, what)
            yield replace(told, fixes=(_LOGARITHM, *told.fixes))
            return
        what = f"{kind} of Gaussian '{latents[0]}' has no exact posterior."
        yield refusal(latents, where, what)
        return
    if is_matrix_of_rows(fn):
        what = "it is a MultivariateNormal under to_event: put its rows in a plate."
        yield refusal(latents, where, what)
        return
    family = family_of(fn)
    assert family is not None
    for argument, t in given_arguments(unwrap(fn)[0], family).items():
        found = () if argument == "loc" else known_below(t, values)
        if found:
            yield refusal(found, where, f"its {argument} depends on '{found[0]}'.")
    found = tuple(n for t in _outside(name, site, values) for n in known_below(t, values))
    if found:
        yield refusal(found, where, f"its value, mask or scale depends on '{found[0]}'.")


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean of a site, and what it is made of, attached.

    Attributes:
        site: The site.
        place: Where its cells are.
        loc: Its mean in a run with the latents at random values.
        offset: The same with the latents at zero. # (*sizes or 1s, *scope, *event)
        reads: What it reads of latents.
    """

    site: str
    place: SitePlace
    loc: Tensor
    offset: Tensor
    reads: tuple[tuple[str, Coefficients], ...]

    def narrowed(self) -> Mean:
        """The same with one slice of each plate along which numbers are equal."""
        plates = len(self.place.sizes)
        reads = tuple(
            (latent, replace(c, values=narrowed(c.values, plates))) for latent, c in self.reads
        )
        return replace(self, offset=narrowed(self.offset, plates), reads=reads)

    def at(self, values: Mapping[str, Tensor]) -> Tensor:
        """The mean at values of the latents, from its parts. # (*sizes or 1s, *scope, *event)"""
        sizes, out = self.place.sizes, self.offset
        for latent, c in self.reads:
            q = c.values.shape[-1]
            rows = values[latent].reshape(-1, q)[c.elements.clamp(min=0)]
            rows = rows * (c.elements >= 0).unsqueeze(-1)
            inner = c.values.dim() - 1 - len(sizes)
            out = out + (c.values * rows.reshape(*sizes, *(1,) * inner, q)).sum(-1)
        return out


def means_of(
    runs: tuple[Run, Run],
    values: Mapping[str, Tensor],
    layout: FactorLayout,
    *,
    jointly: bool = False,
) -> list[Mean]:
    """The means of all Gaussian latents, and of the sites that read some.

    Args:
        runs: With the latents at random values, and at zero.
        values: The random values.
        layout: Of the first run.
        jointly: Whether the latents of a series may have one tensor of coefficients, over all rows.

    Raises:
        NotLinear: If a mean is not linear, or something else of a site reads a latent.
    """
    run, at_zero = runs
    values = NamedLeaves.of(values)
    out = []
    for name, info in layout.structure.sites.items():
        site = run.sites[name]
        read = latents_read(name, site, values)
        if info.role is not Role.GAUSSIAN and not read:
            continue
        place = SitePlace.of(name, layout)
        loc = place.loc(site)
        problem = why_not_linear(loc, values)
        if problem:
            raise NotLinear(refusal(read, f"site '{name}'", f"its loc: {problem}."))
        together = collected(place, loc, read, values, run.sites) if jointly else {}
        reads = tuple(
            (latent, c)
            for latent in read
            for c in (
                (together[latent],)
                if latent in together
                else coefficients_of(place, loc, values[latent], latent, run.sites[latent])
            )
        )
        offset = place.compact(place.loc(at_zero.sites[name]))
        out.append(Mean(name, place, loc, offset, reads))
    return out
