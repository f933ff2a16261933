"""Contenders: the methods of inference that can be compared, and the four that usually are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyro
from pyro.infer import SVI

from pyro_em.em import ExactPosteriorEM
from pyro_em.errors import UsageError, message
from pyro_em.loss import TraceExact_ELBO
from pyro_em.updates.update import Fixed
from pyro_em.variational.amortized import AutoAmortizedCategorical


@dataclass(frozen=True)
class Direct:
    """Direct maximisation of the exact evidence over unconstrained parameters by L-BFGS.

    A step is one evaluation of the evidence and its gradient, which costs about what an E-step
    costs; evaluations of the line search count. What is shown is the best value so far.

    Attributes:
        model: The model; that of the first other contender where None.
        history_size: Pairs that L-BFGS keeps.
        max_plate_nesting: Number of plate dimensions; found by looking where left out.
        max_enumeration: Cells of the largest tensor that an enumeration may need.

    Example:
        >>> Direct().history_size
        20
    """

    model: Callable[..., Any] | None = None
    history_size: int = 20
    max_plate_nesting: int | None = None
    max_enumeration: int = 2**27


Contender: TypeAlias = ExactPosteriorEM | SVI | Direct


def standard_contenders(
    em: ExactPosteriorEM, guide: Callable[..., Any] | None = None
) -> dict[str, Contender]:
    """The four contenders to which a single `ExactPosteriorEM` is compared by default.

    Args:
        em: The model with its settings, which stays the first of them.
        guide: The guide of "SVI, guide"; that of ``em``, else an `AutoAmortizedCategorical`.

    Returns:
        "exact EM", "SVI, exact marginal" (Adam on `TraceExact_ELBO`), "SVI, guide" (Adam on the
        guide's bound, discrete guides summed where they are small) and "L-BFGS" (`Direct`).

    Raises:
        UsageError: If ``em`` holds a parameter fixed, which the other methods would move.

    Example:
        >>> list(standard_contenders(ExactPosteriorEM(lambda x: None)))
        ['exact EM', 'SVI, exact marginal', 'SVI, guide', 'L-BFGS']
    """
    request = em._session.request
    fixed = [name for name, update in request.updates.items() if isinstance(update, Fixed)]
    if fixed:
        raise UsageError(
            message(
                "standard_contenders",
                "updates holds " + ", ".join(f"'{n}'" for n in fixed) + " fixed.",
                "the other contenders would move it, and would maximise something else",
                ["make it a constant of the model", "pass a mapping of contenders to compare"],
            )
        )
    budgets = budgets_of(em)
    model = request.model  # what it makes of missing data included
    users_guide = request.guide if callable(request.guide) else None
    chosen = guide or users_guide or AutoAmortizedCategorical(model)
    empty = (
        users_guide if users_guide is not None and not isinstance(users_guide, type) else no_guide
    )
    adam = pyro.optim.Adam({"lr": 0.01})
    return {
        "exact EM": em,
        "SVI, exact marginal": SVI(model, empty, adam, TraceExact_ELBO(**budgets)),
        "SVI, guide": ExactPosteriorEM(
            model,
            chosen,
            pyro.optim.Adam({"lr": 0.01}),
            strategy="guide",
            num_particles=em.num_particles,
            **budgets,
        ),
        "L-BFGS": Direct(model, **budgets),
    }


def check_contenders(contenders: Any) -> None:
    """Refuse what cannot be compared.

    Raises:
        UsageError: If it is no mapping, is empty, or holds something that is no contender, or if no
            contender has a model.
    """
    if not isinstance(contenders, Mapping) or not contenders:
        what = "it is empty" if isinstance(contenders, Mapping) else type(contenders).__name__
        raise UsageError(
            message(
                "compare",
                f"contenders: {what}.",
                "methods are compared by their labels",
                ["pass {'exact EM': em, 'SVI': svi, 'L-BFGS': Direct()}", "pass one em"],
            )
        )
    for label, one in contenders.items():
        if not isinstance(label, str):
            raise UsageError(
                message(
                    "compare",
                    f"the label {label!r} is no string.",
                    "labels name the rows of the table",
                    [f"use '{label}'"],
                )
            )
        if not isinstance(one, Contender):
            shown = f"the class {one.__name__}" if isinstance(one, type) else type(one).__name__
            raise UsageError(
                message(
                    f"contender '{label}'",
                    f"{shown} is no method of inference that can be compared.",
                    "it has to start anew in a parameter scope of its own",
                    ["use an ExactPosteriorEM, a pyro.infer.SVI or Direct()"],
                )
            )
    if all(one.model is None for one in contenders.values()):
        raise UsageError(
            message(
                "compare",
                "no contender has a model.",
                "Direct() takes that of another contender",
                ["Direct(model)"],
            )
        )


def models_of(contenders: Mapping[str, Contender]) -> dict[str, Callable[..., Any]]:
    """The model of every contender; ``Direct()`` has that of the first that has one."""
    models = {
        label: one._session.request.model if isinstance(one, ExactPosteriorEM) else one.model
        for label, one in contenders.items()
    }
    first = next(model for model in models.values() if model is not None)
    return {label: first if model is None else model for label, model in models.items()}


def budgets_of(one: ExactPosteriorEM | Direct) -> dict[str, Any]:
    """Plate dimensions and the size of enumerations as the user gave them."""
    source = one._session.request if isinstance(one, ExactPosteriorEM) else one
    return {
        "max_plate_nesting": source.max_plate_nesting,
        "max_enumeration": source.max_enumeration,
    }


def no_guide(*args: Any, **kwargs: Any) -> None:
    """A guide without latents and parameters."""
