"""Reading how Gaussian latents enter means, from runs of the model.

The model runs with its latents at random values. Their Jacobian C is read off autograd with few
vectors. If each row reads an element of its own through the same C, then J (e_j in row j) has C_j in
row j. Otherwise C_j = J (1 ⊗ e_j) for each coordinate j of a latent's event, and
J (arange ⊗ a) / J (1 ⊗ a) is the element of the latent's plates that a row reads. A random vector
verifies either. C and b are differentiable in the parameters, and are bound to them where no plate
changes them, at parameters moved at random, so that nothing vanishes by chance.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import unwrap
from pyro_em.errors import Finding, ModelError
from pyro_em.families.registry import family_of, given_arguments
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.linearity import Breaks
from pyro_em.graph.bindings.signatures import Recurring
from pyro_em.graph.bindings.sparse_lines import (
    bind_line,
    random_like,
)
from pyro_em.graph.enumerated import run_enumerated
from pyro_em.graph.gaussian_lines.collected import jacobian_of_all
from pyro_em.graph.gaussian_lines.jacobians import SiteJacobian, SitePlace, refusal
from pyro_em.graph.gaussian_lines.lines import Line, NotLinear, Read
from pyro_em.graph.gaussian_lines.means import means_of
from pyro_em.graph.gaussian_lines.predictions import unlike
from pyro_em.graph.layout import FactorLayout
from pyro_em.graph.structure import Structure
from pyro_em.tracing.given import GivenGaussians
from pyro_em.tracing.parameters import at_moved, values_of
from pyro_em.tracing.runs import Run
from pyro_em.tracing.sites import mask_tensor, tensors_of

_MANY = 4096  # cells of a tensor that is compared by itself


def random_values(model: GivenGaussians, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Random values of all latents of a model; those of one seed differ by their scale alone."""
    return {
        name: scale * random_like(like, seed + i)
        for i, (name, like) in enumerate(model.values.items())
    }


def other_values(model: GivenGaussians) -> dict[str, Tensor]:
    """Values of all latents that are none of those at which lines were read."""
    return random_values(model, 31, -1.0)


def read_lines(
    model: GivenGaussians,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    *,
    bound: bool = True,
) -> dict[str, Line]:
    """The mean of every site that is a Gaussian latent, or reads one.

    Bindings are found at parameters that are moved at random, and put back.

    Args:
        model: The model with its Gaussian latents given.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found of it.
        bound: Whether bindings are of use, because an M-step follows.

    Raises:
        NotLinear: If a latent has a child that is not linear in it and Gaussian.
    """
    values = {n: v.requires_grad_() for n, v in random_values(model, 31).items()}
    with at_moved(structure.parameters, seed=31):
        try:
            with Breaks(values) as breaks:
                run = run_enumerated(model.at(values), args, kwargs, structure, limit=None)
        except ModelError as error:
            what = "it does not run at other values of its latents."
            raise NotLinear(refusal(tuple(values), "model", what)) from error
        for latent, how in breaks.found.items():
            what = f"it changes with '{latent}' outside autograd ({how})."
            raise NotLinear(refusal((latent,), "model", what))
        at_zero = run_enumerated(model, args, kwargs, structure, limit=None)
        # Modules read their own tensors, which must not be written before all has been read.
        return _lines_of(run, at_zero, values, structure, bound)


def _lines_of(
    run: Run, at_zero: Run, values: Mapping[str, Tensor], structure: Structure, bound: bool
) -> dict[str, Line]:
    """The lines that two runs show.

    Args:
        run: With the latents at random values.
        at_zero: With the latents at zero.
        values: The random values.
        structure: What `examine` found of the model.
        bound: Whether bindings are of use.
    """
    leaves = {n: p.leaf for n, p in run.parameters.items()}
    leaves_at_zero = {n: p.leaf for n, p in at_zero.parameters.items()}
    layout = FactorLayout(run.sites, structure.as_run, Recurring(leaves))
    out = {}
    for mean in means_of((run, at_zero), values, layout, jointly=True):
        place, plates = mean.place, len(mean.place.sizes)
        known: dict[int, Binding] = {}  # coefficients of the latents of a series are one tensor
        for _, c in mean.reads:
            if id(c.values) not in known:
                known[id(c.values)] = bind_line(c.values, leaves, plates, bound=bound)
        reads = tuple(
            Read(latent, c.elements, known[id(c.values)], c.only) for latent, c in mean.reads
        )
        own = bind_line(mean.offset, leaves_at_zero, plates, bound=bound)
        out[mean.site] = Line(mean.site, place.sizes, place.scope, place.event, own, reads)
    unseen = hidden(out, (run, at_zero), values, values_of(run.parameters), layout)
    if unseen is not None:
        raise NotLinear(unseen)
    return out


def hidden(
    lines: Mapping[str, Line],
    runs: tuple[Run, Run],
    values: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    layout: FactorLayout,
) -> Finding | None:
    """What changes with the latents although autograd does not show it; None if nothing does.

    Args:
        lines: What autograd shows.
        runs: One with the latents at random values, and one with the latents at zero.
        values: The random values.
        parameters: Constrained values in both runs.
        layout: Of the first run.
    """
    kept = {name: line if line.is_static else line.as_read() for name, line in lines.items()}
    off = set(unlike(kept, layout, parameters, values))
    off.update(_with_other_numbers(lines, runs, values, layout))
    for name in layout.structure.sites:
        if name in off:
            what = "it changes with Gaussian latents in a way that autograd does not show."
            return refusal(tuple(values), f"site '{name}'", what)
    return None


def _with_other_numbers(
    lines: Mapping[str, Line],
    runs: tuple[Run, Run],
    values: Mapping[str, Tensor],
    layout: FactorLayout,
) -> Iterator[str]:
    """Sites whose numbers, means that read latents apart, are not the same in two runs."""
    pairs: dict[Hashable, list[tuple[str, Tensor, Tensor]]] = {}
    for name in layout.structure.sites:
        own = (name in lines, name not in values)
        here, there = (_numbers_of(run.sites[name], *own) for run in runs)
        if len(here) != len(there):
            yield name
            continue
        for a, b in zip(here, there, strict=True):
            if a.shape != b.shape:
                yield name
            elif a.numel() > _MANY:
                if not bool(_are_equal(a, b).all()):
                    yield name
            else:
                pairs.setdefault((a.shape, a.dtype, b.dtype), []).append((name, a, b))
    for alike in pairs.values():
        # Those of the steps of a loop are compared together.
        a, b = (torch.stack(own) for own in ([p[1] for p in alike], [p[2] for p in alike]))
        equal = _are_equal(a, b).reshape(len(alike), -1).all(-1)
        for (name, _, _), is_equal in zip(alike, equal.tolist(), strict=True):
            if not is_equal:
                yield name


def _numbers_of(site: Mapping[str, Any], has_line: bool, with_value: bool) -> list[Tensor]:
    """The numbers in the density of a site; without its loc where that reads latents."""
    fn = site["fn"]
    family = family_of(fn)
    if has_line and family is not None:
        arguments = given_arguments(unwrap(fn)[0], family)
        out = [t for a, t in arguments.items() if a != "loc"]
    else:
        out = tensors_of(fn)
    value = site["value"] if site["is_observed"] and with_value else None
    rest = (value, site["scale"], mask_tensor(site))
    return [t for t in (*out, *rest) if isinstance(t, Tensor)]


def _are_equal(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors have the same number, or neither has one."""
    return (a == b) | ((a != a) & (b != b))


def parts_at(
    lines: Mapping[str, Line],
    model: GivenGaussians,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    parameters: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """What means are made of where no binding gives it, read from runs of the model.

    Args:
        lines: How the latents enter each site.
        model: The model with its Gaussian latents given.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found of it.
        parameters: Constrained values at which to run, possibly attached; the current ones if None.

    Returns:
        Per site the parts that are not static, by their names in `Line.parts`.
    """
    if all(line.is_static for line in lines.values()):
        return {}
    values = {n: v.requires_grad_() for n, v in random_values(model, 31).items()}
    how: dict[str, Any] = {"limit": None, "values": parameters}
    run = run_enumerated(model.at(values), args, kwargs, structure, **how)
    at_zero = run_enumerated(model, args, kwargs, structure, **how)
    layout = FactorLayout(run.sites, structure.as_run)
    out: dict[str, dict[str, Tensor]] = {}
    for name, line in lines.items():
        place = SitePlace.of(name, layout)
        loc = place.loc(run.sites[name])
        series: dict[int, list[str]] = {}
        for r in line.reads:
            series.setdefault(id(r.coefficient), []).append(r.latent)
        joint: dict[int, Tensor] = {}
        for read, (part, binding) in zip((None, *line.reads), line.parts.items(), strict=True):
            if binding.is_static:
                continue
            if read is None:
                found = place.compact(place.loc(at_zero.sites[name]))
            elif len(own := series[id(read.coefficient)]) > 1 and read.only is None:
                key = id(read.coefficient)
                if key not in joint:
                    event = run.sites[own[0]]["fn"].event_dim
                    along = jacobian_of_all(place, loc, [values[n] for n in own], event)
                    joint[key] = along.coefficient()
                found = joint[key]
            else:
                along = SiteJacobian.of(place, loc, values[read.latent], run.sites[read.latent])
                found = along.coefficient(read.only)
            shape = binding.constant.shape[1:]
            for d, size in enumerate(shape[: len(place.sizes)]):
                found = found.narrow(d, 0, 1) if size == 1 else found
            out.setdefault(name, {})[part] = found.unsqueeze(0)
    return out


def differing_lines(
    lines: Mapping[str, Line],
    model: GivenGaussians,
    args: tuple,
    kwargs: dict[str, Any],
    structure: Structure,
    parameters: Mapping[str, Tensor],
    at: Mapping[str, Tensor] | None = None,
    *,
    once: bool = False,
    seen: Run | None = None,
) -> list[str]:
    """Sites whose mean, in runs at other values of the latents, is not what the lines predict.

    Args:
        lines: How the latents enter each site.
        model: The model with its Gaussian latents given.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: What `examine` found of it.
        parameters: Constrained values at which to predict.
        at: What to hand to the runs; the current parameters where None.
        once: Whether one run is enough, because the program did the same when others were made.
        seen: The run at `other_values`, if there was one.
    """
    off: dict[str, None] = {}
    static = {name: line for name, line in lines.items() if line.is_static}
    # Thresholds are passed by signs, and by values beyond most of them.
    some, others = other_values(model), {} if once else random_values(model, 41, 1e4)
    opposite = {name: -value for name, value in others.items()}
    for values in (some,) if once else (some, others, opposite):
        with torch.no_grad():
            run = seen if values is some else None
            if run is None:
                given = model.at(values)
                run = run_enumerated(given, args, kwargs, structure, limit=None, values=at)
            layout = FactorLayout(run.sites, structure.as_run)
            off.update(dict.fromkeys(unlike(static, layout, parameters, values)))
    return list(off)
