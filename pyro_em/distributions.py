"""Facts about distributions and constraints: supports, sizes, bounds, wrappers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import mul
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape as broadcast_shape_of_pyro
from torch import Tensor
from torch.distributions import constraints


def broadcast_shape(a: Sequence[int], b: Sequence[int]) -> torch.Size:
    """The shape of two shapes together; ``torch.broadcast_shapes`` takes 40 µs and imports sympy.

    Raises:
        ValueError: If they do not broadcast.
    """
    return torch.Size(a if a == b else broadcast_shape_of_pyro(a, b))


def is_real(constraint: constraints.Constraint) -> bool:
    """Whether every number is allowed."""
    base = constraint
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    return type(base) is type(constraints.real)


def has_finite_support(fn: Any) -> bool:
    """Whether Pyro can enumerate a distribution."""
    return bool(getattr(fn, "has_enumerate_support", False)) and not has_many_counts(fn)


def has_many_counts(fn: Any) -> bool:
    """Whether the elements of a distribution of counts have supports of their own."""
    total = getattr(unwrap(fn)[0], "total_count", None)
    if not isinstance(total, torch.Tensor) or not total.numel():
        return False
    return not bool((total == total.reshape(-1)[0]).all())


def is_discrete(fn: Any) -> bool:
    """Whether a distribution's support is discrete."""
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


Mask: TypeAlias = Tensor | bool | None


def unwrap(fn: Any) -> tuple[Any, int, list[tuple[Any, int]]]:
    """Strip Independent, Expanded and Masked from a distribution.

    Returns:
        The base distribution, the number of its batch dimensions that are event dimensions of
        ``fn``, and the masks of the stripped wrappers, each with how many of its rightmost
        dimensions are event dimensions of ``fn``.
    """
    reinterpreted: int = 0
    masks: list[tuple[Any, int]] = []
    while True:
        if isinstance(fn, torch.distributions.Independent):
            reinterpreted += fn.reinterpreted_batch_ndims
        elif isinstance(fn, dist.torch_distribution.MaskedDistribution):
            masks.append((fn._mask, reinterpreted))
        elif not isinstance(fn, dist.torch_distribution.ExpandedDistribution):
            return fn, reinterpreted, masks
        fn = fn.base_dist


def unwrap_all(fns: Iterable[Any]) -> list[tuple[Any, int, list[tuple[Any, int]]]]:
    """What several distributions are without their wrappers (`unwrap`)."""
    return [unwrap(fn) for fn in fns]


def bases_of(fns: Iterable[Any]) -> list[Any]:
    """The base distributions of several (`unwrap`)."""
    return [unwrap(fn)[0] for fn in fns]


def element_mask(fn: Any, site_mask: Mask = None) -> Mask:
    """Where each element of an event counts: all masks of a site together.

    Args:
        fn: The site's distribution.
        site_mask: The mask of the site itself (``poutine.mask``).

    Returns:
        None where nothing is masked. # (*batch, *reinterpreted dims), or 1s

    Example:
        >>> seen = torch.tensor([True, False, True])
        >>> element_mask(dist.Normal(torch.zeros(2, 3), 1.0).mask(seen).to_event(1)).tolist()
        [[True, False, True]]
    """
    _, reinterpreted, masks = unwrap(fn)
    out: Mask = None
    narrow = [(unexpanded(m), outer) for m, outer in masks]
    for mask, outer in ((site_mask, 0), *narrow):
        if mask is None or mask is True:
            continue
        if mask is not False:
            mask = mask.reshape(mask.shape + (1,) * (reinterpreted - outer))
        out = mask if out is None else out & mask
    return out


def split_mask(fn: Any, site_mask: Mask = None) -> tuple[Mask, Tensor | None]:
    """Where an event counts at all, and which of its elements do, where they differ.

    Returns:
        # (*batch) or 1s; (*batch, *reinterpreted dims) or 1s, None where whole events are masked
    """
    mask, reinterpreted = element_mask(fn, site_mask), unwrap(fn)[1]
    if not isinstance(mask, Tensor) or not reinterpreted:
        return mask, None
    lead = mask.dim() - reinterpreted
    if mask.shape[lead:].numel() == 1:
        return mask.reshape(mask.shape[:lead]), None
    return mask.flatten(lead).any(-1), mask


def unexpanded(mask: Any) -> Any:
    """A tensor without its copies: a wrapper expands its mask to the batch of what it masks."""
    if not isinstance(mask, Tensor):
        return mask
    for d in range(mask.dim()):
        if mask.stride(d) == 0 and mask.shape[d] > 1:
            mask = mask.narrow(d, 0, 1)
    return mask


def depends_on_tensors(constraint: Any) -> bool:
    """Whether a support depends on numbers of the model, which may change from call to call."""
    parts = vars(constraint).values()
    inner = [p for p in parts if isinstance(p, constraints.Constraint)]
    return any(isinstance(p, Tensor) for p in parts) or any(map(depends_on_tensors, inner))


def is_outside(fn: Any, value: Tensor) -> bool:
    """Whether a value is outside a distribution's support, and not by rounding."""
    try:
        support = fn.support
        value = value.expand(broadcast_shape(value.shape, fn.shape()))
        if bool(support.check(value).all()):
            return False
        total = value.sum(-1, keepdim=True)
        if bool(((total - 1).abs() < 1e-3).all()) and bool(support.check(value / total).all()):
            return False  # a simplex in single precision
    except (NotImplementedError, AttributeError, RuntimeError, IndexError, ValueError):
        return False
    return True


def bounds(constraint: constraints.Constraint) -> tuple[float, float] | None:
    """The interval in which each element of a parameter may lie; None if it is no interval."""
    base: Any = constraint
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    if type(base) is type(constraints.real):
        return -math.inf, math.inf
    try:
        lower = getattr(base, "lower_bound", -math.inf)
        upper = getattr(base, "upper_bound", math.inf)
        if not hasattr(base, "lower_bound") and not hasattr(base, "upper_bound"):
            return None
        if torch.as_tensor(lower).numel() > 1 or torch.as_tensor(upper).numel() > 1:
            return None
        return float(lower), float(upper)
    except (TypeError, ValueError):
        return None


def is_simplex(constraint: constraints.Constraint) -> bool:
    """Whether each row of a parameter is a point of a simplex."""
    base: Any = constraint
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    return base is constraints.simplex


def support_size_of(fn: Any) -> int | None:
    """Number of values that Pyro can enumerate, or None."""
    if not has_finite_support(fn):
        return None
    base = unwrap(fn)[0]
    probs = getattr(base, "probs", None)
    kind = type(base).__name__
    if kind in ("Categorical", "OneHotCategorical") and probs is not None:
        return int(probs.shape[-1])
    if kind == "Bernoulli":
        return 2
    if kind in ("Binomial", "BetaBinomial"):
        return int(base.total_count.reshape(-1)[0]) + 1
    return int(fn.enumerate_support(expand=False).shape[0])


def are_inside(fn: Any) -> bool:
    """Whether the arguments of a distribution satisfy their constraints, as torch validates them.

    Example:
        >>> are_inside(dist.Normal(0.0, torch.tensor([1.0, -1.0]), validate_args=False).to_event(1))
        False
    """
    base = unwrap(fn)[0]
    held = vars(base)
    for part in held.values():  # of mixtures, of what is transformed or compounded
        if isinstance(part, torch.distributions.Distribution) and not are_inside(part):
            return False
    try:
        declared = base.arg_constraints
    except NotImplementedError:
        return True
    for name, constraint in declared.items():
        value = held.get(name)  # lazy ones are no arguments that were given
        if not isinstance(value, Tensor) or constraints.is_dependent(constraint):
            continue
        shape, strides = value.shape, value.stride()
        for d in range(len(shape) - constraint.event_dim):  # what was expanded is the same
            if strides[d] == 0 and shape[d] > 1:
                value = value.narrow(d, 0, 1)
        if not satisfies(constraint, value):
            return False
    return True


def satisfies(constraint: constraints.Constraint, value: Tensor) -> bool:
    """Whether all of a tensor satisfies a constraint that depends on nothing else.

    Example:
        >>> satisfies(constraints.simplex, torch.tensor([0.5, 0.4]))
        False
        >>> satisfies(constraints.positive_definite, torch.eye(2).expand(3, 2, 2))
        True
    """
    value = value.detach()
    surely = _SURELY.get(type(constraint))
    if surely is not None and value.numel() and surely(value):
        return True
    if is_real(constraint) and (is_finite(value) or not bool(torch.isnan(value).any())):
        return True  # of finite numbers and of infinite ones, but not of NaN
    return bool(constraint.check(value).all())


def _are_rows_of_simplex(value: Tensor) -> bool:
    if value.numel() <= _FEW:
        rows = value.reshape(-1, value.shape[-1]).tolist()
        return all(abs(sum(row) - 1) < 1e-6 and min(row) >= 0 for row in rows)
    off = float((value.sum(-1) - 1).abs_().amax())
    return off < 1e-6 and float(value.amin()) >= 0


def _are_positive_definite(value: Tensor) -> bool:
    size = value.shape[-1]
    if size != value.shape[-2]:
        return False
    if value.numel() <= _FEW and all(
        map(_has_clear_pivots, value.reshape(-1, size, size).tolist())
    ):
        return True
    if not torch.equal(value, value.mT):
        return False
    info = torch.linalg.cholesky_ex(value).info
    return not (any(info.reshape(-1).tolist()) if info.numel() <= _FEW else bool(info.any()))


def _has_clear_pivots(matrix: Sequence[Sequence[float]]) -> bool:
    """Whether a symmetric matrix has a Cholesky factor that no rounding puts in question."""
    factor: list[list[float]] = []
    for i, row in enumerate(matrix):
        own: list[float] = []
        for j, before in enumerate(factor):
            if row[j] != matrix[j][i]:
                return False
            rest = row[j] - sum(map(mul, own, before))
            own.append(rest / before[j])
        pivot = row[i] - sum(map(mul, own, own))
        if not _CLEAR * abs(row[i]) < pivot < math.inf:
            return False
        factor.append([*own, math.sqrt(pivot)])
    return True


_CLEAR = 1e-4  # of what a pivot is made of

_FEW = 64  # numbers that are looked at one by one


# What shows in a few operations that nothing is amiss; otherwise torch's own check judges.
_SURELY: Mapping[type, Callable[[Tensor], bool]] = {
    type(constraints.simplex): _are_rows_of_simplex,
    type(constraints.positive_definite): _are_positive_definite,
}


def are_finite(values: Iterable[Tensor]) -> bool:
    """Whether all of some tensors of real numbers are finite (`is_finite`)."""
    return all(map(is_finite, values))


def is_finite(value: Tensor) -> bool:
    """Whether all of a tensor of real numbers is finite; of a large one the sum says so at once.

    Example:
        >>> is_finite(torch.ones(3)), is_finite(torch.tensor([1.0, float("inf"), -float("inf")]))
        (True, False)
        >>> is_finite(torch.full((3,), 3e38))
        True
    """
    value = value.detach()
    if value.numel() <= _FEW:
        return all(map(math.isfinite, value.reshape(-1).tolist()))
    return math.isfinite(float(value.sum())) or bool(torch.isfinite(value).all())
