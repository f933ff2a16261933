"""The plain run of a model, and what made it fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import unwrap
from pyro_em.errors import DataError, Finding, raise_findings
from pyro_em.graph.failing.blame import given_tensors
from pyro_em.graph.failing.failures import is_about_numbers, on_failure
from pyro_em.graph.findings.initial import (
    forget_bad_starts,
    start_problem,
    start_problems,
    tell_of_starts,
)
from pyro_em.graph.findings.missing_inputs import inputs_that_failed
from pyro_em.graph.findings.value_checks import given_problems, parameter_problems
from pyro_em.tracing.missing import has_missing
from pyro_em.tracing.runs import Model, Run, RunFailed, plain_run
from pyro_em.tracing.sites import is_factor, is_latent


def name_of_distribution(site: Mapping[str, Any]) -> str:
    """The name of a site's distribution, without what wraps it."""
    base = unwrap(site["fn"])[0]
    # Of a vector with missing coordinates that of the whole one, which the user wrote.
    return type(base).__name__.removeprefix("Incomplete")


def run_plainly(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    first_look: bool,
    sparing: bool = False,
    tables: bool = True,
) -> Run:
    """Run a model once as it is.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        first_look: Whether the run may advance the random state.
        sparing: Whether large latents may be without numbers.
        tables: Whether tables that the model makes of many rows may then be so, too.

    Raises:
        PyroEMError: If it fails, with the likelier causes first.
    """
    try:
        how = {"keep_random_state": not first_look, "sparing": sparing, "tables": tables}
        run = plain_run(model, args, kwargs, **how)
        tell_of_starts(run.parameters)
        return run
    except RunFailed as failure:
        problems = [
            Finding(
                f"plate '{name}'",
                "it is empty (size 0).",
                "there is nothing to fit",
                ("check the data that set the plate's size",),
                DataError,
            )
            for name in failure.empty_plates
        ]
        problems = problems or _why_it_failed(model, args, kwargs, failure)
        try:
            raise_findings(problems)
        except Exception as error:
            raise error from failure.error


def _why_it_failed(
    model: Model, args: tuple, kwargs: dict[str, Any], failure: RunFailed
) -> list[Finding]:
    """What made a model raise: the likelier cause first."""
    error, run = failure.error, failure.run
    given = given_tensors(model, args, kwargs)
    # A stale or non-finite parameter is the likelier cause of a failure that follows it.
    starts = start_problems(run.parameters)
    problems = parameter_problems(run, starts)
    forget_bad_starts(run.parameters, starts)
    start = None if run.unfinished is None else start_problem(run.unfinished)
    if start is not None:
        problems.append(start)
    if not problems and has_missing(model):
        inputs = inputs_that_failed(model, args, kwargs)
        if inputs:
            return inputs
    if not problems:
        latents = {n: name_of_distribution(s) for n, s in run.sites.items() if is_latent(s)}
        values = {**given, **_values_by_site(run)}
        problems = [on_failure(error, latents, enumerated=False, values=values)]
    if start is None and not is_about_numbers(error) and not has_bad_parameters(run):
        return problems
    return [*given_problems(given, NO_NUMBERS), *problems]


NO_NUMBERS = (
    "a mean, a covariance, an initial value or an argument that is computed from it is no number "
    "either"
)


def has_bad_parameters(run: Run) -> bool:
    """Whether a parameter's value is not finite."""
    real = (p for p in run.parameters.values() if not p.unconstrained.is_meta)
    return any(not bool(torch.isfinite(p.value()).all()) for p in real)


def _values_by_site(run: Run) -> dict[str, Tensor]:
    """The values of a run's sites, under their names in words."""
    return {
        f"site '{n}'": s["value"]
        for n, s in run.sites.items()
        if is_factor(s) and isinstance(s["value"], Tensor)
    }
