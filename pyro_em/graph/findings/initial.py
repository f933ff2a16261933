"""Initial values of parameters: what a model asks for, and where Pyro starts.

Pyro brings an initial value into its constraint without a word: a simplex is divided by its sum, a
number outside an interval goes to the nearer end, of a covariance only the lower triangle is read.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.distributions import are_finite, is_finite
from pyro_em.errors import Finding, warn
from pyro_em.tracing.parameters import TracedParameter

# What three digits and single precision do not keep.
_RELATIVE = 1e-3

_ROUNDING = 1e-6  # of probabilities


def start_problems(parameters: Mapping[str, TracedParameter]) -> dict[str, Finding]:
    """What is wrong with initial values (`start_problem`), by the names of their parameters."""
    begun = [p for p in parameters.values() if p.initial is not None]
    if not any(p.unconstrained.is_meta for p in parameters.values()) and are_finite(
        [t for p in begun for t in (p.initial, p.unconstrained) if t is not None]
    ):
        return {}  # nearly always
    found = {name: start_problem(p) for name, p in parameters.items()}
    return {name: problem for name, problem in found.items() if problem is not None}


def start_problem(p: TracedParameter) -> Finding | None:
    """A finding where no fit can start from the initial value that a model gave, else None."""
    given = p.initial
    where = f"parameter '{p.name}'"
    if p.unconstrained.is_meta:
        return Finding(
            where,
            "it is on the device 'meta', and has a shape but no numbers.",
            "no step starts from there",
            ("make it on the CPU or a GPU: module.to_empty(device='cpu'), and initialise it",),
        )
    if given is None:
        return None
    if not is_finite(given):
        bad = ~torch.isfinite(given)
        kind = "NaN" if bool(given[bad].isnan().all()) else "NaN or infinite"
        return Finding(
            where,
            f"its initial value is not finite: {_counted(int(bad.sum()), given.numel())} {kind}.",
            "no step starts from there",
            (
                "look where it comes from: data with NaN, a division by zero, a logarithm of zero",
                "give it a finite initial value",
            ),
        )
    if is_finite(p.unconstrained.detach()) or _is_inside(p.constraint, given):
        return None
    return Finding(
        where,
        f"its initial value is outside its constraint, {p.constraint}.",
        f"the value given is {_shown(given)}, and no step starts from there",
        (f"give it an initial value inside: {_inside(p.constraint)}",),
    )


def start_note(p: TracedParameter) -> Finding | None:
    """A finding where Pyro starts from another value than the one that a model gave, else None."""
    given = p.initial
    if given is None or not given.numel() or p.unconstrained.is_meta or given.is_complex():
        return None
    where, start = f"parameter '{p.name}'", p.leaf.detach()
    given = given.to(start.dtype)
    if torch.equal(start, given):
        return None
    if start.shape != given.shape or not is_finite(start):
        return None
    off = (start - given).abs()
    if _base(p.constraint) is constraints.simplex:
        return None if float(off.amax()) < _ROUNDING else _simplex_note(where, given, start)
    if float(off.max()) <= _RELATIVE * max(float(given.abs().max()), float(start.abs().max())):
        return None
    at = tuple(int(i) for i in (off == off.max()).nonzero()[0])
    place = f" at index {at}" if at else ""
    return Finding(
        where,
        f"its initial value is outside its constraint, {p.constraint}.",
        f"Pyro starts from the nearest value that it finds inside: {float(start[at]):.6g} where "
        f"{float(given[at]):.6g} was given{place}",
        (f"give it an initial value inside: {_inside(p.constraint)}",),
    )


def tell_of_starts(parameters: Mapping[str, TracedParameter]) -> None:
    """Warn of every parameter that Pyro starts from another value than the one that was given."""
    for p in parameters.values():
        note = start_note(p)
        if note is not None:
            warn(str(note))


def forget_bad_starts(
    parameters: Mapping[str, TracedParameter], problems: Mapping[str, Finding]
) -> None:
    """Take parameters that no fit can start from out of the param store again.

    A second call, on better data, would otherwise meet the bad value.

    Args:
        parameters: Those of a run.
        problems: What is wrong with the initial values of some.
    """
    store = pyro.get_param_store()
    for name in problems:
        p = parameters[name]
        own = p.initial is not None and not isinstance(p.unconstrained, torch.nn.Parameter)
        if own and name in store and "." not in name:
            del store[name]


def _simplex_note(where: str, given: Tensor, start: Tensor) -> Finding | None:
    totals = given.sum(-1)
    # Probabilities that were written down with three digits.
    allowed = min(5e-4 * given.shape[-1], 2e-3) * (1 + _RELATIVE)
    off = (totals - 1).abs() > allowed
    if not bool(off.any()):
        return None
    first = tuple(int(i) for i in off.nonzero()[0]) if off.dim() else ()
    if off.dim():
        count = int(off.sum())
        what = (
            f"{_counted(count, off.numel(), 'row')} of its initial value no distribution: row "
            f"{first[0] if len(first) == 1 else first} sums to {float(totals[first]):.4g}, not to 1."
        )
    else:
        what = f"its initial value sums to {float(totals):.4g}, not to 1."
    return Finding(
        where,
        what,
        f"Pyro divides a simplex by its sum in silence, and starts at {_shown(start[first])}",
        ("divide it yourself: w / w.sum(-1, keepdim=True)", "check the numbers"),
    )


def _base(constraint: constraints.Constraint) -> constraints.Constraint:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _is_inside(constraint: constraints.Constraint, value: Tensor) -> bool:
    try:
        return bool(constraint.check(value).all())
    except (NotImplementedError, RuntimeError):
        return True


def _inside(constraint: constraints.Constraint) -> str:
    """How to make a value inside a constraint."""
    base = _base(constraint)
    name = type(base).__name__.lstrip("_")
    if name.endswith("PositiveDefinite"):
        return "a symmetric matrix with positive eigenvalues, as torch.cov or (S + S.mT) / 2"
    if "Corr" in name and "Cholesky" in name:
        return "torch.linalg.cholesky of a correlation matrix"
    if "Cholesky" in name:
        return "torch.linalg.cholesky of a covariance; it has zeros above its diagonal"
    if name == "Simplex":
        return "probabilities that are positive and sum to one"
    if name.endswith("OrderedVector"):
        return "numbers that rise: x.sort().values"
    if name in ("GreaterThan", "GreaterThanEq", "SoftplusPositive"):
        return f"numbers above {getattr(base, 'lower_bound', 0.0):g}"
    if name in ("Interval", "HalfOpenInterval"):
        return f"numbers between {base.lower_bound:g} and {base.upper_bound:g}"  # type: ignore
    return f"what satisfies {constraint}"


def _counted(count: int, total: int, noun: str = "number") -> str:
    return f"{count} of {total} {noun}{'s' * (total > 1)} {'is' if count == 1 else 'are'}"


def _shown(value: Tensor) -> str:
    if value.dim() == 0:
        return f"{float(value):.4g}"
    shown = ", ".join(_shown(v) for v in value[:4])
    return f"[{shown}{', …' if len(value) > 4 else ''}]"
