"""Looking at a model whose loops may run over index tensors, and at the loop where they may not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
from torch import Tensor

from pyro_em.distributions import has_finite_support
from pyro_em.errors import Finding, PyroEMError, message
from pyro_em.graph.coupling import Sites
from pyro_em.graph.findings.examination import examine
from pyro_em.graph.gaussian_lines.lines import is_gaussian
from pyro_em.graph.structure import Structure
from pyro_em.graph.vectorised_loops.series import require_loops, with_template
from pyro_em.graph.vectorised_loops.stepwise import unrolling_of
from pyro_em.tracing.loops import ALIGNED, EVENTS, PLAIN, NotVectorized, Series, vectorizing
from pyro_em.tracing.randomness import random_state, set_random_state
from pyro_em.tracing.runs import Model, held_run
from pyro_em.tracing.stored import forget_all_but

_WAYS = (ALIGNED, EVENTS, PLAIN)


def examine_with_loops(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    refused: Mapping[str, str],
    stepwise: bool = False,
    **how: Any,
) -> tuple[Structure, list[Finding]]:
    """As `pyro_em.graph.findings.examination.examine`, with vectorised loops over index tensors.

    Where a body cannot be run so, or does something else then, its loop is read step by step, and a
    note says why. What is wrong with a model is said of the loop, by the names of its sites.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        refused: Ways of reading indices that do not serve, and why.
        stepwise: Whether loops are run over integers, as it is known that indices do not help.
        **how: As there.
    """
    if stepwise:
        return examine(model, args, kwargs, **how)
    begin, known = random_state(), frozenset(pyro.get_param_store()._params)
    reasons = list(refused.values())
    findings: list[str] = []
    for way in (w for w in _WAYS if w not in refused):
        series = Series(way, few=True)
        try:
            with vectorizing(series):
                structure, problems = examine(model, args, kwargs, **how)
            if not series.was_met:
                return structure, problems
            if series.is_cut and needs_all_steps(structure):
                set_random_state(begin)
                forget_all_but(known)  # they begin as in a run of all steps
                series = Series(way)
                with vectorizing(series):
                    structure, problems = examine(model, args, kwargs, **how)
            if not problems or _are_gaussian(structure, problems):
                return _unrolled(model, args, kwargs, structure, series), problems
            findings.append(trouble(problems[0]))
        except NotVectorized as refusal:
            reasons.append(trouble(refusal))
        except PyroEMError as error:
            if not series.was_met:
                raise
            findings.append(trouble(error))
        set_random_state(begin)
        forget_all_but(known)
        if series.is_hopeless:
            break
    structure, problems = examine(model, args, kwargs, **how)
    if problems and not reasons:  # of the model, not of index tensors
        return structure, problems
    reason = [*reasons, *findings][0]
    if not reason:
        return structure, problems
    is_the_body = len(refused) < len(_WAYS)  # else it is which latents are read where
    note = message(
        "vectorized_markov",
        "the loop is read step by step, like one of pyro.markov.",
        reason,
        ["let the body do the same with an index tensor as with an integer"] if is_the_body else (),
    )
    return replace(structure, notes=(*structure.notes, note)), problems


def _are_gaussian(structure: Structure, problems: Sequence[Finding]) -> bool:
    """Whether all that is wrong are latents without sums, which may be integrated as Gaussians."""
    sites = [structure.unobserved[n] for n in structure.latents]
    continuous = [s for s in sites if not has_finite_support(s["fn"])]
    routes = bool(problems) and all(p.latents for p in problems)
    return routes and bool(continuous) and all(is_gaussian(s["fn"]) for s in continuous)


def trouble(found: Finding | BaseException) -> str:
    """What is wrong with index tensors, in short: names are made of t where they hold an index."""
    if isinstance(found, PyroEMError) and found.problems:
        found = found.problems[0]
    said = f"{found.where}: {found.what}" if isinstance(found, Finding) else str(found)
    said = re.sub(r"<[^<>]*\+-?\d+>", "t", said.partition("\n")[0]).rstrip(".")
    return said if isinstance(found, NotVectorized) else f"with index tensors, {said}"


def needs_all_steps(structure: Structure) -> bool:
    """Whether a structure holds values or masks of steps, or what masks decide."""
    summed = all(structure.sites[n].support_size for n in structure.latents)
    return bool(structure.barren or structure.masked_pairs) or not summed


def _unrolled(
    model: Model, args: tuple, kwargs: dict[str, Any], template: Structure, series: Series
) -> Structure:
    """The structure of the loops, once it is known that index tensors stand for their steps."""

    def held(series: Series, values: Mapping[str, Tensor]) -> Sites:
        try:
            with vectorizing(series):
                return held_run(model, args, kwargs, values)
        except Exception as error:
            raise NotVectorized(f"the body fails with other indices ({error})") from error

    require_loops(template, series)
    return unrolling_of(template, series, held).unrolled(template.looked)


def examined_in_loops(
    given: Model, args: tuple, kwargs: dict[str, Any], bare: Structure, **how: Any
) -> tuple[Structure, list[Finding]]:
    """As `examine_with_loops`, of a model with some latents given, whose loops are known.

    Args:
        given: The model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        bare: The skeleton of the user's model, which draws these latents.
        **how: As `pyro_em.graph.findings.examination.examine`.
    """
    with vectorizing(Series(bare.series.way)):
        template, problems = examine(given, args, kwargs, **how)
    if problems:
        return template, problems
    return with_template(bare.series, template).unrolled(template.looked), []
