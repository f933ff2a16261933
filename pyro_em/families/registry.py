"""Distribution families with closed-form updates, looked up by exact type.

A density is inherited by subclasses, a maximum-likelihood rule is not.
To add a family, copy a neighbour in one of the files beside this one, add it to that file's
``FAMILIES`` and let `pyro_em.testing.check_family` judge it; or call `register_family`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch

from pyro_em.distributions import unwrap, unwrap_all
from pyro_em.errors import UsageError, message
from pyro_em.families import (
    cauchy,
    clamped,
    compound,
    discrete,
    exponential,
    missing,
    normal,
    one_sided,
    overdispersed,
    rates,
    student,
    student_vectors,
    uniform,
    weibull,
    wishart,
    zero_inflated,
)
from pyro_em.families.family import BUILT_IN, Family, Rule

REGISTRY: dict[type, Family] = {
    family.distribution: family
    for module in (
        discrete,
        rates,
        exponential,
        overdispersed,
        compound,
        student,
        student_vectors,
        cauchy,
        one_sided,
        normal,
        missing,
        clamped,
        uniform,
        weibull,
        wishart,
        zero_inflated,
    )
    for family in module.FAMILIES
}


BUILT_IN.update(REGISTRY)


def register_family(family: Family, *, replace: bool = False) -> Family:
    """Add a closed-form family; from now on models that use its distribution take it.

    Args:
        family: The record.
        replace: Whether an existing record of the same distribution may be replaced.

    Returns:
        The same record, so that the call can end a definition.

    Raises:
        UsageError: If the distribution has a record already, or the record is malformed.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_em import Family, Kind, Rule, register_family
        >>> half_normal = Family(
        ...     dist.HalfNormal,
        ...     statistics=lambda x, a: {"square": x * x},
        ...     rules={"scale": Rule(Kind.SCALE, lambda s, a: (s["square"], s["weight"]))},
        ... )
        >>> register_family(half_normal, replace=True).name
        'HalfNormal'
    """
    if not isinstance(family, Family):
        raise UsageError(
            message(
                "register_family",
                f"a Family record was expected, not {type(family).__name__}.",
                fixes=["build one with pyro_em.Family(distribution, statistics, rules)"],
            )
        )
    sound = isinstance(family.distribution, type) and callable(family.statistics)
    known = getattr(family.distribution, "arg_constraints", {}) if sound else {}
    wrong = [n for n, r in family.rules.items() if n not in known or not isinstance(r, Rule)]
    if not sound or wrong:
        raise UsageError(
            message(
                "register_family",
                f"the record is malformed: {', '.join(wrong) or 'distribution or statistics'}.",
                "distribution is a class, statistics a function, rules map its arguments to Rules",
                [f"its arguments are: {', '.join(known)}"] if known else [],
            )
        )
    known_record = REGISTRY.get(family.distribution)
    if known_record is not None and known_record.rules and not replace:
        raise UsageError(
            message(
                "register_family",
                f"{family.name} has a record already.",
                "a second record would silently change the updates of existing models",
                ["pass replace=True if that is what you want"],
            )
        )
    REGISTRY[family.distribution] = family
    return family


def family_of(fn: Any) -> Family | None:
    """The record for a distribution, by the exact type inside Independent, Expanded and Masked."""
    base, _, _ = unwrap(fn)
    return REGISTRY.get(type(base))


def given_arguments(fn: Any, family: Family) -> dict[str, torch.Tensor]:
    """The arguments that the user gave to an unwrapped distribution, not those derived from them.

    ``Bernoulli(probs=p)`` may hold lazily derived logits as well; only ``probs`` is returned.
    """
    natural = () if family.natural is None else family.natural.arguments
    names = [*family.rules, *natural, *family.plain, *family.constants]
    if hasattr(fn, "_categorical"):  # OneHotCategorical and Multinomial wrap a Categorical
        inner = given_arguments(fn._categorical, REGISTRY[dist.Categorical])
        extra = {n: torch.as_tensor(getattr(fn, n)) for n in family.constants}
        return {**inner, **extra}
    if isinstance(fn, dist.ZeroInflatedDistribution):
        gate = "gate" if "gate" in vars(fn) else "gate_logits"
        inner = given_arguments(fn.base_dist, REGISTRY[type(fn.base_dist)])
        return {**inner, gate: getattr(fn, gate)}
    if isinstance(fn, dist.MultivariateStudentT):  # as a lazy property the matrix would be held
        tril = fn._unbroadcasted_scale_tril
        tril = tril.expand(*fn.batch_shape, *tril.shape[-2:])
        return {"df": fn.df, "loc": fn.loc, "scale_tril": tril}
    if isinstance(fn, torch.distributions.LogNormal):
        return {"loc": fn.base_dist.loc, "scale": fn.base_dist.scale}
    if isinstance(fn, torch.distributions.Chi2):  # its own ``df`` would be made for every row
        each = tuple(slice(0, 1) if s == 0 else slice(None) for s in fn.concentration.stride())
        return {"df": (2 * fn.concentration[each]).expand(fn.concentration.shape)}
    attributes = vars(fn)
    if "_param" in attributes:
        chosen = "probs" if attributes["_param"] is attributes.get("probs") else "logits"
        names = [n for n in names if n not in ("probs", "logits")] + [chosen]
    # An alternative that was not given is a lazy property of the class: never touch it.
    lazy = torch.distributions.utils.lazy_property
    arguments = {
        n: attributes[n] if n in attributes else getattr(fn, n)
        for n in names
        if n in attributes or not isinstance(_of_class(fn, n), lazy)
    }
    if "probs" in arguments and "logits" in arguments:
        del arguments["logits"]
    return {
        n: v if isinstance(v, torch.Tensor) else torch.as_tensor(v) for n, v in arguments.items()
    }


def given_arguments_of_all(fns: Iterable[Any], family: Family) -> list[dict[str, torch.Tensor]]:
    """The given arguments of several unwrapped distributions of one family (`given_arguments`)."""
    return [given_arguments(fn, family) for fn in fns]


class Given(NamedTuple):
    """What a distribution was given, apart from its wrappers.

    Attributes:
        base: It without its wrappers; see `pyro_em.distributions.unwrap`.
        reinterpreted: How many batch dimensions of that are event dimensions.
        masks: Of the wrappers.
        family: Its family, or None.
        arguments: Those that the user gave, of a family; see `given_arguments`.
    """

    base: Any
    reinterpreted: int
    masks: list[tuple[Any, int]]
    family: Family | None
    arguments: dict[str, torch.Tensor]


def given_by_all(fns: Iterable[Any]) -> list[Given]:
    """What several distributions were given."""
    found = []
    for base, reinterpreted, masks in unwrap_all(fns):
        family = REGISTRY.get(type(base))
        arguments = {} if family is None else given_arguments(base, family)
        found.append(Given(base, reinterpreted, masks, family, arguments))
    return found


def spread_arguments(fn: Any) -> dict[str, torch.Tensor]:
    """The arguments, as given, that set how concentrated an unwrapped distribution is.

    All but locations, and but the degrees of freedom of Student's distributions: these leave a
    density bounded.
    """
    bounded = {"loc", "mean"} | ({"df"} if "StudentT" in type(fn).__name__ else set())
    attributes = vars(fn)
    lazy = torch.distributions.utils.lazy_property
    spread = {}
    for name in getattr(fn, "arg_constraints", {}):
        if name in bounded or (name not in attributes and isinstance(_of_class(fn, name), lazy)):
            continue
        value = attributes[name] if name in attributes else getattr(fn, name, None)
        if isinstance(value, torch.Tensor):
            spread[name] = value
    return spread


def stated_arguments(fn: Any) -> dict[str, tuple[torch.Tensor, int]] | None:
    """All that an unwrapped distribution is made of, with how many dimensions of each are its event's.

    They say whether two of one kind are the same more surely than their densities, which cancel where
    a spread is next to nothing.

    Args:
        fn: A distribution that is no family.

    Returns:
        None of a distribution that is not torch's or Pyro's, or keeps something else.

    Example:
        >>> eye = torch.eye(2)
        >>> found = stated_arguments(dist.LowRankMultivariateNormal(eye[0], eye, eye[0] + 1))
        >>> {name: event_dim for name, (_, event_dim) in found.items()}
        {'loc': 1, 'cov_factor': 2, 'cov_diag': 1}
    """
    kind = type(fn)
    if not kind.__module__.startswith(("torch.distributions.", "pyro.distributions.")):
        return None
    names = _stated(kind)  # type: ignore[arg-type]
    held = {n: vars(fn).get(n) for n in names}
    tensors = {n: t for n, t in held.items() if isinstance(t, torch.Tensor)}
    if not names or len(tensors) < len(names):
        return None
    return {n: (t, fn.arg_constraints[n].event_dim) for n, t in tensors.items()}


@cache
def _stated(kind: type) -> tuple[str, ...]:
    """The arguments with which a kind of distribution is made, where all of them are tensors."""
    made_with = signature(kind.__init__).parameters  # type: ignore[misc]
    names = [n for n in made_with if n not in ("self", "validate_args")]
    known = getattr(kind, "arg_constraints", None)
    return tuple(names) if isinstance(known, dict) and set(names) <= set(known) else ()


def _of_class(fn: Any, name: str) -> Any:
    """An attribute of a distribution's class, without triggering properties; None if it has none."""
    return next((vars(cls)[name] for cls in type(fn).__mro__ if name in vars(cls)), None)
