"""How Gaussian latents enter means at one draw of the other latents, attached to all that was drawn.

Coefficients and offsets change from draw to draw, so that no binding gives them. They are read from
two runs at the draw, and a gradient of what is computed from them reaches parameters and draws.

A coefficient that is zero at present hides which element of a latent it belongs to; its gradient
would be lost, or be that of another element. Along random directions R and a the gradients of

    aᵀ (b + J R)   and   aᵀ (b + C R[elements])

must agree. Where they do not, elements are read at parameters that are moved at random, and no two
rows share numbers that are equal at present.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.errors import ModelError, message, sites_in_words
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.sparse_lines import is_close, random_like
from pyro_em.graph.gaussian_lines.jacobians import SiteJacobian
from pyro_em.graph.gaussian_lines.lines import Line, NotLinear, Read
from pyro_em.graph.gaussian_lines.means import Mean, means_of
from pyro_em.graph.gaussian_lines.read_lines import hidden
from pyro_em.graph.layout import FactorLayout
from pyro_em.graph.structure import Structure
from pyro_em.tracing.runs import Run


@dataclass(frozen=True, eq=False)
class DrawnLines:
    """How Gaussian latents enter means at one draw.

    Attributes:
        lines: Per site.
        parts: Per site what its mean is made of, attached, by its names in `Line.parts`.
    """

    lines: Mapping[str, Line]
    parts: Mapping[str, Mapping[str, Tensor]]


@torch.enable_grad()
def drawn_lines(
    runs: tuple[Run, Run],
    values: Mapping[str, Tensor],
    structure: Structure,
    sources: Sequence[Tensor],
    moved: Callable[[], Run],
) -> DrawnLines:
    """Read the lines that two runs at one draw show.

    Args:
        runs: One with the Gaussian latents at random values, and one with them at zero.
        values: The random values, leaves of autograd.
        structure: What `examine` found of the model at such a draw.
        sources: The parameters and draws of which gradients will be taken.
        moved: Runs the model at moved parameters, its latents at the same values.

    Raises:
        NotLinear: If a latent has a child that is not linear in it and Gaussian at this draw.
        ModelError: If the elements that a coefficient of zero belongs to cannot be told.
    """
    run = runs[0]
    # The draw stands for the guide: its own sites are in the run that drew.
    structure = replace(
        structure, sites={n: i for n, i in structure.sites.items() if n in run.sites}
    )
    layout = FactorLayout(run.sites, structure)
    whole = means_of(runs, values, layout)
    means = [m.narrowed() for m in whole]
    if not _are_followed(means, whole, values, run, sources):
        other = moved()
        there = means_of((other, other), values, FactorLayout(other.sites, structure))
        means = _with_elements_of(whole, there, values, run)
        if not _are_followed(means, means, values, run, sources):
            raise ModelError(_hidden_element([m.site for m in means if m.reads]))
    lines: dict[str, Line] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for mean in means:
        place, name = mean.place, mean.site
        tensors = [t.unsqueeze(0) for t in (mean.offset, *(c.values for _, c in mean.reads))]
        own = [Binding("opaque", (), t.detach(), reason="it belongs to a draw") for t in tensors]
        reads = tuple(
            Read(latent, c.elements, binding, c.only)
            for (latent, c), binding in zip(mean.reads, own[1:], strict=True)
        )
        lines[name] = Line(name, place.sizes, place.scope, place.event, own[0], reads)
        parts[name] = dict(zip(lines[name].parts, tensors, strict=True))
    unseen = hidden(lines, runs, values, {}, layout)
    if unseen is not None:
        raise NotLinear(unseen)
    return DrawnLines(lines, parts)


def _are_followed(
    means: Sequence[Mean],
    whole: Sequence[Mean],
    values: Mapping[str, Tensor],
    run: Run,
    sources: Sequence[Tensor],
) -> bool:
    """Whether gradients of what means are made of are those of the means themselves.

    Args:
        means: As they will be used.
        whole: With offsets that are not narrowed.
        values: Values of the latents in the run.
        run: The run.
        sources: What gradients are taken of.
    """
    if not sources:
        return True
    directions = {n: random_like(v, 43 + i) for i, (n, v) in enumerate(values.items())}
    claimed, there = [], []
    for i, (mean, full) in enumerate(zip(means, whole, strict=True)):
        a, b = mean.at(directions), full.offset
        for latent in dict.fromkeys(name for name, _ in mean.reads):
            jacobian = SiteJacobian.of(mean.place, mean.loc, values[latent], run.sites[latent])
            b = b + jacobian.of_all(directions[latent].reshape(jacobian.count, jacobian.q))
        weights = random_like(torch.broadcast_tensors(a, b)[0].detach(), 47 + i)
        claimed.append((a * weights).sum())
        there.append((b * weights).sum())
    of_both = (_gradients(torch.stack(t).sum(), sources) for t in (there, claimed))
    return all(is_close(one, other) for one, other in zip(*of_both, strict=True))


def _gradients(total: Tensor, sources: Sequence[Tensor]) -> list[Tensor]:
    if not total.requires_grad:
        return [torch.zeros_like(s) for s in sources]
    found = torch.autograd.grad(total, sources, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(s) if g is None else g for s, g in zip(sources, found, strict=True)]


def _with_elements_of(
    means: Sequence[Mean],
    other: Sequence[Mean],
    values: Mapping[str, Tensor],
    run: Run,
) -> list[Mean]:
    """The means with the elements that another run shows, coefficients those of this run."""
    out = []
    known = {m.site: m for m in other}
    for mean in means:
        reads = []
        for latent, c in known[mean.site].reads:
            jacobian = SiteJacobian.of(mean.place, mean.loc, values[latent], run.sites[latent])
            reads.append((latent, replace(c, values=jacobian.coefficient(c.only))))
        out.append(replace(mean, reads=tuple(reads)))
    return out


def _hidden_element(sites: Sequence[str]) -> str:
    return message(
        sites_in_words(sites),
        "a loc reads a Gaussian latent through a coefficient that is exactly zero.",
        "which element of the latent its gradient belongs to cannot be told",
        [
            "begin with coefficients away from zero",
            "give the latent to the guide: strategy='guide'",
        ],
    )
