"""Findings about numbers: of parameters, of arguments, of weights and of what is observed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.distributions import (
    are_finite,
    broadcast_shape,
    element_mask,
    is_finite,
    is_real,
    unwrap,
)
from pyro_em.errors import DataError, Finding
from pyro_em.graph.failing.blame import same_tensor
from pyro_em.graph.failing.failing_words import CONVERTED_NAN, NAN_CONVERTED, OF_COORDINATES
from pyro_em.graph.findings.initial import start_problems
from pyro_em.incomplete import may_hold_nan
from pyro_em.pieces import where_true
from pyro_em.tracing.runs import Run

# Supports that are all whole numbers between their bounds.
_WHOLE = (constraints.integer_interval, type(constraints.nonnegative_integer))
_COUNTS = constraints.independent(constraints.nonnegative_integer, 1)


def parameter_problems(run: Run, starts: Mapping[str, Finding] | None = None) -> list[Finding]:
    """Two constraints, a stale shape, a value that is not finite.

    Args:
        run: The run that read the parameters.
        starts: What is wrong with their initial values, where that has been looked at.
    """
    starts = start_problems(run.parameters) if starts is None else starts
    are_sound = are_finite([p.leaf for name, p in run.parameters.items() if name not in starts])
    problems = []
    for p in run.parameters.values():
        where = f"parameter '{p.name}'"
        if len(p.declared) > 1:
            problems.append(
                Finding(
                    where,
                    f"it is declared under {len(p.declared)} constraints: "
                    + " and ".join(p.declared)
                    + ".",
                    "Pyro keeps the first and ignores the others in silence",
                    (
                        "give every pyro.param of this name the same constraint",
                        "rename one",
                        "if it is an earlier model's, forget that: pyro.clear_param_store()",
                    ),
                )
            )
        if p.is_foreign:
            problems.append(
                Finding(
                    where,
                    "the param store's tensor of this name belongs to another module or function.",
                    "the module reads its own nn.Parameter, so that what is fitted would not reach "
                    "it",
                    (
                        "call pyro.clear_param_store() first",
                        "run in a scope of its own: with pyro.get_param_store().scope(): ...",
                        "use pyro.settings.set(module_local_params=True)",
                    ),
                )
            )
        value = p.leaf.detach()
        shape = value.shape
        if p.initial_shape is not None and p.initial_shape != shape:
            problems.append(
                Finding(
                    where,
                    f"the param store holds a value of shape {tuple(shape)}, but the model now asks "
                    f"for shape {tuple(p.initial_shape)}.",
                    "Pyro would return the old value in silence",
                    (
                        "call pyro.clear_param_store() first",
                        "run in a scope of its own: with pyro.get_param_store().scope(): ...",
                    ),
                )
            )
        if p.name in starts:
            problems.append(starts[p.name])
        elif not are_sound and not is_finite(value):
            problems.append(
                Finding(
                    where,
                    "its current value is not finite.",
                    "no exact step starts from there",
                    ("give it a finite initial value", "call pyro.clear_param_store() first"),
                )
            )
    return problems


def given_problems(given: Mapping[str, Tensor], why: str) -> list[Finding]:
    """Tensors that a model is given and that hold NaN or infinite numbers.

    Args:
        given: Tensors by name in words.
        why: What follows from it.
    """
    problems, seen = [], list[Tensor]()
    for where, value in given.items():
        if value.layout != torch.strided or value.is_meta or not _has_nonfinite(value):
            continue
        if any(same_tensor(value, other) for other in seen):
            continue
        seen.append(value)
        count, kind, first = _nonfinite(value, torch.isfinite(value).logical_not_())
        name = where.partition("'")[2][:-1]
        rows = f"torch.isfinite({name})" + (".all(-1)" if value.dim() > 1 else "")
        problems.append(
            Finding(
                where,
                f"{count} of {value.numel()} numbers {'is' if count == 1 else 'are'} {kind}, the "
                f"first at index {first}.",
                why,
                (
                    f"compute initial values and standardise from what is there: {name}[{rows}]",
                    f"mark missing observations: pyro.sample(..., obs={name}, obs_mask={rows})",
                    "drop the rows that hold them",
                ),
                DataError,
                row=first[0] if first else None,
            )
        )
    return problems


def _row_of(site: Mapping[str, Any], value: Tensor, index: tuple[int, ...]) -> int | None:
    """The element of the outermost vectorised plate that an entry of an observed value is in."""
    frame = next((f for f in site["cond_indep_stack"] if f.dim is not None), None)  # the outermost
    place = -1 if frame is None else value.dim() - site["fn"].event_dim + frame.dim
    return index[place] if frame and place >= 0 and value.shape[place] == frame.size else None


def _nonfinite(value: Tensor, bad: Tensor) -> tuple[int, str, tuple[int, ...]]:
    """How many numbers are no numbers, of which kind, and the index of the first."""
    first = tuple(int(i) for i in bad.nonzero()[0])
    nan, count = int((bad & torch.isnan(value)).sum()), int(bad.sum())
    kind = "NaN" if nan == count else "infinite" if nan == 0 else "NaN or infinite"
    return count, kind, first


def weight_problems(name: str, site: Mapping[str, Any]) -> list[Finding]:
    """A scale or a mask along a dimension that is no plate's, or of another size."""
    if not isinstance(site["scale"], Tensor) and not isinstance(site["mask"], Tensor):
        return []
    frames = {f.dim: f for f in site["cond_indep_stack"] if f.dim is not None}
    problems = []
    for what, weight in (("poutine.scale", site["scale"]), ("poutine.mask", site["mask"])):
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
        for dim in range(-len(shape), 0):
            size, frame = shape[dim], frames.get(dim)
            if size == 1 or (frame is not None and frame.size == size):
                continue
            plates = ", ".join(
                f"'{f.name}' of size {f.size} in dimension {d}" for d, f in frames.items()
            )
            event = tuple(site["fn"].event_shape)
            of_coordinates = what == "poutine.mask" and event and shape[-len(event) :] == event
            why = f"a {what.partition('.')[2]} holds one number per element of the plates"
            fixes = (
                *(("drop the last dimension: .squeeze(-1)",) if shape[-1] == 1 else ()),
                "give it the shape of the plates",
            )
            problems.append(
                Finding(
                    f"site '{name}'",
                    f"its {what} has shape {shape}, but its plates are: {plates or 'none'}.",
                    *(OF_COORDINATES if of_coordinates else (why, fixes)),
                    DataError,
                )
            )
            break
    return problems


def _converted(value: Tensor) -> Tensor:
    """Where a value is what NaN becomes as an integer, also where that became a float again."""
    if value.dtype == torch.int32:
        return value == CONVERTED_NAN[1]
    if value.dtype == torch.int64 or value.is_floating_point():
        return value == CONVERTED_NAN[0]
    return torch.zeros((), dtype=torch.bool, device=value.device)


def _has_nonfinite(value: Tensor) -> bool:
    """Whether a number is NaN or infinite, without a tensor of the value's size."""
    if not value.is_floating_point() or not value.numel():
        return False
    return not all(map(math.isfinite, _ends(value)))


def _is_nonfinite(value: Tensor) -> Tensor:
    """Where numbers are NaN or infinite. # like the value"""
    return torch.isfinite(value).logical_not_()


def _ends(value: Tensor) -> tuple[float, float]:
    """The smallest and the largest number of a value; both NaN where one is."""
    low, high = value.detach().aminmax()
    return float(low), float(high)


def data_problems(
    name: str, site: Mapping[str, Any], *, check_support: bool = True
) -> list[Finding]:
    """Observed values that are no numbers, or that the distribution cannot produce.

    Args:
        name: The site's name.
        site: The site as traced.
        check_support: Whether values are held against the support. One that differs between the
            values of a latent says nothing: the draw may be the wrong one.
    """
    fn, value = site["fn"], site["value"]
    masked_by_user = name.endswith("_observed") and site["mask"] is not None
    where = f"site '{name.removesuffix('_observed') if masked_by_user else name}'"
    if not isinstance(value, Tensor):
        return [_no_tensor(where, value)]
    base, reinterpreted, _ = unwrap(fn)
    if type(base).__name__ == "Unit":
        return []
    if value.is_complex():
        what, why = "the observed values are complex.", "no distribution here has a complex support"
        return [Finding(where, what, why, ("observe x.real and x.imag",), DataError)]
    mask = element_mask(fn, site["mask"])
    if mask is False:
        return []
    shown: Tensor | bool = True
    if isinstance(mask, Tensor):
        shown = mask.reshape(mask.shape + (1,) * (fn.event_dim - reinterpreted))
        try:
            broadcast_shape(value.shape, shown.shape)
        except ValueError:
            return []
    low, high = _ends(value) if value.numel() and value.dtype != torch.bool else (0.0, 0.0)
    has_ends = math.isfinite(low) and math.isfinite(high)
    bad: Tensor | None = None
    if not has_ends:
        no_number = torch.isinf if may_hold_nan(base) else _is_nonfinite
        bad = where_true(no_number, value.detach()) & shown
    if bad is not None and bool(bad.any()):
        return [_not_finite(where, site, bad, masked_by_user)]
    converted = None if low > CONVERTED_NAN[1] else _converted(value) & shown
    if converted is not None and bool(converted.any()):
        return [_converted_nan(where, site, converted)]
    if not check_support:
        return []
    try:
        # Element by element, as masks are.
        support = fn.support if mask is None else base.support
        if has_ends and _is_inside(support, value, low, high):
            return []
        of_counts = isinstance(base, torch.distributions.Multinomial) and not base._validate_args
        # Its density takes the total from the counts: `total_count` only bounds it, for those who ask.
        inside = _COUNTS.check(value) if of_counts else support.check(value)
    except (NotImplementedError, AttributeError, RuntimeError):
        return []
    if isinstance(mask, Tensor):
        inside = inside | ~mask
    return [] if bool(inside.all()) else [_outside(where, site, ~inside)]


def _is_inside(support: constraints.Constraint, value: Tensor, low: float, high: float) -> bool:
    """Whether the least and the greatest number of a value show that all are in a support."""
    if is_real(support):
        return True
    if value.is_floating_point() or not -(2**53) < low <= high < 2**53:
        return False
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    least = getattr(support, "lower_bound", -math.inf)
    most = getattr(support, "upper_bound", math.inf)
    if type(support) not in _WHOLE or isinstance(least, Tensor) or isinstance(most, Tensor):
        return False
    return bool(least <= low and high <= most)


def _no_tensor(where: str, value: object) -> Finding:
    kind = f"{type(value).__module__.split('.')[0]}.{type(value).__name__}"
    array = "x.to_numpy()" if kind.startswith("pandas") else "x"
    return Finding(
        where,
        f"the observed value is a {kind}, not a tensor.",
        "Pyro's densities take torch tensors",
        (f"pass torch.as_tensor({array}, dtype=torch.get_default_dtype())",),
        DataError,
    )


def _not_finite(where: str, site: Mapping[str, Any], bad: Tensor, masked_by_user: bool) -> Finding:
    """Values that are NaN or infinite where they count."""
    value = site["value"]
    count, kind, first = _nonfinite(value, bad)
    rows = ".all(-1)" if site["fn"].event_dim else ""
    remedy = f"pyro.sample(..., obs=x, obs_mask=torch.isfinite(x){rows})"
    if masked_by_user:
        fixes: tuple[str, ...] = (
            f"set obs_mask to False there: obs_mask = obs_mask & torch.isfinite(x){rows}",
        )
        kind += " where obs_mask is True"
    else:
        fixes = (f"mark them as missing: {remedy}", "drop the rows that hold them")
        if kind == "NaN":
            fixes = ("integrate them out: ExactPosteriorEM(model, missing='nan')", *fixes)
    return Finding(
        where,
        f"{count} of {value.numel()} observed values are {kind}, the first at index {first}.",
        "a density cannot be evaluated there",
        fixes,
        DataError,
        row=_row_of(site, value, first),
    )


def _converted_nan(where: str, site: Mapping[str, Any], converted: Tensor) -> Finding:
    """Integers that NaN became."""
    value = site["value"]
    first = tuple(int(i) for i in converted.nonzero()[0])
    count = int(converted.sum())
    return Finding(
        where,
        f"{count} of {value.numel()} observed values {'is' if count == 1 else 'are'} "
        f"{int(value.expand(converted.shape)[first])}, the first at index {first}.",
        NAN_CONVERTED,
        (
            "observe the floating tensor as it is, codes too: obs=x with "
            "ExactPosteriorEM(model, missing='nan')",
            "mark them as missing before: obs_mask=~x.isnan()",
        ),
        DataError,
        row=_row_of(site, value, first),
    )


def _outside(where: str, site: Mapping[str, Any], outside: Tensor) -> Finding:
    """Values that the distribution cannot produce."""
    fn, value = site["fn"], site["value"]
    base = unwrap(fn)[0]
    first = tuple(int(i) for i in outside.nonzero()[0])
    why = f"its support is {fn.support}"
    fixes: tuple[str, ...] = ("check the data", "choose a distribution whose support holds them")
    if isinstance(base, torch.distributions.Multinomial):
        most = base.total_count
        why = f"its support holds vectors of counts whose sum is at most total_count={most}"
        if bool(_COUNTS.check(value).all()):
            total = int(value.sum(-1).max())
            fixes = (
                f"give the largest sum: Multinomial({total}, ...); the density takes each row's own",
                "say that rows have sums of their own: Multinomial(..., validate_args=False)",
            )
    return Finding(
        where,
        f"{int(outside.sum())} of {outside.numel()} observed values are outside the support of "
        f"{type(base).__name__}, the first at index {first}.",
        why,
        fixes,
        DataError,
        row=_row_of(site, value, first),
    )
