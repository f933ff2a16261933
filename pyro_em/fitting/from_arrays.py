"""The public methods that take data: arrays and tables become tensors on the way in."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from pyro_em.errors import DataError, Finding, PyroEMError, as_error
from pyro_em.fitting.results.result import EMResult
from pyro_em.plan.plan import Plan
from pyro_em.sources.given import Given, arguments_read, hold_arrays, reads_as_it_is
from pyro_em.tracing.sites import signature_of

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("pyro_em")

_OF_NUMBERS = ("validation", "init", "q", "params")  # keywords of methods that may hold arrays
_ORDERED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def from_arrays(method: Callable[P, T]) -> Callable[P, T]:
    """A method of `pyro_em.ExactPosteriorEM` whose model gets tensors, whatever its caller passes.

    An argument that the model annotates with ``numpy.ndarray``, ``pandas.DataFrame`` or
    ``pandas.Series`` stays as it is. So do all where the model fails with tensors, and does not with
    what its caller passes: it makes tensors by itself.
    """
    parameters = list(inspect.signature(method).parameters.values())
    lead = sum(p.kind in _ORDERED for p in parameters)
    own = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @functools.wraps(method)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        if not hold_arrays((*args[lead:], *kwargs.values())):
            return method(*args, **kwargs)
        em: Any = args[0]
        given = Given(em._session.tensors_given)
        theirs = {n: v for n, v in kwargs.items() if n not in own}
        rest, read = read_for(given, em.model, args[lead:], theirs)
        for name in own.intersection(kwargs, _OF_NUMBERS):
            read[name] = given.read(kwargs[name], name)
        for note in given.notes:
            logger.info("%s: %s", method.__name__, note)
        try:
            out: Any = method(*args[:lead], *rest, **{**kwargs, **read})  # type: ignore[arg-type]
        except PyroEMError as error:
            if not _is_by_the_model(error):
                raise
            return _as_they_are(method, args, kwargs, _with_hint(error, given))
        return _noted(out, given)

    return inside


def read_for(
    given: Given, model: Any, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a model with tensors, but for those that it takes as they are.

    Args:
        given: Reads them.
        model: The user's.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    form = signature_of(model)
    names = [p.name for p in form if p.kind in _ORDERED]
    stay = {p.name: reads_as_it_is(p.annotation) for p in form}
    return arguments_read(given, names, stay, args, kwargs)


def _noted(out: Any, given: Given) -> Any:
    """A plan with what was read as what, a result with the names of columns as well."""
    if isinstance(out, Plan):
        return replace(out, notes=(*out.notes, *given.notes))
    if isinstance(out, EMResult):
        return replace(out, plan=_noted(out.plan, given), columns=dict(given.columns))
    return out


def _is_by_the_model(error: PyroEMError) -> bool:
    """Whether the model itself raised, as one does that expects arrays."""
    kinds = (AttributeError, TypeError, IndexError, KeyError, ValueError)
    return bool(error.problems) and isinstance(error.__cause__, kinds)


def _as_they_are(method: Callable[P, T], args: Any, kwargs: Any, error: PyroEMError) -> T:
    """What a method returns for arguments as its caller passes them; else an error with tensors."""
    try:
        return method(*args, **kwargs)
    except PyroEMError as other:
        if isinstance(other, DataError) or _is_by_the_model(other):
            raise error from error.__cause__  # it fails on arrays too
        raise


def _with_hint(error: PyroEMError, given: Given) -> PyroEMError:
    """The error of a model that expects arrays, with what it was handed."""
    fixes = tuple(
        f"{note}; annotate the argument (x: numpy.ndarray, x: pandas.DataFrame) for a model that "
        "reads it by itself"
        for note in given.notes
    )
    hinted = as_error([_also(problem, fixes) for problem in error.problems])
    hinted.__cause__ = error.__cause__
    return hinted


def _also(problem: Finding, fixes: tuple[str, ...]) -> Finding:
    return replace(problem, fixes=(*problem.fixes, *fixes))
