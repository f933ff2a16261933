"""Checks of what users pass to `ExactPosteriorEM` and its methods (`fit`: see `fit_wishes`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from pyro_em.arguments import by_name, number, shown, whole
from pyro_em.errors import UsageError, message
from pyro_em.globs import listed, meant
from pyro_em.plan.fit_wishes import FIT_KEYWORDS
from pyro_em.plan.words_of_peers import likely
from pyro_em.posteriors.strategies import EStepStrategy
from pyro_em.tracing.sites import signature_of, users
from pyro_em.updates.update import Update


def check_constructor(
    model: Any,
    guide: Any,
    optim: Any,
    strategy: Any,
    updates: Mapping[str, Any],
    num_particles: int,
    max_plate_nesting: Any = None,
    max_enumeration: Any = 1,
    missing: Any = None,
) -> None:
    """Refuse what cannot be a model, a guide, an optimiser, a strategy or an update."""
    if not callable(model):
        raise UsageError(
            message(
                "ExactPosteriorEM",
                f"model is {type(model).__name__}, not a callable.",
                fixes=["pass the function itself, not the result of calling it"],
            )
        )
    if guide is not None and not callable(guide) and not (guide == "map"):
        raise UsageError(
            message(
                "ExactPosteriorEM",
                f"guide={guide!r} is no guide.",
                fixes=["pass a callable, an autoguide class, a factory, or 'map'"],
            )
        )
    if optim is not None and not callable(optim):
        raise UsageError(
            message(
                "ExactPosteriorEM",
                f"optim={shown(optim)} is no optimiser.",
                "it is made anew for the parameters of each fit"
                if isinstance(optim, torch.optim.Optimizer)
                else "",
                fixes=[
                    "pass lambda params: torch.optim.Adam(params, lr=0.01)",
                    "pass pyro.optim.Adam({'lr': 0.01})",
                ],
            )
        )
    several = isinstance(strategy, Mapping)
    if several:
        by_name("strategy", strategy, "dict from latents to strategies", ["pass {'z': 'exact'}"])
    for one in strategy.values() if several else (strategy,):
        known = isinstance(one, EStepStrategy) or (
            isinstance(one, str) and one in ("exact", "guide")
        )
        if not known:
            raise UsageError(
                message(
                    "ExactPosteriorEM",
                    f"strategy={shown(one)} is not available.",
                    "a strategy says how the E-step treats latents",
                    ["use 'exact', 'guide', Hard(), MonteCarlo(n), Annealed(schedule), or a dict"],
                )
            )
    if guide is None and (strategy == "guide" or (several and "guide" in strategy.values())):
        raise UsageError(
            message(
                "ExactPosteriorEM",
                "strategy='guide' was asked for, but there is no guide.",
                fixes=["pass guide=", "let a network be it: guide=AutoAmortizedCategorical"],
            )
        )
    if missing is not None and not (isinstance(missing, str) and missing == "nan"):
        raise UsageError(
            message(
                "ExactPosteriorEM",
                f"missing={shown(missing)} is no mark of missing data.",
                "observed values that are missing are NaN",
                ["pass missing='nan', and NaN in floating tensors", "leave it out: NaN is refused"],
            )
        )
    check_draws(num_particles, "ExactPosteriorEM")
    check_limits("ExactPosteriorEM", max_plate_nesting, max_enumeration)
    for name, update in updates.items():
        if not isinstance(update, Update):
            raise UsageError(
                message(
                    f"updates['{name}']",
                    f"{shown(update)} is no update.",
                    "an unknown word would leave the parameter alone in silence",
                    [
                        "use an instance: Fixed(), ClosedForm(), LeastSquares(), Newton() or Gradient()"
                    ],
                )
            )


def updates_by_name(updates: Any) -> dict[str, Any]:
    """What a user asks for as updates, as a dict of its own.

    Raises:
        UsageError: If it is no mapping from names.
    """
    return by_name(
        "updates",
        {} if updates is None else updates,
        "dict from parameters to updates",
        ["pass {'mu': Fixed()}, with a parameter's name or a glob"],
    )


def check_limits(where: str, max_plate_nesting: Any, max_enumeration: Any) -> None:
    """Refuse what is no number of dimensions or cells."""
    if max_plate_nesting is not None:
        whole(where, "max_plate_nesting", max_plate_nesting, None)
    if not number(where, "max_enumeration", max_enumeration) >= 0:
        raise UsageError(
            message(
                where,
                f"max_enumeration={max_enumeration} is no number of cells.",
                "it bounds the largest tensor of an enumeration",
                ["leave it out", "pass max_enumeration=2**27"],
            )
        )


def check_draws(num_particles: Any, where: str) -> None:
    """Refuse what is no number of draws."""
    is_whole = isinstance(num_particles, int) and not isinstance(num_particles, bool)
    if not is_whole or num_particles < 1:
        raise UsageError(
            message(
                where,
                f"num_particles={num_particles!r} is no number of draws.",
                fixes=["pass a whole number from 1"],
            )
        )


def check_collisions(
    model: Callable[..., Any],
    args: tuple,
    keywords: Iterable[str],
    method: str,
    passed: Collection[str] | None = None,
) -> None:
    """Refuse a model whose argument could not be told from a keyword of a method.

    Args:
        model: The user's model.
        args: The positional arguments of the call.
        keywords: The method's keywords.
        method: Its name.
        passed: Keywords that the call gave; an argument with the default None that none of them is
            cannot be mistaken (Pyro's examples have ``batch_size=None``). All, where None.
    """
    left = signature_of(model)[len(args) :]
    given = tuple(keywords)
    clash = [
        p
        for p in left
        if p.name in given and (passed is None or p.name in passed or p.default is not None)
    ]
    if clash:
        by_position = clash[0].kind is not inspect.Parameter.KEYWORD_ONLY
        raise UsageError(
            message(
                method,
                f"the model's argument '{clash[0].name}' is also a keyword of {method}.",
                "it could not be passed to the model by name",
                (["pass it by position"] if by_position else []) + ["rename it in the model"],
            )
        )


def check_loader(
    model: Callable[..., Any], items: int, rest: Collection[Any], kwargs: Mapping[str, Any]
) -> None:
    """Refuse a loader whose batches are not the arguments that the model takes.

    Args:
        model: The user's model.
        items: How many arguments a batch of the loader is.
        rest: Arguments after the loader.
        kwargs: The model's keyword arguments.
    """
    parameters = signature_of(model)
    if not parameters or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    takes = [p for p in parameters if p.kind not in named]
    given = items + len(rest)
    missing = [p.name for p in takes[given:] if p.default is p.empty and p.name not in kwargs]
    if given <= len(takes) and not missing:
        return
    names = ", ".join(f"'{p.name}'" for p in takes) or "nothing"
    many = given > len(takes)
    raise UsageError(
        message(
            "DataLoader",
            f"each of its batches has {items} item{'s' * (items > 1)}"
            + (f", and {len(rest)} more were passed" if rest else "")
            + f"; the model takes {names}.",
            "the items of a batch are the model's positional arguments, in their order",
            [
                "let the dataset hold what the model takes: DataLoader(TensorDataset("
                + ", ".join(p.name for p in takes)
                + "))",
                "let the model take the others too: def model("
                + ", ".join([*(p.name for p in takes), "labels=None"])
                + ")"
                if many
                else f"pass what is missing by keyword: fit(loader, {missing[0]}=...)",
            ],
        )
    )


def check_call(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], where: str
) -> None:
    """Refuse arguments with which the model cannot be called."""
    model = users(model)
    target = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(signature.parameters) or "nothing"
        raise UsageError(
            message(
                where,
                f"the model cannot be called with these arguments: {error}.",
                "arguments that are no keyword of the method go to the model",
                [f"the model takes: {names}"],
            )
        ) from error


def check_model_keywords(model: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a keyword that neither the method nor the model knows."""
    if not kwargs:
        return
    parameters = signature_of(model)
    if not parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters]
    for name in kwargs:
        if name in known:
            continue
        near = likely(name, known)
        if name in FIT_KEYWORDS:
            what = "it is a keyword of fit, which this method does not have."
        elif near is not None:
            what = f"neither the method nor the model has it; did you mean '{near}'?"
        else:
            what = "neither the method nor the model has such an argument."
        raise UsageError(
            message(
                f"keyword '{name}'",
                what,
                "keywords that are not the method's own go to the model",
                ["the model takes: " + ", ".join(known)],
            )
        )


def matched(requested: Mapping[str, Update], parameters: Mapping[str, Any]) -> dict[str, Update]:
    """The user's updates per parameter; exact names win over globs.

    Raises:
        UsageError: If a name matches no parameter.
    """
    out: dict[str, Update] = {}
    for pattern in sorted(requested, key=lambda p: p in parameters):
        hits = meant(pattern, parameters)
        if not hits:
            raise UsageError(
                message(
                    f"updates['{pattern}']",
                    f"no parameter matches; the model has: {listed(parameters)}.",
                    "a misspelt name would be ignored in silence",
                    ["use a parameter's name or a glob such as 'decoder*'"],
                )
            )
        out.update(dict.fromkeys(hits, requested[pattern]))
    return out
